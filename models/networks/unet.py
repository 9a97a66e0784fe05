"""The U-Net of the decoder and of the upsamplers, built from ADM's layers
(models/networks/unet_blocks.py) or from magnitude-preserving ones (models/networks/unet_mp.py)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.configs import UNetConfig
from models.networks.compiling import compiled
from models.networks.unet_blocks import ADM, UNetLayers
from models.networks.unet_mp import MAGNITUDE_PRESERVING


class _Level(nn.Module):
    """A residual block, on the way up of a feature map joined with a skip, and attention where the
    resolution has it."""

    def __init__(
        self, block: nn.Module, attention: nn.Module | None, join: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        self.block, self.attention, self._join = block, attention, join
        self.takes_skip = block.resample is None  # on the way up

    @compiled(dynamic=False)
    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        tokens: Tensor | None,
        token_mask: Tensor | None,
        skip: Tensor | None = None,
    ) -> Tensor:
        x = x if skip is None else self._join(x, skip)  # [B, C, H, W]
        x = self.block(x, cond)  # [B, C', H', W']
        return x if self.attention is None else self.attention(x, tokens, token_mask)


def _validate(config: UNetConfig, image_size: int) -> None:
    """Refuse attention that the network could not have, and options without effect."""
    if config.magnitude_preserving and config.qk_norm:
        raise ValueError(
            "qk_norm: found true with magnitude_preserving, expected false: its attention "
            "normalises queries, keys and values without it"
        )
    if config.refine_channels < 0 or (config.magnitude_preserving and config.refine_channels):
        raise ValueError(
            f"refine_channels: found {config.refine_channels}, expected 0 or more, and 0 with "
            "magnitude_preserving, which its convolutions are not"
        )
    grid = image_size // config.patch_size
    sides = [grid // 2**i for i in range(len(config.channel_mult))]
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


class UNet(nn.Module):
    """A noise-conditional U-Net over images of any side that its resolutions divide.

    image_size: side in px in training, which `config.attn_resolutions` refer to; in_channels,
    out_channels: of the images; context: width of the condition's tokens (0 = none). Raises
    ValueError for a size that does not halve, for attention at a resolution that the network does
    not have, and for options that would have no effect.
    """

    outer_layers = ("time_in", "conv_in", "conv_out", "refine")

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
        self.config, self.context = config, context
        self.channels_last = config.channels_last  # or set where it is faster, see `compile_model`
        self._require_halving(image_size)
        _validate(config, image_size)
        self.grid, self.channels = image_size // config.patch_size, config.channels
        self.qk_norm = config.qk_norm or config.magnitude_preserving
        self.cond_width = 4 * config.channels
        layers, width, area = self.layers, config.channels, config.patch_size**2
        self.time_in = layers.time_in(width, self.cond_width)
        self.conv_in = layers.conv_in(in_channels * area, width)

        # Down; `skips` holds the channels of the feature maps that the way up joins
        side, channels, skips = self.grid, width, [width]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                self.down.append(self._level(layers.block_down, channels, mult * width, side))
                channels = mult * width
                skips.append(channels)
            if i + 1 < len(config.channel_mult):
                level = self._level(layers.block_down, channels, channels, side, "down")
                self.down.append(level)
                skips.append(channels)
                side //= 2

        # Middle: attention in the first level alone
        middle = [self._level(layers.block_up, channels, channels, s) for s in (side, 0)]
        self.middle = nn.ModuleList(middle)

        # Up
        for i, mult in reversed(list(enumerate(config.channel_mult))):
            for j in range(config.num_res_blocks + 1):
                joined = channels + skips.pop()
                channels = mult * width
                self.up.append(self._level(layers.block_up, joined, channels, side))
                if i > 0 and j == config.num_res_blocks:
                    self.up.append(self._level(layers.block_up, channels, channels, side, "up"))
                    side *= 2

        self.norm_out = layers.norm_out(width)
        fine = config.refine_channels
        if fine:
            self.conv_out = layers.conv_in(width, fine * area)
            convs = layers.conv_in(fine + in_channels, fine), layers.conv_out(fine, out_channels)
            self.refine = nn.Sequential(convs[0], nn.SiLU(), convs[1])
        else:
            self.conv_out, self.refine = layers.conv_out(width, out_channels * area), None

    @property
    def layers(self) -> UNetLayers:
        """The kind of layers that the network is built from."""
        return MAGNITUDE_PRESERVING if self.config.magnitude_preserving else ADM

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of activations.

        Weights stay contiguous: ZeRO flattens them, and Muon views them as matrices; a convolution
        follows its input.
        """
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def _require_halving(self, *sides: int) -> None:
        """Raise ValueError for sides in px that some resolution could not halve."""
        patch, halvings = self.config.patch_size, len(self.config.channel_mult) - 1
        if any(side % (patch * 2**halvings) for side in sides):
            raise ValueError(
                f"image size: found {' x '.join(map(str, sides))}, expected a multiple of "
                f"patch_size = {patch} times 2^{halvings} (one halving per resolution)"
            )

    def _level(
        self,
        block: Callable[..., nn.Module],
        channels: int,
        out: int,
        side: int,
        resample: str | None = None,
    ) -> _Level:
        """Build a level at `side` cells, with attention if the configuration has it there."""
        config = self.config
        residual = block(
            channels=channels,
            out=out,
            cond=self.cond_width,
            dropout=config.dropout,
            resample=resample,
        )
        # magnitude-preserving attention has no choice of norms
        norms = {"qk_norm": True} if config.qk_norm else {}
        # built even where it is left out: random initial weights do not depend on its presence
        attention = self.layers.attention(
            channels=out, head_channels=config.head_channels, context=self.context, **norms
        )
        has_attention = side in config.attn_resolutions and resample is None
        return _Level(residual, attention if has_attention else None, self.layers.join)

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
        added to the first layer's output (see `UNetLayers.add`); tokens [B, N, context] with
        token_mask bool [B, N] (True = keep): read by every attention layer. Raises ValueError for
        sides that do not halve or do not fit `grid`.
        """
        self._require_halving(*x.shape[2:])
        h, cond = self._enter(x, t, cond, grid)  # [B, C, H/p, W/p], [B, 4C]
        skips = [h]
        for level in self.down:
            h = self._run(level, h, cond, tokens, token_mask)  # [B, mC, H/(2^i p), W/(2^i p)]
            skips.append(h)
        for level in self.middle:
            h = self._run(level, h, cond, tokens, token_mask)
        for level in self.up:
            skip = skips.pop() if level.takes_skip else None
            h = self._run(level, h, cond, tokens, token_mask, skip)
        return self._leave(h, x)  # [B, out, H, W]

    @compiled(dynamic=False)
    def _enter(
        self, x: Tensor, t: Tensor, cond: Tensor | None, grid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the first feature map [B, C, H/p, W/p], and the levels' condition [B, 4C]."""
        layers, time = self.layers, self.time_in(t)  # [B, 4C]
        time = time if cond is None else layers.add(time, cond)  # [B, 4C]
        x = F.pixel_unshuffle(x, self.config.patch_size)  # [B, in p^2, H/p, W/p]
        h = self.conv_in(x.contiguous(memory_format=self.memory_format))  # [B, C, H/p, W/p]
        if grid is not None:
            if grid.shape[2:] != h.shape[2:]:
                sides, expected = (
                    " x ".join(str(self.config.patch_size * side) for side in cells.shape[2:])
                    for cells in (h, grid)
                )
                raise ValueError(f"image size: found {sides}, expected {expected} as in training")
            h = layers.add(h, grid)  # [B, C, H/p, W/p]
        return h, time

    @compiled(dynamic=False)
    def _leave(self, h: Tensor, x: Tensor) -> Tensor:
        """Return the output, float32 [B, out, H, W], of the last feature map and the input
        x [B, in, H, W]."""
        h = self.conv_out(self.norm_out(h)).contiguous()  # [B, out p^2, H/p, W/p], or fine p^2
        h = F.pixel_shuffle(h, self.config.patch_size)  # [B, out, H, W], or fine
        if self.refine is not None:
            h = self.refine(torch.cat([h, x.to(h.dtype)], dim=1))  # [B, out, H, W]
        return h.float()
