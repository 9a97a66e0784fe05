"""Transformer parts shared by the priors and the U-Nets."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

TRIM_MULTIPLE = 8  # tokens


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(d) + mask) v, all [B, H, tokens, d]; `mask` bool, True = keep.

    On an accelerator this is the fused kernel. On the CPU the fused backward in bf16 took 28 % of a
    U-Net's step, and plain matrix products half of that, so there the formula is spelled out.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    logits = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1).to(v.dtype) @ v


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Embed t [B] as cosines and sines of `width`/2 frequencies each (Vaswani et al. 2017).
    Returns [B, width]."""
    half = width // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device) / half)
    angle = t.float()[:, None] * frequency[None, :]
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def attention_kernels(like: Tensor) -> AbstractContextManager:
    """Choose, for models that call the fused attention themselves, the kernels that suit the
    device of `like`.

    On the CPU that is the plain formula, for the reason given in `attend`.
    """
    return nullcontext() if like.is_cuda else sdpa_kernel(SDPBackend.MATH)


def trimmed_length(token_mask: Tensor) -> int:
    """Return how many columns of bool [B, L] hold every real token, rounded up."""
    width = token_mask.shape[1]
    places = torch.arange(1, width + 1, device=token_mask.device)
    longest = int((places * token_mask).max())
    return min(width, -(-max(1, longest) // TRIM_MULTIPLE) * TRIM_MULTIPLE)


class TimestepMLP(nn.Sequential):
    """Sinusoids -> linear -> SiLU -> linear: [B] int64 -> [B, width]."""

    def __init__(self, sinusoids: int, width: int) -> None:
        super().__init__(nn.Linear(sinusoids, width), nn.SiLU(), nn.Linear(width, width))
        self.sinusoids = sinusoids

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(timestep_embedding(t, self.sinusoids))


class KeyValues:
    """Keys and values of the tokens a block has read, with room for all that will come.

    shape: (B, H, N, d); like: a tensor of their type and device.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self._k, self._v = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in "kv")
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of n further tokens, [B, H, n, d] each; return all there are."""
        start, self.length = self.length, self.length + k.shape[2]
        self._k[:, :, start : self.length], self._v[:, :, start : self.length] = k, v
        return self._k[:, :, : self.length], self._v[:, :, : self.length]

    def back_to(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        self.length = length


class SelfAttention(nn.Module):
    """Multi-head self-attention over [B, N, width], with optional QK-norm (Dehghani et al.
    2023)."""

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
        self, x: Tensor, mask: Tensor, last: int = 0, cache: "KeyValues | None" = None
    ) -> Tensor:
        """Return [B, N, width], or of the `last` tokens alone, which read all the others.

        cache: keys and values of earlier tokens, which these read as well and are added to; then
        mask is [..., N, earlier + N].
        """
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # [B, N, width] each
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        q, mask = q[..., -last:, :], mask[..., -last:, :]  # -0 takes all
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            k, v = cache.extend(k, v)
        y = attend(q, k, v, mask)  # [B, H, N, d]
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a 4x GELU MLP."""

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

    def forward(
        self, x: Tensor, mask: Tensor, last: int = 0, cache: "KeyValues | None" = None
    ) -> Tensor:
        """Map [B, N, width] to the same, or to the `last` tokens alone: [B, last, width]; see
        `SelfAttention` for the cache."""
        x = x[:, -last:] + self.dropout(self.attention(self.norm_1(x), mask, last, cache))
        return x + self.dropout(self.mlp(self.norm_2(x)))


def causal_mask(length: int, keep: Tensor) -> Tensor:
    """Combine causality with padding: bool [B, 1, N, N], True where query i may read key j <= i.

    keep: bool [B, N], False for padding. Every token reads itself, so that no row is empty.
    """
    lower = torch.ones(length, length, dtype=torch.bool, device=keep.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=keep.device)
    return ((lower & keep[:, None, :]) | itself)[:, None]
