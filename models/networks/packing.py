"""Packing: sequences of unequal length one after another, without padding between them.

Linear layers, norms and MLPs then run on the T real tokens, [T, W]; attention reads within each
sequence (Krell et al. 2021). Everything about the lengths is computed on the CPU, from lengths
that are there before the batch is on a device, so that no device is waited for.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

KERNEL_ROWS = 128  # tokens that a block of the kernel takes; bounds on lengths are multiples
NUM_GROUPS = 5


class OnDevice:
    """Tensors that move together: the fields of a dataclass, and of those within it."""

    def apply(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with `function` of every tensor."""

        def of(value: object) -> object:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, tuple):
                return tuple(of(item) for item in value)
            return value.apply(function) if isinstance(value, OnDevice) else value

        values = {field.name: of(getattr(self, field.name)) for field in fields(self)}  # pyright: ignore
        return replace(self, **values)  # pyright: ignore


@dataclass(frozen=True, kw_only=True)
class Packing(OnDevice):
    """Where the tokens of B sequences are in a tensor [T, W].

    offsets: int32 [B + 1], the rows at which sequences begin and end; sequence, position: int64
    [T], of each row; last: int64 [B], the row of each sequence's last token; max_length: a bound on
    the lengths; causal: whether a token reads those before it alone, or all of its sequence.

    Where there is no kernel for it, attention runs on groups of sequences of like length, padded to
    the longest of the group. rows: int64 [b, l] for each group, of its tokens; keep: bool [b, l],
    False for padding; order: int64 [T], of each token in all groups flattened; members: int64 [b],
    the sequences of each group; member_order: int64 [B], of each sequence in all groups.
    """

    offsets: Tensor
    sequence: Tensor
    position: Tensor
    last: Tensor
    max_length: int
    causal: bool
    rows: tuple[Tensor, ...]
    keep: tuple[Tensor, ...]
    order: Tensor
    members: tuple[Tensor, ...]
    member_order: Tensor

    @classmethod
    def of(cls, lengths: Tensor, *, causal: bool = True) -> "Packing":
        """Pack sequences of `lengths`, int64 [B] on the CPU; one of no tokens takes no row."""
        count, total = len(lengths), int(lengths.sum())
        offsets = torch.zeros(count + 1, dtype=torch.int64)
        offsets[1:] = lengths.cumsum(0)
        sequence = torch.arange(count).repeat_interleave(lengths)  # [T]
        position = torch.arange(total) - offsets[sequence]  # [T]
        longest = int(lengths.max()) if count else 0

        # Groups: half of the sequences, the shortest ones, then half of the rest, ...
        by_length = lengths.argsort(stable=True)
        by_length = by_length[lengths[by_length] > 0]
        bounds = [len(by_length) - (len(by_length) >> k) for k in range(1, NUM_GROUPS)]
        members = [group for group in by_length.tensor_split(bounds) if len(group)]
        keep = [torch.arange(int(lengths[group[-1]])) < lengths[group, None] for group in members]
        rows = [
            offsets[group, None] + torch.arange(kept.shape[1]).minimum(lengths[group, None] - 1)
            for group, kept in zip(members, keep, strict=True)
        ]  # padding repeats a sequence's last token
        order, member_order = torch.zeros(total, dtype=torch.int64), torch.zeros_like(lengths)
        if members:
            is_token = torch.cat([kept.flatten() for kept in keep])
            order[torch.cat([row.flatten() for row in rows])[is_token]] = is_token.nonzero()[:, 0]
            member_order[torch.cat(members)] = torch.arange(len(by_length))
        return cls(
            offsets=offsets.int(), sequence=sequence, position=position,
            last=(offsets[1:] - 1).clamp(min=0),
            max_length=-(-longest // KERNEL_ROWS) * KERNEL_ROWS, causal=causal,
            rows=tuple(rows), keep=tuple(keep), order=order,
            members=tuple(members), member_order=member_order,
        )  # fmt: skip

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.sequence)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.rows[-1].shape[1] if self.rows else 0

    def mask(self, length: int) -> Tensor:
        """Return bool [B, length], True where `pad` places a token."""
        lengths = self.offsets.diff()
        return torch.arange(length, device=lengths.device) < lengths[:, None]

    def pad(self, x: Tensor, length: int) -> Tensor:
        """Return packed rows x [T, ...] as [B, length, ...], zero where there is no token."""
        padded = x.new_zeros(len(self.last), length, *x.shape[1:])
        return padded.index_put((self.sequence, self.position), x)


def token_lengths(token_mask: Tensor) -> Tensor:
    """Return the lengths int64 [B] of captions, 1 or more, of bool [B, L] that is True where tokens
    are real: the first ones of each row."""
    return token_mask.sum(1).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class CaptionPacking(OnDevice):
    """How a batch's captions are packed, and a prior's sequences [text | K further tokens].

    text: of the captions' S tokens; drop: bool [B], captions that the model does not read. joined:
    of a prior's sequences, None where there are none; source: int64 [T], of each of their tokens
    the row in [S tokens of text | N nulls of each dropped caption | K further tokens of each
    sample]; place: int64 [T], its position, of further tokens counted from the end: -K ... -1;
    num_dropped: of captions; num_tokens: that the model reads of captions, nulls among them.
    """

    text: Packing
    drop: Tensor
    num_tokens: int
    num_dropped: int = 0
    joined: Packing | None = None
    source: Tensor | None = None
    place: Tensor | None = None

    @classmethod
    def of(cls, lengths: Tensor, drop: Tensor) -> "CaptionPacking":
        """Pack captions of `lengths`, int64 [B] on the CPU, all of which are read."""
        text = Packing.of(lengths)
        return cls(text=text, drop=drop, num_tokens=text.num_tokens)


def pack_prior(
    lengths: Tensor,
    drop: Tensor,
    *,
    num_further: int,
    nulls: tuple[int, int] = (0, 0),
    causal: bool = True,
) -> CaptionPacking:
    """Pack sequences of captions of `lengths`, int64 [B] on the CPU, and `num_further` tokens each.

    drop: bool [B], of which captions learned nulls take the place; nulls: how many of them are
    read, and how many there are; causal: see `Packing`.
    """
    length, num_nulls = nulls
    text = Packing.of(lengths.masked_fill(drop, 0))
    read = lengths.masked_fill(drop, length)
    joined = Packing.of(read + num_further, causal=causal)
    sequence, position = joined.sequence, joined.position
    further = position - read[sequence]  # 0 or more beyond the text
    num_dropped, first_null = int(drop.sum()), text.num_tokens
    first_further = first_null + num_dropped * num_nulls
    null = first_null + (drop.cumsum(0)[sequence] - 1) * num_nulls + position
    source = torch.where(drop[sequence], null, text.offsets[sequence].long() + position)
    return CaptionPacking(
        text=text, drop=drop, num_tokens=int(read.sum()), num_dropped=num_dropped, joined=joined,
        source=torch.where(further < 0, source, first_further + sequence * num_further + further),
        place=torch.where(further < 0, position, further - num_further),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PackedTokens(OnDevice):
    """The tokens of a batch's captions, int64 [S], and their packing."""

    tokens: Tensor
    packing: CaptionPacking

    @classmethod
    def of(cls, tokens: Tensor, packing: CaptionPacking) -> "PackedTokens":
        """Pack tokens int [B, L]."""
        rows = tokens[packing.text.sequence, packing.text.position]
        return cls(tokens=rows.long(), packing=packing)
