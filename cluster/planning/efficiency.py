"""How much of a GPU's peak training reaches, by kind of network.

One value for each kind of network and generation of GPU, each from one published figure (or from a
line of measured speeds, which then goes first); nothing is fitted to a run. docs/planning.md states
which figures those are, and which others test them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.planning.counts import architecture, read_preset
from cluster.planning.devices import GPUS, Gpu
from cluster.planning.request import PlanRequest

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
    shares: dict[tuple[str, str], Efficiency] = {}
    for network, own in ampere.items():
        source = _NEMO.format("H100")
        if network != "transformer":
            ratio = NEMO_H100 / NEMO_A100
            source = f"{own.source}; times {ratio:.2f}, an H100 to an A100 (NeMo, CLIP g/14)"
        by_generation = {
            "ampere": (own.mfu, own.source),
            "ada": (own.mfu, f"assumed that of an A100: {own.source}"),
            "hopper": (own.mfu * hopper, source),
            "blackwell": (own.mfu * hopper, f"assumed that of an H100: {source}"),
            "cpu": (0.5, "this project's decoder on two cores: 90 to 102 GFLOP a second"),
        }
        for generation, (mfu, source) in by_generation.items():
            shares[network, generation] = Efficiency(mfu=mfu, source=source)
    return shares


PUBLISHED = _published()


@dataclass(frozen=True, kw_only=True)
class Measured(Efficiency):
    """A measured speed: a line of benchmarks/measured.jsonl."""

    device: str
    network: str
    preset: str


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
                _, network = architecture(read_preset("decoder", preset))
                kind = "unet_channels_last" if network.unet.channels_last else "unet"
            source = f"measured: {where}, {preset} on {device}"
            speeds.append(Measured(
                device=str(device), network=kind, preset=str(preset), mfu=float(mfu), source=source
            ))  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"measured: {where}: found {error}, expected device, preset and mfu as "
                "benchmarks/preset_step.py prints them"
            ) from None
    return speeds


def efficiency(
    network: str, gpu: Gpu, request: PlanRequest, measured: list[Measured], preset: str = ""
) -> Efficiency:
    """Return the requested share, else a measured one (of this preset, then of this kind of
    network), else the published one."""
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
    # All pieces of the kind's name are in the device's: the memory distinguishes the two A100s
    pieces = gpu.name.upper().split("-")
    same = [
        speed
        for speed in measured
        if speed.network == network and all(piece in speed.device.upper() for piece in pieces)
    ]
    exact = [speed for speed in same if speed.preset == preset]
    return (exact or same or [PUBLISHED[network, gpu.generation]])[-1]
