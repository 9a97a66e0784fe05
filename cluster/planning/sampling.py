"""What it costs to draw one image through the whole chain, stage by stage."""

from typing import Any

import torch

from cluster.planning.stages import CHAINS, Stage
from models.costs import forward_macs, forward_of
from models.decoder import Decoder
from models.priors.diffusion import DiffusionPrior
from models.upsampler import Upsampler

BEST_OF = 2  # draws of a diffusion prior, of which one is kept


def flops_an_image(preset: str, stages: list[Stage]) -> dict[str, float]:
    """Return the FLOPs of each stage for one image, two a multiply-accumulate.

    A diffusion prior draws twice and keeps one; a decoder reads its caption once, for all steps;
    an upsampler runs on the whole image, not on a crop; guidance takes two passes a step.
    """
    chain = CHAINS[preset]
    prior_steps, decoder_steps, *upsampler_steps = chain.sampling
    found = {}
    for stage in stages:
        model, macs = stage.model, stage.macs
        if isinstance(model, DiffusionPrior):
            passes = prior_steps * chain.guided[0] * BEST_OF
            found[stage.name] = 2.0 * macs * passes
        elif isinstance(model, Decoder):
            text = _text_macs(stage)
            found[stage.name] = 2.0 * (text + (macs - text) * decoder_steps * chain.guided[1])
        elif isinstance(model, Upsampler):
            found[stage.name] = 2.0 * whole_image_macs(stage) * upsampler_steps.pop(0)
        elif stage.kind == "prior":
            found[stage.name] = 2.0 * macs
    return found


def _text_macs(stage: Stage) -> int:
    """Return what a decoder's own text transformer multiplies, which needs it once an image."""
    if stage.model.text_encoder is None:
        return 0
    tokens = torch.ones(1, stage.words, dtype=torch.long, device="meta")
    return forward_macs(lambda: stage.model.text_encoder(tokens, tokens > 0))


def whole_image_macs(stage: Stage) -> int:
    """Return an upsampler's multiply-accumulates on an image of its stage's full size."""
    model: Any = stage.model
    crop = model.crop_size
    try:
        model.crop_size = stage.config.image_size  # type: ignore[attr-defined]
        forward = forward_of(model, stage.words)
    finally:
        model.crop_size = crop
    with torch.device("meta"):
        return forward_macs(forward)
