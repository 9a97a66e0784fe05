"""Images for captions, in batches; an image depends on its seed, its caption and its place in the
list, never on its batch."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from models.configs import SpacingChoice
from models.decoder import ImageSampling
from models.diffusion.keyed_random import sample_keys
from models.diffusion.samplers import SAMPLERS, Sampler, default_spacing, sampler_named
from models.priors.base import PriorSampling
from models.unclip import Sampling, UnClip
from training.engine.precision import Precision, settled
from training.tasks.pictures import to_uint8


def caption_keys(captions: list[str], seed: int, offset: int = 0) -> Tensor:
    """Return the random key int64 [B] of each (seed, caption, place in the list): repeats of a
    caption differ, and so does a caption at another place."""
    words = torch.tensor([zlib.crc32(c.encode()) for c in captions], dtype=torch.int64)
    places = torch.arange(offset, offset + len(captions), dtype=torch.int64)
    return sample_keys(seed, places, words)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How images are drawn, in words that a command line and a record of samples hold.

    The paper did not guide its prior (section 3.2); on the drawn set a little guidance helps
    (`benchmarks/results.md`).
    """

    sampler: str = "dpmpp_2m"
    prior_sampler: str = "ddpm"
    upsampler_sampler: str = ""
    spacing: SpacingChoice = "auto"
    prior_steps: int = 16
    decoder_steps: int = 16
    upsampler_steps: int = 8
    upsampler_tile: int = 0
    cfg_scale: float = 1.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    prior_cfg_scale: float = 1.5
    best_of: int = 2
    temperature: float = 1.0
    top_share: float = 0.5
    mean_of: int = 1
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        steps = ("prior_steps", "decoder_steps", "upsampler_steps", "best_of", "mean_of")
        for name, least in (*((name, 1) for name in steps), ("upsampler_tile", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected {least} or more")
        for name in ("cfg_scale", "prior_cfg_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a finite number")
        if not self.temperature >= 0:
            raise ValueError(f"temperature: found {self.temperature}, expected 0 or more")
        if not 0 < self.top_share <= 1:
            raise ValueError(
                f"top_share: found {self.top_share}, expected more than 0 and at most 1"
            )

    def build(self, device_type: str = "cpu") -> Sampling:
        """Return the settings of the three parts, for networks on such a device; ValueError for an
        unknown sampler."""
        learned: Any = "learned_ddpm"
        base = learned if self.sampler == learned else sampler_named(self.sampler)
        if not self.upsampler_sampler and self.sampler == learned:
            raise ValueError(
                "upsampler_sampler: found none with sampler learned_ddpm, which upsamplers do not "
                f"have, expected one of {', '.join(SAMPLERS)}"
            )
        name_above = self.upsampler_sampler or self.sampler
        enlarging = sampler_named(name_above)
        return Sampling(
            prior=PriorSampling(
                sampler=_prior_sampler(self.prior_sampler),
                sample_steps=self.prior_steps,
                spacing=default_spacing(self.spacing, self.prior_sampler),
                best_of=self.best_of,
                cfg_scale=self.prior_cfg_scale,
                temperature=self.temperature,
                top_share=self.top_share,
                mean_of=self.mean_of,
            ),
            decoder=ImageSampling(
                sampler=base,
                sample_steps=self.decoder_steps,
                spacing=default_spacing(self.spacing, self.sampler),
                cfg_scale=self.cfg_scale,
                guidance_interval=self._interval(),
                guidance_rescale=self.guidance_rescale,
            ),
            upsampler=ImageSampling(
                sampler=enlarging,
                sample_steps=self.upsampler_steps,
                spacing=default_spacing(self.spacing, name_above),
                tile=self.upsampler_tile,
            ),
            precision=settled(self.precision, device_type),
        )

    def _interval(self) -> tuple[float, float] | None:
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"guidance_interval: found {low:g} {high:g}, expected 0 <= low < high <= 1, shares "
                "of the noising time"
            )
        return None if (low, high) == (0, 1) else (low, high)


def default_sampling(device_type: str = "cpu") -> Sampling:
    """Return the default settings of the three parts, for networks on such a device."""
    return SamplingSettings().build(device_type)


def _prior_sampler(name: str) -> Sampler | Literal["analytic_ddpm"]:
    """Return a prior's sampler; Analytic-DPM's takes its variances from the prior's own data."""
    if name == "analytic_ddpm":
        return "analytic_ddpm"
    if name not in SAMPLERS:
        known = ", ".join([*SAMPLERS, "analytic_ddpm"])
        raise ValueError(f"prior_sampler: found {name!r}, expected one of {known}")
    return SAMPLERS[name]


def sampling_of(settings: Mapping[str, Any]) -> Sampling:
    """Return the default settings with what `settings` says otherwise; other keys are left
    alone."""
    known = [field.name for field in fields(SamplingSettings)]
    told = {name: settings[name] for name in known if name in settings}
    return SamplingSettings(**told).build()


def render_all(
    chain: UnClip,
    captions: list[str],
    image_embed: Tensor | None,
    sampling: Sampling,
    *,
    seed: int = 0,
    batch_size: int = 50,
    offset: int = 0,
) -> np.ndarray:
    """Return uint8 [N, H, W, 3]; image_embed [N, E] to decode, or None for the prior's own.

    offset: place of the first caption in its list, which its noise is keyed by.
    """
    parts = []
    for start in range(0, len(captions), batch_size):
        part = captions[start : start + batch_size]
        keys = caption_keys(part, seed, offset + start)
        given = None if image_embed is None else image_embed[start : start + batch_size]
        z = chain.sample_prior(keys, part, sampling) if given is None else given
        parts.append(to_uint8(chain.render(keys, part, z, sampling)))
    return np.concatenate(parts)
