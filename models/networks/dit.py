"""A diffusion transformer over patches of pixels, with its condition in context.

Adaptive norms are those of Peebles & Xie 2023 (DiT, adaLN-Zero); norms, gated MLPs, rotary
positions and the bottleneck before the first layer those of Li & He 2025 (JiT).
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.configs import DiTConfig
from models.networks.compiling import compiled
from models.networks.transformer import TimestepMLP, attend
from models.networks.unet_blocks import OuterConv

SINUSOIDS = 256  # of the timestep
MAX_PERIOD = 100.0  # cells, of the slowest rotation (Heo et al. 2024)
MIN_NORM = 1e-6
HIDDEN_MULTIPLE = 8  # channels, for GPUs' fast kernels


# -- functions -------------------------------------------------------------------------------------


def rotations(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Return what turns a head's channels by a cell's place: cosines and sines, float32
    [2, H W, channels].

    Pairs (i, i + d/2) turn, the first half of them with the row, the second half with the column,
    so that products of queries and keys depend on distances alone (Su et al. 2021; axial in 2-D).
    """
    pairs = channels // 4
    frequency = MAX_PERIOD ** -(torch.arange(pairs, device=device) / pairs)  # [pairs]
    row = torch.arange(height, device=device)[:, None] * frequency  # [H, pairs]
    column = torch.arange(width, device=device)[:, None] * frequency  # [W, pairs]
    shape = height, width, pairs
    angles = torch.cat([row[:, None].expand(shape), column[None].expand(shape)], dim=-1)
    angles = angles.flatten(0, 1)  # [H W, 2 pairs]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs of x [B, N, H, d]; rotation: see `rotations`, [2, N, d]."""
    cos, sin = rotation.to(x.dtype)[:, :, None]  # [N, 1, d] each
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def unit_rms(x: Tensor) -> Tensor:
    """Return x [..., W] at unit RMS, as `F.rms_norm`, which takes twice as long on a CPU."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # [..., 1]
    return x * (math.sqrt(x.shape[-1]) / norm.clamp(min=MIN_NORM)).to(x.dtype)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return (1 + scale) x + shift of x [B, N, W] at unit RMS; shift, scale: [B, 1, W]."""
    x = unit_rms(x)
    return torch.addcmul(shift.to(x.dtype), x, 1 + scale.to(x.dtype))


# -- layers ----------------------------------------------------------------------------------------


class DiTBlock(nn.Module):
    """Attention, then a SwiGLU MLP (Shazeer 2020) of 8/3 widths, each with a norm and a gate that
    the condition sets; both gates start at 0."""

    outer_layers = ("modulation",)

    def __init__(self, *, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        hidden = 8 * width // 3 // HIDDEN_MULTIPLE * HIDDEN_MULTIPLE
        self.mlp_in = nn.Linear(width, 2 * hidden)
        self.mlp_out = nn.Linear(hidden, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.qkv, self.out, self.mlp_in, self.mlp_out):
            nn.init.xavier_uniform_(layer.weight)
        for parameter in self.modulation.parameters():
            nn.init.zeros_(parameter)

    @compiled(dynamic=None)
    def forward(self, x: Tensor, cond: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        """Map x [B, N, W] to [B, N, W].

        cond: [B, W]; rotation: see `rotations`, [2, N, d]; mask: bool [B, 1, 1, N], True = keep,
        None for all.
        """
        modulation = self.modulation(F.silu(cond))[:, None]  # [B, 1, 6 W]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, dim=-1)
        heads = self.num_heads
        qkv = self.qkv(modulated(x, shift_1, scale_1)).unflatten(-1, (3 * heads, -1))
        qk, v = qkv.split([2 * heads, heads], dim=2)  # [B, N, 2 H, d], [B, N, H, d]
        # QK-norm (Dehghani et al. 2023): stable in bf16
        qk = rotated(unit_rms(qk), rotation)  # [B, N, 2 H, d]
        q, k, v = (y.transpose(1, 2) for y in (*qk.chunk(2, dim=2), v))  # [B, H, N, d]
        y = attend(q.to(v.dtype), k.to(v.dtype), v, mask)  # [B, H, N, d]
        y = self.dropout(self.out(y.transpose(1, 2).flatten(2)))  # [B, N, W]
        x = torch.addcmul(x, gate_1.to(x.dtype), y.to(x.dtype))
        gate, y = self.mlp_in(modulated(x, shift_2, scale_2)).chunk(2, dim=-1)  # [B, N, hidden]
        y = self.dropout(self.mlp_out(F.silu(gate) * y))  # [B, N, W]
        return torch.addcmul(x, gate_2.to(x.dtype), y.to(x.dtype))


def _validate(config: DiTConfig) -> None:
    """Refuse sizes that do not divide, and layers that cannot be."""
    for name in ("width", "depth", "num_heads", "patch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: found {getattr(config, name)}, expected 1 or more")
    for name in ("bottleneck_channels", "refine_channels"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}: found {getattr(config, name)}, expected 0 or more")
    if config.width % config.num_heads or config.width // config.num_heads % 4:
        raise ValueError(
            f"width: found {config.width} with num_heads {config.num_heads}, expected heads of a "
            "multiple of 4 channels: pairs of them turn with the row and with the column"
        )


class DiT(nn.Module):
    """A noise-conditional transformer over images of any sides that `patch_size` divides.

    The condition's tokens stand before the patches, and every block processes both (Li & He 2025,
    in-context conditioning). image_size: side in px in training; in_channels, out_channels: of the
    images; context: width of the condition's tokens (0 = none). Raises ValueError for sizes that do
    not divide.
    """

    outer_layers = ("time_in", "patch_in", "context_in", "modulation_out", "patch_out", "refine")
    qk_norm = True

    def __init__(
        self,
        config: DiTConfig,
        *,
        image_size: int,
        in_channels: int,
        out_channels: int,
        context: int = 0,
    ) -> None:
        super().__init__()
        _validate(config)
        self.config, self.context = config, context
        self._require_patches(image_size)
        self.grid, self.channels = image_size // config.patch_size, config.width
        width, area = config.width, config.patch_size**2
        self.cond_width = width
        self.time_in = TimestepMLP(SINUSOIDS, width)
        self.context_in = nn.Linear(context, width) if context else None

        # Natural images lie near few of a large patch's dimensions
        narrow = config.bottleneck_channels
        sizes = [in_channels * area, *([narrow] if narrow else []), width]
        self.patch_in = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(sizes)))

        self.blocks = nn.ModuleList(
            DiTBlock(width=width, num_heads=config.num_heads, dropout=config.dropout)
            for _ in range(config.depth)
        )
        self.modulation_out = nn.Linear(width, 2 * width)
        fine = config.refine_channels
        self.patch_out = nn.Linear(width, (fine or out_channels) * area)
        self.refine = None
        if fine:
            convs = OuterConv(fine + in_channels, fine), OuterConv(fine, out_channels)
            self.refine = nn.Sequential(convs[0], nn.SiLU(), convs[1])
        for layer in (self.modulation_out, self.refine[-1] if self.refine else self.patch_out):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def _require_patches(self, *sides: int) -> None:
        """Raise ValueError for sides in px that patches do not fill."""
        if any(side % self.config.patch_size for side in sides):
            raise ValueError(
                f"image size: found {' x '.join(map(str, sides))}, expected a multiple of "
                f"patch_size = {self.config.patch_size}"
            )

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

        cond: [B, width], added to the timestep embedding; grid: [B, width, H/p, W/p], added to the
        patches; tokens [B, N, context] with token_mask bool [B, N] (True = keep): read by every
        block. Raises ValueError for sides that patches do not fill, or that do not fit `grid`.
        """
        self._require_patches(*x.shape[2:])
        h, cond, rotation, mask = self._enter(x, t, cond, grid, tokens, token_mask)
        for block in self.blocks:
            if self.config.checkpointing and self.training:
                h = checkpoint(block, h, cond, rotation, mask, use_reentrant=False)
            else:
                h = block(h, cond, rotation, mask)  # [B, N + HW/p^2, width]
        height, width = (side // self.config.patch_size for side in x.shape[2:])
        return self._leave(h, cond, x, height, width)  # [B, out, H, W]

    @compiled(dynamic=None)
    def _enter(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor | None,
        grid: Tensor | None,
        tokens: Tensor | None,
        token_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the first tokens [B, M, width], M = N + HW/p^2, the blocks' condition [B, width],
        rotation [2, M, d] and mask [B, 1, 1, M]."""
        time = self.time_in(t)  # [B, width]
        time = time if cond is None else time + cond
        patches = F.pixel_unshuffle(x, self.config.patch_size)  # [B, in p^2, H/p, W/p]
        height, width = patches.shape[2:]
        # in fp32 under autocast: later blocks add little to the sum of all before them
        h = self.patch_in(patches.flatten(2).transpose(1, 2)).float()  # [B, HW/p^2, width]
        if grid is not None:
            if grid.shape[2:] != (height, width):
                sides, expected = (
                    " x ".join(str(self.config.patch_size * side) for side in cells)
                    for cells in ((height, width), grid.shape[2:])
                )
                raise ValueError(f"image size: found {sides}, expected {expected} as in training")
            h = h + grid.flatten(2).transpose(1, 2).to(h.dtype)
        size = self.channels // self.config.num_heads
        rotation = rotations(height, width, size, x.device)  # [2, HW/p^2, size]
        mask = None
        if self.context_in is not None and tokens is not None and token_mask is not None:
            count = tokens.shape[1]
            h = torch.cat([self.context_in(tokens).to(h.dtype), h], dim=1)  # [B, M, width]
            # the condition's tokens do not turn
            still = torch.stack([rotation.new_ones(count, size), rotation.new_zeros(count, size)])
            rotation = torch.cat([still, rotation], dim=1)
            mask = F.pad(token_mask, (0, height * width), value=True)[:, None, None]
        return h, time, rotation, mask

    @compiled(dynamic=None)
    def _leave(self, h: Tensor, cond: Tensor, x: Tensor, height: int, width: int) -> Tensor:
        """Return the output, float32 [B, out, H, W], of the last tokens [B, M, width] and the input
        x [B, in, H, W]; height, width: of the image in patches."""
        shift, scale = self.modulation_out(F.silu(cond))[:, None].chunk(2, dim=-1)  # [B, 1, W]
        h = self.patch_out(modulated(h[:, -height * width :], shift, scale))  # [B, HW/p^2, out p^2]
        h = h.transpose(1, 2).unflatten(2, (height, width))  # [B, out p^2, H/p, W/p]
        h = F.pixel_shuffle(h, self.config.patch_size)  # [B, out, H, W], or fine
        if self.refine is not None:
            h = self.refine(torch.cat([h, x.to(h.dtype)], dim=1))  # [B, out, H, W]
        return h.float()
