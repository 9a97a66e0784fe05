"""Shards made anew without some samples: a new generation under the old names.

Kept samples keep their bytes and keys, and every row of the list keeps its row of the table: what
was stored becomes filtered, for the reason given.
"""

import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ingest.fetching.retries import RETRIED
from ingest.shards import STORED, index_tar, outcome
from ingest.store.commits import Attempt, Commit
from ingest.store.forgotten import FORGOTTEN
from ingest.store.generations import lift
from ingest.store.storage import LocalStorage, storage_of

if TYPE_CHECKING:
    import pyarrow as pa

EMBED_PARTS = ("image_embed", "text_embed", "tokens")
SIZES = ("width", "height", "original_width", "original_height")


@contextmanager
def local_files(root: str | os.PathLike[str], commit: Commit) -> Iterator[Path]:
    """Yield a local folder that holds the files of a commit: the root itself, or a copy."""
    storage = storage_of(root)
    if isinstance(storage, LocalStorage):
        yield storage.root
        return
    folder = Path(tempfile.mkdtemp(prefix="minidalle2-"))
    try:
        for name in commit.files:
            with storage.open(name) as source, open(folder / name, "wb") as target:
                shutil.copyfileobj(source, target)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_rows(root: str | os.PathLike[str], old: Commit, reasons: Mapping[int, str]) -> Commit:
    """Make an image shard anew without the samples of some rows of its table.

    reasons: row of the table -> why it goes; where that is FORGOTTEN, what the table says of the
    row goes too. The caller holds the folder (`exclusive`).
    """
    import pyarrow.parquet as pq

    name = old.shard
    with local_files(root, old) as folder, Attempt(root, name) as attempt:
        table = pq.ParquetFile(folder / f"{name}.parquet").read()
        status, keys = table["status"].to_pylist(), table["key"].to_pylist()
        stored = [row for row, word in enumerate(status) if word == STORED]
        gone = {keys[row] for row in stored if row in reasons}
        copy_tar(folder / f"{name}.tar", attempt.path / f"{name}.tar", without=gone)
        index = index_tar(attempt.path / f"{name}.tar")
        np.save(attempt.path / f"{name}.idx.npy", index, allow_pickle=False)
        table = _without(table, reasons)
        pq.write_table(table, attempt.path / f"{name}.parquet")
        retried = {n: c for n, c in old.counts.items() if n.startswith(f"{RETRIED}:")}
        made = attempt.supersede(
            old,
            [place for place, row in enumerate(stored) if row in reasons],
            counts={**_outcomes(table), **retried},
            config_hash=old.config_hash,
        )
    lift(root, name)
    return made


def copy_tar(source: Path, target: Path, *, without: Collection[str]) -> None:
    """Copy a tar byte for byte, but for the members of some keys."""
    with tarfile.open(source, "r:") as old, tarfile.open(target, "x") as new:
        for member in old:
            if member.name.partition(".")[0] not in without:
                new.addfile(member, old.extractfile(member))


def _without(table: "pa.Table", reasons: Mapping[int, str]) -> "pa.Table":
    import pyarrow as pa

    columns = table.to_pydict()
    forgotten = [row for row, reason in reasons.items() if reason == FORGOTTEN]
    for row, reason in reasons.items():
        if columns["status"][row] == STORED:  # what failed stays as it was counted
            columns["status"][row], columns["error"][row] = "filtered", reason
            for size in SIZES:
                columns[size][row] = None
    for name in set(columns) - {"key", "status", "error"}:
        for row in forgotten:
            columns[name][row] = None
    return pa.table(columns, schema=table.schema)


def _outcomes(table: "pa.Table") -> dict[str, int]:
    rows = zip(table["status"].to_pylist(), table["error"].to_pylist(), strict=True)
    return dict(sorted(Counter(outcome(status, error) for status, error in rows).items()))


def follow_images(root: str | os.PathLike[str], old: Commit, images: Commit) -> Commit | None:
    """Make an embedding shard anew without the samples that its image shard lost since.

    None: nothing to do, or its images are no earlier generation of these.
    """
    import pyarrow.parquet as pq

    earlier = images.superseded.get(old.config_hash)
    if old.config_hash == images.digest or earlier is None:
        return None
    name, removed = old.shard, earlier["removed"]
    with local_files(root, old) as folder, Attempt(root, name) as attempt:
        for part in EMBED_PARTS:
            array = np.load(folder / f"{name}.{part}.npy", allow_pickle=False)
            kept = np.delete(array, removed, axis=0)
            np.save(attempt.path / f"{name}.{part}.npy", kept, allow_pickle=False)
        table = pq.ParquetFile(folder / f"{name}.keys.parquet").read()
        rows = np.delete(np.arange(table.num_rows), removed)
        places = np.arange(len(rows), dtype=np.int32)
        table = table.take(rows).set_column(0, table.schema.field("row"), [places])
        pq.write_table(table, attempt.path / f"{name}.keys.parquet")
        counts = {"embedded": len(rows)}
        made = attempt.supersede(old, removed, counts=counts, config_hash=images.digest)
    lift(root, name)
    return made
