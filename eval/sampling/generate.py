"""Images for captions, in batches; an image depends on its seed, its caption and its place in the
list, never on its batch."""

import zlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.sampling.options import SamplingSettings
from models.decoder import ImageSampling
from models.diffusion.keyed_random import sample_keys
from models.diffusion.samplers import NEED_VARIANCE, SAMPLERS, Sampler, default_spacing
from models.priors.base import PriorSampling
from models.unclip import Sampling, UnClip
from training.engine.precision import settled
from training.tasks.pictures import to_uint8


def caption_keys(captions: list[str], seed: int, offset: int = 0) -> Tensor:
    """Return the random key int64 [B] of each (seed, caption, place in the list): repeats of a
    caption differ, and so does a caption at another place."""
    digests = torch.tensor([zlib.crc32(c.encode()) for c in captions], dtype=torch.int64)
    places = torch.arange(offset, offset + len(captions), dtype=torch.int64)
    return sample_keys(seed, places, digests)


def build_sampling(settings: SamplingSettings, device_type: str = "cpu") -> Sampling:
    """Return the settings of the three parts, for networks on such a device; ValueError for a
    sampler that is unknown, or that a part cannot have."""
    name_above = settings.upsampler_sampler or settings.sampler
    low, high = settings.guidance_interval
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"guidance_interval: found {low:g} {high:g}, expected 0 <= low < high <= 1, shares "
            "of the noising time"
        )
    interval = None if (low, high) == (0, 1) else (low, high)
    return Sampling(
        prior=PriorSampling(
            sampler=_sampler("prior_sampler", settings.prior_sampler, "learned_ddpm"),
            sample_steps=settings.prior_steps,
            spacing=default_spacing(settings.spacing, settings.prior_sampler),
            best_of=settings.best_of,
            cfg_scale=settings.prior_cfg_scale,
            temperature=settings.temperature,
            top_share=settings.top_share,
            mean_of=settings.mean_of,
        ),
        decoder=ImageSampling(
            sampler=_sampler("sampler", settings.sampler, "analytic_ddpm"),
            sample_steps=settings.decoder_steps,
            spacing=default_spacing(settings.spacing, settings.sampler),
            cfg_scale=settings.cfg_scale,
            guidance_interval=interval,
            guidance_rescale=settings.guidance_rescale,
        ),
        upsampler=ImageSampling(
            sampler=_sampler("upsampler_sampler", name_above, *NEED_VARIANCE),
            sample_steps=settings.upsampler_steps,
            spacing=default_spacing(settings.spacing, name_above),
            tile=settings.upsampler_tile,
        ),
        precision=settled(settings.precision, device_type),
    )


def default_sampling(device_type: str = "cpu") -> Sampling:
    """Return the default settings of the three parts, for networks on such a device."""
    return build_sampling(SamplingSettings(), device_type)


def _sampler(option: str, name: str, *lacking: str) -> Sampler:
    """Return the sampler called `name`, of a part that has not what those `lacking` need."""
    known = [each for each in SAMPLERS if each not in lacking]
    if name not in known:
        raise ValueError(f"{option}: found {name!r}, expected one of {', '.join(known)}")
    return SAMPLERS[name]


def sampling_of(settings: Mapping[str, Any]) -> Sampling:
    """Return the default settings with what `settings` says otherwise; other keys are left
    alone."""
    known = [field.name for field in fields(SamplingSettings)]
    known_settings = {name: settings[name] for name in known if name in settings}
    return build_sampling(SamplingSettings(**known_settings))


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
    images = []
    for start in range(0, len(captions), batch_size):
        batch = captions[start : start + batch_size]
        keys = caption_keys(batch, seed, offset + start)
        given = None if image_embed is None else image_embed[start : start + batch_size]
        z = chain.sample_prior(keys, batch, sampling) if given is None else given
        images.append(to_uint8(chain.render(keys, batch, z, sampling)))
    return np.concatenate(images)
