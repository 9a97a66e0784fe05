"""What a GPU's memory must hold, which layouts fit, and what comes nearest where none does."""

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.planning.devices import GPUS, Gpu
from cluster.planning.efficiency import Layout, Step, load_of, step_time
from cluster.planning.stages import Stage
from models.costs import offloaded_bytes, state_bytes
from training.engine.engines import BUCKET

MAX_LIVE = 1_000_000_000  # elements of weights that stage 3 keeps gathered
MOST_GPUS = 8192  # looked at for the nearest that fits


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
        return self.state + self.buffers + self.activations + self.frozen


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A layout on some GPUs: what it holds, how long a step takes, whether it fits."""

    layout: Layout
    workers: int
    memory: Memory
    step: Step
    fits: bool


def memory_of(stage: Stage, workers: int, layout: Layout) -> Memory:
    """Return what each of so many workers holds on its GPU, the EMA sharded as our engine does."""
    count, zero = stage.parameters, layout.zero_stage
    power = 4 * count * len(stage.config.train.averages.power_ema) / workers
    state = state_bytes(stage.model, zero, workers, offload=layout.offload)
    return Memory(
        state=state + (0 if layout.offload else power),
        buffers=_buffers(count, workers, layout),
        activations=stage.activations[layout.checkpointing].of(layout.micro_batch),
        frozen=4.0 * stage.frozen.text_parameters if stage.frozen else 0.0,
    )


def _buffers(count: int, workers: int, layout: Layout) -> float:
    """Return the bytes in which ZeRO reduces and gathers so many parameters.

    Under autocast DeepSpeed keeps a bucket for gradients that are sent in bf16 and one for those
    in fp32: both as fp32 in stages 1 and 2, which need none where one worker has nobody to reduce
    with (training/engine/zero_partitions.py), and each as it is in stage 3.
    """
    bucket = min(count, BUCKET)
    if layout.zero_stage == 3:
        return (2 + 4) * bucket + 4 * min(count, MAX_LIVE)
    alone = workers == 1 and not layout.offload
    return 0 if layout.zero_stage == 0 or alone else (4 + 4) * bucket


def host_bytes(stage: Stage, workers: int) -> float:
    """Return what each worker holds in the CPU's memory where the optimizer is offloaded."""
    power = 4 * stage.parameters * len(stage.config.train.averages.power_ema) / workers
    return offloaded_bytes(stage.model, workers) + power


def usable_workers(stage: Stage, num_gpus: int) -> int:
    """Return the largest number of workers, at most `num_gpus`, that share the global batch out
    evenly."""
    batch = stage.config.train.batch.global_batch_size
    return max(n for n in range(1, min(num_gpus, batch) + 1) if batch % n == 0)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def layouts(stage: Stage, workers: int, *, offload: bool) -> Iterator[Layout]:
    """Yield the layouts that the training script takes on so many workers."""
    share = stage.config.train.batch.global_batch_size // workers
    sizes = divisors(share) if stage.accumulates else [share]
    stages = (2, 3) if offload else (0, 1, 2, 3)
    if stage.config.train.optimizer.kind == "muon":
        stages = () if offload else (0,)
    if stage.kind == "clip" and getattr(stage.config, "sam_rho", 0):
        stages = tuple(zero for zero in stages if zero < 3)
    for zero in stages:
        for checkpointing in stage.checkpointing:
            for micro in sizes:
                yield Layout(
                    zero_stage=zero, micro_batch=micro, checkpointing=checkpointing, offload=offload
                )


def place(stage: Stage, gpu: Gpu, workers: int, mfu: float, headroom: float) -> list[Placement]:
    """Return every layout on so many workers, the quickest first; with offload only where nothing
    else fits."""
    load = load_of(stage, workers)
    for offload in (False, True):
        found = []
        for layout in layouts(stage, workers, offload=offload):
            memory = memory_of(stage, workers, layout)
            found.append(
                Placement(
                    layout=layout, workers=workers, memory=memory,
                    step=step_time(load, gpu, workers, layout, mfu),
                    fits=memory.total <= gpu.memory_bytes * (1 - headroom),
                )
            )  # fmt: skip
        if any(one.fits for one in found):
            break
    return sorted(found, key=_preference)


def _preference(one: Placement) -> tuple[float, int, float]:
    """Order by time to a thousandth; of equals the larger micro-batch, which kernels like, and then
    the smaller memory."""
    return float(f"{one.step.seconds:.3g}"), -one.layout.micro_batch, one.memory.total


def preset_layout(stage: Stage, workers: int) -> Layout:
    """Return what the preset itself asks for, on so many workers."""
    train = stage.config.train
    share = train.batch.global_batch_size // workers
    return Layout(
        zero_stage=train.workers.zero_stage,
        micro_batch=train.batch.micro_batch_size or share,
        checkpointing=stage.checkpointing[0],
        offload=train.workers.offload == "cpu",
    )


def largest_micro_batch(
    stage: Stage, gpu: Gpu, workers: int, layout: Layout, headroom: float
) -> int:
    """Return the largest micro-batch of that layout which fits, of those that share a worker's
    samples out evenly; 0 where not even one does."""
    share = stage.config.train.batch.global_batch_size // workers
    room = gpu.memory_bytes * (1 - headroom)
    sizes = divisors(share) if stage.accumulates else [share]
    fits = [
        size
        for size in sizes
        if memory_of(
            stage, workers, Layout(zero_stage=layout.zero_stage, micro_batch=size,
                                   checkpointing=layout.checkpointing, offload=layout.offload)
        ).total <= room
    ]  # fmt: skip
    return max(fits, default=0)


def nearest(stage: Stage, gpu: Gpu, workers: int, mfu: float, headroom: float) -> list[str]:
    """Return what would make a stage fit that does not: more GPUs of the kind, or another kind."""
    found = []
    batch = stage.config.train.batch.global_batch_size
    for more in (n for n in divisors(batch) if workers < n <= MOST_GPUS):
        fits = [one for one in place(stage, gpu, more, mfu, headroom) if one.fits]
        if fits:
            found.append(f"{more} x {gpu.name} with {told(stage, fits[0].layout)}")
            break
    for other in sorted(GPUS.values(), key=lambda one: one.memory_gib):
        if other.memory_gib <= gpu.memory_gib or other.name == "cpu":
            continue
        fits = [one for one in place(stage, other, workers, mfu, headroom) if one.fits]
        if fits:
            found.append(f"{workers} x {other.name} with {told(stage, fits[0].layout)}")
            break
    return found


def told(stage: Stage, layout: Layout) -> str:
    """Return a layout in words."""
    words = [f"ZeRO {layout.zero_stage}", f"micro-batch {layout.micro_batch}"]
    if layout.checkpointing:
        words.append("activation checkpointing")
    if layout.offload:
        words.append("offload")
    return ", ".join(words)


def flags(stage: Stage, placement: Placement) -> str:
    """Return the flags by which the training script takes that placement."""
    layout = placement.layout
    found = [
        f"--train.num-workers {placement.workers}",
        f"--train.zero-stage {layout.zero_stage}",
        f"--train.micro-batch-size {layout.micro_batch}",
    ]
    if layout.offload:
        found.append("--train.offload cpu")
    if layout.checkpointing != stage.checkpointing[0]:
        group, _, name = stage.checkpointing_flag.rpartition(".")
        found.append(f"--{group}.{'' if layout.checkpointing else 'no-'}{name}")
    return " ".join(found)
