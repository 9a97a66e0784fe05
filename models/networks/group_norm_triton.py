"""Triton kernels of group norm, scale and shift, and SiLU on channels-last images.

A program has one sample and a block of whole groups, of 64 bytes or more, so that its reads of
[cells, channels] are of whole sectors. It passes over its cells twice: sums over each channel, from
which the groups' follow, then the result, from the last cells to the first, which are still in the
cache. Where samples and blocks are too few for a GPU, the cells are split among several programs,
and the two passes are two launches, which hand partial sums over: never an atomic addition, so that
the same input gives the same bits.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language
from torch import Tensor
from triton.language import constexpr

# Typed as the compiler sees them, not as Python does: a kernel takes int for constexpr
tl: Any = triton.language
jit: Any = triton.jit

TILE = 4096  # values of a tile: 16 a thread, two loads of 16 bytes in bf16
MIN_BYTES = 64  # a cell's bytes in a block: two sectors, what the second-level cache fetches
MIN_PROGRAMS = 528  # 4 a multiprocessor of an H100; with fewer, cells are split
STAGES = 1  # tiles of a loop under way at once, through shared memory where above 1


@dataclass(frozen=True)
class _Plan:
    """How [B, C, H, W] is divided among programs."""

    groups: int  # of a block
    per_group: int  # channels
    block: int  # channels of a tile, a power of two
    rows: int  # cells of a tile
    split_cells: int  # of a program
    num_blocks: int
    num_splits: int

    @property
    def constants(self) -> dict[str, int]:
        return {
            "per_group": self.per_group, "block_groups": self.groups, "block": self.block,
            "group_block": triton.next_power_of_2(self.groups), "tile_rows": self.rows,
            "num_splits": self.num_splits, "split_block": triton.next_power_of_2(self.num_splits),
            "stages": STAGES, "num_warps": min(8, max(1, self.block * self.rows // 512)),
        }  # fmt: skip


def _plan(x: Tensor, num_groups: int) -> _Plan:
    batch, channels, cells = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    per_group = channels // num_groups
    sizes = [count for count in range(1, num_groups + 1) if num_groups % count == 0]
    cell_bytes = per_group * x.element_size()
    aligned = [count for count in sizes if count * cell_bytes % 16 == 0] or sizes
    groups = next((n for n in aligned if n * cell_bytes >= MIN_BYTES), aligned[-1])
    block = triton.next_power_of_2(groups * per_group)
    rows = max(1, min(TILE // block, triton.next_power_of_2(cells)))
    tiles, programs = math.ceil(cells / rows), batch * num_groups // groups
    tiles_each = math.ceil(tiles / min(tiles, math.ceil(MIN_PROGRAMS / programs)))
    return _Plan(
        groups=groups, per_group=per_group, block=block, rows=rows,
        split_cells=tiles_each * rows, num_blocks=num_groups // groups,
        num_splits=math.ceil(tiles / tiles_each),
    )  # fmt: skip


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    num_groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the result [B, C, H, W], and mean and 1 / standard deviation, float32 [2, B, G]."""
    plan, (batch, channels, height, width) = _plan(x, num_groups), x.shape
    y = torch.empty_like(x)
    moments = x.new_empty(2, batch, num_groups, dtype=torch.float32)
    partial = x.new_empty(2, batch, plan.num_splits, channels, dtype=torch.float32)
    grid = (plan.num_blocks, plan.num_splits, batch)
    for sums, applies in _passes(plan):
        _forward_kernel[grid](
            x, weight, bias, *_modulation(scale, shift, weight), y, *moments, partial,
            height * width, plan.split_cells, channels, eps, modulated=scale is not None,
            silu=silu, sums=sums, applies=applies, **plan.constants,
        )  # fmt: skip
    return y, moments


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, moments: Tensor, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient of x, and the sums over cells of dz and of dz x', float32 [2, B, C].

    z is SiLU's input, dz its gradient, x' the normalised x: the other gradients follow from them.
    """
    plan, (batch, channels, height, width) = _plan(x, moments.shape[2]), x.shape
    dx = torch.empty_like(x)
    partial = x.new_empty(2, batch, plan.num_splits, channels, dtype=torch.float32)
    grid = (plan.num_blocks, plan.num_splits, batch)
    for sums, applies in _passes(plan):
        _backward_kernel[grid](
            dy, x, weight, bias, *_modulation(scale, shift, weight), *moments, dx, partial,
            height * width, plan.split_cells, channels, modulated=scale is not None,
            silu=silu, sums=sums, applies=applies, **plan.constants,
        )  # fmt: skip
    return dx, partial.sum(2)


def _passes(plan: _Plan) -> list[tuple[bool, bool]]:
    """Return of each launch whether it sums and whether it applies."""
    return [(True, True)] if plan.num_splits == 1 else [(True, False), (False, True)]


def _modulation(
    scale: Tensor | None, shift: Tensor | None, absent: Tensor
) -> tuple[Tensor, Tensor, int, int]:
    """Return scale and shift with the distances of their rows, or what is never read."""
    if scale is None or shift is None:
        return absent, absent, 0, 0
    return scale, shift, scale.stride(0), shift.stride(0)


# -- in a kernel -----------------------------------------------------------------------------------


@jit
def _totals(values, member):  # [block] -> [group_block]
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@jit
def _to_channels(values, member):  # [group_block] -> [block]
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@jit
def _place(
    split_cells, cells, per_group: constexpr, block_groups: constexpr,
    block: constexpr, group_block: constexpr, second: constexpr,
):  # fmt: skip
    """Return a program's sample, channels and those that are there, groups and their members,
    and cells.

    second: of a second launch, which begins with the first one's last samples: the cache has them.
    """
    sample = tl.program_id(2).to(tl.int64)
    if second:
        sample = tl.num_programs(2) - 1 - sample
    lanes = tl.arange(0, block)
    here = lanes < block_groups * per_group
    channel = tl.program_id(0) * (block_groups * per_group) + lanes
    group = tl.arange(0, group_block)
    member = ((lanes // per_group)[None, :] == group[:, None]) & here[None, :]
    first = tl.program_id(1) * split_cells
    return sample, channel, here, group, member, first, tl.minimum(first + split_cells, cells)


@jit
def _affine(
    weight, bias, scale, shift, scale_row, shift_row, sample, channel, here,
    modulated: constexpr,
):  # fmt: skip
    """Return gain and offset [block]: z = x' gain + offset."""
    gain = tl.load(weight + channel, mask=here, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=here, other=0.0).to(tl.float32)
    if modulated:
        factor = tl.load(scale + sample * scale_row + channel, mask=here, other=0.0)
        added = tl.load(shift + sample * shift_row + channel, mask=here, other=0.0)
        factor = 1.0 + factor.to(tl.float32)
        gain, offset = gain * factor, offset * factor + added.to(tl.float32)
    return gain, offset


@jit
def _forward_kernel(
    x, weight, bias, scale, shift, scale_row, shift_row, y, mean_of, rstd_of, partial,
    cells, split_cells, channels, eps,
    modulated: constexpr, silu: constexpr, sums: constexpr, applies: constexpr,
    per_group: constexpr, block_groups: constexpr, block: constexpr,
    group_block: constexpr, tile_rows: constexpr, num_splits: constexpr,
    split_block: constexpr, stages: constexpr,
):  # fmt: skip
    sample, channel, here, group, member, first, end = _place(
        split_cells, cells, per_group, block_groups, block, group_block, not sums
    )
    rows = tl.arange(0, tile_rows)
    tile = rows[:, None] * channels + channel[None, :]  # [tile_rows, block]
    x += sample * cells * channels
    row = sample * num_splits * channels + channel  # of the first split's partial sums
    second = tl.num_programs(2).to(tl.int64) * num_splits * channels  # to the other partial sums

    # Mean and sum of squared deviations of each channel; sums of differences from its first value,
    # so that a mean far from 0 costs no digits
    if sums:
        pivot = tl.load(x + first * channels + channel, mask=here, other=0.0).to(tl.float32)
        total = tl.zeros([tile_rows, block], tl.float32)
        squares = tl.zeros([tile_rows, block], tl.float32)
        for start in tl.range(first, end, tile_rows, num_stages=stages):
            inside = ((start + rows) < end)[:, None] & here[None, :]
            value = tl.load(x + start * channels + tile, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(inside, value - pivot[None, :], 0.0)
            total += value
            squares += value * value
        count = (end - first).to(tl.float32)
        difference = tl.sum(total, axis=0) / count  # [block]
        mean = pivot + difference
        deviation = tl.sum(squares, axis=0) - difference * difference * count
    else:
        split = tl.arange(0, split_block)
        there = (split < num_splits)[:, None] & here[None, :]
        places = split[:, None] * channels + row[None, :]  # [split_block, block]
        means = tl.load(partial + places, mask=there, other=0.0)
        deviations = tl.load(partial + second + places, mask=there, other=0.0)
        counts = tl.minimum(cells - split * split_cells, split_cells).to(tl.float32)
        mean = tl.sum(means * counts[:, None], axis=0) / cells  # [block]
        apart = tl.where(there, means - mean[None, :], 0.0)
        deviation = tl.sum(deviations + apart * apart * counts[:, None], axis=0)

    if not applies:
        row += tl.program_id(1) * channels
        tl.store(partial + row, mean, mask=here)
        tl.store(partial + second + row, deviation, mask=here)
    else:
        # Mean and variance of each group (Chan et al. 1979), then the result
        group_mean = _totals(mean, member) / per_group  # [group_block]
        center = _to_channels(group_mean, member)  # [block]
        apart = mean - center
        variance = _totals(deviation + apart * apart * cells, member) / (cells * per_group)
        rstd = 1.0 / tl.sqrt(variance + eps)  # [group_block]
        if tl.program_id(1) == 0:
            to = (sample * tl.num_programs(0) + tl.program_id(0)) * block_groups + group
            tl.store(mean_of + to, group_mean, mask=group < block_groups)
            tl.store(rstd_of + to, rstd, mask=group < block_groups)

        gain, offset = _affine(
            weight, bias, scale, shift, scale_row, shift_row, sample, channel, here, modulated
        )
        gain *= _to_channels(rstd, member)
        y += sample * cells * channels
        tiles = tl.cdiv(end - first, tile_rows)
        for i in tl.range(tiles, num_stages=stages):
            start = first + (tiles - 1 - i) * tile_rows
            inside = ((start + rows) < end)[:, None] & here[None, :]
            place = start * channels + tile
            value = tl.load(x + place, mask=inside, other=0.0, eviction_policy="evict_first")
            value = (value.to(tl.float32) - center[None, :]) * gain[None, :] + offset[None, :]
            if silu:
                value *= tl.sigmoid(value)
            value = value.to(y.dtype.element_ty)
            tl.store(y + place, value, mask=inside, eviction_policy="evict_first")


@jit
def _gradient(dy, x, place, inside, center, rstd, gain, offset, silu: constexpr):
    """Return dz and x' of a tile [tile_rows, block]."""
    dz = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = (value - center[None, :]) * rstd[None, :]
    if silu:
        z = value * gain[None, :] + offset[None, :]
        sigmoid = tl.sigmoid(z)
        dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dz, value


@jit
def _backward_kernel(
    dy, x, weight, bias, scale, shift, scale_row, shift_row, mean_of, rstd_of, dx, partial,
    cells, split_cells, channels,
    modulated: constexpr, silu: constexpr, sums: constexpr, applies: constexpr,
    per_group: constexpr, block_groups: constexpr, block: constexpr,
    group_block: constexpr, tile_rows: constexpr, num_splits: constexpr,
    split_block: constexpr, stages: constexpr,
):  # fmt: skip
    sample, channel, here, group, member, first, end = _place(
        split_cells, cells, per_group, block_groups, block, group_block, not sums
    )
    rows = tl.arange(0, tile_rows)
    tile = rows[:, None] * channels + channel[None, :]  # [tile_rows, block]
    dy += sample * cells * channels
    x += sample * cells * channels
    row = sample * num_splits * channels + channel  # of the first split's partial sums
    second = tl.num_programs(2).to(tl.int64) * num_splits * channels  # to the other partial sums
    of = (sample * tl.num_programs(0) + tl.program_id(0)) * block_groups + group
    center = _to_channels(tl.load(mean_of + of, mask=group < block_groups, other=0.0), member)
    rstd = _to_channels(tl.load(rstd_of + of, mask=group < block_groups, other=0.0), member)
    gain, offset = _affine(
        weight, bias, scale, shift, scale_row, shift_row, sample, channel, here, modulated
    )  # [block] each

    # Sums over each channel's cells
    if sums:
        total = tl.zeros([tile_rows, block], tl.float32)
        product = tl.zeros([tile_rows, block], tl.float32)
        for start in tl.range(first, end, tile_rows, num_stages=stages):
            inside = ((start + rows) < end)[:, None] & here[None, :]
            place = start * channels + tile
            dz, value = _gradient(dy, x, place, inside, center, rstd, gain, offset, silu)
            total += dz
            product += dz * value
        dz_sum, dz_x_sum = tl.sum(total, axis=0), tl.sum(product, axis=0)  # [block]
        to = row + tl.program_id(1) * channels
        tl.store(partial + to, dz_sum, mask=here)
        tl.store(partial + second + to, dz_x_sum, mask=here)
    else:
        split = tl.arange(0, split_block)
        there = (split < num_splits)[:, None] & here[None, :]
        places = split[:, None] * channels + row[None, :]  # [split_block, block]
        dz_sum = tl.sum(tl.load(partial + places, mask=there, other=0.0), axis=0)
        dz_x_sum = tl.sum(tl.load(partial + second + places, mask=there, other=0.0), axis=0)

    # dx = rstd (dz gain - mean(dz gain) - x' mean(dz gain x')), means over the group
    if applies:
        size = cells * per_group
        along_one = _to_channels(_totals(gain * dz_sum, member) / size, member)  # [block]
        along_x = _to_channels(_totals(gain * dz_x_sum, member) / size, member)
        dx += sample * cells * channels
        tiles = tl.cdiv(end - first, tile_rows)
        for i in tl.range(tiles, num_stages=stages):
            start = first + (tiles - 1 - i) * tile_rows
            inside = ((start + rows) < end)[:, None] & here[None, :]
            place = start * channels + tile
            dz, value = _gradient(dy, x, place, inside, center, rstd, gain, offset, silu)
            value = dz * gain[None, :] - along_one[None, :] - value * along_x[None, :]
            value = (value * rstd[None, :]).to(dx.dtype.element_ty)
            tl.store(dx + place, value, mask=inside, eviction_policy="evict_first")
