"""Packed captions against padded ones: equal losses, gradients and states, without the padding."""

from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from _priors import EMBED, TEXT, images, prior_of
from torch import Tensor

from models.clip import VOCAB_SIZE, FrozenClip, token_mask
from models.networks.packing import Packing, token_lengths
from models.networks.transformer import TextEncoder
from models.priors.base import PackedText, PriorText

KINDS = ("diffusion", "autoregressive", "regression")
WORDS = 30
LENGTHS = {
    "mixed": [1, 30, 7, 2, 9, 9, 16, 3, 1],
    "alike": [5] * 9,
    "one": [4],
    "ones": [1, 1, 1],
}


def mask_of(lengths: Tensor) -> Tensor:
    return torch.arange(WORDS) < lengths[:, None]


def packed(text: PriorText, prior: Any, keys: Tensor) -> PackedText:
    packing = prior.pack(token_lengths(text.token_mask), keys)
    rows = text.text[packing.text.sequence, packing.text.position]
    return PackedText(text_embed=text.text_embed, text=rows, packing=packing)


def gradients(prior: Any, keys: Tensor, text: PriorText | PackedText) -> dict[str, Tensor]:
    """Return the losses of a batch and the gradient of every parameter."""
    prior.zero_grad(set_to_none=True)
    losses = prior.losses(keys, images(len(keys)), text)
    (losses["loss"] * torch.linspace(0.5, 1.5, len(keys))).sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
             for n, p in prior.named_parameters()}  # fmt: skip
    return {"loss": losses["loss"].detach(), **grads}


def captions_of(lengths: list[int], *, own_tokens: bool) -> PriorText:
    count = len(lengths)
    rng = torch.Generator().manual_seed(2)
    text = torch.randint(1, 50, (count, WORDS), generator=rng)
    return PriorText(
        text_embed=F.normalize(torch.randn(count, EMBED, generator=rng), dim=1),
        text=text if own_tokens else torch.randn(count, WORDS, TEXT, generator=rng),
        token_mask=mask_of(torch.tensor(lengths)),
    )


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("own_tokens", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_padded_captions(kind: str, own_tokens: bool, name: str):
    changes: dict[str, Any] = {"qk_norm": True}
    if own_tokens:
        changes["text_tokens"] = WORDS
    if kind != "regression":
        changes["text_drop"] = 0.4
    prior = prior_of(kind, context_length=WORDS, **changes)
    text, keys = captions_of(LENGTHS[name], own_tokens=own_tokens), torch.arange(len(LENGTHS[name]))
    expected = gradients(prior, keys, text)
    found = gradients(prior, keys, packed(text, prior, keys))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert sum(float(g.abs().sum()) for n, g in found.items() if n.startswith("blocks")) > 0


# -- text encoders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LENGTHS)
def test_states_of_an_own_text_encoder_are_those_of_padded_captions(name: str):
    torch.manual_seed(0)
    encoder = TextEncoder(context_length=WORDS, vocab_size=50, width=32, depth=2, num_heads=2)
    text = captions_of(LENGTHS[name], own_tokens=True)
    packing = Packing.of(token_lengths(text.token_mask))
    rows = text.text[packing.sequence, packing.position]
    found = encoder(rows, packing)
    whole = encoder(text.text, text.token_mask)
    torch.testing.assert_close(found, whole[text.token_mask], atol=1e-5, rtol=1e-5)
    expected = torch.where(text.token_mask[..., None], whole, 0)
    torch.testing.assert_close(packing.pad(found, WORDS), expected, atol=1e-5, rtol=1e-5)


CAPTIONS = ["a red cube", "", "two blue spheres beside a green cone! and a word more", "a", "a red"]


@pytest.mark.parametrize("pool_type", ["argmax", "eos"])
@pytest.mark.parametrize("dropped", [(), (1, 2), (0, 1, 2, 3, 4)])
def test_the_frozen_tower_encodes_packed_captions_as_padded_ones(pool_type: str, dropped: tuple):
    text = open_clip.CLIPTextCfg(
        context_length=40, width=32, heads=2, layers=2, pool_type=pool_type, eos_id=VOCAB_SIZE - 1,
        ls_init_value=0.5,
    )  # fmt: skip
    vision = open_clip.CLIPVisionCfg(image_size=32, patch_size=8, width=32, layers=1, head_width=16)
    encoder = FrozenClip(open_clip.CLIP(16, vision, text), "small")
    assert encoder.packs_text
    tokens = torch.from_numpy(encoder.tokenize(CAPTIONS))
    embed, states = encoder.encode_text(tokens)
    drop = torch.zeros(len(CAPTIONS), dtype=torch.bool)
    drop[list(dropped)] = True
    keep = token_mask(tokens) & ~drop[:, None]
    packing = Packing.of(keep.sum(1))
    rows = tokens[keep].long()
    found = encoder.encode_packed(rows, packing)
    torch.testing.assert_close(found, states[keep], atol=1e-5, rtol=1e-5)
    if not dropped:
        pooled = encoder.pool_packed(found, rows, packing)
        torch.testing.assert_close(pooled, embed, atol=1e-5, rtol=1e-5)


def test_towers_of_other_kinds_are_not_packed():
    vision = open_clip.CLIPVisionCfg(image_size=32, patch_size=8, width=32, layers=1, head_width=16)
    changes: list[Any] = [{"no_causal_mask": True}, {"pool_type": "last"}, {"qk_norm": True}]
    for options in changes:
        text = open_clip.CLIPTextCfg(context_length=40, width=32, heads=2, layers=1, **options)
        assert not FrozenClip(open_clip.CLIP(16, vision, text), "small").packs_text
