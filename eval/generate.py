"""Images for captions, in batches; an image depends on its seed and caption, never on its batch."""

import inspect
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from models.decoder import ImageSampling
from models.keyed_random import sample_keys
from models.priors import PriorSampling
from models.samplers import sampler_named
from models.unclip import Sampling, UnClip


def caption_keys(captions: list[str], seed: int, offset: int = 0) -> Tensor:
    """Return the random key int64 [B] of each (seed, caption, position): repeats of a caption
    differ."""
    words = torch.tensor([zlib.crc32(c.encode()) for c in captions], dtype=torch.int64)
    places = torch.arange(offset, offset + len(captions), dtype=torch.int64)
    return sample_keys(seed, places, words)


def default_sampling(
    *,
    sampler: str = "dpmpp_2m",
    prior_steps: int = 16,
    decoder_steps: int = 16,
    upsampler_steps: int = 8,
    cfg_scale: float = 1.5,
    prior_cfg_scale: float = 1.5,
    best_of: int = 2,
    precision: Literal["bf16", "fp32"] = "bf16",
) -> Sampling:
    """Return settings for the three parts.

    The paper did not guide its prior (section 3.2); on the drawn set a little guidance helps
    (`benchmarks/results.md`).
    """
    steps = sampler_named(sampler)
    return Sampling(
        prior=PriorSampling(
            sampler=sampler_named("ddpm"),
            sample_steps=prior_steps,
            best_of=best_of,
            cfg_scale=prior_cfg_scale,
        ),
        decoder=ImageSampling(sampler=steps, sample_steps=decoder_steps, cfg_scale=cfg_scale),
        upsampler=ImageSampling(sampler=steps, sample_steps=upsampler_steps),
        precision=precision,
    )


def sampling_of(settings: Mapping[str, Any]) -> Sampling:
    """Return `default_sampling` with what `settings` says otherwise; other keys are left alone."""
    known = inspect.signature(default_sampling).parameters
    return default_sampling(**{name: settings[name] for name in known if name in settings})


def to_uint8(image: Tensor) -> np.ndarray:
    """Map [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3]."""
    return ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def grid(
    images: list[list[np.ndarray]], rows: list[str], columns: list[str], zoom: int = 2
) -> Image.Image:
    """Lay out uint8 [H, W, 3] images in labelled rows and columns."""
    side = images[0][0].shape[0] * zoom
    left = 8 + max([0, *(7 * len(row) for row in rows)])
    top = 20 if columns else 4
    canvas = Image.new(
        "RGB", (left + len(images[0]) * (side + 4), top + len(images) * (side + 4)), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for y, line in enumerate(images):
        if rows:
            draw.text((4, top + y * (side + 4) + side // 2 - 6), rows[y], fill="black")
        for x, image in enumerate(line):
            tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + x * (side + 4), top + y * (side + 4)))
    for x, label in enumerate(columns):
        draw.text((left + x * (side + 4) + 2, 4), label, fill="black")
    return canvas


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
        z = chain.imagine(keys, part, sampling) if given is None else given
        parts.append(to_uint8(chain.render(keys, part, z, sampling)))
    return np.concatenate(parts)


def save_png(path: Path, image: np.ndarray | Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(path)
