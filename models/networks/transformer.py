"""Transformer layers shared by the priors and the U-Nets: attention, blocks, and the caption's
input."""

import inspect
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from models.configs import TransformerConfig
from models.networks.compiling import compiled
from models.networks.packing import Packing

TRIM_MULTIPLE = 8  # tokens
Mask = Tensor | Packing | Literal["causal"]  # what a token may read, see `SelfAttention`
_OPTIONS = inspect.signature(varlen_attn).parameters
_CAUSAL = {"window_size": (-1, 0)} if "window_size" in _OPTIONS else {"is_causal": True}


# -- functions -------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Literal["causal"] | None) -> Tensor:
    """Return softmax(q k^T / sqrt(d) + mask) v (Vaswani et al. 2017, eq. 1).

    q: [B, H, N, d]; k, v: [B, H, M, d]; mask: bool, broadcast to [B, H, N, M], True = keep, or
    "causal" for N = M, or None for none. Returns [B, H, N, d].

    This is the fused kernel, but in bf16 on the CPU: there its backward took 28 % of a U-Net's
    step, and plain matrix products half of that, so the formula is spelled out. In fp32 the kernel
    takes two thirds of their time.
    """
    if q.is_cuda or (q.is_cpu and q.dtype == v.dtype == torch.float32):
        if mask == "causal":  # a table would keep the fastest kernel away
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    logits = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)  # [B, H, N, M]
    if isinstance(mask, str):
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1).to(v.dtype) @ v


def has_kernel(like: Tensor) -> bool:
    """Return whether torch's attention on packed sequences takes tensors as `like`, [T, H, d]."""
    width = like.shape[-1]
    return like.is_cuda and like.dtype != torch.float32 and width % 8 == 0 and width <= 256


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, num_queries: int = 0
) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v within each sequence.

    k, v: [T, H, d]; q: [T, H, d], or with `num_queries` n > 0 [B * n, H, d], n for each sequence,
    which read all of it; no sequence may then be empty. Returns as q.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # a norm under autocast makes fp32
    if has_kernel(v):
        offsets, longest, causal = packing.offsets, packing.max_length, packing.causal
        if num_queries:
            stop = len(offsets) * num_queries
            offsets = torch.arange(0, stop, num_queries, dtype=torch.int32, device=q.device)
            longest, causal = num_queries, False
        options = _CAUSAL if causal else {}
        ends = offsets, packing.offsets, longest, packing.max_length
        return varlen_attn(q, k, v, *ends, **options)  # pyright: ignore

    outputs = []
    for rows, keep, members in zip(packing.rows, packing.keep, packing.members, strict=True):

        def padded(x: Tensor, rows: Tensor = rows) -> Tensor:
            flat = x.index_select(0, rows.flatten())  # [b * l, H, d]
            return flat.unflatten(0, rows.shape).transpose(1, 2)  # [b, H, l, d]

        if num_queries:
            queries = q.unflatten(0, (-1, num_queries)).index_select(0, members).transpose(1, 2)
        else:
            queries = padded(q)  # [b, H, n or l, d]
        # padding comes after all tokens of a sequence
        mask = "causal" if packing.causal and not num_queries else keep[:, None, None, :]
        y = attend(queries, padded(k), padded(v), mask).transpose(1, 2)  # [b, n or l, H, d]
        outputs.append(y if num_queries else y.flatten(0, 1))
    if not outputs:
        return q  # no token at all
    y = torch.cat(outputs)  # [B, n, H, d], or the groups' [b * l, H, d]
    if num_queries:
        return y.index_select(0, packing.member_order).flatten(0, 1)
    return y.index_select(0, packing.order)


def attention_kernels(like: Tensor) -> AbstractContextManager:
    """Return a context that selects attention kernels for the device of `like`, for models that
    call the fused attention themselves: on the CPU the plain formula, as in `attend`."""
    return nullcontext() if like.is_cuda else sdpa_kernel(SDPBackend.MATH)


def without_autocast(like: Tensor) -> AbstractContextManager:
    """Return a context without autocast on the device of `like`.

    For products that bf16's 8 bits would spoil: codes would move to their neighbours, and logits
    near 100 would be equal. The meta device, on which costs are counted, has no autocast.
    """
    if like.is_meta:
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def causal_mask(length: int, keep: Tensor) -> Tensor:
    """Return a causal mask without padding: bool [B, 1, N, N], True where query i may read key
    j <= i.

    length: N; keep: bool [B, N], False for padding. Every token reads itself, so that no row is
    empty.
    """
    lower = torch.ones(length, length, dtype=torch.bool, device=keep.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=keep.device)
    return ((lower & keep[:, None, :]) | itself)[:, None]


def trimmed_length(token_mask: Tensor) -> int:
    """Return the number of columns of bool [B, L] that hold every real token, as a multiple of
    `TRIM_MULTIPLE` or L."""
    width = token_mask.shape[1]
    position = torch.arange(1, width + 1, device=token_mask.device)
    return trim(int((position * token_mask).max()), width)


def trim(longest: int, width: int) -> int:
    """Return `longest` as a multiple of `TRIM_MULTIPLE`, at most `width`."""
    return min(width, -(-max(1, longest) // TRIM_MULTIPLE) * TRIM_MULTIPLE)


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Embed t [B] as cosines and sines of width/2 frequencies each (Vaswani et al. 2017, section
    3.5). Returns float32 [B, width]."""
    half = width // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device) / half)
    angle = t.float()[:, None] * frequency[None, :]
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def last_tokens(x: Tensor, mask: Mask, num_queries: int) -> Tensor:
    """Return the last `num_queries` tokens of x [B, N, ...], 0 for all, or the last one of each
    sequence of a packed x [T, ...]."""
    if isinstance(mask, Packing):
        return x.index_select(0, mask.last) if num_queries else x
    return x[:, -num_queries:]  # -0 takes all


# -- layers ----------------------------------------------------------------------------------------


class TimestepMLP(nn.Sequential):
    """Embed a timestep: sinusoids, linear, SiLU, linear."""

    def __init__(self, sinusoids: int, width: int) -> None:
        super().__init__(nn.Linear(sinusoids, width), nn.SiLU(), nn.Linear(width, width))
        self.sinusoids = sinusoids

    def forward(self, input: Tensor) -> Tensor:
        """Map timesteps [B], of any number type, to [B, width]."""
        return super().forward(timestep_embedding(input, self.sinusoids))


class KeyValues:
    """The keys and values of the tokens that a block has processed, with room for N tokens.

    shape: (B, H, N, d); like: a tensor of their type and device.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self._k, self._v = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in "kv")
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of n tokens, [B, H, n, d] each; return all, [B, H, length, d]."""
        start, self.length = self.length, self.length + k.shape[2]
        self._k[:, :, start : self.length], self._v[:, :, start : self.length] = k, v
        return self._k[:, :, : self.length], self._v[:, :, : self.length]

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens only."""
        self.length = length


class SelfAttention(nn.Module):
    """Multi-head self-attention, with optional QK-norm (Dehghani et al. 2023).

    Raises ValueError for a width that num_heads does not divide.
    """

    def __init__(self, *, width: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"width: found {width}, expected a multiple of num_heads = {num_heads}"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        head = width // num_heads
        # without gains: fp32 gains on bf16 queries leave the fused kernel
        self.q_norm = nn.RMSNorm(head, elementwise_affine=False) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head, elementwise_affine=False) if qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, mask: Mask, num_queries: int = 0, cache: KeyValues | None = None
    ) -> Tensor:
        """Map x [B, N, width] to [B, N, width], or to [B, num_queries, width] of the last tokens,
        which read all the others.

        mask: bool [..., N, M], True = keep, or "causal" with neither `cache` nor `num_queries`, or
        the packing of x [T, width], of which `num_queries` 1 takes each sequence's last token, [B,
        width]. cache: M - N earlier tokens, which these tokens read and are appended to; None for
        none, M = N. num_queries: 0 for all.
        """
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # [B, N, W] each
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        if isinstance(mask, Packing):
            q, k = self.q_norm(last_tokens(q, mask, num_queries)), self.k_norm(k)  # [T, H, d]
            return self.out(attend_packed(q, k, v, mask, num_queries).flatten(1))  # [T, W]
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if isinstance(mask, Tensor):
            q, mask = q[..., -num_queries:, :], mask[..., -num_queries:, :]  # -0 takes all
        q, k = self.q_norm(q), self.k_norm(k)  # [B, H, N, d]
        if cache is not None:
            k, v = cache.extend(k, v)  # [B, H, M, d]
        y = attend(q, k, v, mask)  # [B, H, N, d]
        return self.out(y.transpose(1, 2).flatten(2))  # [B, N, W]


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then an MLP of 4 widths with GELU."""

    def __init__(
        self, *, width: int, num_heads: int, dropout: float = 0.0, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width=width, num_heads=num_heads, qk_norm=qk_norm)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    @compiled(dynamic=None)
    def forward(
        self, x: Tensor, mask: Mask, num_queries: int = 0, cache: KeyValues | None = None
    ) -> Tensor:
        """Map x [B, N, width] to [B, N, width], or to [B, num_queries, width] of the last tokens;
        see `SelfAttention` for the arguments, and for x [T, width] that is packed."""
        h = self.attention(self.norm_1(x), mask, num_queries, cache)  # [B, N, W]
        x = last_tokens(x, mask, num_queries) + self.dropout(h)  # [B, N, W]
        return x + self.dropout(self.mlp(self.norm_2(x)))  # [B, N, W]


def prior_blocks(config: TransformerConfig) -> nn.ModuleList:
    """Build the blocks of a prior's transformer."""
    width, num_heads = config.width, config.num_heads
    return nn.ModuleList(
        Block(width=width, num_heads=num_heads, dropout=config.dropout, qk_norm=config.qk_norm)
        for _ in range(config.depth)
    )


class TextInput(nn.Module):
    """Bring a caption to a network's width.

    text_width: W of CLIP's states, 0 for own tokens; vocab_size: number of own tokens.
    """

    outer_layers = ("states", "tokens")

    def __init__(self, *, text_width: int, vocab_size: int, width: int) -> None:
        super().__init__()
        self.states = nn.Linear(text_width, width) if text_width else None
        self.tokens = None if text_width else nn.Embedding(vocab_size, width)
        if self.tokens is not None:
            nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Map CLIP's states [B, L, W] or own tokens int [B, L] to [B, L, width]."""
        if self.states is not None:
            return self.states(text)  # [B, L, width]
        assert self.tokens is not None
        return self.tokens(text.long())  # [B, L, width]


class TextEncoder(nn.Module):
    """A causal transformer over the caption's own tokens."""

    outer_layers = ("position",)

    def __init__(
        self,
        *,
        context_length: int,
        vocab_size: int,
        width: int,
        depth: int,
        num_heads: int,
        dropout: float = 0.0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = TextInput(text_width=0, vocab_size=vocab_size, width=width)
        self.position = nn.Parameter(torch.randn(1, context_length, width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(width=width, num_heads=num_heads, dropout=dropout, qk_norm=qk_norm)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, token_mask: Tensor | Packing) -> Tensor:
        """Map tokens int [B, L] with token_mask bool [B, L] (True = keep) to states [B, L, width],
        or packed ones [T] with their packing to [T, width].

        L may be less than `context_length` if the end of every caption is within L.
        """
        if isinstance(token_mask, Packing):
            h = self.tokens(tokens) + F.embedding(token_mask.position, self.position[0])  # [T, W]
            for block in self.blocks:
                h = block(h, token_mask)  # [T, W]
            return self.norm(h)  # [T, W]
        length = tokens.shape[1]
        h = self.tokens(tokens) + self.position[:, :length]  # [B, L, W]
        mask = causal_mask(length, token_mask)  # [B, 1, L, L]
        for block in self.blocks:
            h = block(h, mask)  # [B, L, W]
        return self.norm(h)  # [B, L, W]
