"""Sub-commands of eval/sample.py: edits of an image by its unCLIP latents.

python eval/sample.py variations --images cat.png --decoder runs/base
python eval/sample.py interpolate --images cat.png dog.png --decoder runs/base
python eval/sample.py textdiff --images cat.png --caption "a winter cat" --without "a cat"
python eval/sample.py inpaint --images cat.png --mask hat.png --caption "a cat in a hat"
python eval/sample.py pca --images cat.png --embeds data/embeds
python eval/sample.py guidance --prompts "a red cube" --prior runs/prior --decoder runs/base
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction

from cluster.base.cli import require_at_least
from cluster.base.files import write_text
from cluster.base.machine import threads_for
from eval.sampling.options import DrawingOptions, ImageOptions, PriorOptions
from training.engine.precision import Precision, settled

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from models.latents import Latents
    from models.unclip import Sampling, UnClip

EDITS_NAME = "edits.jsonl"


# -- what each sub-command is asked for ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EditConfig(ImageOptions, DrawingOptions):
    """What every sub-command takes. Images are cut square; those of the grid are one a row."""

    clip: str = ""
    """encoder; empty = the one the decoder was trained on"""
    out: str = "edits"
    """folder of the images, grid.png and edits.jsonl; written over"""
    seed: int = 0
    """of all noise"""
    decoder_steps: int = 50
    """sampling steps of the decoder, and of its inversion"""
    precision: Precision = "fp32"
    """of the networks; inversion wants fp32"""


@dataclass(frozen=True, kw_only=True)
class ImagineConfig(EditConfig, PriorOptions):
    """What the sub-commands take that ask a prior."""

    prior: str = ""
    """finished run of training/prior.py"""


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
    """Draw part of images again, given their own embedding or, with a prior, a caption's."""

    mask: str = ""
    """image file: white where to draw, black where to keep; one for all images"""
    caption: str = ""
    """of the complete image as it is to become; needs a prior"""
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
    """how many of them, one an image; the complete embedding follows"""


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig(ImagineConfig):
    """Draw captions at several scales of the decoder's guidance, from one z_i each (figure 9)."""

    prompts: Annotated[tuple[str, ...], UseAppendAction] = ()
    """caption to draw; repeatable"""
    prior: str = "runs/prior"
    """finished run of training/prior.py"""
    scales: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
    """scales, one an image"""


# -- the sub-commands ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EditRows:
    """The images of an edit, pixels [R * C, 3, S, S] row by row, and the names of rows, columns."""

    pixels: "Tensor"
    rows: list[str]
    columns: list[str]


def run_edit(command: str, config: EditConfig) -> int:
    """Run a sub-command and write its images."""
    import torch
    from PIL import Image

    from eval.features.devices import device_named
    from eval.sampling.chain import load_chain
    from eval.sampling.generate import sampling_of
    from training.tasks.pictures import grid, save_png, to_uint8

    torch.set_num_threads(threads_for(config.num_threads))
    device = device_named(config.device)
    config = dataclasses.replace(config, precision=settled(config.precision, device.type))
    settings = {**vars(config), "sampler": "ddim"}
    _check(config)
    runs = (config.clip, getattr(config, "prior", ""), config.decoder, config.upsampler)
    chain = load_chain(*runs, device=config.device)
    sampling = sampling_of(settings)
    edit = COMMANDS[command][1](config, chain, sampling)
    keys = _keys(config.seed, len(edit.pixels))
    enlarged = _in_batches(
        config.batch_size,
        len(keys),
        lambda batch: chain.upsample(keys[batch], edit.pixels[batch], sampling),
    )

    # Every image, a line for each with its settings, and a labelled grid
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    pixels, width = to_uint8(enlarged), len(edit.columns)
    options = dataclasses.asdict(config)
    lines = []
    for number, image in enumerate(pixels):
        row, column = divmod(number, width)
        name = f"{row:03d}_{column:03d}.png"
        Image.fromarray(image).save(out / name)
        place = {"file": name, "row": edit.rows[row], "column": edit.columns[column]}
        record = {**place, "command": command, "settings": options}
        lines.append(json.dumps(record) + "\n")
    table = [list(pixels[start : start + width]) for start in range(0, len(pixels), width)]
    save_png(out / "grid.png", grid(table, edit.rows, edit.columns))
    write_text(out / EDITS_NAME, "".join(lines))
    print(f"{command}: {len(pixels)} images -> {config.out}")
    return 0


def _check(config: EditConfig) -> None:
    """Raise ValueError for the first option that is absent or out of its range."""
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
    if isinstance(config, TextDiffConfig):
        if not config.caption:
            raise ValueError("--caption: found none, expected what the images are to become")
        if not 0 < config.max_theta <= 1:
            raise ValueError(
                f"--max-theta: found {config.max_theta:g}, expected more than 0 and at most 1"
            )
    if isinstance(config, InpaintConfig):
        if not config.mask:
            raise ValueError("--mask: found none, expected an image file, white where to draw")
        if bool(config.caption) != bool(config.prior):
            raise ValueError("found one of --caption and --prior, expected both or none")
    has_ends = isinstance(config, (InterpolateConfig, TextDiffConfig))
    bounds = {"count": 2 if has_ends else 1, "decoder_steps": 1, "upsampler_steps": 1,
              "prior_steps": 1, "batch_size": 1, "num_threads": 1}  # fmt: skip
    require_at_least(config, **{k: v for k, v in bounds.items() if hasattr(config, k)})


def _open_images(paths: Sequence[str]) -> "list[Image]":
    """Open images upright, as the download stores them."""
    from PIL import Image, ImageOps

    images = []
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"{path}: found no such file, expected an image")
        try:
            with Image.open(path) as image:
                images.append(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: found no image: {error}") from None
    return images


def _keys(seed: int, count: int) -> "Tensor":
    """Return the random key int64 [count] of each image, by its place in the grid."""
    import torch

    from models.diffusion.keyed_random import sample_keys

    places = torch.arange(count, dtype=torch.int64)
    return sample_keys(seed, torch.zeros_like(places), places)


def _in_batches(size: int, count: int, make: "Callable[[slice], Tensor]") -> "Tensor":
    """Concatenate what `make` returns for each batch of `count` rows, on the CPU.

    Noise is keyed by the place among all rows, so that no batch size changes a row.
    """
    import torch

    batches = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return torch.cat([make(batch).cpu() for batch in batches])


def _encoded(config: ImagesConfig, chain: "UnClip", sampling: "Sampling") -> "list[Latents]":
    from models.latents import encode

    images, size = _open_images(config.images), config.batch_size
    rows = []
    for start in range(0, len(images), size):
        latents = encode(chain, images[start : start + size], sampling)
        rows += [latents.row(number) for number in range(len(latents))]
    return rows


def _decoded(
    config: EditConfig, chain: "UnClip", sampling: "Sampling", latents: "Sequence[Latents]",
    eta: float = 0.0,
) -> "Tensor":  # fmt: skip
    import torch

    from models.latents import Latents, reconstructions

    embeds = torch.cat([each.image_embed for each in latents])
    starts = torch.cat([each.start for each in latents])
    keys = _keys(config.seed, len(embeds))

    def draw(batch: slice) -> "Tensor":
        of_batch = Latents(image_embed=embeds[batch], start=starts[batch])
        return reconstructions(chain, keys[batch], of_batch, sampling, eta)

    return _in_batches(config.batch_size, len(keys), draw)


def _names(config: ImagesConfig) -> list[str]:
    return [Path(path).stem for path in config.images]


def variations(config: VariationsConfig, chain: "UnClip", sampling: "Sampling") -> EditRows:
    """Reconstruct each image, then decode it with fresh noise at every step."""
    import torch

    latents = _encoded(config, chain, sampling)
    exact = _decoded(config, chain, sampling, latents)
    repeated = [each for each in latents for _ in range(config.count)]
    varied = _decoded(config, chain, sampling, repeated, config.eta)
    varied = varied.unflatten(0, (len(latents), -1))
    pixels = torch.cat([exact[:, None], varied], dim=1).flatten(0, 1)
    columns = ["image", *(f"{number + 1}" for number in range(config.count))]
    return EditRows(pixels=pixels, rows=_names(config), columns=columns)


def _spread(last: float, count: int) -> list[float]:
    return [last * step / (count - 1) for step in range(count)]


def interpolate(config: InterpolateConfig, chain: "UnClip", sampling: "Sampling") -> EditRows:
    """Blend the latents of each image with those of the next."""
    from models.latents import blends

    thetas = _spread(1.0, config.count)
    pairs = itertools.pairwise(_encoded(config, chain, sampling))
    latents = [blends(first, second, thetas, noise=config.noise) for first, second in pairs]
    return EditRows(
        pixels=_decoded(config, chain, sampling, latents),
        rows=[f"{first} to {second}" for first, second in itertools.pairwise(_names(config))],
        columns=[f"{theta:.2f}" for theta in thetas],
    )


def textdiff(config: TextDiffConfig, chain: "UnClip", sampling: "Sampling") -> EditRows:
    """Rotate each image embedding toward the difference of two captions."""
    from models.latents import text_diffs

    thetas = _spread(config.max_theta, config.count)
    latents = [
        text_diffs(chain, each, config.caption, config.without, thetas)
        for each in _encoded(config, chain, sampling)
    ]
    columns = [f"{theta:.2f}" for theta in thetas]
    return EditRows(
        pixels=_decoded(config, chain, sampling, latents), rows=_names(config), columns=columns
    )


def pca(config: PcaConfig, chain: "UnClip", sampling: "Sampling") -> EditRows:
    """Decode each image embedding from its first principal components."""
    import torch

    from ingest.embedding.statistics import EmbedStatistics
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
    latents = [
        pca_images(each, mean, basis, counts) for each in _encoded(config, chain, sampling)
    ]
    return EditRows(
        pixels=_decoded(config, chain, sampling, latents),
        rows=_names(config),
        columns=[str(count) for count in counts],
    )


def inpaint(config: InpaintConfig, chain: "UnClip", sampling: "Sampling") -> EditRows:
    """Draw the masked part of each image again."""
    import torch

    from models.latents import embed_images, pixels_of

    images, size = _open_images(config.images), chain.base.image_size
    count = len(images) * config.count
    keys = _keys(config.seed, count)
    known = pixels_of(images, size).repeat_interleave(config.count, dim=0)
    mask = (pixels_of(_open_images([config.mask]), size).mean(1, keepdim=True) < 0).float()

    def draw(batch: slice) -> "Tensor":
        captions = [config.caption] * (batch.stop - batch.start)
        if config.caption:
            image_embed = chain.sample_prior(keys[batch], captions, sampling)
            condition = chain.condition(captions, image_embed)
        else:
            own = [images[number // config.count] for number in range(batch.start, batch.stop)]
            condition = chain.condition(None, embed_images(chain, own))
        masks = mask.expand(len(captions), -1, -1, -1)
        return chain.sample_base(keys[batch], condition, sampling, known=(known[batch], masks))

    drawn = _in_batches(config.batch_size, count, draw)
    rows = known.unflatten(0, (len(images), -1))[:, :1], drawn.unflatten(0, (len(images), -1))
    columns = ["image", *(f"{number + 1}" for number in range(config.count))]
    pixels = torch.cat(rows, dim=1).flatten(0, 1)
    return EditRows(pixels=pixels, rows=_names(config), columns=columns)


def guidance(config: GuidanceConfig, chain: "UnClip", sampling: "Sampling") -> EditRows:
    """Decode one image embedding per caption at several guidance scales."""
    import torch

    captions = list(config.prompts)
    keys = _keys(config.seed, len(captions))

    def draw(batch: slice) -> "Tensor":
        image_embed = chain.sample_prior(keys[batch], captions[batch], sampling)
        condition = chain.condition(captions[batch], image_embed)
        drawn = []
        for scale in config.scales:
            options = dataclasses.replace(sampling.decoder, cfg_scale=scale)
            scaled = dataclasses.replace(sampling, decoder=options)
            drawn.append(chain.sample_base(keys[batch], condition, scaled))
        return torch.stack(drawn, dim=1)

    drawn = _in_batches(config.batch_size, len(captions), draw)
    columns = [f"{scale:g}" for scale in config.scales]
    return EditRows(pixels=drawn.flatten(0, 1), rows=captions, columns=columns)


COMMANDS: dict[str, tuple[type[EditConfig], Callable[[Any, Any, Any], EditRows]]] = {
    "variations": (VariationsConfig, variations),
    "interpolate": (InterpolateConfig, interpolate),
    "textdiff": (TextDiffConfig, textdiff),
    "inpaint": (InpaintConfig, inpaint),
    "pca": (PcaConfig, pca),
    "guidance": (GuidanceConfig, guidance),
}
