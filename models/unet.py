"""The U-Net of the decoder and of the upsamplers: ADM blocks (Dhariwal & Nichol 2021) with
GLIDE's attention.

Tokens of the condition are projected per attention layer and concatenated to that layer's keys
and values
(Nichol et al. 2021, GLIDE), not attended to by a layer of their own.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.configs import UNetConfig
from models.transformer import TimestepMLP, attend


def _zeroed(layer: nn.Module) -> nn.Module:
    """Zero the last layer of a residual branch, so that every block starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(math.gcd(32, channels), max(1, channels // 4)), channels)


class ResBlock(nn.Module):
    """Residual block with scale-shift conditioning and, for "up" or "down", a change of
    resolution inside."""

    def __init__(
        self, *, channels: int, out: int, cond: int, dropout: float, resample: str | None = None
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm_1 = _norm(channels)
        self.conv_1 = nn.Conv2d(channels, out, 3, padding=1)
        self.cond = nn.Linear(cond, 2 * out)
        self.norm_2 = _norm(out)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = _zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def _resize(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Map x [B, C, H, W] under cond [B, cond] to [B, out, H', W']."""
        h = self.conv_1(self._resize(F.silu(self.norm_1(x))))
        scale, shift = self.cond(F.silu(cond))[:, :, None, None].chunk(2, dim=1)
        h = self.norm_2(h) * (1 + scale) + shift
        return self.skip(self._resize(x)) + self.conv_2(self.dropout(F.silu(h)))


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
        """Map x [B, C, H, W] with tokens [B, N, context] and their mask [B, N] (True = keep) to
        [B, C, H, W]."""
        batch, _, height, width = x.shape
        q, k, v = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, dim=-1)  # [B, HW, C]
        mask = None
        if self.context is not None and tokens is not None and token_mask is not None:
            more_k, more_v = self.context(tokens).chunk(2, dim=-1)  # [B, N, C]
            k, v = torch.cat([more_k, k], dim=1), torch.cat([more_v, v], dim=1)
            mask = F.pad(token_mask, (0, height * width), value=True)[
                :, None, None
            ]  # [B, 1, 1, N + HW]
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        if self.qk_norm:
            q, k = (F.rms_norm(y, y.shape[-1:]) for y in (q, k))
        h = self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))
        # .contiguous(): cells last, GroupNorm on the CPU takes ten times as long
        return x + h.transpose(1, 2).contiguous().view(batch, -1, height, width)


class _Level(nn.Module):
    """A residual block, and attention where the resolution has it."""

    def __init__(self, block: ResBlock, attention: AttentionBlock | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention
        self.takes_skip = block.resample is None  # on the way up

    def forward(
        self, x: Tensor, cond: Tensor, tokens: Tensor | None, token_mask: Tensor | None
    ) -> Tensor:
        x = self.block(x, cond)
        return x if self.attention is None else self.attention(x, tokens, token_mask)


class UNet(nn.Module):
    """A noise-conditional U-Net over images of any side that its resolutions divide.

    image_size: side in px in training, which `config.attn_resolutions` refer to; in_channels,
    out_channels: of the images; context: width of the condition's tokens (0 = none). Raises
    ValueError for a size that does not halve, and for attention at a resolution that there is not.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        image_size: int,
        in_channels: int,
        out_channels: int,
        context: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.grid = image_size // config.patch_size
        self._require_halving(image_size)
        self._require_attended(image_size)
        area = config.patch_size**2
        width = config.channels
        self.cond_width = 4 * width
        self.context = context
        self.time_in = TimestepMLP(width, self.cond_width)
        self.conv_in = nn.Conv2d(in_channels * area, width, 3, padding=1)
        self._build_levels(width)
        self.norm_out = _norm(width)
        self.conv_out = _zeroed(nn.Conv2d(width, out_channels * area, 3, padding=1))

    def _require_halving(self, *sides: int) -> None:
        """Refuse sides in px that some resolution could not halve, before torch does, obscurely."""
        patch, halvings = self.config.patch_size, len(self.config.channel_mult) - 1
        if any(side % (patch * 2**halvings) for side in sides):
            raise ValueError(
                f"image size: found {' x '.join(map(str, sides))}, expected a multiple of "
                f"patch_size = {patch} times 2^{halvings} (one halving a resolution)"
            )

    def _require_attended(self, image_size: int) -> None:
        """Refuse attention at a resolution that the network does not have: it would have none."""
        config = self.config
        sides = [self.grid // 2**i for i in range(len(config.channel_mult))]
        unknown = [side for side in config.attn_resolutions if side not in sides]
        if unknown:
            raise ValueError(
                f"attn_resolutions: found {', '.join(map(str, unknown))}, expected some of "
                f"{', '.join(map(str, sides))}: the sides in cells of images of {image_size} px "
                f"with patch_size {config.patch_size} and {len(sides)} resolutions"
            )

    def _level(self, channels: int, out: int, side: int, resample: str | None = None) -> _Level:
        config = self.config
        block = ResBlock(
            channels=channels,
            out=out,
            cond=self.cond_width,
            dropout=config.dropout,
            resample=resample,
        )
        attends = side in config.attn_resolutions and resample is None
        attention = AttentionBlock(
            channels=out,
            head_channels=config.head_channels,
            context=self.context,
            qk_norm=config.qk_norm,
        )
        return _Level(block, attention if attends else None)

    def _build_levels(self, width: int) -> None:
        """Lay out down, middle and up; `skips` are the channels that the way up will find."""
        config, side, channels = self.config, self.grid, width
        skips = [channels]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                self.down.append(self._level(channels, mult * width, side))
                channels = mult * width
                skips.append(channels)
            if i + 1 < len(config.channel_mult):
                self.down.append(self._level(channels, channels, side, "down"))
                skips.append(channels)
                side //= 2
        self.middle = nn.ModuleList(
            [self._level(channels, channels, side), self._level(channels, channels, 0)]
        )
        for i, mult in reversed(list(enumerate(config.channel_mult))):
            for j in range(config.num_res_blocks + 1):
                self.up.append(self._level(channels + skips.pop(), mult * width, side))
                channels = mult * width
                if i > 0 and j == config.num_res_blocks:
                    self.up.append(self._level(channels, channels, side, "up"))
                    side *= 2

    def _run(self, level: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.config.checkpointing and self.training:
            return checkpoint(level, *inputs, use_reentrant=False)
        return level(*inputs)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        cond: Tensor | None = None,
        grid: Tensor | None = None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Map x [B, in_channels, H, W] at t int64 [B] to float32 [B, out_channels, H, W].

        cond: [B, 4 channels], added to the timestep embedding; grid: [B, channels, H/p, W/p],
        added to the
        first layer's output; tokens [B, N, context] with token_mask [B, N]: read by every
        attention layer. Raises ValueError for sides that do not halve or do not fit `grid`.
        """
        self._require_halving(*x.shape[2:])
        cond = self.time_in(t) if cond is None else self.time_in(t) + cond
        h = self.conv_in(F.pixel_unshuffle(x, self.config.patch_size))
        if grid is not None and grid.shape[2:] != h.shape[2:]:
            found, expected = (
                " x ".join(str(self.config.patch_size * side) for side in cells.shape[2:])
                for cells in (h, grid)
            )
            raise ValueError(f"image size: found {found}, expected {expected} as in training")
        h = h if grid is None else h + grid
        skips = [h]
        for level in self.down:
            h = self._run(level, h, cond, tokens, token_mask)
            skips.append(h)
        for level in self.middle:
            h = self._run(level, h, cond, tokens, token_mask)
        for level in self.up:
            if level.takes_skip:
                h = torch.cat([h, skips.pop()], dim=1)
            h = self._run(level, h, cond, tokens, token_mask)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.config.patch_size).float()
