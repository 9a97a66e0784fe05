"""A plan's arithmetic against published sizes and runs: what is computed here beside what others
say, and which of their figures the stated efficiencies were chosen by."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cluster.planning import efficiency as eff
from cluster.planning import flows
from cluster.planning.devices import GPUS, Gpu
from cluster.planning.efficiency import Layout, Load, step_time
from cluster.planning.request import LLAMA_NODES, NODE_MTBF_HOURS, PlanRequest
from cluster.planning.sampling import flops_an_image, whole_image_macs
from cluster.planning.simulation import Nodes, Training, best_interval, mean_goodput, simulate
from cluster.planning.stages import Stage, build_stages
from models.costs import forward_of, num_parameters

GIB, MIB, DAY = 2**30, 2**20, 86_400.0
SIZES, RUNS = 0.05, 0.25  # how near to a size, and to a run's time, a plan is to come


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. role: "size", "chosen" (the efficiency is this figure's), "tests", or "apart"
    for a run that the model is known not to describe; why says how."""

    what: str
    ours: float
    published: float
    unit: str
    source: str
    role: str = "size"
    why: str = ""

    @property
    def error(self) -> float:
        return self.ours / self.published - 1

    @property
    def limit(self) -> float:
        return SIZES if self.role == "size" else RUNS

    @property
    def holds(self) -> bool:
        return abs(self.error) <= self.limit


# -- sizes: the paper's, counted by others -------------------------------------------------------

_SIZES = "size arithmetic of the paper's models (unclip facts, A.10)"
_SCALE = "paper scale (unclip facts, E.3)"


def paper_stages() -> dict[str, Stage]:
    """Return the paper's stages by name, the autoregressive prior as "ar"."""
    _, stages = build_stages(PlanRequest(chain="paper", train_clip=True))
    _, others = build_stages(PlanRequest(chain="paper", prior="autoregressive"))
    return {stage.name: stage for stage in stages} | {"ar": others[0]}


def sizes(stages: dict[str, Stage]) -> Iterator[Row]:
    """Compare parameters, FLOPs of training and of drawing an image."""
    decoder, ar, clip = (stages[name].model for name in ("base", "ar", "clip"))
    text, ar_text = num_parameters(decoder.text_encoder), num_parameters(ar.text_encoder)
    vision = num_parameters(clip.visual)
    counted = (
        ("decoder, visual", stages["base"].parameters - text, 2.249e9),
        ("decoder, text", text, 1.312e9),
        ("diffusion prior", stages["prior"].parameters, 1.320e9),
        ("autoregressive prior, text", ar_text, 1.312e9),
        ("autoregressive prior, decoder", stages["ar"].parameters - ar_text, 0.800e9),
        ("up256", stages["up256"].parameters, 0.730e9),
        ("up1024", stages["up1024"].parameters, 0.282e9),
        ("CLIP, vision", vision, 0.632e9),
        ("CLIP, text", stages["clip"].parameters - vision, 0.353e9),
    )
    yield from (_size(f"parameters: {what}", ours, theirs, "") for what, ours, theirs in counted)
    trained = (
        ("decoder", stages["base"].flops(), 6.66e12),  # 4.77 and 1.89
        ("diffusion prior", stages["prior"].flops(), 1.92e12),
        ("autoregressive prior", stages["ar"].flops(), 3.80e12),
        ("up256, a crop", stages["up256"].flops(), 1.59e12),
        ("up1024, a crop", stages["up1024"].flops(), 3.72e12),
        ("CLIP", stages["clip"].flops(), 1.14e12),
        ("CLIP with SAM, 64 a worker", stages["clip"].flops(64), 2.28e12),
    )
    for what, ours, theirs in trained:
        yield _size(f"training a sample: {what}", ours, theirs, "FLOP")
    for what, name in (("up256", "up256"), ("up1024", "up1024")):
        published = {"up256": 4249e9, "up1024": 9922e9}[name]
        found = whole_image_macs(stages[name])
        yield _size(f"forward, whole image: {what}", found, published, "MAC")
    whole = {"prior": 4.7e21, "ar": 1.56e22, "base": 1.09e22, "up256": 1.6e21, "up1024": 1.9e21}
    for name, published in whole.items():
        found = stages[name].flops() * stages[name].samples
        yield _size(f"whole training: {name}", found, published, "FLOP")
    drawn = flops_an_image("paper", [stages[n] for n in ("prior", "base", "up256", "up1024")])
    image = {"prior": 82e12, "base": 794e12, "up256": 229e12, "up1024": 298e12}
    for name, published in image.items():
        yield _size(f"one image of 1024 px: {name}", drawn[name], published, "FLOP")
    yield _size("one image of 1024 px: all", sum(drawn.values()), 1.4e15, "FLOP")


def _size(what: str, ours: float, published: float, unit: str, source: str = _SIZES) -> Row:
    return Row(what=what, ours=ours, published=published, unit=unit, source=source)


def mixed_bytes(parameters: int, zero_stage: int, workers: int) -> float:
    """Return a worker's state where weights and gradients are bf16 and masters, moments and EMA are
    fp32: 20 bytes a parameter (Rajbhandari et al. 2020, section 3.1, and 4 of EMA). Our engine
    keeps fp32 weights under autocast instead: `models.costs.state_bytes`."""
    shared = (0, 16, 18, 20)[zero_stage]
    return parameters * ((20 - shared) + shared / workers)


def scale(stages: dict[str, Stage]) -> Iterator[Row]:
    """Compare memory by ZeRO stage, activations and GPU-hours with those of E.3."""
    states = {
        "base": (66.0, 14.1, 7.6, 1.0), "prior": (24.6, 5.2, 2.8, 0.4),
        "ar": (39.3, 8.4, 4.5, 0.6), "up256": (13.6, 2.9), "up1024": (5.3, 1.1),
    }  # fmt: skip
    for name, published in states.items():
        for zero, gib in enumerate(published):
            # rounded as it is printed there: a tenth is a quarter of the smallest
            found = round(mixed_bytes(stages[name].parameters, zero, 64) / GIB, 1)
            yield _size(f"state of {name}, ZeRO {zero}, 64 GPUs", found, gib, "GiB", _SCALE)
    for name, mib in (("base", 425), ("up256", 199), ("up1024", 1.14 * 1024)):
        found = output_bytes(stages[name]) / MIB
        yield _size(f"activations a sample of {name}, outputs alone", found, mib, "MiB", _SCALE)
    hours = {
        "base": (15.2e3, 8.7e3), "prior": (6.6e3, 3.8e3), "ar": (21.6e3, 12.4e3),
        "up256": (2.3e3, 1.3e3), "up1024": (2.6e3, 1.5e3),
    }  # fmt: skip
    for name, published in hours.items():
        for tflops, each in zip((200, 350), published, strict=True):
            found = stages[name].flops() * stages[name].samples / (tflops * 1e12) / 3600
            yield _size(f"{name} at {tflops} TFLOP/s", found, each, "GPU-hours", _SCALE)
    names = ("base", "prior", "up256", "up1024")
    work = sum(stages[name].flops() * stages[name].samples for name in names)
    for tflops, days in ((200, 17), (350, 10)):
        found = work / (64 * tflops * 1e12) / DAY
        yield _size(f"all but AR on 64 GPUs at {tflops} TFLOP/s", found, days, "days", _SCALE)


def output_bytes(stage: Stage) -> int:
    """Return the bytes of what a U-Net's convolutions, norms and attention projections of the image
    put out for one sample, in bf16: what E.3 counts. A step keeps more: see `peak_bytes`."""
    unet, total = stage.model.unet, 0

    def count(_: Any, __: Any, out: torch.Tensor) -> None:
        nonlocal total
        total += 2 * out.numel()

    hooks = [
        module.register_forward_hook(count)
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Conv2d, nn.GroupNorm))
        or (isinstance(module, nn.Linear) and name.endswith(("attention.qkv", "attention.out")))
    ]
    forward = forward_of(stage.model.eval(), stage.words)
    with torch.device("meta"), torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    return total


# -- runs: times that others measured ------------------------------------------------------------

ADM_64 = 109.6568e9  # forward multiply-accumulates of ADM's ImageNet-64 network, as our U-Net
CLIP_B32 = 4.4088e9 + 2.9798e9
SD2_UNET_512 = 402.1287e9
SD2_PARAMETERS, ADM_PARAMETERS, G14_PARAMETERS = 865_910_724, 295_131_267, 1_366_678_273
MOSAIC = "mosaicml/diffusion, README"
MOSAIC_256 = {8: 1100, 16: 2180, 32: 4080, 64: 8530, 128: 11600}
MOSAIC_512 = {8: 290, 16: 585, 32: 1195, 64: 2340, 128: 4590}
MOSAIC_DAYS = {8: 81.33, 16: 40.42, 32: 20.06, 64: 10.14, 128: 5.51}
MOSAIC_IMAGES = 1_126_400_000, 1_740_800_000  # at 256 and at 512 px
NEMO = "NVIDIA NeMo user guide, CLIP performance (23.08)"
NEMO_A100 = {1: 559, 2: 1115, 4: 2190, 8: 4407, 16: 8633}
NEMO_H100 = {1: 935, 2: 1795, 4: 3502, 8: 6771, 16: 13829}
NEMO_SHARE = 80  # samples a GPU: of its configuration of H/14; that of g/14 is not told


def _rate(load: Load, gpu: Gpu, workers: int, micro: int, network: str) -> float:
    """Return samples a second of plain data parallelism."""
    layout = Layout(zero_stage=0, micro_batch=micro, checkpointing=False)
    mfu = eff.PUBLISHED[network, gpu.generation].mfu
    step = step_time(load, gpu, workers, layout, mfu)
    # the update of E.3's state and of ours alike is left to the compute that was measured
    return workers * load.share / (step.compute + step.wait)


def mosaic_rate(gpus: int, size: int) -> float:
    """Return images a second of Stable Diffusion 2's U-Net: a global batch of 2,048, micro-batches
    of 16 at 256 px (SD-2-base-256.yaml), and of 4 at 512 px, which has as many pixels."""
    macs, micro = {256: (eff.SD2_UNET_256, 16), 512: (SD2_UNET_512, 4)}[size]
    load = Load(parameters=SD2_PARAMETERS, flops=6 * macs, share=2048 // gpus)
    return _rate(load, GPUS["a100-80"], gpus, micro, "unet_channels_last")


def runs() -> Iterator[Row]:
    """Compare with runs whose time is told."""
    for gpus, published in MOSAIC_256.items():
        yield Row(
            what=f"Stable Diffusion 2, 256 px, {gpus} A100", ours=mosaic_rate(gpus, 256),
            published=published, unit="images/s", source=MOSAIC,
            role="chosen" if gpus == 8 else "tests",
        )  # fmt: skip
    for gpus, published in MOSAIC_512.items():
        yield Row(
            what=f"Stable Diffusion 2, 512 px, {gpus} A100", ours=mosaic_rate(gpus, 512),
            published=published, unit="images/s", source=MOSAIC, role="tests",
        )  # fmt: skip
    for gpus, published in MOSAIC_DAYS.items():
        small, large = MOSAIC_IMAGES
        days = (small / mosaic_rate(gpus, 256) + large / mosaic_rate(gpus, 512)) / DAY
        yield Row(
            what=f"Stable Diffusion 2, whole training, {gpus} A100", ours=days,
            published=published, unit="days", source=MOSAIC, role="tests",
        )  # fmt: skip
    edm = Load(parameters=ADM_PARAMETERS, flops=6 * ADM_64, share=128)
    yield Row(
        what="EDM, ImageNet-64 (ADM), 2,500 M images, 32 A100",
        ours=2500e6 / _rate(edm, GPUS["a100-80"], 32, 128, "unet") / DAY, published=13.0,
        unit="days", source="NVlabs/edm, README", role="tests",
    )  # fmt: skip
    yield from _clips()
    yield from _data()
    yield _llama()


def _clips() -> Iterator[Row]:
    for name, kind, published in (("A100", "a100-80", NEMO_A100), ("H100", "h100", NEMO_H100)):
        for nodes, rate in published.items():
            load = Load(parameters=G14_PARAMETERS, flops=6 * eff.CLIP_G14, share=NEMO_SHARE)
            yield Row(
                what=f"CLIP g/14, {8 * nodes} {name}",
                ours=_rate(load, GPUS[kind], 8 * nodes, NEMO_SHARE, "transformer"),
                published=rate, unit="samples/s", source=NEMO,
                role="chosen" if nodes == 1 else "tests",
            )  # fmt: skip
    speed = GPUS["a100-80"].peak_tflops * 1e12 * eff.PUBLISHED["encoder", "ampere"].mfu
    retrieval = "clip-retrieval, documentation"
    yield Row(
        what="embedding with L/14, one A100", ours=speed / (2 * eff.CLIP_L14), published=312.0,
        unit="samples/s", source=retrieval, role="chosen",
    )  # fmt: skip
    yield Row(
        what="embedding with B/32, one A100", ours=speed / (2 * CLIP_B32), published=2500.0,
        unit="samples/s", source=retrieval, role="apart",
        why="decoding bounds it: 2,500 images take six cores at 2.4 ms",
    )  # fmt: skip


def _data() -> Iterator[Row]:
    img2dataset = "img2dataset, README and PR 272"
    yield Row(
        what="download, 100 machines of 96 vCPUs", ours=9600 * flows.DOWNLOAD_A_VCPU,
        published=200e3, unit="images/s", source=img2dataset, role="chosen",
    )  # fmt: skip
    yield Row(
        what="download, one machine of 16 cores", ours=16 * flows.DOWNLOAD_A_VCPU,
        published=1350.0, unit="images/s", source=img2dataset, role="apart",
        why="a core alone does four times a vCPU of a large cluster; plans take the slower",
    )  # fmt: skip
    yield Row(
        what="LAION-400M, images of 256 px", ours=413e6 * flows.IMAGE_BYTES_256 / 1e12,
        published=10.0, unit="TB", source="LAION-400M, announcement", role="tests",
    )  # fmt: skip


def _llama() -> Row:
    """Simulate a training of Llama 3's size and failures, with our restart and spares at hand."""
    nodes = Nodes(
        count=LLAMA_NODES, mtbf=3600 * NODE_MTBF_HOURS, restart=300.0, repair=14_400.0, spares=64
    )
    block = 2.0
    interval = best_interval(block, nodes.restart, nodes.system_mtbf)
    training = Training(work=54 * DAY, interval=interval, block=block, write=30.0)
    return Row(
        what="Llama 3, effective training time (published: more than)",
        ours=mean_goodput(simulate(training, nodes, count=8)), published=0.9, unit="of the time",
        source="Dubey et al. 2024, section 3.3.4", role="tests",
    )  # fmt: skip


def rows() -> list[Row]:
    """Return every comparison."""
    stages = paper_stages()
    return [*sizes(stages), *scale(stages), *runs()]


