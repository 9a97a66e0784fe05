"""Packed captions against padded ones: equal losses, gradients and states, without the padding."""

import copy
import pickle
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from _networks import UNET
from _priors import EMBED, TEXT, images, prior_of
from torch import Tensor, nn

from models.clip import FrozenClip
from models.configs import DecoderConfig
from models.convert.runs import load_clip
from models.decoder import Decoder
from models.networks import transformer
from models.networks.compiling import compile_parts
from models.networks.packing import Packing, token_lengths
from models.networks.transformer import TextEncoder
from models.priors.base import PackedText, PriorText
from models.tokenizers import VOCAB_SIZE, token_mask, tokenizer
from training.config import DecoderRunConfig
from training.data.dataloader import as_batch
from training.tasks.decoder import base_objective, pack_captions_of_decoder
from training.tasks.prior import pack_captions

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


# -- what is computed ------------------------------------------------------------------------------


def laion_lengths() -> Tensor:
    """Return lengths of captions in CLIP's tokens as they were counted in LAION's list, which
    tests/test_training_benchmarks.py counts again."""
    path = Path(__file__).parent.parent / "benchmarks" / "_captions.py"
    return torch.from_numpy(runpy.run_path(str(path))["caption_lengths"](1536))


def test_at_most_one_and_a_tenth_tokens_are_computed_for_each_real_one():
    """Counted where linear layers run: in the tower, and in each prior's blocks."""
    lengths = laion_lengths()
    counted: list[int] = []

    def count(_: Any, inputs: tuple[Tensor, ...]) -> None:
        counted.append(inputs[0].shape[0])

    vision = open_clip.CLIPVisionCfg(image_size=32, patch_size=8, width=32, layers=1, head_width=16)
    text = open_clip.CLIPTextCfg(context_length=77, width=TEXT, heads=1, layers=1)
    encoder = FrozenClip(open_clip.CLIP(16, vision, text), "small")
    encoder.clip.transformer.resblocks[0].mlp[0].register_forward_pre_hook(count)
    priors = [prior_of(kind, context_length=77, depth=1) for kind in ("diffusion", "regression")]
    for prior in priors:
        prior.blocks[0].attention.qkv.register_forward_pre_hook(count)
    for batch in lengths.split(512):
        keys = torch.arange(len(batch))
        for prior in priors:
            packing = prior.pack(batch, keys)
            tokens = torch.ones(packing.text.num_tokens, dtype=torch.long)
            states, embed = encoder.encode_packed(tokens, packing.text), images(len(keys))
            further = prior.position.shape[1] - 77
            captions = PackedText(text_embed=embed, text=states, packing=packing)
            prior.losses(keys, embed, captions)
            tower, blocks = counted[-2:]
            assert tower <= batch.sum()  # no state of a dropped caption
            assert blocks <= 1.1 * (batch.sum() + further * len(batch))
    assert len(counted) == 2 * 2 * 3 and 15 < lengths.double().mean() < 16


def test_attention_on_a_cpu_pads_a_third_of_what_the_longest_caption_asks_for():
    packing = Packing.of(laion_lengths()[:512])
    padded = sum(rows.shape[0] * rows.shape[1] ** 2 for rows in packing.rows)
    assert padded < 512 * packing.longest**2 / 3


# -- the kernel of a GPU ---------------------------------------------------------------------------


def reference_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """What torch documents of `varlen_attn`, sequence by sequence, in double precision."""
    out = torch.full_like(q, torch.nan)
    ends_q, ends_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(ends_q) == len(ends_k)
    for i in range(len(ends_q) - 1):
        of_q, of_k = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        rows = [x.double().transpose(0, 1) for x in (q[of_q], k[of_k], v[of_k])]
        assert rows[0].shape[1] <= max_q and rows[1].shape[1] <= max_k
        causal = window_size == (-1, 0)
        assert causal or window_size == (-1, -1)
        if rows[0].shape[1]:
            y = F.scaled_dot_product_attention(rows[0], rows[1], rows[2], is_causal=causal)
            out[of_q] = y.transpose(0, 1).to(q.dtype)
    return out


@pytest.mark.parametrize("own_tokens", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_given_what_the_groups_compute(
    monkeypatch: pytest.MonkeyPatch, kind: str, own_tokens: bool
):
    changes: dict[str, Any] = {"text_tokens": WORDS} if own_tokens else {}
    if kind != "regression":
        changes["text_drop"] = 0.4
    prior = prior_of(kind, context_length=WORDS, **changes)
    text, keys = captions_of(LENGTHS["mixed"], own_tokens=own_tokens), torch.arange(9)
    expected = gradients(prior, keys, packed(text, prior, keys))
    calls: list[Any] = []
    monkeypatch.setattr(transformer, "has_kernel", lambda like: True)
    monkeypatch.setattr(transformer, "varlen_attn", lambda *args, **options: (
        calls.append(options), reference_varlen(*args, **options))[1])  # fmt: skip
    found = gradients(prior, keys, packed(text, prior, keys))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) > 0


@torch.library.custom_op("tests::varlen", mutates_args=())
def varlen_op(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, causal: bool
) -> Tensor:
    """The reference as an operation that a graph may contain."""
    window = (-1, 0) if causal else (-1, -1)
    return reference_varlen(q, k, v, ends_q, ends_k, 1 << 20, 1 << 20, window_size=window)


varlen_op.register_fake(lambda q, k, v, ends_q, ends_k, causal: torch.empty_like(q))


@pytest.mark.parametrize("by_kernel", [False, True])
def test_compiled_blocks_of_prior_and_tower_take_captions_of_any_length(
    monkeypatch: pytest.MonkeyPatch, by_kernel: bool
):
    """Without a graph break; after two batches, as torch finds out what varies, without another
    graph."""
    if by_kernel:
        monkeypatch.setattr(transformer, "has_kernel", lambda like: True)
        monkeypatch.setattr(transformer, "varlen_attn", lambda q, k, v, a, b, m, n, **window: (
            varlen_op(q, k, v, a, b, bool(window))))  # fmt: skip
    graphs: list[Any] = []
    torch.compiler.reset()
    count = lambda graph, inputs: (graphs.append(graph), graph.forward)[1]  # noqa: E731
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    vision = open_clip.CLIPVisionCfg(image_size=32, patch_size=8, width=32, layers=1, head_width=16)
    text = open_clip.CLIPTextCfg(context_length=77, width=TEXT, heads=1, layers=3)
    encoder = FrozenClip(open_clip.CLIP(16, vision, text), "small")
    prior = prior_of("diffusion", context_length=77, depth=3).eval()
    eager = copy.deepcopy((encoder, prior))
    for module in (encoder, prior):
        compile_parts(module)
    seen, lengths = [], laion_lengths()
    for batch, keys in zip(lengths.split(64)[:6], torch.arange(384).split(64), strict=True):
        losses = []
        for tower, model in ((encoder, prior), eager):
            packing = model.pack(batch, keys)
            tokens = torch.arange(packing.text.num_tokens) % 100
            states = tower.encode_packed(tokens, packing.text)
            captions = PackedText(text_embed=images(64), text=states, packing=packing)
            with torch.no_grad():
                losses.append(model.losses(keys, images(64), captions)["loss"])
        torch.testing.assert_close(*losses)
        seen.append(len(graphs))
    assert 0 < seen[1] <= 6, "a block of the tower, one of the prior and its last one"
    assert len(set(seen[2 if by_kernel else 3 :])) == 1


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"empty_caption": True, "text_embed_cond": True}, {"text_tokens": WORDS}],
    ids=["states", "empty caption", "own tokens"],
)  # fmt: skip
def test_a_decoder_s_losses_and_gradients_are_those_of_padded_captions(options: dict[str, Any]):
    encoder = load_clip("tiny:random")
    base = DecoderConfig(unet=UNET, context_width=8, text_drop=0.4, **options)
    config = DecoderRunConfig(base=base)
    torch.manual_seed(0)
    sizes = {"embed_dim": encoder.embed_dim, "text_width": encoder.text_width}
    model = Decoder(base, image_size=8, **sizes, vocab_size=VOCAB_SIZE)
    for parameter in model.parameters():  # layers that begin at zero would hide the caption
        nn.init.normal_(parameter, std=0.05)
    embed = F.normalize(torch.randn(2, len(CAPTIONS), encoder.embed_dim), dim=-1)
    columns: dict[str, Any] = {
        "image": torch.randint(256, (len(CAPTIONS), 3, 8, 8), dtype=torch.uint8).numpy(),
        "image_embed": embed[0].numpy(), "text_embed": embed[1].numpy(),
        "tokens": encoder.tokenize(CAPTIONS), "caption_tokens": tokenizer(WORDS)(CAPTIONS),
    }  # fmt: skip
    batch = as_batch(columns, torch.arange(len(CAPTIONS)))
    found = []
    for each in (pack_captions_of_decoder(encoder, config, batch), batch):
        model.zero_grad(set_to_none=True)
        loss = base_objective(encoder, config, model, each)["loss"]
        loss.sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **grads})
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert max(float(g.abs().max()) for n, g in found[0].items() if n.startswith("text_")) > 0


def test_a_batch_carries_its_packing_over_pickling_and_to_devices():
    tokens = torch.from_numpy(tokenizer(77)(CAPTIONS))
    batch = as_batch({"tokens": tokens.numpy()}, torch.arange(len(CAPTIONS)))
    batch = pack_captions(prior_of("diffusion", context_length=77).pack, False, batch)
    found = pickle.loads(pickle.dumps(batch)).to(torch.device("cpu"))
    assert found.captions is not None and batch.captions is not None
    assert torch.equal(found.captions.tokens, batch.captions.tokens)
    assert found.captions.packing.joined.max_length == 128
    meta = batch.to(torch.device("meta")).captions
    assert meta is not None and meta.packing.joined is not None
    devices = {x.device.type for x in (meta.tokens, meta.packing.drop, *meta.packing.joined.rows)}
    assert devices == {"meta"}
    assert batch.rows(slice(0, 2)).captions is None
