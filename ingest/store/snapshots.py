"""What a data folder is (its manifest), and the lists of shards that readers pin (snapshots).

    <root>/_manifest.json               kind, format version, and the settings of its content
    <root>/_snapshots/<digest>.parquet  (name, num_samples, digest, excluded) a row; never changed
    <root>/_snapshots/latest            the digest published last, replaced atomically
    <images>/index.json                 the tars of the snapshot published last, as wids reads them

Training and evaluation pin one snapshot by its digest and read nothing else.
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cluster.base.files import Json, digest_of
from ingest.store.commits import read_commits
from ingest.store.storage import Root, join_root, read_table, storage_of, write_table

FORMAT_VERSION = 1
MANIFEST = "_manifest.json"
LATEST = "_snapshots/latest"
WIDS_INDEX = "index.json"  # for readers of other projects: wids, webdataset, Energon
FORGOTTEN_FOLDER = "_forgotten"  # --fresh keeps it: a request to be forgotten is for good


# -- manifest ------------------------------------------------------------------------------------


def write_manifest(root: Root, kind: str, fields: Json) -> None:
    """Create `<root>/_manifest.json`, or check that the existing one is equal.

    kind: "images", "embeds" or "features"; fields: JSON-able. Raises ValueError naming the first
    field that differs, or when the folder holds other things than our data.
    """
    storage = storage_of(root)
    expected = json.loads(json.dumps({"kind": kind, "version": FORMAT_VERSION, **fields}))
    names = storage.names()
    if MANIFEST not in names:
        if any(MANIFEST not in name and name != FORGOTTEN_FOLDER for name in names):
            raise ValueError(f"{root}: not empty and without our manifest; give another folder")
        text = json.dumps(expected, indent=1, sort_keys=True) + "\n"
        if storage.create(MANIFEST, text.encode()):
            return
    stored = read_manifest(root)
    # The hash of all settings comes last: the name of one setting is more helpful.
    for name in sorted({*stored, *expected}, key=lambda name: (name == "config_hash", name)):
        if stored.get(name) != expected.get(name):
            raise ValueError(
                f"{root}: was made with {name} = {stored.get(name)!r}, this run has "
                f"{expected.get(name)!r}; use the same, another folder, or --fresh to start over"
            )


def read_manifest(root: Root) -> Json:
    """Return the manifest of `root`; ValueError with the remedy when there is none."""
    try:
        return json.loads(storage_of(root).read(MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{root}: no _manifest.json, so not a data folder; make one of what is there by: "
            f"{adopt_command(root)}; or by ingest/download.py (images) or ingest/embed.py (embeds)"
        ) from None
    except json.JSONDecodeError as error:
        where = join_root(root, MANIFEST)
        raise ValueError(f"{where}: not JSON ({error}); restore it or use --fresh") from None


def adopt_command(root: Root) -> str:
    """Return the command that makes a data folder of tars, tables or pictures in `root`."""
    return f"python ingest/adopt.py --source {shlex.quote(os.fspath(root))} --out data/images"


def remove_data_folder(root: Root, kind: str) -> None:
    """Empty `root` for --fresh; only a folder with our manifest of that kind."""
    storage = storage_of(root)
    names = set(storage.names()) - {FORGOTTEN_FOLDER}
    if not names:
        return
    actual = read_manifest(root).get("kind")
    if actual != kind:
        raise ValueError(f"{root}: --fresh refused: its manifest says {actual!r}, not {kind!r}")
    # The manifest goes last, so that an interrupted deletion can be repeated.
    for name in sorted(names, key=lambda name: name == MANIFEST):
        storage.delete(name)


# -- snapshots -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One committed shard of a snapshot. digest: see `Commit.digest`; excluded: rows that readers
    leave out, rising."""

    name: str
    num_samples: int
    digest: str
    excluded: tuple[int, ...] = ()

    @property
    def num_kept(self) -> int:
        """Number of samples that readers read."""
        return self.num_samples - len(self.excluded)

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Return the rows of the shard at `places` among those not excluded."""
        if not self.excluded:
            return places
        return np.delete(np.arange(self.num_samples), self.excluded)[places]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An immutable list of committed shards, in name order, identified by its content's digest."""

    root: str
    digest: str
    shards: tuple[ShardEntry, ...]

    @property
    def num_samples(self) -> int:
        """Number of samples that readers read."""
        return sum(shard.num_kept for shard in self.shards)


def _snapshot_digest(shards: tuple[ShardEntry, ...]) -> str:
    """Digest the rows, not the Parquet bytes, which another version may lay out differently."""
    rows = [asdict(shard) for shard in shards]
    for row in rows:
        if not row["excluded"]:
            del row["excluded"]
    return digest_of(rows)


def publish_snapshot(root: Root, excluded: Mapping[str, Sequence[int]] | None = None) -> Snapshot:
    """Write the immutable list of what is committed now, and point `_snapshots/latest` at it.

    excluded: by shard, the rows that its readers leave out.
    """
    shards: list[ShardEntry] = []
    tars: list[str] = []
    for commit in read_commits(root):
        rows = tuple(sorted((excluded or {}).get(commit.shard, ())))
        shards.append(
            ShardEntry(
                name=commit.shard,
                num_samples=commit.num_samples,
                digest=commit.digest,
                excluded=rows,
            )
        )
        tar = commit.files.get(f"{commit.shard}.tar")
        if tar is not None:
            # An adopted tar has all of its samples, also those that are left out here
            num_samples = sum(commit.counts.values()) if "url" in tar else commit.num_samples
            url = tar.get("url", f"{commit.shard}.tar")
            entry = {"url": url, "nsamples": num_samples, "filesize": tar["size"]}
            tars.append(json.dumps(entry))
    if tars or storage_of(root).size(WIDS_INDEX) is not None:
        head = '{"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [\n'
        storage_of(root).replace(WIDS_INDEX, (head + ",\n".join(tars) + "\n]}\n").encode())
    return write_snapshot(root, tuple(shards))


def write_snapshot(root: Root, shards: tuple[ShardEntry, ...]) -> Snapshot:
    """Write a list of shards as a snapshot, and point `_snapshots/latest` at it."""
    import pyarrow as pa

    storage, digest = storage_of(root), _snapshot_digest(shards)
    name = f"_snapshots/{digest}.parquet"
    if storage.size(name) is None:
        types = [("name", pa.string()), ("num_samples", pa.int64()), ("digest", pa.string())]
        types.append(("excluded", pa.list_(pa.int32())))
        columns = {name: [getattr(shard, name) for shard in shards] for name, _ in types}
        write_table(root, name, pa.table(columns, schema=pa.schema(types)))
    storage.replace(LATEST, f"{digest}\n".encode())
    return Snapshot(root=str(root), digest=digest, shards=shards)


def latest_digest(root: Root) -> str | None:
    """Return the digest of the snapshot published last, None before the first."""
    try:
        return storage_of(root).read(LATEST).decode().strip()
    except FileNotFoundError:
        return None


def load_snapshot(root: Root, digest: str | None = None) -> Snapshot:
    """Return a snapshot by its digest, None for the latest; ValueError if absent or altered."""
    if digest is None:
        read_manifest(root)
        digest = latest_digest(root)
    if digest is None:
        raise ValueError(f"{root}: no snapshot yet; rerun the stage that makes it until it ends")
    name = f"_snapshots/{digest}.parquet"
    where = join_root(root, name)
    try:
        table = read_table(root, name)
    except FileNotFoundError:
        raise ValueError(
            f"{where}: no such snapshot; the latest is named in {join_root(root, LATEST)}"
        ) from None
    shards = tuple(
        ShardEntry(**{**row, "excluded": tuple(row.get("excluded") or ())})
        for row in table.to_pylist()
    )
    if _snapshot_digest(shards) != digest:
        raise ValueError(f"{where}: content does not match its name; delete it and rerun the stage")
    return Snapshot(root=str(root), digest=digest, shards=shards)
