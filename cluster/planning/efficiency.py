"""How much of a GPU's peak training reaches, by kind of network, and how long a step takes.

One value for each kind of network and generation of GPU, each from one published figure (or from a
line of measured speeds, which then goes first); nothing is fitted to a run. Which figures those
are, and which others test them, is in cluster/planning/published.py and docs/planning.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.planning.devices import GPUS, Gpu
from cluster.planning.request import PlanRequest
from cluster.planning.stages import Stage, read_preset

MEASURED = Path(__file__).parents[2] / "benchmarks" / "measured.jsonl"

# -- the figures that efficiencies were chosen by ------------------------------------------------
# forward multiply-accumulates a sample, counted on the meta device; tests count them again
SD2_UNET_256 = 90.5452e9  # Stable Diffusion 2's U-Net, 32 x 32 latents, 77 tokens
CLIP_G14 = 267.0315e9 + 23.5457e9  # open_clip's ViT-g-14: image at 224 px and caption
CLIP_L14 = 81.0128e9 + 6.6498e9
MOSAIC_8 = 1100 / 8  # images a second and A100: mosaicml/diffusion, README, 8 GPUs at 256 px
NEMO_A100, NEMO_H100 = 559 / 8, 935 / 8  # samples a second and GPU: NeMo, CLIP g/14, one DGX
CLIP_RETRIEVAL_L14 = 312.0  # samples a second and A100: clip-retrieval's documentation
CHANNELS_LAST = 20.24 / 16.40  # NeMo, ControlNet on an A100, both with flash attention
_MOSAIC = "mosaicml/diffusion README, 8 x A100 at 256 px"
_NEMO = "NVIDIA NeMo, CLIP g/14 on one DGX {} (23.08)"


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """A share of the peak, and where it is from."""

    mfu: float
    source: str


def _share(samples_a_second: float, flops: float, gpu: str) -> float:
    return samples_a_second * flops / (GPUS[gpu].peak_tflops * 1e12)


def _published() -> dict[tuple[str, str], Efficiency]:
    """Return the efficiencies by kind of network and generation of GPU."""
    hopper = NEMO_H100 / NEMO_A100 * GPUS["a100-80"].peak_tflops / GPUS["h100"].peak_tflops
    unet = _share(MOSAIC_8, 6 * SD2_UNET_256, "a100-80")
    ampere = {
        "transformer": Efficiency(
            mfu=_share(NEMO_A100, 6 * CLIP_G14, "a100-80"), source=_NEMO.format("A100")
        ),
        "unet_channels_last": Efficiency(mfu=unet, source=_MOSAIC),
        "unet": Efficiency(
            mfu=unet / CHANNELS_LAST,
            source=f"{_MOSAIC}, over {CHANNELS_LAST:.2f} for contiguous memory (NeMo, ControlNet)",
        ),
        "encoder": Efficiency(
            mfu=_share(CLIP_RETRIEVAL_L14, 2 * CLIP_L14, "a100-80"),
            source="clip-retrieval, L/14 on one A100",
        ),
    }
    found = {}
    for network, one in ampere.items():
        found[network, "ampere"] = one
        found[network, "ada"] = Efficiency(
            mfu=one.mfu, source=f"assumed that of an A100: {one.source}"
        )
        told = (
            f"{one.source}; times {NEMO_H100 / NEMO_A100:.2f}, an H100 to an A100 (NeMo, CLIP g/14)"
        )
        told = _NEMO.format("H100") if network == "transformer" else told
        found[network, "hopper"] = Efficiency(mfu=one.mfu * hopper, source=told)
        found[network, "blackwell"] = Efficiency(
            mfu=one.mfu * hopper, source=f"assumed that of an H100: {told}"
        )
        found[network, "cpu"] = Efficiency(
            mfu=0.5, source="this project's decoder on two cores: 90 to 102 GFLOP a second"
        )
    return found


PUBLISHED = _published()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measured speed: a line of benchmarks/measured.jsonl."""

    device: str
    network: str
    preset: str
    mfu: float
    where: str


def read_measured(path: str) -> list[Measured]:
    """Read measured speeds; none where the project's own file is absent. ValueError names the line
    that is wrong."""
    file = Path(path) if path else MEASURED
    if not file.is_file():
        if path:
            raise ValueError(f"measured: found no file {path}, expected one JSON object a line")
        return []
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.strip():
            found.append(_measured(f"{file.name}, line {number}", line))
    return [one for one in found if one is not None]


def _measured(where: str, line: str) -> Measured | None:
    """Read a line as benchmarks/preset_step.py prints; None for a device without a known peak."""
    try:
        told = json.loads(line)
        device, preset, mfu = told["device"], told["preset"], told["mfu"]
        if mfu is None:
            return None
        if not 0 < float(mfu) <= 1:
            raise ValueError("mfu outside of (0, 1]")
        network = told.get("network") or _network_of(preset)
        return Measured(
            device=str(device), network=network, preset=str(preset), mfu=float(mfu),
            where=f"measured: {where}, {preset} on {device}",
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"measured: {where}: found {error}, expected device, preset and mfu as "
            "benchmarks/preset_step.py prints them"
        ) from None


def _network_of(preset: str) -> str:
    config: Any = read_preset("decoder", preset)
    unet = (config.base if config.stage == "base" else config.up).unet
    return "unet_channels_last" if unet.channels_last else "unet"


def efficiency(
    network: str, gpu: Gpu, request: PlanRequest, measured: list[Measured], preset: str = ""
) -> Efficiency:
    """Return what is asked for, else what was measured (of this preset, then of this kind of
    network), else what was published."""
    if request.effective_tflops:
        share = request.effective_tflops / gpu.peak_tflops
        if share > 1:
            raise ValueError(
                f"effective_tflops: found {request.effective_tflops:g}, expected at most the "
                f"{gpu.peak_tflops:g} of a {gpu.name}"
            )
        return Efficiency(mfu=share, source="asked for: effective_tflops")
    if request.mfu:
        return Efficiency(mfu=request.mfu, source="asked for: mfu")
    here = [one for one in measured if _is(gpu, one.device) and one.network == network]
    exact = [one for one in here if one.preset == preset]
    if exact or here:
        newest = (exact or here)[-1]
        return Efficiency(mfu=newest.mfu, source=newest.where)
    return PUBLISHED[network, gpu.generation]


def _is(gpu: Gpu, device: str) -> bool:
    """Whether a device's own name is of that kind; the memory tells the two A100s apart."""
    parts = gpu.name.upper().split("-")
    return all(part in device.upper() for part in parts)


# -- a step ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a stage lies on its GPUs."""

    zero_stage: int
    micro_batch: int
    checkpointing: bool
    offload: bool = False


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of a step: computing, what communication adds to it, and the optimizer's pass."""

    compute: float
    wait: float
    update: float

    @property
    def seconds(self) -> float:
        return self.compute + self.wait + self.update


GRADIENT_BYTES = 2  # on the wire: DeepSpeed's torch_autocast reduces in bf16
WEIGHT_BYTES = 4  # gathered after the update, or before use: fp32
UPDATE_BYTES = 40  # read and written by AdamW and the average: 5 fp32 read, 5 written
# Layers are gathered one by one: of DeepSpeed as it comes benchmarks/results.md has stage 3 at 1.79
# of a bare loop's step and stage 2 at 1.59, on one rank, where nothing is sent. An assumption: what
# is copied there takes memory's time, and not the processor's.
ZERO_3_SLOWER = 1.79 / 1.59
PCIE = 25e9  # bytes a second between a GPU and the memory of the CPU
CPU_UPDATE = 20e9  # bytes a second of memory that each GPU's share of CPU cores updates


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a step has to do: parameters that are updated, FLOPs a sample, samples of a worker."""

    parameters: int
    flops: float
    share: int


def load_of(stage: Stage, workers: int) -> Load:
    share = stage.config.train.batch.global_batch_size // workers
    return Load(parameters=stage.parameters, flops=stage.flops(share), share=share)


def step_time(load: Load, gpu: Gpu, workers: int, layout: Layout, mfu: float) -> Step:
    """Return how long a step takes on so many GPUs.

    A ring moves (N - 1) / N of the bytes once to reduce and once to gather (Patarasuk & Yuan 2009).
    What reduces gradients hides behind the last micro-batch's backward pass, two thirds of its time
    (three quarters where activations are computed again); ZeRO 1 and 2 gather the new weights after
    it, and stage 3 gathers them before each pass (Rajbhandari et al. 2020, section 7).
    """
    again = (4 / 3 if layout.checkpointing else 1) * (
        ZERO_3_SLOWER if layout.zero_stage == 3 else 1
    )
    micro = layout.micro_batch * load.flops * again / (gpu.peak_tflops * 1e12 * mfu)
    count = load.share // layout.micro_batch
    backward = micro * (3 / 4 if layout.checkpointing else 2 / 3)
    update = _update(load, gpu, workers, layout)
    once = load.parameters * (workers - 1) / workers / gpu.wire(workers)
    if layout.zero_stage == 0:
        wait = max(0.0, 2 * GRADIENT_BYTES * once - backward)
    elif layout.zero_stage < 3:
        wait = max(0.0, GRADIENT_BYTES * once - backward) + WEIGHT_BYTES * once
    else:  # in every micro-batch and pass, since weights go once they were used
        gather, reduce = WEIGHT_BYTES * once, GRADIENT_BYTES * once
        forward = micro - backward
        wait = count * (max(0.0, gather - forward) + max(0.0, gather + reduce - backward))
    return Step(compute=micro * count, wait=wait, update=update)


def _update(load: Load, gpu: Gpu, workers: int, layout: Layout) -> float:
    """Return the seconds in which the optimizer and the average pass over their part."""
    part = load.parameters / (workers if layout.zero_stage else 1)
    if layout.offload:  # gradients down, weights up, and the pass over the CPU's memory
        return part * (8 / PCIE + UPDATE_BYTES / CPU_UPDATE)
    return part * UPDATE_BYTES / gpu.bandwidth
