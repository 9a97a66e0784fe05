"""Sub-commands of eval/sample.py: what the latents of unCLIP allow to be done with an image.

python eval/sample.py variations --images cat.png --decoder runs/base
python eval/sample.py interpolate --images cat.png dog.png --decoder runs/base
python eval/sample.py textdiff --images cat.png --caption "a winter cat" --without "a cat"
python eval/sample.py inpaint --images cat.png --mask hat.png --caption "a cat in a hat"
python eval/sample.py pca --images cat.png --embeds data/embeds
python eval/sample.py guidance --prompts "a red cube" --prior runs/prior --decoder runs/base
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction

from training.precision import Precision, settled

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from models.latents import Latents
    from models.unclip import Sampling, UnClip

EDITS_NAME = "edits.jsonl"


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """What every sub-command takes. Images are cut square; those of the grid are one a row."""

    decoder: str = "runs/base"
    """finished run of training/decoder.py --stage base"""
    upsampler: Annotated[tuple[str, ...], UseAppendAction] = ()
    """finished run of an upsampler, in order of the cascade; repeatable"""
    clip: str = ""
    """encoder; empty = the one the decoder was trained on"""
    out: str = "edits"
    """folder of the images, grid.png and edits.jsonl; written over"""
    seed: int = 0
    """of all noise"""
    decoder_steps: int = 50
    """sampling steps of the decoder, and of its inversion"""
    upsampler_steps: int = 8
    """sampling steps of an upsampler"""
    upsampler_tile: int = 0
    """side in px of the overlapping parts in which an upsampler works, where its whole image does
    not fit the memory; 0 = whole"""
    precision: Precision = "fp32"
    """of the networks; inversion wants fp32"""
    device: str = "auto"
    """auto: a GPU where there is one; cpu, cuda or cuda:N"""
    num_threads: int = 2
    """threads on the CPU"""


@dataclass(frozen=True, kw_only=True)
class ImagineConfig(EditConfig):
    """What the sub-commands take that ask a prior."""

    prior: str = ""
    """finished run of training/prior.py"""
    prior_steps: int = 16
    """sampling steps of the prior"""
    prior_cfg_scale: float = 1.5
    """guidance of the prior; 1 = off, as in the paper"""
    best_of: int = 2
    """draws of a diffusion prior, of which the one nearest to the caption is kept"""


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(EditConfig):
    """What the sub-commands take that begin with images."""

    images: tuple[str, ...] = ()
    """image files"""


@dataclass(frozen=True, kw_only=True)
class VariationsConfig(ImagesConfig):
    """Vary what z_i leaves open: DDIM from the image's own x_T, with fresh noise (figure 3)."""

    count: int = 5
    """variations of each image, after its reconstruction"""
    eta: float = 1.0
    """share of fresh noise at each step; 0 = the image itself"""


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig(ImagesConfig):
    """Blend from each image to the next (figure 4)."""

    count: int = 7
    """images of a row, ends included"""
    noise: bool = True
    """blend x_T as well, so that the ends are the images; else it is the first one's"""


@dataclass(frozen=True, kw_only=True)
class TextDiffConfig(ImagesConfig):
    """Turn images toward what one caption says beyond another (figure 5)."""

    caption: str = ""
    """what they are to become"""
    without: str = ""
    """what they are, or a plain caption such as "a photo"; empty = nothing"""
    max_theta: float = 0.4
    """how far at the end of the row, of 1; the paper's are .25 to .5"""
    count: int = 5
    """images of a row, the image itself included"""


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(ImagesConfig, ImagineConfig):
    """Draw part of images anew, under their own embedding or, with a prior, a caption's."""

    mask: str = ""
    """image file: white where to draw, black where to keep; one for all images"""
    caption: str = ""
    """of the whole image as it is to become; needs a prior"""
    cfg_scale: float = 1.5
    """guidance of the decoder; 1 = off"""
    count: int = 4
    """draws of each image"""


@dataclass(frozen=True, kw_only=True)
class PcaConfig(ImagesConfig):
    """Draw images from the first principal components of their embeddings (figure 7)."""

    embeds: str = "data/embeds"
    """folder of the embeddings whose components these are"""
    components: tuple[int, ...] = (20, 30, 40, 80, 120, 160, 200, 320)
    """how many of them, one an image; the whole embedding follows"""


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig(ImagineConfig):
    """Draw captions at several scales of the decoder's guidance, from one z_i each (figure 9)."""

    prompts: Annotated[tuple[str, ...], UseAppendAction] = ()
    """caption to draw; repeatable"""
    prior: str = "runs/prior"
    """finished run of training/prior.py"""
    scales: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
    """scales, one an image"""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The images of an edit: pixels [R * C, 3, S, S] row by row, and what rows and columns are."""

    pixels: "Tensor"
    rows: list[str]
    columns: list[str]


def run_edit(command: str, config: EditConfig) -> int:
    """Run a sub-command and write its images."""
    import torch

    from eval.chain import load_chain
    from eval.devices import device_named
    from eval.generate import sampling_of

    torch.set_num_threads(config.num_threads)
    device = device_named(config.device)
    config = dataclasses.replace(config, precision=settled(config.precision, device.type))
    settings = {**vars(config), "sampler": "ddim"}
    _check(config)
    parts = (config.clip, getattr(config, "prior", ""), config.decoder, config.upsampler)
    chain = load_chain(*parts, device=config.device)
    rows = COMMANDS[command][1](config, chain, sampling_of(settings))
    keys = _keys(config.seed, len(rows.pixels))
    enlarged = chain.enlarge(keys, rows.pixels, sampling_of(settings))
    _write(command, config, dataclasses.replace(rows, pixels=enlarged))
    print(f"{command}: {len(rows.pixels)} images -> {config.out}")
    return 0


def _check(config: EditConfig) -> None:
    out = Path(config.out)
    if out.is_dir() and any(out.iterdir()) and not (out / EDITS_NAME).is_file():
        raise ValueError(f"{out}: found a folder without {EDITS_NAME}, expected edits or nothing")
    if isinstance(config, ImagesConfig) and not config.images:
        raise ValueError("--images: found none, expected at least one image file")
    if isinstance(config, InterpolateConfig) and len(config.images) < 2:
        raise ValueError("--images: found one, expected two or more to blend between")
    if isinstance(config, GuidanceConfig) and not (config.prompts and config.scales):
        flag = "scales" if config.prompts else "prompts"
        raise ValueError(f"--{flag}: found none, expected at least one")
    if isinstance(config, PcaConfig) and min(config.components, default=1) < 1:
        raise ValueError(f"--components: found {min(config.components)}, expected 1 or more")
    if isinstance(config, TextDiffConfig) and not config.caption:
        raise ValueError("--caption: found none, expected what the images are to become")
    if isinstance(config, InpaintConfig):
        if not config.mask:
            raise ValueError("--mask: found none, expected an image file, white where to draw")
        if bool(config.caption) != bool(config.prior):
            raise ValueError("found one of --caption and --prior, expected both or none")
    for name in ("count", "decoder_steps", "upsampler_steps", "prior_steps", "num_threads"):
        spread = isinstance(config, (InterpolateConfig, TextDiffConfig))
        least = 2 if name == "count" and spread else 1
        if getattr(config, name, least) < least:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: found {getattr(config, name)}, expected {least} or more")


def _opened(paths: Sequence[str]) -> "list[Image]":
    """Open images upright, as the download stores them."""
    from PIL import Image, ImageOps

    found = []
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"{path}: found no such file, expected an image")
        try:
            with Image.open(path) as image:
                found.append(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: found no image: {error}") from None
    return found


def _keys(seed: int, count: int) -> "Tensor":
    """Return the key of each image: the same for a place in the grid, whatever the batch."""
    import torch

    from models.keyed_random import sample_keys

    places = torch.arange(count, dtype=torch.int64)
    return sample_keys(seed, torch.zeros_like(places), places)


def _encoded(config: ImagesConfig, chain: "UnClip", sampling: "Sampling") -> "list[Latents]":
    from models.latents import encode

    latents = encode(chain, _opened(config.images), sampling)
    return [latents.row(number) for number in range(len(latents))]


def _decoded(
    config: EditConfig, chain: "UnClip", sampling: "Sampling", parts: "Sequence[Latents]",
    eta: float = 0.0,
) -> "Tensor":  # fmt: skip
    import torch

    from models.latents import Latents, reconstructions

    whole = Latents(
        image_embed=torch.cat([part.image_embed for part in parts]),
        start=torch.cat([part.start for part in parts]),
    )
    return reconstructions(chain, _keys(config.seed, len(whole)), whole, sampling, eta)


def _names(config: ImagesConfig) -> list[str]:
    return [Path(path).stem for path in config.images]


def variations(config: VariationsConfig, chain: "UnClip", sampling: "Sampling") -> Rows:
    import torch

    found = _encoded(config, chain, sampling)
    exact = _decoded(config, chain, sampling, found)
    many = [part for part in found for _ in range(config.count)]
    varied = _decoded(config, chain, sampling, many, config.eta)
    varied = varied.unflatten(0, (len(found), -1))
    pixels = torch.cat([exact[:, None], varied], dim=1).flatten(0, 1)
    columns = ["image", *(f"{number + 1}" for number in range(config.count))]
    return Rows(pixels=pixels, rows=_names(config), columns=columns)


def _spread(last: float, count: int) -> list[float]:
    return [last * step / (count - 1) for step in range(count)]


def interpolate(config: InterpolateConfig, chain: "UnClip", sampling: "Sampling") -> Rows:
    from models.latents import blends

    found, names = _encoded(config, chain, sampling), _names(config)
    thetas = _spread(1.0, config.count)
    pairs = list(zip(found, found[1:], strict=False))
    parts = [blends(one, other, thetas, noise=config.noise) for one, other in pairs]
    return Rows(
        pixels=_decoded(config, chain, sampling, parts),
        rows=[f"{one} to {other}" for one, other in zip(names, names[1:], strict=False)],
        columns=[f"{theta:.2f}" for theta in thetas],
    )


def textdiff(config: TextDiffConfig, chain: "UnClip", sampling: "Sampling") -> Rows:
    from models.latents import text_diffs

    thetas = _spread(config.max_theta, config.count)
    parts = [
        text_diffs(chain, latents, config.caption, config.without, thetas)
        for latents in _encoded(config, chain, sampling)
    ]
    columns = [f"{theta:.2f}" for theta in thetas]
    return Rows(
        pixels=_decoded(config, chain, sampling, parts), rows=_names(config), columns=columns
    )


def pca(config: PcaConfig, chain: "UnClip", sampling: "Sampling") -> Rows:
    import torch

    from ingest.embed_statistics import EmbedStatistics
    from models.latents import pca_images

    statistics = EmbedStatistics.read(config.embeds)
    mean, basis = (torch.from_numpy(each.copy()).float() for each in
                   (statistics.mean, statistics.basis))  # fmt: skip
    if len(mean) != chain.clip.embed_dim:
        raise ValueError(
            f"{config.embeds}: found embeddings of {len(mean)} dimensions, expected "
            f"{chain.clip.embed_dim}: those of the decoder's encoder"
        )
    counts = [count for count in config.components if count < len(mean)] + [len(mean)]
    parts = [pca_images(one, mean, basis, counts) for one in _encoded(config, chain, sampling)]
    return Rows(
        pixels=_decoded(config, chain, sampling, parts),
        rows=_names(config),
        columns=[str(count) for count in counts],
    )


def inpaint(config: InpaintConfig, chain: "UnClip", sampling: "Sampling") -> Rows:
    import torch

    from models.latents import embed_images, pixels_of

    images, size = _opened(config.images), chain.base.image_size
    count = len(images) * config.count
    keys = _keys(config.seed, count)
    known = pixels_of(images, size).repeat_interleave(config.count, dim=0)
    mask = (pixels_of(_opened([config.mask]), size).mean(1, keepdim=True) < 0).float()
    mask = mask.expand(count, -1, -1, -1)
    if config.caption:
        captions = [config.caption] * count
        told = chain.condition(captions, chain.imagine(keys, captions, sampling))
    else:
        embed = embed_images(chain, images).repeat_interleave(config.count, dim=0)
        told = chain.wordless(embed)
    drawn = chain.draw(keys, told, sampling, known=(known, mask)).cpu()
    rows = known.unflatten(0, (len(images), -1))[:, :1], drawn.unflatten(0, (len(images), -1))
    columns = ["image", *(f"{number + 1}" for number in range(config.count))]
    return Rows(pixels=torch.cat(rows, dim=1).flatten(0, 1), rows=_names(config), columns=columns)


def guidance(config: GuidanceConfig, chain: "UnClip", sampling: "Sampling") -> Rows:
    import torch

    captions, drawn = list(config.prompts), []
    keys = _keys(config.seed, len(captions))
    embed = chain.imagine(keys, captions, sampling)
    told = chain.condition(captions, embed)
    for scale in config.scales:
        options = dataclasses.replace(sampling.decoder, cfg_scale=scale)
        drawn.append(chain.draw(keys, told, dataclasses.replace(sampling, decoder=options)))
    columns = [f"{scale:g}" for scale in config.scales]
    return Rows(pixels=torch.stack(drawn, dim=1).flatten(0, 1), rows=captions, columns=columns)


COMMANDS: dict[str, tuple[type[EditConfig], Callable[[Any, Any, Any], Rows]]] = {
    "variations": (VariationsConfig, variations),
    "interpolate": (InterpolateConfig, interpolate),
    "textdiff": (TextDiffConfig, textdiff),
    "inpaint": (InpaintConfig, inpaint),
    "pca": (PcaConfig, pca),
    "guidance": (GuidanceConfig, guidance),
}


def _write(command: str, config: EditConfig, found: Rows) -> None:
    """Write every image, a labelled grid, and a line for each of what made it."""
    from PIL import Image

    from training.pictures import grid, save_png, to_uint8

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    pixels, width = to_uint8(found.pixels), len(found.columns)
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    lines = []
    for number, image in enumerate(pixels):
        row, column = divmod(number, width)
        name = f"{row:03d}_{column:03d}.png"
        Image.fromarray(image).save(out / name)
        place = {"file": name, "row": found.rows[row], "column": found.columns[column]}
        lines.append({**place, "command": command, "settings": settings})
    table = [list(pixels[start : start + width]) for start in range(0, len(pixels), width)]
    save_png(out / "grid.png", grid(table, found.rows, found.columns))
    (out / EDITS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
