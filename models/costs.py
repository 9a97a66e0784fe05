"""What training a model costs a sample, counted on the meta device at its own sizes."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from open_clip import CLIP
from torch import Tensor, nn

from models.autoregressive_prior import AutoregressivePrior
from models.clip import model_sizes
from models.decoder import Condition, Decoder
from models.diffusion_prior import NUM_EXTRA_TOKENS, DiffusionPrior
from models.flops import forward_macs
from models.priors import PriorText
from models.regression_prior import RegressionPrior
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
    counter = next((f for kind, f in _COUNTERS.items() if isinstance(model, kind)), None)
    if counter is None:
        raise ValueError(f"costs: found a {type(model).__name__}, expected a model of this project")
    # a twin without memory: every tensor is already "copied", to one of its shape alone
    tensors = (*model.parameters(), *model.buffers())
    memo = {id(each): torch.empty_like(each, device="meta") for each in tensors}
    twin = copy.deepcopy(model, memo).eval()
    with torch.device("meta"):
        return forward_macs(counter(twin, num_words))


def _caption(model: Any, width: int, words: int) -> tuple[Tensor, Tensor]:
    """Return what a model is told of a caption, CLIP's states or tokens of its own, and a mask."""
    if model.config.text_tokens:
        words = min(words, model.config.text_tokens)
        tokens = torch.ones(1, words, dtype=torch.long)
        return tokens, tokens > 0
    return torch.zeros(1, words, width), torch.ones(1, words, dtype=torch.bool)


def _text(model: Any, embed_dim: int, width: int, words: int) -> PriorText:
    told, mask = _caption(model, width, words)
    return PriorText(text_embed=torch.zeros(1, embed_dim), text=told, token_mask=mask)


def _diffusion(prior: DiffusionPrior, words: int) -> Callable[[], object]:
    states, room = prior.text_in.states, prior.length - NUM_EXTRA_TOKENS
    width = 0 if states is None else states.in_features
    text = _text(prior, prior.embed_dim, width, min(words, room))
    x, t = torch.zeros(1, prior.embed_dim), torch.zeros(1, dtype=torch.long)
    return lambda: prior(x, t, text, t.bool())


def _autoregressive(prior: AutoregressivePrior, words: int) -> Callable[[], object]:
    text = _text(prior, prior.embed_dim, prior.pool.kv.in_features, words)
    dot = torch.zeros(1, dtype=torch.long)
    codes = torch.zeros(1, prior.config.num_codes, dtype=torch.long)
    return lambda: prior(text, dot, codes, dot.bool())


def _regression(prior: RegressionPrior, words: int) -> Callable[[], object]:
    states, room = prior.text_in.states, prior.position.shape[1] - 2  # z_t, query
    width = 0 if states is None else states.in_features
    text = _text(prior, prior.embed_dim, width, min(words, room))
    return lambda: prior(text)


def _decoder(decoder: Decoder, words: int) -> Callable[[], object]:
    size = decoder.image_size
    told, mask = _caption(
        decoder, 0 if decoder.text_in is None else decoder.text_in.in_features, words
    )
    dim = len(decoder.null_image_embed)
    condition = Condition(
        image_embed=torch.zeros(1, dim), text_embed=torch.zeros(1, dim), token_mask=mask,
        tokens=told, text_states=told,
    )  # fmt: skip
    x, t = torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.long)
    return lambda: decoder(x, t, condition, t.bool(), t.bool())


def _upsampler(upsampler: Upsampler, words: int) -> Callable[[], object]:
    crop = upsampler.crop_size
    x, t = torch.zeros(1, 3, crop, crop), torch.zeros(1, dtype=torch.long)
    low = torch.zeros(1, 3, crop // upsampler.factor, crop // upsampler.factor)
    return lambda: upsampler(x, t, low)


def _clip(clip: CLIP, words: int) -> Callable[[], object]:
    size, context = model_sizes(clip)
    image, tokens = torch.zeros(1, 3, size, size), torch.ones(1, context, dtype=torch.long)
    return lambda: (clip.encode_image(image), clip.encode_text(tokens))


_COUNTERS: dict[type, Callable] = {
    DiffusionPrior: _diffusion,
    AutoregressivePrior: _autoregressive,
    RegressionPrior: _regression,
    Decoder: _decoder,
    Upsampler: _upsampler,
    CLIP: _clip,
}
