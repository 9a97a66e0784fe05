"""Snapshots: immutable lists of committed shards, which training and evaluation pin by digest.

<root>/_snapshots/<digest>.parquet    (name, num_samples, digest) a row, never changed
<root>/_snapshots/latest              the digest published last, replaced atomically
"""

import os
from dataclasses import asdict, dataclass

from ingest.commits import digest_of, read_commits
from ingest.manifests import read_manifest
from ingest.storage import join_root, storage_of

LATEST = "_snapshots/latest"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One committed shard of a snapshot; digest: of its content, see `Commit.digest`."""

    name: str
    num_samples: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An immutable list of committed shards, in name order, known by the digest of its content."""

    root: str
    digest: str
    shards: tuple[ShardEntry, ...]

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)


def _snapshot_digest(shards: tuple[ShardEntry, ...]) -> str:
    # Of the rows, not of the Parquet bytes, which another writer version may lay out otherwise.
    return digest_of([asdict(shard) for shard in shards])


def publish_snapshot(root: str | os.PathLike[str]) -> Snapshot:
    """Write the immutable list of what is committed now, and point `_snapshots/latest` at it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards = tuple(
        ShardEntry(name=one.shard, num_samples=one.num_samples, digest=one.digest)
        for one in read_commits(root)
    )
    storage = storage_of(root)
    digest = _snapshot_digest(shards)
    name = f"_snapshots/{digest}.parquet"
    if storage.size(name) is None:
        columns = {name: [asdict(s)[name] for s in shards] for name in ShardEntry.__annotations__}
        types = [("name", pa.string()), ("num_samples", pa.int64()), ("digest", pa.string())]
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
    shards = tuple(ShardEntry(**row) for row in table.to_pylist())
    if _snapshot_digest(shards) != digest:
        raise ValueError(f"{where}: content does not match its name; delete it and rerun the stage")
    return Snapshot(root=str(root), digest=digest, shards=shards)
