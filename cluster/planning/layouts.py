"""How a stage is laid out on GPUs: what each holds, how long a step takes, which layouts fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.base.options import with_options
from cluster.planning.devices import GPUS, Gpu
from cluster.planning.efficiency import Efficiency, Workload
from cluster.planning.request import EngineName, PlanRequest
from cluster.planning.stages import Stage
from training.config import ClipRunConfig
from training.engine.choices import MAX_BUCKET, zero_stage

MAX_LIVE = 1_000_000_000  # elements of weights that stage 3 keeps gathered
MOST_GPUS = 8192  # considered for the nearest that fits

WEIGHT, GRADIENT, MOMENTS, EMA = 4, 4, 8, 4  # bytes a parameter, fp32
SENT = 2  # bf16 on the wire: gradients, and weights that FSDP2 and stage 3 gather
UPDATE_BYTES = 40  # read and written by AdamW and the average: 5 fp32 read, 5 written
# Layers are gathered one by one: of DeepSpeed as it comes benchmarks/results.md has stage 3 at 1.79
# of a bare loop's step and stage 2 at 1.59, on one rank, where nothing is sent. An assumption: what
# is copied there takes memory's time, and not the processor's.
ZERO_3_SLOWER = 1.79 / 1.59
# Seconds of Python that DeepSpeed takes for each tensor of parameters and micro-batch, by stage:
# 64, 195 and 1,200 microseconds beside a bare loop's on one slow core (November 2026), of which a
# server's core is assumed to take a third. A GPU that is quicker waits.
HOST_SECONDS = (0.0, 64e-6 / 3, 195e-6 / 3, 1200e-6 / 3)
PCIE = 25e9  # bytes a second between a GPU and the memory of the CPU
CPU_UPDATE = 20e9  # bytes a second of memory that each GPU's share of CPU cores updates


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a stage is spread over its GPUs."""

    zero_stage: int
    micro_batch: int
    checkpointing: bool
    offload: bool = False
    engine: EngineName = "deepspeed"

    def __str__(self) -> str:
        name = "FSDP2" if self.engine == "fsdp2" else f"ZeRO {self.zero_stage}"
        text = f"{name}, micro-batch {self.micro_batch}"
        text += ", activation checkpointing" if self.checkpointing else ""
        return text + (", offload" if self.offload else "")


# -- memory ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU. state: weights, gradients, moments, averages; buffers: what ZeRO reduces
    and gathers in; activations: with autocast's copies of weights; frozen: the encoder's text
    tower."""

    state: float
    buffers: float
    activations: float
    frozen: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.state + self.buffers + self.activations + self.frozen


def memory_of(stage: Stage, workers: int, layout: Layout) -> Memory:
    """Return what each worker holds on its GPU (Rajbhandari et al. 2020; docs/planning.md).

    The EMA is sharded at every stage. Stage 1 partitions the moments, stage 2 the gradients too,
    and both keep flat copies of a rank's part of weights and gradients; stage 3 partitions the
    weights as well. So does FSDP2, whose gathered weights are bf16, as autocast's copies are.
    """
    count, zero = stage.parameters, layout.zero_stage
    if layout.engine == "fsdp2":
        state = count * (WEIGHT + GRADIENT + MOMENTS + EMA + stage.average_bytes) / workers
    elif layout.offload:
        state = count * WEIGHT / (workers if zero == 3 else 1)
    else:
        kept = (
            WEIGHT + GRADIENT + MOMENTS,
            WEIGHT + GRADIENT,
            WEIGHT,
            0,
        )[zero]
        copies = WEIGHT + GRADIENT  # flat, of a rank's part
        sharded = (EMA, EMA + MOMENTS + copies, EMA + MOMENTS + GRADIENT + copies,
                   EMA + MOMENTS + GRADIENT + WEIGHT)[zero]  # fmt: skip
        state = count * (kept + (sharded + stage.average_bytes) / workers)

    # Under autocast DeepSpeed keeps two buckets for gradients that are sent in bf16 and two for
    # those in fp32: all as fp32 in stages 1 and 2, and each in its own type in stage 3. FSDP2 has a
    # block's gradients and weights on their way.
    bucket = min(count / 16, MAX_BUCKET)
    buffers = 0 if zero == 0 else 2 * (4 + 4) * bucket
    if layout.engine == "fsdp2":
        buffers = 2 * (SENT + GRADIENT) * bucket
    elif zero == 3:
        buffers = 2 * (2 + 4) * bucket + SENT * min(count, MAX_LIVE)
    return Memory(
        state=state,
        buffers=buffers,
        activations=stage.activation_bytes(layout.micro_batch, layout.checkpointing),
        frozen=4.0 * stage.frozen["text_parameters"] if stage.frozen else 0.0,
    )


def host_bytes(stage: Stage, workers: int) -> float:
    """Return what each worker holds in the CPU's memory where the optimizer is offloaded."""
    each = WEIGHT + GRADIENT + MOMENTS + EMA + stage.average_bytes
    return stage.parameters * each / workers


# -- a step ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of a step: computing, what communication adds to it, and the optimizer's pass."""

    compute: float
    wait: float
    update: float

    @property
    def seconds(self) -> float:
        """Sum of all."""
        return self.compute + self.wait + self.update


def step_time(
    model: Workload, flops: float, share: int, gpu: Gpu, workers: int, layout: Layout,
    efficiency: Efficiency,
) -> Step:  # fmt: skip
    """Return how long a step takes on so many GPUs.

    model: whose parameters the step updates; flops: of training on one sample; share: samples of a
    worker.

    A ring moves (N - 1) / N of the bytes once to reduce and once to gather (Patarasuk & Yuan 2009).
    Reducing gradients hides behind a backward pass, two thirds of a micro-batch's time (three
    quarters where activations are computed again): the last one of a step at stage 1, each at
    stage 2 and with FSDP2. DeepSpeed's stages 1 and 2 reduce to all ranks, twice the bytes, and
    gather the new weights in fp32 after the step; FSDP2 gathers them in bf16 beside the first
    forward pass. Stage 0 reduces in fp32 after the backward pass, and stage 3 gathers the weights
    before each pass (Rajbhandari et al. 2020, section 7).
    """
    again = 4 / 3 if layout.checkpointing else 1
    again *= ZERO_3_SLOWER if layout.zero_stage == 3 else 1
    micro = layout.micro_batch * flops / (gpu.peak_tflops * 1e12 * efficiency.mfu)
    micro = again * (micro + efficiency.tensor_seconds * model.tensors)
    if layout.engine == "deepspeed" and gpu.name != "cpu":
        micro = max(micro, HOST_SECONDS[layout.zero_stage] * model.tensors)
    count = share // layout.micro_batch
    backward = micro * (3 / 4 if layout.checkpointing else 2 / 3)

    once = model.parameters * (workers - 1) / workers / gpu.wire(workers)
    forward, sent = micro - backward, SENT * once
    partitioned = layout.engine == "fsdp2" or layout.zero_stage > 0
    if layout.engine == "fsdp2":
        wait = max(0.0, sent - forward) + count * max(0.0, sent - backward)
    elif layout.zero_stage == 0:
        wait = 2 * GRADIENT * once
    elif layout.zero_stage < 3:
        times = count if layout.zero_stage == 2 else 1
        wait = times * max(0.0, 2 * sent - backward) + WEIGHT * once
    else:  # in every micro-batch and pass, since weights are dropped after their use
        wait = count * (max(0.0, sent - forward) + max(0.0, 2 * sent - backward))

    updated = model.parameters / (workers if partitioned else 1)
    update = updated * UPDATE_BYTES / gpu.bandwidth
    if layout.offload:  # gradients down, weights up, and the pass over the CPU's memory
        update = updated * (8 / PCIE + UPDATE_BYTES / CPU_UPDATE)
    return Step(compute=micro * count, wait=wait, update=update)


# -- what fits -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A layout on some GPUs: what it holds, how long a step takes, whether it fits."""

    layout: Layout
    workers: int
    memory: Memory
    step: Step
    fits: bool


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, the smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def usable_workers(stage: Stage, num_gpus: int) -> int:
    """Return the largest number of workers, at most `num_gpus`, that divides the global batch."""
    return max(n for n in divisors(stage.global_batch_size) if n <= num_gpus)


def micro_batches(stage: Stage, workers: int) -> list[int]:
    """Return the micro-batches that share a worker's samples out evenly."""
    share = stage.global_batch_size // workers
    return divisors(share) if stage.accumulates else [share]


def layouts(
    stage: Stage, workers: int, engine: EngineName = "deepspeed", *, offload: bool
) -> Iterator[Layout]:
    """Yield the layouts that the training script takes on so many workers; by DeepSpeed where FSDP2
    does not do what the stage asks for: Muon, SAM."""
    zero_stages = (2, 3) if offload else (0, 1, 2, 3)
    muon = stage.train.optimizer.kind == "muon"
    sam = isinstance(stage.config, ClipRunConfig) and stage.config.sam_rho
    if muon:
        zero_stages = () if offload else (0,)
    if sam:
        zero_stages = tuple(zero for zero in zero_stages if zero < 3)
    if muon or sam:
        engine = "deepspeed"
    if engine == "fsdp2":
        zero_stages = () if offload else (2,)
    for zero in zero_stages:
        for checkpointing in stage.checkpointing:
            for micro in micro_batches(stage, workers):
                yield Layout(
                    zero_stage=zero, micro_batch=micro, checkpointing=checkpointing,
                    offload=offload, engine=engine,
                )  # fmt: skip


def place(
    stage: Stage, gpu: Gpu, workers: int, efficiency: Efficiency, request: PlanRequest
) -> list[Placement]:
    """Return every layout on so many workers, the quickest first; with offload only where nothing
    else fits. Of equal times to a thousandth the larger micro-batch comes first, which kernels
    like, then the smaller memory."""
    share = stage.global_batch_size // workers
    flops = stage.flops(share)
    placements: list[Placement] = []
    for offload in (False, True):
        placements = []
        for layout in layouts(stage, workers, request.engine, offload=offload):
            memory = memory_of(stage, workers, layout)
            step = step_time(stage.workload, flops, share, gpu, workers, layout, efficiency)
            fits = memory.total <= gpu.memory_bytes * (1 - request.headroom)
            placements.append(
                Placement(layout=layout, workers=workers, memory=memory, step=step, fits=fits)
            )
        if any(each.fits for each in placements):
            break
    placements.sort(
        key=lambda p: (float(f"{p.step.seconds:.3g}"), -p.layout.micro_batch, p.memory.total)
    )
    return placements


def preset_layout(stage: Stage, workers: int) -> Layout:
    """Return what the preset itself asks for, on so many workers."""
    train = with_options(stage.train, num_workers=workers)
    return Layout(
        zero_stage=zero_stage(train, stage.parameters),
        micro_batch=train.batch.micro_batch_size or stage.global_batch_size // workers,
        checkpointing=stage.checkpointing[0],
        offload=train.workers.offload == "cpu",
    )


def largest_micro_batch(
    stage: Stage, gpu: Gpu, workers: int, layout: Layout, headroom: float
) -> int:
    """Return the largest micro-batch of that layout which fits; 0 where none does."""
    room = gpu.memory_bytes * (1 - headroom)
    sizes = (
        size
        for size in micro_batches(stage, workers)
        if memory_of(stage, workers, replace(layout, micro_batch=size)).total <= room
    )
    return max(sizes, default=0)


def nearest(
    stage: Stage, gpu: Gpu, workers: int, efficiency: Efficiency, request: PlanRequest
) -> list[str]:
    """Return what would make a stage fit that does not: more GPUs of the kind, or another kind."""

    def first(candidates: Iterator[tuple[int, Gpu]]) -> list[str]:
        for count, kind in candidates:
            for placement in place(stage, kind, count, efficiency, request):
                if placement.fits:
                    return [f"{count} x {kind.name} with {placement.layout}"]
        return []

    more = divisors(stage.global_batch_size)
    larger = sorted(GPUS.values(), key=lambda kind: kind.memory_gib)
    return first((n, gpu) for n in more if workers < n <= MOST_GPUS) + first(
        (workers, kind)
        for kind in larger
        if kind.memory_gib > gpu.memory_gib and kind.name != "cpu"
    )


def flags(stage: Stage, placement: Placement) -> str:
    """Return the flags by which the training script takes that placement."""
    layout = placement.layout
    text = (
        f"--train.num-workers {placement.workers} --train.micro-batch-size {layout.micro_batch} "
        + ("--train.engine fsdp2" if layout.engine == "fsdp2"
           else f"--train.zero-stage {layout.zero_stage}")
    )  # fmt: skip
    if layout.offload:
        text += " --train.offload cpu"
    if layout.checkpointing != stage.checkpointing[0]:
        group, _, name = stage.checkpointing_flag.rpartition(".")
        text += f" --{group}.{'' if layout.checkpointing else 'no-'}{name}"
    return text
