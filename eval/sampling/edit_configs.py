"""What the sub-commands of eval/sample.py that edit images are asked for."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import UseAppendAction

from eval.sampling.options import DrawingOptions, ImageOptions, PriorOptions
from training.engine.precision import Precision


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
