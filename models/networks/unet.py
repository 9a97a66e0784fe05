"""The U-Net of the decoder and of the upsamplers, laid out from ADM's blocks
(models/networks/unet_blocks.py) or from those that keep magnitudes (models/networks/unet_mp.py)."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.configs import UNetConfig
from models.networks.unet_blocks import ADM, Parts
from models.networks.unet_mp import MAGNITUDE_PRESERVING


class _Level(nn.Module):
    """A residual block, and attention where the resolution has it."""

    def __init__(self, block: nn.Module, attention: nn.Module | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention
        self.takes_skip = block.resample is None  # on the way up

    def forward(
        self, x: Tensor, cond: Tensor, tokens: Tensor | None, token_mask: Tensor | None
    ) -> Tensor:
        x = self.block(x, cond)
        return x if self.attention is None else self.attention(x, tokens, token_mask)


def _require_sense(config: UNetConfig) -> None:
    """Refuse options that would do nothing."""
    if config.magnitude_preserving and config.qk_norm:
        raise ValueError(
            "qk_norm: found true with magnitude_preserving, expected false: its attention "
            "normalises queries, keys and values as it is"
        )


class UNet(nn.Module):
    """A noise-conditional U-Net over images of any side that its resolutions divide.

    image_size: side in px in training, which `config.attn_resolutions` refer to; in_channels,
    out_channels: of the images; context: width of the condition's tokens (0 = none). Raises
    ValueError for a size that does not halve, for attention at a resolution that there is not, and
    for options that would do nothing.
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
        _require_sense(config)
        self.config = config
        self.grid = image_size // config.patch_size
        self._require_halving(image_size)
        self._require_attended(image_size)
        area = config.patch_size**2
        width = config.channels
        self.cond_width = 4 * width
        self.context = context
        self.time_in = self.parts.time_in(width, self.cond_width)
        self.conv_in = self.parts.conv_in(in_channels * area, width)
        self._build_levels(width)
        self.norm_out = self.parts.norm_out(width)
        self.conv_out = self.parts.conv_out(width, out_channels * area)

    @property
    def parts(self) -> Parts:
        """The kind of layers that the network is laid out from."""
        return MAGNITUDE_PRESERVING if self.config.magnitude_preserving else ADM

    @property
    def memory_format(self) -> torch.memory_format:
        """Of activations. Weights stay contiguous: ZeRO flattens them, and Muon views them as
        matrices; a convolution follows its input."""
        return torch.channels_last if self.config.channels_last else torch.contiguous_format

    def _require_halving(self, *sides: int) -> None:
        """Refuse sides in px that some resolution could not halve, before torch does, obscurely."""
        patch, halvings = self.config.patch_size, len(self.config.channel_mult) - 1
        if any(side % (patch * 2**halvings) for side in sides):
            raise ValueError(
                f"image size: found {' x '.join(map(str, sides))}, expected a multiple of "
                f"patch_size = {patch} times 2^{halvings} (one halving a resolution)"
            )

    def _require_attended(self, image_size: int) -> None:
        """Refuse attention at a resolution that the network does not have: it would have none; and
        heads that do not divide the channels they share."""
        config = self.config
        sides = [self.grid // 2**i for i in range(len(config.channel_mult))]
        unknown = [side for side in config.attn_resolutions if side not in sides]
        if unknown:
            raise ValueError(
                f"attn_resolutions: found {', '.join(map(str, unknown))}, expected some of "
                f"{', '.join(map(str, sides))}: the sides in cells of images of {image_size} px "
                f"with patch_size {config.patch_size} and {len(sides)} resolutions"
            )
        for mult, side in zip(config.channel_mult, sides, strict=True):
            width, head = mult * config.channels, config.head_channels
            if side in config.attn_resolutions and width > head and width % head:
                raise ValueError(
                    f"head_channels: found {head} with {width} channels at side {side}, expected a "
                    "divisor of the channels wherever there is attention"
                )

    def _level(
        self,
        channels: int,
        out: int,
        side: int,
        resample: str | None = None,
        *,
        block: Callable[..., nn.Module],
    ) -> _Level:
        config = self.config
        made = block(
            channels=channels,
            out=out,
            cond=self.cond_width,
            dropout=config.dropout,
            resample=resample,
        )
        attends = side in config.attn_resolutions and resample is None
        norms = (
            {"qk_norm": True} if config.qk_norm else {}
        )  # no choice of magnitude-preserving ones
        attention = self.parts.attention(
            channels=out, head_channels=config.head_channels, context=self.context, **norms
        )
        return _Level(made, attention if attends else None)

    def _build_levels(self, width: int) -> None:
        """Lay out down, middle and up; `skips` are the channels that the way up will find."""
        config, side, channels = self.config, self.grid, width
        level_down = partial(self._level, block=self.parts.block_down)
        level_up = partial(self._level, block=self.parts.block_up)
        skips = [channels]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                self.down.append(level_down(channels, mult * width, side))
                channels = mult * width
                skips.append(channels)
            if i + 1 < len(config.channel_mult):
                self.down.append(level_down(channels, channels, side, "down"))
                skips.append(channels)
                side //= 2
        self.middle = nn.ModuleList(
            [level_up(channels, channels, side), level_up(channels, channels, 0)]
        )
        for i, mult in reversed(list(enumerate(config.channel_mult))):
            for j in range(config.num_res_blocks + 1):
                self.up.append(level_up(channels + skips.pop(), mult * width, side))
                channels = mult * width
                if i > 0 and j == config.num_res_blocks:
                    self.up.append(level_up(channels, channels, side, "up"))
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
        added to the first layer's output (see `Parts.add`); tokens [B, N, context] with token_mask
        [B, N]: read by every attention layer. Raises ValueError for sides that do not halve or do
        not fit `grid`.
        """
        self._require_halving(*x.shape[2:])
        parts, time = self.parts, self.time_in(t)
        cond = time if cond is None else parts.add(time, cond)
        x = F.pixel_unshuffle(x, self.config.patch_size)
        h = self.conv_in(x.contiguous(memory_format=self.memory_format))
        if grid is not None and grid.shape[2:] != h.shape[2:]:
            found, expected = (
                " x ".join(str(self.config.patch_size * side) for side in cells.shape[2:])
                for cells in (h, grid)
            )
            raise ValueError(f"image size: found {found}, expected {expected} as in training")
        h = h if grid is None else parts.add(h, grid)
        skips = [h]
        for level in self.down:
            h = self._run(level, h, cond, tokens, token_mask)
            skips.append(h)
        for level in self.middle:
            h = self._run(level, h, cond, tokens, token_mask)
        for level in self.up:
            if level.takes_skip:
                h = parts.join(h, skips.pop())
            h = self._run(level, h, cond, tokens, token_mask)
        h = self.conv_out(parts.activate(self.norm_out(h))).contiguous()
        return F.pixel_shuffle(h, self.config.patch_size).float()
