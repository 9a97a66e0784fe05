"""Rounds of retries: rows that failed for passing reasons, fetched again into new shards.

    <images>/_retries/0001.parquet    row (its place in the list) and reason, in the list's order

A round's shards follow the list's and those of earlier rounds. A round is written once; until its
last shard is committed it belongs to what a download has to do, whoever runs it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cluster.base.outcomes import TRANSIENT
from ingest.lists.url_list import rechunk
from ingest.store.storage import storage_of

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Round:
    """rows: int64 [n], places in the list, rising; reasons: why each failed before."""

    number: int
    rows: np.ndarray
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All shards that a download consists of: the list's, then those of each round."""

    num_rows: int
    samples_per_shard: int
    rounds: tuple[Round, ...] = ()

    @property
    def num_shards(self) -> int:
        """Number of shards, the rounds' included."""
        return sum(self._shards_of(count) for count in self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return [self.num_rows, *(len(one.rows) for one in self.rounds)]

    def _shards_of(self, count: int) -> int:
        return -(-count // self.samples_per_shard)

    def rows_of(self, shard: int) -> np.ndarray:
        """Return the places in the list of a shard's rows, int64 [n]."""
        size = self.samples_per_shard
        for number, count in enumerate(self._sizes):
            shards = self._shards_of(count)
            if shard < shards:
                start, stop = shard * size, min(count, (shard + 1) * size)
                places = self.rounds[number - 1].rows[start:stop] if number else None
                return np.arange(start, stop) if places is None else places
            shard -= shards
        raise IndexError(shard)

    def reasons_of(self, shard: int) -> list[str]:
        """Return why each of a shard's rows failed before; empty for a shard of the list."""
        shard -= self._shards_of(self.num_rows)
        for one in self.rounds if shard >= 0 else ():
            shards = self._shards_of(len(one.rows))
            if shard < shards:
                size = self.samples_per_shard
                return list(one.reasons[shard * size : (shard + 1) * size])
            shard -= shards
        return []


def read_rounds(root: str | os.PathLike[str]) -> tuple[Round, ...]:
    """Return the rounds of a download, in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    storage, found = storage_of(root), []
    for name in storage.names("_retries"):
        if name != f"{len(found) + 1:04d}.parquet":  # one that was being written
            continue
        table = pq.ParquetFile(pa.BufferReader(storage.read(f"_retries/{name}"))).read()
        reasons = tuple(table["reason"].to_pylist())
        found.append(Round(number=len(found) + 1, rows=table["row"].to_numpy(), reasons=reasons))
    return tuple(found)


def start_round(root: str | os.PathLike[str], plan: Plan, shards: Sequence[str]) -> Round | None:
    """Write the next round, of all rows whose last failure may pass; None if there are none.

    shards: the names of the plan's, in order, all committed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    storage, names = storage_of(root), sorted(TRANSIENT)
    last = np.zeros(plan.num_rows, np.int8)  # 1 + place of the reason in `names`; 0 for none
    for number, name in enumerate(shards):
        with storage.open(f"{name}.parquet") as file:
            table = pq.ParquetFile(file).read(columns=["error"])
        errors = table["error"].to_pylist()
        codes = [1 + names.index(error) if error in TRANSIENT else 0 for error in errors]
        last[plan.rows_of(number)] = codes
    rows = np.flatnonzero(last)
    if not len(rows):
        return None
    reasons = tuple(names[code - 1] for code in last[rows])
    number = len(plan.rounds) + 1
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"row": pa.array(rows, pa.int64()), "reason": list(reasons)}), sink)
    storage.replace(f"_retries/{number:04d}.parquet", sink.getvalue().to_pybytes())
    return Round(number=number, rows=rows, reasons=reasons)


def pick(tables: "Iterator[pa.Table]", rows: np.ndarray, size: int) -> "Iterator[pa.Table]":
    """Yield tables of `size` rows (the last: what is left) of the list's `rows`, in their order.

    tables: the list from its beginning; rows: int64, rising.
    """
    import pyarrow as pa

    def chosen() -> "Iterator[pa.Table]":
        start = 0
        for table in tables:
            low, high = np.searchsorted(rows, [start, start + table.num_rows])
            if high > low:
                yield table.take(pa.array(rows[low:high] - start))
            start += table.num_rows

    return rechunk(chosen(), size)
