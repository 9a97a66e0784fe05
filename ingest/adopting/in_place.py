"""One tar, indexed where it lies: one pass over it writes our index, captions, table and commit.

<shard>.idx.npy     int64 [n, 4]: the image's offset and length in the tar, the caption's in
<shard>.captions    the captions, UTF-8
<shard>.parquet     a row for every sample of the tar, stored or not
"""

import hashlib
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import cast

import numpy as np

from cluster.base.files import Json, write_json
from cluster.base.outcomes import status_of
from ingest.adopting.sources import Part, SourceSample, left_out, row_key, table_row
from ingest.adopting.tar_reader import Span, TarReader, plain_tar
from ingest.adopting.tars import TarSource
from ingest.fetching.decode import DecodeError, ImageLimits, verify_image
from ingest.lists.filters import RowFilter
from ingest.shards import CAPTIONS_END, SOURCE_KEY, STORED, Attempt, Commit, outcome, row_schema
from ingest.store.commits import FileEntry
from ingest.store.removal import FORGOTTEN, read_forgotten
from ingest.store.shard_runner import Unit
from ingest.store.storage import split_place, storage_of

CHUNK_ROWS = 1000
CHUNK_CHARS = 1 << 24  # of captions

Found = tuple[Span | None, SourceSample]


@dataclass(frozen=True, kw_only=True)
class InPlaceJob:
    """What every shard of an adoption in place has in common."""

    root: str
    source: TarSource
    row_filter: RowFilter
    limits: ImageLimits
    config_hash: str

    def __call__(self, unit: Unit) -> Commit:
        """Index the tar of a unit and commit it; return the commit, of whoever came first.

        Raises OSError or ValueError where the tar is absent, damaged, or changes meanwhile.
        """
        name, part, started = unit.name, cast(Part, unit.payload), time.time()
        folder, base = split_place(part.place)
        stamp = storage_of(folder).stamp(base)
        with (
            Attempt(self.root, name) as attempt,
            plain_tar(part.place, decompress=False) as path,
            closing(TarReader(path)) as reader,
        ):
            counts = self._index(reader, part, attempt)
            if storage_of(folder).stamp(base) != stamp:
                raise OSError("it was changed while it was read; rerun")
            stats = {"start_time": started, "end_time": time.time(), "status_dict": counts}
            write_json(attempt.path / f"{name}_stats.json", stats)
            outcomes = {_outcome(reason): number for reason, number in counts.items()}
            tar = FileEntry(sha256=reader.digest(), size=reader.size, url=part.place, stamp=stamp)
            return attempt.commit(
                num_samples=counts[STORED],
                counts=dict(sorted(outcomes.items())),
                config_hash=self.config_hash,
                elsewhere={f"{name}.tar": tar},
            )

    def _index(self, reader: TarReader, part: Part, attempt: Attempt) -> Counter[str]:
        """Write the index, the captions and the table; return the rows by reason."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        kept, name = self.source.kept, attempt.shard
        schema = pa.schema([*row_schema(), (SOURCE_KEY, pa.string()), *kept])
        forgotten = read_forgotten(self.root)
        reasons: Counter[str] = Counter()
        index, num_bytes = array("q"), 0  # a row's four numbers; of captions so far
        with (
            open(attempt.path / f"{name}.captions", "xb") as captions,
            pq.ParquetWriter(attempt.path / f"{name}.parquet", schema) as table,
        ):
            for chunk in _chunks(self.source.scan(reader, part)):
                left = left_out([sample for _, sample in chunk], self.row_filter, kept, forgotten)
                rows: list[Json] = []
                for place, (span, sample) in enumerate(chunk):
                    reason, sha256, sizes = left.get(place), None, None
                    if reason is None and span is not None:
                        data = reader.read(span)
                        sha256 = hashlib.sha256(data).hexdigest()
                        reason, sizes = self._verified(data)
                        reason = FORGOTTEN if forgotten.covers(None, sha256) else reason
                    if reason is None and span is not None:
                        caption = "".join(sample.captions[:1]).encode()
                        index.extend((*span, num_bytes, len(caption)))
                        num_bytes += captions.write(caption)
                    key = row_key(name, reasons.total())
                    rows.append(table_row(key, sample, reason, sha256=sha256, sizes=sizes))
                    reasons[reason or STORED] += 1
                table.write_table(pa.Table.from_pylist(rows, schema=schema))
            captions.write(CAPTIONS_END)
        rows_of_index = np.frombuffer(index, np.int64).reshape(-1, 4)
        np.save(attempt.path / f"{name}.idx.npy", rows_of_index, allow_pickle=False)
        return reasons

    def _verified(self, data: bytes) -> tuple[str | None, tuple[int, ...]]:
        """Return why an image is left out, None if it is not, and its sizes."""
        try:
            return None, 2 * verify_image(data, self.limits)
        except DecodeError as error:
            return error.reason, ()


def _outcome(reason: str) -> str:
    return outcome(STORED, None) if reason == STORED else outcome(status_of(reason), reason)


def _chunks(samples: Iterator[Found]) -> Iterator[list[Found]]:
    """Yield samples by up to 1,000, fewer where captions are long."""
    chunk: list[Found] = []
    num_chars = 0
    for found in samples:
        chunk.append(found)
        num_chars += sum(map(len, found[1].captions))
        if len(chunk) == CHUNK_ROWS or num_chars > CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk
