"""The smallest networks of images, awake, and what they are given."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.configs import ClipConfig, DecoderConfig, DiTConfig, UNetConfig, UpsamplerConfig
from models.decoder import Condition, Decoder
from models.upsampler import Upsampler

EMBED, TEXT, LENGTH, SIZE = 8, 12, 5, 8
UNET = UNetConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), head_channels=8
)
DIT = DiTConfig(width=16, depth=2, num_heads=2, patch_size=2)
PLAIN = dataclasses.replace(UNET, attn_resolutions=())  # as upsamplers take it
CLIP = ClipConfig(
    embed_dim=16, vision_width=32, vision_depth=1, text_width=32, text_depth=1, patch_size=16,
    vocab_size=512,
)  # fmt: skip


def awake(model: Any) -> Any:
    """Give the parameters that start at zero values, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval()


def decoder(*, asleep: bool = False, **changes: Any) -> Any:
    """Build a decoder; asleep: as it is before training."""
    torch.manual_seed(0)
    config = DecoderConfig(**{"unet": UNET, "context_width": 8, **changes})
    model = Decoder(config, image_size=SIZE, embed_dim=EMBED, text_width=TEXT)
    return model if asleep else awake(model)


def upsampler(**changes: Any) -> Any:
    """Build an upsampler to twice the size."""
    torch.manual_seed(0)
    config = UpsamplerConfig(**{"unet": PLAIN, **changes})
    return awake(Upsampler(config, factor=2, crop_size=SIZE))


def condition(count: int = 6, rows: Any = slice(None)) -> Condition:
    """Return `rows` of `count` conditions, with captions of 3 tokens of 5."""
    rng = torch.Generator().manual_seed(0)
    image_embed = F.normalize(torch.randn(count, EMBED, generator=rng), dim=1)
    states = torch.randn(count, LENGTH, TEXT, generator=rng)
    mask = (torch.arange(LENGTH) < 3).repeat(count, 1)
    return Condition(image_embed=image_embed[rows], text_states=states[rows], token_mask=mask[rows])


def images(count: int, size: int = SIZE) -> Tensor:
    """Return images of noise in [-1, 1]."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
