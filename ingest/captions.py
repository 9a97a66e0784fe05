"""Further captions of samples: a kept column of the images' tables, and its embeddings.

The layout of their files is in ingest/shards.py. A column holds a text or a list of texts for each
sample, or nothing: a null and an empty text are no captions.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    pass

FURTHER_ARRAYS = ("offsets", "text_embed", "tokens")
OFFSETS = ".offsets.npy"


@dataclass(frozen=True)
class FurtherCaptions:
    """The embeddings of a column: sample i has `counts[i]` captions, from row `starts[i]` on.

    starts, counts: int64 [n]; text_embed: float16 [m, E]; tokens: int32 [m, L].
    """

    starts: np.ndarray
    counts: np.ndarray
    text_embed: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, offsets: np.ndarray, text_embed: np.ndarray, tokens: np.ndarray) -> Self:
        """Return the captions of samples that have rows [offsets[i], offsets[i + 1])."""
        return cls(offsets[:-1], np.diff(offsets), text_embed, tokens)

    def at(self, rows: np.ndarray) -> Self:
        """Return the captions of some of the samples; the arrays stay as they are."""
        return replace(self, starts=self.starts[rows], counts=self.counts[rows])

    def write(self, folder: Path, name: str) -> None:
        """Write the files of column `name`, SHARD.COLUMN, with the rows of these samples alone."""
        spans = zip(self.starts.tolist(), self.counts.tolist(), strict=True)
        rows = np.concatenate([np.zeros(0, int), *(np.arange(s, s + n) for s, n in spans)])
        offsets = np.concatenate([[0], self.counts.cumsum()]).astype(np.int64)
        text_embed = self.text_embed[rows].astype(np.float16)
        tokens = self.tokens[rows].astype(np.int32)
        for array, values in zip(FURTHER_ARRAYS, (offsets, text_embed, tokens), strict=True):
            np.save(folder / f"{name}.{array}.npy", values, allow_pickle=False)


def further_columns(shard: str, files: Iterable[str]) -> list[str]:
    """Return the columns of captions among the files of an embedding shard."""
    names = (name.removeprefix(f"{shard}.") for name in files if name.endswith(OFFSETS))
    return [name.removesuffix(OFFSETS) for name in names]


def as_captions(value: object) -> list[str]:
    """Return the captions in a value of such a column."""
    texts = value if isinstance(value, list) else [value]
    return [text for text in texts if isinstance(text, str) and text]
