"""ADM's blocks in a form that preserves magnitudes (Karras et al. 2024, "Analyzing and Improving
the Training Dynamics of Diffusion Models", EDM2: configuration G of section 2, without its forced
weight normalisation).

Activations have unit magnitude, that is a root mean square of 1 over channels, because every
layer preserves it by its form. There are no group norms and no biases; a constant channel of the
input replaces the biases.

The paper also writes its normalised weights back into the parameters after every step (its
"forced" weight normalisation, appendix B). Ours are normalised in the forward pass alone: DeepSpeed
owns the parameters, its ZeRO flattens and partitions them, and a write from outside is lost at its
next step. Gradients are orthogonal to such weights, so that their norms grow and the effective
learning rate falls; `weight_decay` and the learning rate's own decay counteract it.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.transformer import timestep_embedding
from models.networks.unet_blocks import UNetLayers, attend_cells, cells_of, image_of, resized

SILU_MAGNITUDE = 0.596  # root mean square of silu(x) for x ~ N(0, 1)
BRANCH = 0.3  # share of a residual branch in its sum (the paper's t)
BALANCE = 0.5  # share of a skip, or of a condition
EPS = 1e-4


def mp_silu(x: Tensor) -> Tensor:
    """Return silu(x) / 0.596: of unit magnitude where x is standard normal (eq. 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return (1 - t) a + t b at unit magnitude, for independent a and b of unit magnitude (eq. 88);
    t in [0, 1]."""
    return torch.lerp(a, b.to(a.dtype), t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float = BALANCE) -> Tensor:
    """Concatenate a [B, N, H, W] and b [B, M, H, W] at unit magnitude (eq. 103).

    The next layer's input is b for a share t, whatever N and M. Returns [B, N + M, H, W].
    """
    n, m = a.shape[1], b.shape[1]
    scale = math.sqrt(n + m) / math.hypot(1 - t, t)
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n)), b * (scale * t / math.sqrt(m))], dim=1)


def unit(x: Tensor, dim: int | tuple[int, ...] = 1) -> Tensor:
    """Return x at unit magnitude over `dim`: over channels the paper's pixel norm (eq. 30)."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    size = math.sqrt(x.numel() / norm.numel())
    return x * (1 / (norm / size + EPS)).to(x.dtype)


class _Normalised(nn.Module):
    """A weight [out, ...] whose every output channel is brought to norm 1 in the forward pass, so
    that independent inputs of unit magnitude give outputs of unit magnitude (eq. 47).

    gain: also learn a factor, which starts at 0. It alone has a magnitude.
    """

    def __init__(self, *shape: int, gain: bool = False) -> None:
        super().__init__()
        self.fan_in = math.prod(shape[1:])
        # The paper draws N(0, 1) and steps by 1e-2. No output depends on the scale, but the share
        # of a weight that a step moves does: at norm 1, which is torch's own scale, the learning
        # rates of other networks fit, and Muon's too, whose steps have rows of norm 1.
        self.weight = nn.Parameter(torch.randn(shape) / math.sqrt(self.fan_in))
        self.gain = nn.Parameter(torch.zeros(())) if gain else None

    def normalised(self) -> Tensor:
        """Return the effective weight [out, ...]."""
        weight = F.normalize(self.weight.flatten(1), dim=1).view_as(self.weight)
        if self.gain is None:
            return weight
        # in units in which a step moves it as far as it moves the weight, as in the paper
        return weight * (self.gain * math.sqrt(self.fan_in))


class MPLinear(_Normalised):
    """Linear map of normalised weights, without bias."""

    def __init__(self, channels: int, out: int, *, gain: bool = False) -> None:
        super().__init__(out, channels, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., channels] to [..., out]."""
        return F.linear(x, self.normalised())  # [..., out]


class MPConv(_Normalised):
    """Convolution of normalised weights, without bias."""

    def __init__(self, channels: int, out: int, side: int = 3, *, gain: bool = False) -> None:
        super().__init__(out, channels, side, side, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, channels, H, W] to [B, out, H, W]."""
        return F.conv2d(x, self.normalised(), padding=self.weight.shape[-1] // 2)  # [B, out, H, W]


class MPFirstConv(MPConv):
    """Convolution of an image with an added channel of ones: the network's only bias."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels + 1, out)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, channels, H, W] to [B, out, H, W]."""
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # [B, channels + 1, H, W]
        return super().forward(x)  # [B, out, H, W]


class MPTimestep(nn.Module):
    """Embed a timestep: sinusoids of unit magnitude, linear.

    Sinusoids of the timestep, not the paper's random Fourier features of the noise level: cosine
    and sine of one angle have unit magnitude together at every t, after a factor sqrt(2).
    """

    def __init__(self, sinusoids: int, width: int) -> None:
        super().__init__()
        self.sinusoids = sinusoids
        self.linear = MPLinear(sinusoids, width)

    def forward(self, t: Tensor) -> Tensor:
        """Map t int64 [B] to [B, width]."""
        x = math.sqrt(2) * timestep_embedding(t, self.sinusoids)  # [B, sinusoids]
        return self.linear(x)  # [B, width]


class MPResBlock(nn.Module):
    """Residual block (figure 2): a change of resolution first, then on the way down (`norm`) a
    pixel norm at its entry; the condition sets one gain per channel."""

    def __init__(
        self,
        *,
        channels: int,
        out: int,
        cond: int,
        dropout: float,
        resample: str | None = None,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm = norm
        self.conv_1 = MPConv(channels if not norm else out, out)
        self.cond = MPLinear(cond, out, gain=True)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = MPConv(out, out)
        self.skip = nn.Identity() if channels == out else MPConv(channels, out, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Map x [B, C, H, W] under cond [B, cond] to [B, out, H', W']."""
        x = resized(x, self.resample)  # [B, C, H', W']
        x = unit(self.skip(x)) if self.norm else x  # [B, out, H', W'] if norm
        h = self.conv_1(mp_silu(x))  # [B, out, H', W']
        gain = 1 + self.cond(mp_silu(cond))[:, :, None, None]  # [B, out, 1, 1]
        h = self.conv_2(self.dropout(mp_silu(h * gain)))  # [B, out, H', W']
        return mp_sum(x if self.norm else self.skip(x), h, BRANCH)


class MPAttentionBlock(nn.Module):
    """Cosine attention (figure 2) over cells and, as in GLIDE, the condition's tokens: queries,
    keys and values all have unit magnitude."""

    def __init__(self, *, channels: int, head_channels: int, context: int) -> None:
        super().__init__()
        self.num_heads = max(1, channels // head_channels)
        self.qkv = MPLinear(channels, 3 * channels)
        self.context = MPLinear(context, 2 * channels) if context else None
        self.out = MPLinear(channels, channels)

    def forward(self, x: Tensor, tokens: Tensor | None, token_mask: Tensor | None) -> Tensor:
        """Map x [B, C, H, W] with tokens [B, N, context] and their mask bool [B, N] (True = keep)
        to [B, C, H, W]."""
        context = None if self.context is None or tokens is None else self.context(tokens)
        qkv = self.qkv(cells_of(x))  # [B, HW, 3C]
        h = attend_cells(
            qkv, context, token_mask, num_heads=self.num_heads, qk_norm=True, v_norm=True
        )  # [B, HW, C]
        return mp_sum(x, image_of(self.out(h), like=x), BRANCH)  # [B, C, H, W]


def _add_condition(x: Tensor, condition: Tensor) -> Tensor:
    """Sum x and a condition of its shape, whose layers outside the U-Net preserve no magnitude.

    The condition is brought to unit magnitude sample by sample, so that a grid's cells keep their
    contrast.
    """
    return mp_sum(x, unit(condition, tuple(range(1, condition.ndim))), BALANCE)


MAGNITUDE_PRESERVING = UNetLayers(
    block_down=partial(MPResBlock, norm=True),
    block_up=MPResBlock,
    attention=MPAttentionBlock,
    time_in=MPTimestep,
    conv_in=MPFirstConv,
    norm_out=nn.Identity,
    conv_out=partial(MPConv, gain=True),
    join=mp_cat,
    add=_add_condition,
)
