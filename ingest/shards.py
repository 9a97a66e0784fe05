"""THE sample schema: the names, index and layout of image and embedding shards.

    <images>/000000.tar       key.jpg key.txt key.json, members of a key adjacent, in row order
    <images>/000000.parquet   a row for every attempted URL, stored or not
    <images>/000000.idx.npy   int64 [n, 4]: offset and length of the image and of the caption
    <embeds>/000000.image_embed.npy, .text_embed.npy   float16 [n, E], unit norm
    <embeds>/000000.tokens.npy   int32 [n, L]     <embeds>/000000.keys.parquet   row, key, caption
    <embeds>/_statistics.npz  mean, std and spectrum of the image embeddings

Row i of every embedding file belongs to row i of the shard's index. Every reader imports this
file, and what it needs of commits and snapshots comes with it. Nothing here is ever unpickled.
"""

import io
import json
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ingest.commits import (
    Attempt,
    Commit,
    committed,
    damage,
    local_root,
    published,
    read_commit,
    read_manifest,
    recover,
    remove_data_folder,
    withdraw,
    write_manifest,
)
from ingest.snapshots import ShardEntry, Snapshot, load_snapshot, publish_snapshot

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "Attempt", "Commit", "EmbedShard", "EmbedStatistics", "ImageShard", "Sample", "ShardEntry",
    "Snapshot", "committed", "damage", "load_snapshot", "local_root", "publish_snapshot",
    "published", "read_commit", "read_manifest", "recover", "remove_data_folder", "shard_name",
    "withdraw", "write_embed_shard", "write_image_shard", "write_manifest",
]  # fmt: skip

STORED = "success"  # img2dataset's word in the `status` column for a row that became a sample


def shard_name(number: int) -> str:
    """Return the name of the `number`-th shard, six digits at least."""
    return f"{number:06d}"


# -- image shards ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image-caption pair as stored. image_bytes: an encoded JPEG; json: its metadata."""

    key: str
    image_bytes: bytes
    caption: str
    json: Mapping[str, Any]


def row_schema() -> "pa.Schema":
    """Return the columns of every `<shard>.parquet`; kept columns of the list follow them."""
    import pyarrow as pa

    text = ["key", "url", "caption", "status", "error", "sha256"]
    sizes = ["width", "height", "original_width", "original_height"]
    return pa.schema([(n, pa.string()) for n in text] + [(n, pa.int32()) for n in sizes])


def write_image_shard(
    folder: Path,
    name: str,
    samples: Iterable[Sample],
    rows: Sequence[Mapping[str, Any]],
    *,
    kept: "pa.Schema | None" = None,
) -> int:
    """Write `name`.tar, .idx.npy and .parquet into `folder`; equal input gives equal bytes.

    samples: in key order. rows: one for every attempted URL, with the columns of `row_schema` and
    those of `kept` (None: no others); status "success" exactly for the samples, in their order.
    Returns the number of samples. Raises ValueError when rows and samples do not agree.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tar_path = folder / f"{name}.tar"
    keys = _write_tar(tar_path, samples)
    stored = [row["key"] for row in rows if row["status"] == STORED]
    if stored != keys or keys != sorted(set(keys)):
        raise ValueError(f"{tar_path}: samples are not the stored rows, in strictly rising order")
    np.save(folder / f"{name}.idx.npy", index_tar(tar_path), allow_pickle=False)
    schema = pa.schema([*row_schema(), *(kept or [])])
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    pq.write_table(table, folder / f"{name}.parquet")
    return len(keys)


def _write_tar(path: Path, samples: Iterable[Sample]) -> list[str]:
    """Write what webdataset's TarWriter writes, whose import brings torch along; return the keys.

    Names and owners are webdataset's, times are 0: equal samples give equal bytes.
    """
    import tarfile

    keys: list[str] = []
    with tarfile.open(path, "x") as tar:
        for sample in samples:
            keys.append(sample.key)
            metadata = json.dumps(dict(sample.json), sort_keys=True, ensure_ascii=False)
            parts = {"jpg": sample.image_bytes, "json": metadata.encode()}
            for extension, data in {**parts, "txt": sample.caption.encode()}.items():
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size, member.mode = len(data), 0o444
                member.uname = member.gname = "bigdata"
                tar.addfile(member, io.BytesIO(data))
    return keys


def index_tar(path: str | os.PathLike[str]) -> np.ndarray:
    """Return int64 [n, 4]: offset and length of each sample's .jpg and .txt in the tar."""
    import tarfile

    found: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            found.setdefault(key, {})[extension] = (member.offset_data, member.size)
    pairs = [(*parts["jpg"], *parts["txt"]) for parts in found.values()]
    return np.array(pairs, dtype=np.int64).reshape(-1, 4)


class ImageShard:
    """Random access to a committed image shard through its index and a memory map.

    digest: of the snapshot's entry; given, another content under the same name is a ValueError.
    """

    def __init__(self, root: str | os.PathLike[str], name: str, *, digest: str | None = None):
        folder = local_root(root)
        self.name, self.commit = name, _opened(root, name, digest)
        self.rows_path = folder / f"{name}.parquet"
        self._index = np.load(folder / f"{name}.idx.npy", mmap_mode="r", allow_pickle=False)
        with open(folder / f"{name}.tar", "rb") as file:  # never empty: a tar ends in two blocks
            self._tar = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._keys: list[str] | None = None

    def __len__(self) -> int:
        return len(self._index)

    def image_bytes(self, i: int) -> bytes:
        """Return the encoded image of sample `i`."""
        offset, length = self._index[i, :2]
        return self._tar[offset : offset + length]

    def caption(self, i: int) -> str:
        """Return the caption of sample `i`."""
        offset, length = self._index[i, 2:]
        return self._tar[offset : offset + length].decode()

    @property
    def keys(self) -> list[str]:
        """The key of every sample, in row order; read from the Parquet file once."""
        if self._keys is None:
            import pyarrow.parquet as pq

            table = pq.ParquetFile(self.rows_path).read(columns=["key", "status"])
            rows = zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True)
            self._keys = [key for key, status in rows if status == STORED]
            _require_length(self.rows_path, len(self._keys), len(self))
        return self._keys


def _opened(root: str | os.PathLike[str], name: str, digest: str | None) -> Commit:
    """Return the commit of a shard whose files are all in place with their committed sizes."""
    commit = published(root, name)
    problem = damage(root, commit)
    if problem is not None:
        where = f"{local_root(root)}: shard {name}"
        raise ValueError(f"{where} is damaged: {problem}; rerun its stage")
    if digest is not None and commit.digest != digest:
        raise ValueError(
            f"{local_root(root)}: shard {name} has digest {commit.digest[:12]}, the snapshot says "
            f"{digest[:12]}; it was made anew since: publish and use a new snapshot"
        )
    return commit


def _require_length(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{path}: has {found} rows, expected {expected}; rerun its stage")


# -- embedding shards --------------------------------------------------------------------------


def write_embed_shard(
    folder: Path,
    name: str,
    *,
    image_embed: np.ndarray,
    text_embed: np.ndarray,
    tokens: np.ndarray,
    keys: Sequence[str],
    captions: Sequence[str],
) -> int:
    """Write the four files of an embedding shard into `folder`; return the number of rows n.

    image_embed, text_embed: [n, E], stored as float16; tokens: [n, L], stored as int32.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        "image_embed": image_embed.astype(np.float16),
        "text_embed": text_embed.astype(np.float16),
        "tokens": tokens.astype(np.int32),
    }
    for part, array in arrays.items():
        _require_length(folder / f"{name}.{part}.npy", len(array), len(keys))
        np.save(folder / f"{name}.{part}.npy", array, allow_pickle=False)
    table = pa.table(
        {
            "row": pa.array(range(len(keys)), pa.int32()),
            "key": pa.array(keys, pa.string()),
            "caption": pa.array(captions, pa.string()),
        }
    )
    pq.write_table(table, folder / f"{name}.keys.parquet")
    return len(keys)


class EmbedShard:
    """A committed embedding shard: arrays stay on the disk until they are indexed.

    image_embed, text_embed: float16 [n, E]; tokens: int32 [n, L]; digest: see `ImageShard`.
    """

    def __init__(self, root: str | os.PathLike[str], name: str, *, digest: str | None = None):
        self.name, self.commit = name, _opened(root, name, digest)
        self._folder = local_root(root)
        self.image_embed = self._load("image_embed")
        self.text_embed = self._load("text_embed")
        self.tokens = self._load("tokens")
        self._texts: tuple[list[str], list[str]] | None = None

    def _load(self, part: str) -> np.ndarray:
        path = self._folder / f"{self.name}.{part}.npy"
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        _require_length(path, len(array), self.commit.num_samples)
        return array

    def __len__(self) -> int:
        return len(self.image_embed)

    def _columns(self) -> tuple[list[str], list[str]]:
        if self._texts is None:
            import pyarrow.parquet as pq

            path = self._folder / f"{self.name}.keys.parquet"
            table = pq.ParquetFile(path).read(columns=["key", "caption"])
            _require_length(path, table.num_rows, len(self))
            self._texts = table["key"].to_pylist(), table["caption"].to_pylist()
        return self._texts

    @property
    def keys(self) -> list[str]:
        """The key of every row, read once."""
        return self._columns()[0]

    @property
    def captions(self) -> list[str]:
        """The caption of every row, read once."""
        return self._columns()[1]


@dataclass(frozen=True, kw_only=True)
class EmbedStatistics:
    """Moments of a snapshot's image embeddings, in float64.

    mean, std: [E]; eigenvalues: [E] of the covariance, falling; basis: [E, E], column k belongs
    to eigenvalue k; snapshot: digest of the embeddings they were taken over.
    """

    mean: np.ndarray
    std: np.ndarray
    eigenvalues: np.ndarray
    basis: np.ndarray
    count: int
    snapshot: str

    @classmethod
    def compute(cls, snapshot: Snapshot) -> "EmbedStatistics":
        """Take the moments in one pass over the shards of `snapshot`, which must hold samples."""
        if snapshot.num_samples == 0:
            raise ValueError(f"{snapshot.root}: the snapshot has no samples to take moments of")
        total, products = 0.0, 0.0
        for entry in snapshot.shards:
            embed = EmbedShard(snapshot.root, entry.name, digest=entry.digest).image_embed
            block = np.asarray(embed, dtype=np.float64)
            total, products = total + block.sum(0), products + block.T @ block
        mean = np.asarray(total) / snapshot.num_samples
        covariance = np.asarray(products) / snapshot.num_samples - np.outer(mean, mean)
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
        # An eigenvector's sign is arbitrary: its largest component is made positive.
        peaks = vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])]
        return cls(
            mean=mean,
            std=np.sqrt(covariance.diagonal().clip(min=0)),
            eigenvalues=values,
            basis=vectors * np.where(peaks < 0, -1.0, 1.0),
            count=snapshot.num_samples,
            snapshot=snapshot.digest,
        )

    def write(self, root: str | os.PathLike[str]) -> None:
        """Write `<root>/_statistics.npz`, whole or not at all."""
        path = local_root(root) / "_statistics.npz"
        temporary = path.with_name(f"._statistics.{os.getpid()}.npz")
        np.savez(temporary, allow_pickle=False, **vars(self))
        os.replace(temporary, path)

    @classmethod
    def read(cls, root: str | os.PathLike[str]) -> "EmbedStatistics":
        """Read `<root>/_statistics.npz`; ValueError with the remedy when it is missing."""
        path = local_root(root) / "_statistics.npz"
        if not path.exists():
            raise ValueError(f"{path}: missing; rerun ingest/embed.py until it finishes")
        with np.load(path, allow_pickle=False) as found:
            arrays = {n: found[n] for n in ("mean", "std", "eigenvalues", "basis")}
            return cls(**arrays, count=int(found["count"]), snapshot=str(found["snapshot"]))
