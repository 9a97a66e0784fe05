"""How images are drawn: the options of sampling, once; no torch here, so that --help is quick."""

import math
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import UseAppendAction

from cluster.base.options import Option, require_bounds
from models.configs import SpacingChoice
from training.engine.precision import Precision


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """What every command that draws takes: which finished runs draw, and where."""

    decoder: str = "runs/base"
    """finished run of training/decoder.py --stage base"""
    upsampler: Annotated[tuple[str, ...], UseAppendAction] = ()
    """finished run of an upsampler, in order of the cascade; repeatable"""
    batch_size: int = 50
    """images at once; changes memory and speed, not the images"""
    device: str = "auto"
    """auto: a GPU where there is one; cpu, cuda or cuda:N"""
    num_threads: int | None = None
    """threads on the CPU; None: all cores of this machine"""


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How the decoder and upsamplers draw."""

    decoder_steps: Annotated[int, Option(least=1)] = 16
    """sampling steps of the decoder"""
    upsampler_steps: Annotated[int, Option(least=1)] = 8
    """sampling steps of an upsampler"""
    upsampler_tile: Annotated[int, Option(least=0)] = 0
    """side in px of the overlapping tiles in which an upsampler works, where its complete image
    does not fit the memory; 0 = no tiles"""
    precision: Precision = "auto"
    """of the networks; auto: bf16 where the device computes in it"""


@dataclass(frozen=True, kw_only=True)
class PriorOptions:
    """How a prior draws."""

    prior_steps: Annotated[int, Option(least=1)] = 16
    """sampling steps of the prior"""
    prior_cfg_scale: float = 1.5
    """guidance of the prior; 1 = off, as in the paper"""
    best_of: Annotated[int, Option(least=1)] = 2
    """draws of a diffusion prior, of which the one nearest to the caption is kept"""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(PriorOptions, ImageOptions):
    """How images are drawn, in words that a command line and a record of samples hold.

    The paper did not guide its prior (section 3.2); on the drawn set a little guidance helps
    (`benchmarks/results.md`).
    """

    sampler: str = "dpmpp_2m"
    """sampler of the decoder: ddim, ddpm, heun, dpmpp_2m, or learned_ddpm, the paper's, for one
    that learned its variance"""
    upsampler_sampler: str = ""
    """sampler of upsamplers: the same but the last; empty = the decoder's"""
    spacing: SpacingChoice = "auto"
    """timesteps that samplers visit: trailing; strided, the paper's; karras, more of them at both
    ends; auto: karras for heun and dpmpp_2m, trailing for the others"""
    prior_sampler: str = "ddpm"
    """sampler of a diffusion prior: those, or analytic_ddpm, the paper's"""
    cfg_scale: float = 1.5
    """guidance of the decoder; 1 = off"""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """shares of the noising time in which to guide the decoder; 0 is the clean end"""
    guidance_rescale: float = 0.0
    """share of the decoder's result that gets the standard deviation back that guidance took"""
    temperature: Annotated[float, Option(least=0)] = 1.0
    """of an autoregressive prior's codes; 0 = no draw: each code at its expected value, which is
nearer to the image than a draw"""
    top_share: float = 0.5
    """an autoregressive prior draws its dot-product token from this top part of its distribution"""
    mean_of: Annotated[int, Option(least=1)] = 1
    """draws of an autoregressive prior whose mean is taken: nearer to the image, and less varied"""

    def __post_init__(self) -> None:
        require_bounds(self)
        for name in ("cfg_scale", "prior_cfg_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a finite number")
        if not 0 < self.top_share <= 1:
            raise ValueError(
                f"top_share: found {self.top_share}, expected more than 0 and at most 1"
            )


@dataclass(frozen=True, kw_only=True)
class SeededSampling(SamplingSettings):
    """All options that a sample depends on beside its caption and the weights."""

    seed: int = 0
    """of all noise"""
