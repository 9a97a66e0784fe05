"""The shards of a download: the list's, then those of rounds of retries.

    <images>/_retries/0001.parquet    row (its place in the list) and reason, in the list's order

A round takes the rows that failed for reasons that may pass into new shards, after those of the
list and of earlier rounds. It is written once; until its last shard is committed, every download
to the folder works on it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cluster.base.outcomes import TRANSIENT
from ingest.lists.url_list import rechunk
from ingest.shards import shard_name
from ingest.store.shard_runner import Unit
from ingest.store.storage import Root, read_table, storage_of, write_table

if TYPE_CHECKING:
    import pyarrow as pa

FAILED_BEFORE = "_failed_before"  # column of a round's shards: why the row failed


@dataclass(frozen=True, kw_only=True)
class RetryRound:
    """rows: int64 [n], places in the list, ascending; reasons: why each failed before."""

    number: int
    rows: np.ndarray
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DownloadPlan:
    """All shards that a download consists of: the list's, then those of each round."""

    num_rows: int
    samples_per_shard: int
    rounds: tuple[RetryRound, ...] = ()

    @property
    def num_shards(self) -> int:
        """Number of shards, the rounds' included."""
        sizes = [self.num_rows, *(len(each.rows) for each in self.rounds)]
        return sum(self._num_shards(size) for size in sizes)

    def _num_shards(self, num_rows: int) -> int:
        return -(-num_rows // self.samples_per_shard)

    def _locate(self, shard: int) -> tuple[RetryRound | None, slice]:
        """Return the round of a shard, None for the list, and the shard's rows there."""
        size = self.samples_per_shard
        for source in (None, *self.rounds):
            num_rows = self.num_rows if source is None else len(source.rows)
            if shard < self._num_shards(num_rows):
                return source, slice(shard * size, min(num_rows, (shard + 1) * size))
            shard -= self._num_shards(num_rows)
        raise IndexError(shard)

    def rows_of(self, shard: int) -> np.ndarray:
        """Return the places in the list of a shard's rows, int64 [n]."""
        source, rows = self._locate(shard)
        return np.arange(rows.start, rows.stop) if source is None else source.rows[rows]

    def reasons_of(self, shard: int) -> list[str]:
        """Return why each of a shard's rows failed before; empty for a shard of the list."""
        source, rows = self._locate(shard)
        return [] if source is None else list(source.reasons[rows])

    def units(self, read_list: "Callable[[], Iterator[pa.Table]]") -> Iterator[Unit]:
        """Yield every shard with its rows; read_list: yields the list's shards from the start."""
        import pyarrow as pa

        number = 0
        for source in (None, *self.rounds):
            tables = read_list()
            if source is not None:
                tables = pick(tables, source.rows, self.samples_per_shard)
            for rows in tables:
                if source is not None:
                    reasons = pa.array(self.reasons_of(number), pa.string())
                    rows = rows.append_column(FAILED_BEFORE, reasons)
                yield Unit(name=shard_name(number), payload=rows)
                number += 1


def read_rounds(root: Root) -> tuple[RetryRound, ...]:
    """Return the rounds of a download, in order."""
    rounds: list[RetryRound] = []
    for name in storage_of(root).names("_retries"):
        number = len(rounds) + 1
        if name != f"{number:04d}.parquet":  # a file that was being written
            continue
        table = read_table(root, f"_retries/{name}")
        reasons = tuple(table["reason"].to_pylist())
        rounds.append(RetryRound(number=number, rows=table["row"].to_numpy(), reasons=reasons))
    return tuple(rounds)


def start_round(root: Root, plan: DownloadPlan) -> RetryRound | None:
    """Write the next round, of all rows whose last failure may pass; None if there are none.

    All shards of the plan must be committed.
    """
    import pyarrow as pa

    names = sorted(TRANSIENT)
    last = np.zeros(plan.num_rows, np.int8)  # 1 + place of the reason in `names`; 0 for none
    for number in range(plan.num_shards):
        errors = read_table(root, f"{shard_name(number)}.parquet", "error")["error"].to_pylist()
        codes = [1 + names.index(error) if error in TRANSIENT else 0 for error in errors]
        last[plan.rows_of(number)] = codes
    rows = np.flatnonzero(last)
    if not len(rows):
        return None
    reasons = tuple(names[code - 1] for code in last[rows])
    number = len(plan.rounds) + 1
    table = pa.table({"row": pa.array(rows, pa.int64()), "reason": list(reasons)})
    write_table(root, f"_retries/{number:04d}.parquet", table)
    return RetryRound(number=number, rows=rows, reasons=reasons)


def pick(tables: "Iterator[pa.Table]", rows: np.ndarray, size: int) -> "Iterator[pa.Table]":
    """Yield tables of `size` rows (the last: what is left) of the list's `rows`, in their order.

    tables: the list from its beginning; rows: int64, ascending.
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
