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
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction

from cluster.base.cli import require_at_least
from cluster.base.files import write_text
from cluster.base.machine import threads_for
from eval.sampling.image_source import EDITS_NAME, GRID_NAME
from eval.sampling.options import DrawingOptions, ImageOptions, PriorOptions
from training.engine.precision import Precision, settled

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from models.latents import Latents
    from models.unclip import Sampling, UnClip

@dataclass(frozen=True, kw_only=True)
class EditRows:
    """The images of an edit, pixels [R * C, 3, S, S] row by row, and the names of rows, columns."""

    pixels: "Tensor"
    rows: list[str]
    columns: list[str]


# -- what sub-commands share -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Edit(ImageOptions, DrawingOptions):
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

    def _check(self) -> None:
        out = Path(self.out)
        if out.is_dir() and any(out.iterdir()) and not (out / EDITS_NAME).is_file():
            raise ValueError(
                f"{out}: found a folder without {EDITS_NAME}, expected edits or nothing"
            )
        bounds = ("decoder_steps", "upsampler_steps", "prior_steps", "count", "batch_size")
        own = {name: 1 for name in bounds if hasattr(self, name)}
        require_at_least(self, **own, num_threads=1)

    def draw(self, chain: "UnClip", sampling: "Sampling") -> EditRows:
        """Draw the images of the grid, before upsampling."""
        raise NotImplementedError

    def keys(self, count: int) -> "Tensor":
        """Return the random key int64 [count] of each image, by its place in the grid."""
        import torch

        from models.diffusion.keyed_random import sample_keys

        places = torch.arange(count, dtype=torch.int64)
        return sample_keys(self.seed, torch.zeros_like(places), places)

    def in_batches(self, count: int, make: "Callable[[slice], Tensor]") -> "Tensor":
        """Concatenate what `make` returns for each batch of `count` rows, on the CPU.

        Noise is keyed by the place among all rows, so that no batch size changes a row.
        """
        import torch

        size = self.batch_size
        batches = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        return torch.cat([make(batch).cpu() for batch in batches])


@dataclass(frozen=True, kw_only=True)
class PriorEdit(Edit, PriorOptions):
    """What the sub-commands take that ask a prior."""

    prior: str = ""
    """finished run of training/prior.py"""


@dataclass(frozen=True, kw_only=True)
class ImagesEdit(Edit):
    """What the sub-commands take that begin with images."""

    images: tuple[str, ...] = ()
    """image files"""

    def _check(self) -> None:
        super()._check()
        if not self.images:
            raise ValueError("--images: found none, expected at least one image file")

    @property
    def names(self) -> list[str]:
        """What the rows of the grid are called."""
        return [Path(path).stem for path in self.images]

    def encoded(
        self, chain: "UnClip", sampling: "Sampling", *, with_tokens: bool = True
    ) -> "list[Latents]":
        """Return the latents of each image, with the tokens that the decoder reads or without."""
        from models.latents import encode

        images, size = open_images(self.images), self.batch_size
        batches = (images[start : start + size] for start in range(0, len(images), size))
        encoded = (encode(chain, batch, sampling, with_tokens=with_tokens) for batch in batches)
        return [latents.row(number) for latents in encoded for number in range(len(latents))]

    def decoded(
        self, chain: "UnClip", sampling: "Sampling", latents: "Sequence[Latents]", eta: float = 0.0
    ) -> "Tensor":
        """Return the images of latents, in order; eta: share of fresh noise at each step."""
        import torch

        from models.latents import Latents, reconstructions

        embeds = torch.cat([each.image_embed for each in latents])
        starts = torch.cat([each.start for each in latents])
        keys = self.keys(len(embeds))

        def make(batch: slice) -> "Tensor":
            of_batch = Latents(image_embed=embeds[batch], start=starts[batch])
            return reconstructions(chain, keys[batch], of_batch, sampling, eta)

        return self.in_batches(len(keys), make)

    def beside_images(self, first: "Tensor", others: "Tensor", count: int) -> EditRows:
        """Return a row an image: itself, then `count` draws of it."""
        import torch

        pixels = torch.cat([first[:, None], others.unflatten(0, (len(first), -1))], dim=1)
        columns = ["image", *(f"{number + 1}" for number in range(count))]
        return EditRows(pixels=pixels.flatten(0, 1), rows=self.names, columns=columns)


def open_images(paths: Sequence[str]) -> "list[Image]":
    """Open images as the download stores them: upright, over white. ValueError names a bad one."""
    from ingest.fetching.decode import stored_picture

    return [_opened(path, stored_picture) for path in paths]


def open_mask(path: str) -> "Image":
    """Open a mask as grey, white where to draw; a transparent part is where to draw."""
    from PIL import ImageOps

    from ingest.fetching.decode import stored_picture
    from ingest.fetching.formats import open_complete

    def mask_of(data: bytes) -> "Image":
        with open_complete(data) as image:
            image.load()
            alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
        opaque = alpha.getextrema()[0] == 255
        return stored_picture(data).convert("L") if opaque else ImageOps.invert(alpha)

    return _opened(path, mask_of)


def _opened(path: str, decode: "Callable[[bytes], Image]") -> "Image":
    from PIL.Image import DecompressionBombError

    from ingest.fetching.decode import BAD_BYTES

    if not Path(path).is_file():
        raise ValueError(f"{path}: found no such file, expected an image")
    try:
        return decode(Path(path).read_bytes())
    except (*BAD_BYTES, DecompressionBombError) as error:
        raise ValueError(f"{path}: found no image: {error}") from None


# -- the sub-commands ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Variations(ImagesEdit):
    """Vary what z_i leaves open: DDIM from the image's own x_T, with fresh noise (figure 3)."""

    count: int = 5
    """variations of each image, after its reconstruction"""
    eta: float = 1.0
    """share of fresh noise at each step; 0 = the image itself"""

    def draw(self, chain: "UnClip", sampling: "Sampling") -> EditRows:
        """Reconstruct each image, then decode it with fresh noise at every step."""
        latents = self.encoded(chain, sampling)
        exact = self.decoded(chain, sampling, latents)
        repeated = [each for each in latents for _ in range(self.count)]
        varied = self.decoded(chain, sampling, repeated, self.eta)
        return self.beside_images(exact, varied, self.count)


@dataclass(frozen=True, kw_only=True)
class Interpolate(ImagesEdit):
    """Blend from each image to the next (figure 4)."""

    count: int = 7
    """images of a row, ends included"""
    noise: bool = True
    """blend x_T as well, so that the ends are the images; else it is the first one's"""

    def _check(self) -> None:
        super()._check()
        require_at_least(self, count=2)
        if len(self.images) < 2:
            raise ValueError("--images: found one, expected two or more to blend between")

    def draw(self, chain: "UnClip", sampling: "Sampling") -> EditRows:
        """Blend the latents of each image with those of the next."""
        from models.latents import blends

        thetas = _spread(1.0, self.count)
        pairs = itertools.pairwise(self.encoded(chain, sampling))
        latents = [blends(first, second, thetas, noise=self.noise) for first, second in pairs]
        return EditRows(
            pixels=self.decoded(chain, sampling, latents),
            rows=[f"{first} to {second}" for first, second in itertools.pairwise(self.names)],
            columns=[f"{theta:.2f}" for theta in thetas],
        )


def _spread(last: float, count: int) -> list[float]:
    return [last * step / (count - 1) for step in range(count)]


@dataclass(frozen=True, kw_only=True)
class TextDiff(ImagesEdit):
    """Turn images toward what one caption says beyond another (figure 5)."""

    caption: str = ""
    """what they are to become"""
    without: str = ""
    """what they are, or a plain caption such as "a photo"; empty = nothing"""
    max_theta: float = 0.4
    """how far at the end of the row, of 1; the paper's are .25 to .5"""
    count: int = 5
    """images of a row, the image itself included"""

    def _check(self) -> None:
        super()._check()
        require_at_least(self, count=2)
        if not self.caption:
            raise ValueError("--caption: found none, expected what the images are to become")
        if not 0 < self.max_theta <= 1:
            raise ValueError(
                f"--max-theta: found {self.max_theta:g}, expected more than 0 and at most 1"
            )

    def draw(self, chain: "UnClip", sampling: "Sampling") -> EditRows:
        """Rotate each image embedding toward the difference of two captions."""
        from models.latents import text_diffs

        thetas = _spread(self.max_theta, self.count)
        latents = [
            text_diffs(chain, each, self.caption, self.without, thetas)
            for each in self.encoded(chain, sampling, with_tokens=False)
        ]
        columns = [f"{theta:.2f}" for theta in thetas]
        pixels = self.decoded(chain, sampling, latents)
        return EditRows(pixels=pixels, rows=self.names, columns=columns)


@dataclass(frozen=True, kw_only=True)
class Inpaint(ImagesEdit, PriorEdit):
    """Draw part of images again, given their own embedding or, with a prior, a caption's."""

    mask: str = ""
    """image file: white where to draw, black where to keep, or transparent where to draw; one for
    all images"""
    caption: str = ""
    """of the complete image as it is to become; needs a prior"""
    cfg_scale: float = 1.5
    """guidance of the decoder; 1 = off"""
    count: int = 4
    """draws of each image"""

    def _check(self) -> None:
        super()._check()
        if not self.mask:
            raise ValueError("--mask: found none, expected an image file, white where to draw")
        if bool(self.caption) != bool(self.prior):
            raise ValueError("found one of --caption and --prior, expected both or none")

    def draw(self, chain: "UnClip", sampling: "Sampling") -> EditRows:
        """Draw the masked region of each image again."""
        from models.latents import embed_images, pixels_of

        images, size = open_images(self.images), chain.base.image_size
        keys = self.keys(len(images) * self.count)
        pixels = pixels_of(images, size)
        known = pixels.repeat_interleave(self.count, dim=0)
        mask = (pixels_of([open_mask(self.mask)], size).mean(1, keepdim=True) < 0).float()
        if not (mask == 0).any():
            raise ValueError(f"{self.mask}: found nothing white, expected white where to draw")

        def make(batch: slice) -> "Tensor":
            captions = [self.caption] * (batch.stop - batch.start)
            if self.caption:
                image_embed = chain.sample_prior(keys[batch], captions, sampling)
                condition = chain.condition(captions, image_embed)
            else:
                own = [images[number // self.count] for number in range(batch.start, batch.stop)]
                condition = chain.condition(None, embed_images(chain, own))
            masks = mask.expand(len(captions), -1, -1, -1)
            return chain.sample_base(keys[batch], condition, sampling, known=(known[batch], masks))

        return self.beside_images(pixels, self.in_batches(len(keys), make), self.count)


@dataclass(frozen=True, kw_only=True)
class Pca(ImagesEdit):
    """Draw images from the first principal components of their embeddings (figure 7)."""

    embeds: str = "data/embeds"
    """folder of the embeddings whose components these are"""
    components: tuple[int, ...] = (20, 30, 40, 80, 120, 160, 200, 320)
    """how many of them, one an image; the complete embedding follows"""

    def _check(self) -> None:
        super()._check()
        if min(self.components, default=1) < 1:
            raise ValueError(f"--components: found {min(self.components)}, expected 1 or more")

    def draw(self, chain: "UnClip", sampling: "Sampling") -> EditRows:
        """Decode each image embedding from its first principal components."""
        import torch

        from ingest.embedding.statistics import EmbedStatistics
        from models.latents import pca_images

        statistics = EmbedStatistics.read(self.embeds)
        mean, basis = (torch.from_numpy(each.copy()).float() for each in
                       (statistics.mean, statistics.basis))  # fmt: skip
        if len(mean) != chain.clip.embed_dim:
            raise ValueError(
                f"{self.embeds}: found embeddings of {len(mean)} dimensions, expected "
                f"{chain.clip.embed_dim}: those of the decoder's encoder"
            )
        counts = [count for count in self.components if count < len(mean)] + [len(mean)]
        encoded = self.encoded(chain, sampling, with_tokens=False)
        latents = [pca_images(each, mean, basis, counts) for each in encoded]
        pixels = self.decoded(chain, sampling, latents)
        return EditRows(pixels=pixels, rows=self.names, columns=[str(count) for count in counts])


@dataclass(frozen=True, kw_only=True)
class Guidance(PriorEdit):
    """Draw captions at several scales of the decoder's guidance, from one z_i each (figure 9)."""

    prompts: Annotated[tuple[str, ...], UseAppendAction] = ()
    """caption to draw; repeatable"""
    prior: str = "runs/prior"
    """finished run of training/prior.py"""
    scales: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
    """scales, one an image"""

    def _check(self) -> None:
        super()._check()
        if not (self.prompts and self.scales):
            flag = "scales" if self.prompts else "prompts"
            raise ValueError(f"--{flag}: found none, expected at least one")

    def draw(self, chain: "UnClip", sampling: "Sampling") -> EditRows:
        """Decode one image embedding per caption at several guidance scales."""
        import torch

        captions = list(self.prompts)
        keys = self.keys(len(captions))

        def make(batch: slice) -> "Tensor":
            image_embed = chain.sample_prior(keys[batch], captions[batch], sampling)
            condition = chain.condition(captions[batch], image_embed)
            drawn = []
            for scale in self.scales:
                options = dataclasses.replace(sampling.decoder, cfg_scale=scale)
                scaled = dataclasses.replace(sampling, decoder=options)
                drawn.append(chain.sample_base(keys[batch], condition, scaled))
            return torch.stack(drawn, dim=1)

        pixels = self.in_batches(len(captions), make).flatten(0, 1)
        columns = [f"{scale:g}" for scale in self.scales]
        return EditRows(pixels=pixels, rows=captions, columns=columns)


COMMANDS: dict[str, type[Edit]] = {
    "variations": Variations, "interpolate": Interpolate, "textdiff": TextDiff,
    "inpaint": Inpaint, "pca": Pca, "guidance": Guidance,
}  # fmt: skip


def run_edit(command: str, edit: Edit) -> int:
    """Run a sub-command and write its images."""
    import torch
    from PIL import Image

    from eval.features.devices import device_named
    from eval.sampling.chain import load_chain
    from eval.sampling.generate import sampling_of
    from training.tasks.pictures import grid, save_png, to_uint8

    torch.set_num_threads(threads_for(edit.num_threads))
    device = device_named(edit.device)
    edit = dataclasses.replace(edit, precision=settled(edit.precision, device.type))
    edit._check()  # the first option that is absent or out of its range is a ValueError
    runs = (edit.clip, getattr(edit, "prior", ""), edit.decoder, edit.upsampler)
    chain = load_chain(*runs, device=edit.device)
    sampling = sampling_of({**vars(edit), "sampler": "ddim"})
    drawn = edit.draw(chain, sampling)
    keys = edit.keys(len(drawn.pixels))
    pixels = to_uint8(edit.in_batches(
        len(keys), lambda batch: chain.upsample(keys[batch], drawn.pixels[batch], sampling)
    ))  # fmt: skip

    # Every image, a line for each with its settings, and a labelled grid
    out, width = Path(edit.out), len(drawn.columns)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, image in enumerate(pixels):
        row, column = divmod(number, width)
        name = f"{row:03d}_{column:03d}.png"
        Image.fromarray(image).save(out / name)
        lines.append(json.dumps({
            "file": name, "row": drawn.rows[row], "column": drawn.columns[column],
            "command": command, "settings": dataclasses.asdict(edit),
        }) + "\n")  # fmt: skip
    table = [list(pixels[start : start + width]) for start in range(0, len(pixels), width)]
    save_png(out / GRID_NAME, grid(table, drawn.rows, drawn.columns))
    write_text(out / EDITS_NAME, "".join(lines))
    print(f"{command}: {len(pixels)} images -> {edit.out}")
    return 0
