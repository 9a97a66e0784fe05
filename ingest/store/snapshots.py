"""Snapshots: immutable lists of committed shards, which training and evaluation pin by digest.

<root>/_snapshots/<digest>.parquet    (name, num_samples, digest, excluded) a row, never changed
<root>/_snapshots/latest              the digest published last, replaced atomically
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.base.files import digest_of
from ingest.store.commits import read_commits
from ingest.store.manifests import read_manifest
from ingest.store.storage import join_root, storage_of

LATEST = "_snapshots/latest"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One committed shard of a snapshot. digest: of its content, see `Commit.digest`; excluded:
    rows that readers leave out, rising."""

    name: str
    num_samples: int
    digest: str
    excluded: tuple[int, ...] = ()

    @property
    def num_kept(self) -> int:
        """Number of samples that readers read."""
        return self.num_samples - len(self.excluded)

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Return the rows of the shard that stand at `places` among those not excluded."""
        if not self.excluded:
            return places
        return np.delete(np.arange(self.num_samples), self.excluded)[places]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An immutable list of committed shards, in name order, known by the digest of its content."""

    root: str
    digest: str
    shards: tuple[ShardEntry, ...]

    @property
    def num_samples(self) -> int:
        """Number of samples that readers read."""
        return sum(shard.num_kept for shard in self.shards)


def _snapshot_digest(shards: tuple[ShardEntry, ...]) -> str:
    # Of the rows, not of the Parquet bytes, which another writer version may lay out otherwise.
    return digest_of([_as_row(shard) for shard in shards])


def _as_row(shard: ShardEntry) -> dict[str, Any]:
    row = asdict(shard)
    return row if shard.excluded else {name: row[name] for name in row if name != "excluded"}


def publish_snapshot(
    root: str | os.PathLike[str], excluded: Mapping[str, Sequence[int]] | None = None
) -> Snapshot:
    """Write the immutable list of what is committed now, and point `_snapshots/latest` at it.

    excluded: by shard, the rows that its readers leave out.
    """
    shards = tuple(
        ShardEntry(
            name=one.shard,
            num_samples=one.num_samples,
            digest=one.digest,
            excluded=tuple(sorted((excluded or {}).get(one.shard, ()))),
        )
        for one in read_commits(root)
    )
    return write_snapshot(root, shards)


def write_snapshot(root: str | os.PathLike[str], shards: tuple[ShardEntry, ...]) -> Snapshot:
    """Write a list of shards as a snapshot, and point `_snapshots/latest` at it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    storage = storage_of(root)
    digest = _snapshot_digest(shards)
    name = f"_snapshots/{digest}.parquet"
    if storage.size(name) is None:
        types = [("name", pa.string()), ("num_samples", pa.int64()), ("digest", pa.string())]
        types.append(("excluded", pa.list_(pa.int32())))
        columns = {name: [getattr(shard, name) for shard in shards] for name, _ in types}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=pa.schema(types)), sink)
        storage.replace(name, sink.getvalue().to_pybytes())
    storage.replace(LATEST, f"{digest}\n".encode())
    return Snapshot(root=str(root), digest=digest, shards=shards)


def load_snapshot(root: str | os.PathLike[str], digest: str | None = None) -> Snapshot:
    """Return a snapshot by its digest, None for the latest; ValueError if absent or altered."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    storage = storage_of(root)
    if digest is None:
        read_manifest(root)
        try:
            digest = storage.read(LATEST).decode().strip()
        except FileNotFoundError:
            raise ValueError(
                f"{root}: no snapshot yet; rerun the stage that makes it until it ends"
            ) from None
    name = f"_snapshots/{digest}.parquet"
    where = join_root(root, name)
    try:
        table = pq.ParquetFile(pa.BufferReader(storage.read(name))).read()
    except FileNotFoundError:
        raise ValueError(
            f"{where}: no such snapshot; the latest is named in {join_root(root, LATEST)}"
        ) from None
    rows = table.to_pylist()
    shards = tuple(
        ShardEntry(**{**row, "excluded": tuple(row.get("excluded") or ())}) for row in rows
    )
    if _snapshot_digest(shards) != digest:
        raise ValueError(f"{where}: content does not match its name; delete it and rerun the stage")
    return Snapshot(root=str(root), digest=digest, shards=shards)
