"""How much of a GPU's peak training reaches, by kind of network.

One value for each kind of network and generation of GPU, each from one published figure (U-Nets on
Hopper from two), or from a line of measured speeds, which then goes first. docs/planning.md states
which figures those are, and published.yaml which others test them.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from cluster.planning.counts import architecture, read_preset
from cluster.planning.devices import GPUS, Gpu
from cluster.planning.request import PlanRequest
from models.configs import network_of

MEASURED = Path(__file__).parents[2] / "benchmarks" / "measured.jsonl"

# -- the figures that efficiencies were chosen by ------------------------------------------------
# forward multiply-accumulates a sample, counted on the meta device; tests count them again
SD2_UNET_256 = 90.5452e9  # Stable Diffusion 2's U-Net, 32 x 32 latents, 77 tokens
SD2_UNET_512 = 402.1287e9
SD2_TENSORS = 686  # of its 866 M parameters
CLIP_G14 = 267.0315e9 + 23.5457e9  # open_clip's ViT-g-14: image at 224 px and caption
CLIP_L14 = 81.0128e9 + 6.6498e9
MOSAIC_8 = 1100 / 8  # images a second and A100: mosaicml/diffusion, README, 8 GPUs at 256 px
NEMO_A100, NEMO_H100 = 559 / 8, 935 / 8  # samples a second and GPU: NeMo, CLIP g/14, one DGX
CLIP_RETRIEVAL_L14 = 312.0  # samples a second and A100: clip-retrieval's documentation
CHANNELS_LAST = 20.24 / 16.40  # NeMo, ControlNet on an A100, both with flash attention
# Seconds of a step of 64 samples a GPU (8 x H200: 51,200 samples in 49.7 s) and of 16 (64 x H100:
# 110.3 images a second and GPU): MLPerf Training v4.0, Stable Diffusion 2, 512 px latents
MLPERF_64, MLPERF_16 = 49.7 * 8 * 64 / 51_200, 16 / 110.3
_MLPERF_EACH = (MLPERF_64 - MLPERF_16) / (64 - 16)
# What a micro-batch takes beside its samples' share: kernels of few samples are short of work. By
# tensor of parameters, of which a layer has about two.
SECONDS_A_TENSOR = (MLPERF_16 - 16 * _MLPERF_EACH) / SD2_TENSORS  # 40 microseconds
_MLPERF = "MLPerf Training v4.0 (June 2024), 8 x H200 and 64 x H100, NeMo, compiled"
_MOSAIC = "mosaicml/diffusion README (2023), 8 x A100 at 256 px"
_NEMO = "NVIDIA NeMo, CLIP g/14 on one DGX {} (23.08, August 2023)"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is run, as far as speed depends on it. tensors: that hold its parameters."""

    network: str
    preset: str = ""
    parameters: int = 0
    tensors: int = 0
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """A share of the peak, and where it is from.

    tensor_seconds: what a micro-batch takes for each tensor of parameters beside the time by `mfu`.
    """

    mfu: float
    source: str
    tensor_seconds: float = 0.0


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
    ratio = f"times {NEMO_H100 / NEMO_A100:.2f}, an H100 to an A100 (NeMo, CLIP g/14)"
    unet_h100 = _share(1 / _MLPERF_EACH, 6 * SD2_UNET_512, "h100")
    contiguous = f"{_MLPERF}, over {CHANNELS_LAST:.2f} for contiguous memory (NeMo, ControlNet)"
    on_hopper = {
        "transformer": (ampere["transformer"].mfu * hopper, _NEMO.format("H100"), 0.0),
        "unet_channels_last": (unet_h100, _MLPERF, SECONDS_A_TENSOR),
        "unet": (unet_h100 / CHANNELS_LAST, contiguous, SECONDS_A_TENSOR),
        "encoder": (ampere["encoder"].mfu * hopper, f"{ampere['encoder'].source}; {ratio}", 0.0),
    }
    shares: dict[tuple[str, str], Efficiency] = {}
    for network, own in ampere.items():
        mfu, source, seconds = on_hopper[network]
        by_generation = {
            "ampere": (own.mfu, own.source, 0.0),
            "ada": (own.mfu, f"assumed that of an A100: {own.source}", 0.0),
            "hopper": (mfu, source, seconds),
            "blackwell": (mfu, f"assumed that of an H100: {source}", seconds),
            "cpu": (0.5, "this project's decoder on two cores: 90 to 102 GFLOP a second", 0.0),
        }
        for generation, (mfu, source, seconds) in by_generation.items():
            shares[network, generation] = Efficiency(
                mfu=mfu, source=source, tensor_seconds=seconds
            )
    return shares


PUBLISHED = _published()


def network_kind(config: object, *, compiled: bool = False) -> str:
    """Return the kind of network, which decides its efficiency, of a model's configuration.

    compiled: a U-Net is channels-last then, whatever its configuration says.
    """
    name, sizes = network_of(config)
    if name != "unet":
        return "transformer"
    return "unet_channels_last" if sizes.channels_last or compiled else "unet"


@dataclass(frozen=True, kw_only=True)
class Measured(Efficiency):
    """A measured speed: a line of benchmarks/measured.jsonl.

    seconds: of the measured step, infinite where the line has none.
    """

    device: str
    network: str
    preset: str
    compiled: bool
    seconds: float


def read_measured(path: str) -> list[Measured]:
    """Read measured speeds, as benchmarks/preset_step.py prints them; none where the project's own
    file is absent, or for a device without a known peak. ValueError names the line that is
    wrong."""
    file = Path(path) if path else MEASURED
    if not file.is_file():
        if path:
            raise ValueError(f"measured: found no file {path}, expected one JSON object a line")
        return []
    speeds = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            entry = json.loads(line)
            device, preset, mfu = entry["device"], entry["preset"], entry["mfu"]
            if mfu is None:
                continue
            if not 0 < float(mfu) <= 1:
                raise ValueError("mfu outside of (0, 1]")
            kind = entry.get("network")
            if not kind:
                kind = network_kind(architecture(read_preset("decoder", preset))[1])
            compiled = bool(entry.get("compiled"))
            how = "compiled" if compiled else "eager"
            speeds.append(Measured(
                device=str(device), network=kind, preset=str(preset), mfu=float(mfu),
                compiled=compiled, seconds=float(entry.get("ms", math.inf)) / 1000,
                source=f"measured: {where}, {preset} on {device}, {how}",
            ))  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"measured: {where}: found {error}, expected device, preset and mfu as "
                "benchmarks/preset_step.py prints them"
            ) from None
    return speeds


def efficiency(
    run: Workload, gpu: Gpu, request: PlanRequest, measured: list[Measured]
) -> Efficiency:
    """Return the requested share, else a measured one (of this preset, then of this kind of
    network), else the published one.

    Only lines measured as it is run count, compiled or eager. A measured share holds for its
    own batch: what a micro-batch takes in any case is taken out of it, and counts again for the
    micro-batch of a plan.
    """
    if request.effective_tflops:
        share = request.effective_tflops / gpu.peak_tflops
        if share > 1:
            raise ValueError(
                f"effective_tflops: found {request.effective_tflops:g}, expected at most the "
                f"{gpu.peak_tflops:g} of a {gpu.name}"
            )
        return Efficiency(mfu=share, source="requested: effective_tflops")
    if request.mfu:
        return Efficiency(mfu=request.mfu, source="requested: mfu")
    published = PUBLISHED[run.network, gpu.generation]
    # All pieces of the kind's name are in the device's: the memory distinguishes the two A100s
    pieces = gpu.name.upper().split("-")
    same = [
        speed
        for speed in measured
        if speed.network == run.network
        and speed.compiled == (run.compiled and gpu.name != "cpu")
        and all(piece in speed.device.upper() for piece in pieces)
    ]
    if not same:
        return published
    line = ([speed for speed in same if speed.preset == run.preset] or same)[-1]
    beside = min(0.5, published.tensor_seconds * run.tensors / line.seconds)
    return Efficiency(
        mfu=line.mfu / (1 - beside), source=line.source, tensor_seconds=published.tensor_seconds
    )
