"""The layers of a U-Net: ADM's blocks (Dhariwal & Nichol 2021) with GLIDE's attention.

Tokens of the condition are projected by each attention layer and concatenated to its keys and
values (Nichol et al. 2021, GLIDE); there is no cross-attention layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.group_norm import FusedGroupNorm, in_channels_last
from models.networks.transformer import TimestepMLP, attend


@dataclass(frozen=True, kw_only=True)
class UNetLayers:
    """The layers of one kind of U-Net; `UNet` arranges them.

    block_down: residual blocks of the way down; block_up: those of the middle and the way up; join:
    a feature map of the way up, with a skip; add: a feature map, with a condition of its shape;
    norm_out: what precedes the last layer.
    """

    block_down: Callable[..., nn.Module]
    block_up: Callable[..., nn.Module]
    attention: Callable[..., nn.Module]
    time_in: Callable[[int, int], nn.Module]
    conv_in: Callable[[int, int], nn.Module]
    norm_out: Callable[[int], nn.Module]
    conv_out: Callable[[int, int], nn.Module]
    join: Callable[[Tensor, Tensor], Tensor]
    add: Callable[[Tensor, Tensor], Tensor]


# -- what every kind of U-Net shares ---------------------------------------------------------------


def resized(x: Tensor, resample: str | None) -> Tensor:
    """Return x [B, C, H, W] at half the size for "down", at twice the size for "up"."""
    if resample == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if resample == "up" else x


def cells_of(x: Tensor) -> Tensor:
    """Return an image [B, C, H, W] as cells [B, HW, C]."""
    return x.flatten(2).transpose(1, 2)


def image_of(cells: Tensor, like: Tensor) -> Tensor:
    """Return cells [B, HW, C] as an image [B, C, H, W], in the memory format of `like`."""
    x = cells.transpose(1, 2)
    # .contiguous(): with cells last, GroupNorm on the CPU takes ten times as long
    x = x if in_channels_last(like) else x.contiguous()
    return x.unflatten(2, like.shape[2:])


def attend_cells(
    qkv: Tensor,
    context: Tensor | None,
    token_mask: Tensor | None,
    *,
    num_heads: int,
    qk_norm: bool = False,
    v_norm: bool = False,
) -> Tensor:
    """Attend over cells, with tokens beside the cells in keys and values.

    qkv: [B, HW, 3 C]; context: keys and values of tokens, [B, N, 2 C], with token_mask bool [B, N]
    (True = keep); qk_norm: queries and keys get unit RMS; v_norm: values as well. Returns
    [B, HW, C].
    """
    q, k, v = qkv.chunk(3, dim=-1)  # [B, HW, C] each
    mask = None
    if context is not None and token_mask is not None:
        context_k, context_v = context.chunk(2, dim=-1)  # [B, N, C] each
        k, v = torch.cat([context_k, k], dim=1), torch.cat([context_v, v], dim=1)  # [B, N + HW, C]
        mask = F.pad(token_mask, (0, q.shape[1]), value=True)[:, None, None]  # [B, 1, 1, N + HW]
    q, k, v = (y.unflatten(-1, (num_heads, -1)).transpose(1, 2) for y in (q, k, v))
    if qk_norm:
        q, k = (F.rms_norm(y, y.shape[-1:]) for y in (q, k))  # [B, heads, ..., d]
    if v_norm:
        v = F.rms_norm(v, v.shape[-1:])
    return attend(q, k, v, mask).transpose(1, 2).flatten(2)  # [B, HW, C]


# -- ADM's blocks ----------------------------------------------------------------------------------


def _zeroed(layer: nn.Module) -> nn.Module:
    """Zero the last layer of a residual branch, so that every block starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class OuterConv(nn.Conv2d):
    """The first or last convolution, 3 x 3, of few channels on one side.

    GPUs have fast kernels in bf16 for multiples of 8 channels: there, zeros fill them up. Weights
    and results are the same.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """Map input [B, channels, H, W] to [B, out, H, W]."""
        on_gpu = input.is_cuda and torch.is_autocast_enabled()
        return self.padded(input) if on_gpu else super().forward(input)

    def padded(self, x: Tensor) -> Tensor:
        """Map as `forward`, through multiples of 8 channels."""
        inner, outer = -self.in_channels % 8, -self.out_channels % 8
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, inner, 0, outer))  # [8 m, 8 n, 3, 3]
        bias = None if self.bias is None else F.pad(self.bias, (0, outer))  # [8 m]
        x = F.pad(x, (0, 0, 0, 0, 0, inner))  # [B, 8 n, H, W]
        return F.conv2d(x, weight, bias, padding=1)[:, : self.out_channels]  # [B, out, H, W]


def _norm(channels: int, *, silu: bool = False) -> FusedGroupNorm:
    groups = min(math.gcd(32, channels), max(1, channels // 4))
    return FusedGroupNorm(groups, channels, silu=silu)


class UpConv(nn.Conv2d):
    """A convolution of 3 x 3 of its input at twice the size.

    A pixel of the nearest-neighbour enlargement is read by up to four of the nine taps. Their sums
    are the kernel, 4 x 4, of a transposed convolution of stride 2, of which an output takes 4
    products instead of 9: on the CPU a forward and a backward pass take half the time.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map input [B, C, H, W] to [B, out, 2H, 2W]."""
        if not input.is_cpu:
            return super().forward(resized(input, "up"))
        # kernel[i, j] = sum of weight[i - a, j - b] over a, b in {0, 1}, turned by 180 degrees
        kernel = F.avg_pool2d(F.pad(self.weight, (1, 1, 1, 1)), 2, 1, divisor_override=1)
        kernel = kernel.flip(2, 3).transpose(0, 1)  # [C, out, 4, 4]
        return F.conv_transpose2d(input, kernel, self.bias, stride=2, padding=1)


class ResBlock(nn.Module):
    """Residual block with scale-shift conditioning and, for "up" or "down", a change of
    resolution (Dhariwal & Nichol 2021, section 3)."""

    def __init__(
        self, *, channels: int, out: int, cond: int, dropout: float, resample: str | None = None
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm_1 = _norm(channels, silu=True)
        conv = UpConv if resample == "up" else nn.Conv2d
        self.conv_1 = conv(channels, out, 3, padding=1)
        self.cond = nn.Linear(cond, 2 * out)
        self.norm_2 = _norm(out, silu=True)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = _zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Map x [B, C, H, W] under cond [B, cond] to [B, out, H', W']."""
        h = self.norm_1(x)  # [B, C, H, W]
        h = resized(h, "down") if self.resample == "down" else h
        h = self.conv_1(h)  # [B, out, H', W'], for "up" from half the size
        scale, shift = self.cond(F.silu(cond)).chunk(2, dim=1)  # [B, out]
        h = self.conv_2(self.dropout(self.norm_2(h, scale, shift)))  # [B, out, H', W']
        return self.skip(resized(x, self.resample)) + h


class AttentionBlock(nn.Module):
    """Self-attention over cells, with the condition's tokens beside the cells in keys and
    values."""

    def __init__(
        self, *, channels: int, head_channels: int, context: int, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.qk_norm = qk_norm
        self.num_heads = max(1, channels // head_channels)
        self.norm = _norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context = nn.Linear(context, 2 * channels) if context else None
        self.out = _zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor | None, token_mask: Tensor | None) -> Tensor:
        """Map x [B, C, H, W] with tokens [B, N, context] and their mask bool [B, N] (True = keep)
        to [B, C, H, W]."""
        qkv = self.qkv(cells_of(self.norm(x)))  # [B, HW, 3C]
        context = None if self.context is None or tokens is None else self.context(tokens)
        h = attend_cells(
            qkv, context, token_mask, num_heads=self.num_heads, qk_norm=self.qk_norm
        )  # [B, HW, C]
        return x + image_of(self.out(h), like=x)  # [B, C, H, W]


ADM = UNetLayers(
    block_down=ResBlock,
    block_up=ResBlock,
    attention=AttentionBlock,
    time_in=TimestepMLP,
    conv_in=OuterConv,
    norm_out=partial(_norm, silu=True),
    conv_out=lambda channels, out: _zeroed(OuterConv(channels, out)),
    join=lambda x, skip: torch.cat([x, skip], dim=1),
    add=torch.add,
)
