"""Features in blocks of rows, on disk or in memory; sums never need all of them in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.distances.frechet import Moments

BLOCK_SIZE = 256  # images
CHUNK_BLOCKS = 8  # blocks whose features are in memory at once, as float64: 2,048 rows


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features [N, D] in blocks, float32; each block is a file or an array."""

    blocks: Sequence[Path | np.ndarray]
    sizes: Sequence[int]

    @classmethod
    def of(cls, array: np.ndarray, block_size: int = BLOCK_SIZE) -> "Features":
        """Return the features of an array that is in memory."""
        blocks = [array[i : i + block_size] for i in range(0, len(array), block_size)]
        return cls(blocks=blocks, sizes=[len(block) for block in blocks])

    def __len__(self) -> int:
        return sum(self.sizes)

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (rows, float64 [B, D]) in order, some 2,048 rows at a time."""
        start = 0
        for first in range(0, len(self.blocks), CHUNK_BLOCKS):
            loaded = [_load(block) for block in self.blocks[first : first + CHUNK_BLOCKS]]
            chunk = np.concatenate(loaded).astype(np.float64)
            yield slice(start, start + len(chunk)), chunk
            start += len(chunk)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return float64 [len(rows), D]: those rows, in their order."""
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        block_of = np.searchsorted(starts, rows, side="right") - 1
        taken: np.ndarray | None = None
        for block in np.unique(block_of):
            places = np.flatnonzero(block_of == block)
            picked = _load(self.blocks[block], lazily=True)[rows[places] - starts[block]]
            if taken is None:
                taken = np.empty((len(rows), picked.shape[1]))
            taken[places] = picked
        assert taken is not None, "no rows asked for"
        return taken

    def all(self) -> np.ndarray:
        """Return every feature, float32 [N, D]: for narrow spaces only."""
        return np.concatenate([_load(block) for block in self.blocks])

    def moments(self, counts: np.ndarray | None = None) -> Moments:
        """Return the moments of all rows, or of each row `counts` times, summed in block order."""
        if counts is None:
            return Moments.merge(Moments.of(chunk) for _, chunk in self.chunks())
        return Moments.merge(Moments.of(chunk, counts[rows]) for rows, chunk in self.chunks())


def _load(block: Path | np.ndarray, *, lazily: bool = False) -> np.ndarray:
    if isinstance(block, np.ndarray):
        return block
    return np.load(block, mmap_mode="r" if lazily else None, allow_pickle=False)
