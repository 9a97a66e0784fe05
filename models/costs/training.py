"""What training a model costs a sample, counted on the meta device at its own sizes."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from open_clip import CLIP
from torch import Tensor, nn

from models.clip import model_sizes
from models.costs.flops import forward_macs
from models.decoder import Condition, Decoder
from models.priors.autoregressive import AutoregressivePrior
from models.priors.base import PriorText
from models.priors.diffusion import NUM_EXTRA_TOKENS, DiffusionPrior
from models.priors.regression import RegressionPrior
from models.upsampler import Upsampler

CAPTION_TOKENS = 32  # what a batch of web captions is about trimmed to
FLOPS_A_MAC = 6  # two, in the forward pass and twice in the backward


def training_flops(model: nn.Module, num_words: int = CAPTION_TOKENS) -> float:
    """Return the FLOPs of training on one sample: of the model's own products and convolutions.

    What activation checkpointing does again, and frozen encoders, are not counted: it is the
    numerator of MFU (Chowdhery et al. 2022, appendix B). Raises ValueError for an unknown model.
    """
    return FLOPS_A_MAC * macs_a_sample(model, num_words)


def macs_a_sample(model: nn.Module, num_words: int = CAPTION_TOKENS) -> int:
    """Return the multiply-accumulates of a forward pass on one sample with so many words, or as
    many as the model has room for."""
    forward = forward_of(twin_of(model).eval(), num_words)
    with torch.device("meta"):
        return forward_macs(forward)


def twin_of(model: nn.Module) -> nn.Module:
    """Return a copy of `model` on the meta device, without memory."""
    # every tensor is already "copied", to one of its shape alone
    tensors = (*model.parameters(), *model.buffers())
    memo = {id(each): torch.empty_like(each, device="meta") for each in tensors}
    return copy.deepcopy(model, memo)


def forward_of(twin: nn.Module, num_words: int = CAPTION_TOKENS, batch: int = 1) -> Callable:
    """Return a function of nothing that runs a model of the meta device forward, on a batch of so
    many samples with so many words. Raises ValueError for an unknown model."""
    counter = next((f for kind, f in _COUNTERS.items() if isinstance(twin, kind)), None)
    if counter is None:
        raise ValueError(f"costs: found a {type(twin).__name__}, expected a model of this project")
    with torch.device("meta"):
        return counter(twin, num_words, batch)


def _caption(model: Any, width: int, words: int, batch: int) -> tuple[Tensor, Tensor]:
    """Return what a model is told of a caption, CLIP's states or tokens of its own, and a mask."""
    if model.config.text_tokens:
        words = min(words, model.config.text_tokens)
        tokens = torch.ones(batch, words, dtype=torch.long)
        return tokens, tokens > 0
    return torch.zeros(batch, words, width), torch.ones(batch, words, dtype=torch.bool)


def _text(model: Any, embed_dim: int, told: tuple[Tensor, Tensor]) -> PriorText:
    text, mask = told
    return PriorText(text_embed=torch.zeros(len(text), embed_dim), text=text, token_mask=mask)


def _diffusion(prior: DiffusionPrior, words: int, batch: int) -> Callable[[], object]:
    states, room = prior.text_in.states, prior.length - NUM_EXTRA_TOKENS
    width = 0 if states is None else states.in_features
    text = _text(prior, prior.embed_dim, _caption(prior, width, min(words, room), batch))
    x, t = torch.zeros(batch, prior.embed_dim), torch.zeros(batch, dtype=torch.long)
    return lambda: prior(x, t, text, t.bool())


def _autoregressive(prior: AutoregressivePrior, words: int, batch: int) -> Callable[[], object]:
    told = _caption(prior, prior.pool.kv.in_features, words, batch)
    text, dot = _text(prior, prior.embed_dim, told), torch.zeros(batch, dtype=torch.long)
    codes = torch.zeros(batch, prior.config.num_codes, dtype=torch.long)
    return lambda: prior(text, dot, codes, dot.bool())


def _regression(prior: RegressionPrior, words: int, batch: int) -> Callable[[], object]:
    states, room = prior.text_in.states, prior.position.shape[1] - 2  # z_t, query
    width = 0 if states is None else states.in_features
    text = _text(prior, prior.embed_dim, _caption(prior, width, min(words, room), batch))
    return lambda: prior(text)


def _decoder(decoder: Decoder, words: int, batch: int) -> Callable[[], object]:
    size = decoder.image_size
    width = 0 if decoder.text_in is None else decoder.text_in.in_features
    told, mask = _caption(decoder, width, words, batch)
    dim = len(decoder.null_image_embed)
    condition = Condition(
        image_embed=torch.zeros(batch, dim), text_embed=torch.zeros(batch, dim), token_mask=mask,
        tokens=told, text_states=told,
    )  # fmt: skip
    x, t = torch.zeros(batch, 3, size, size), torch.zeros(batch, dtype=torch.long)
    return lambda: decoder(x, t, condition, t.bool(), t.bool())


def _upsampler(upsampler: Upsampler, words: int, batch: int) -> Callable[[], object]:
    crop = upsampler.crop_size
    x, t = torch.zeros(batch, 3, crop, crop), torch.zeros(batch, dtype=torch.long)
    low = torch.zeros(batch, 3, crop // upsampler.factor, crop // upsampler.factor)
    return lambda: upsampler(x, t, low)


def _clip(clip: CLIP, words: int, batch: int) -> Callable[[], object]:
    size, context = model_sizes(clip)
    image, tokens = torch.zeros(batch, 3, size, size), torch.ones(batch, context, dtype=torch.long)
    return lambda: (clip.encode_image(image), clip.encode_text(tokens))


_COUNTERS: dict[type, Callable] = {
    DiffusionPrior: _diffusion,
    AutoregressivePrior: _autoregressive,
    RegressionPrior: _regression,
    Decoder: _decoder,
    Upsampler: _upsampler,
    CLIP: _clip,
}
