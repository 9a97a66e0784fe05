"""THE sample schema: the names, index and layout of image and embedding shards.

    <images>/000000.tar       key.jpg key.txt key.json, members of a key adjacent, in row order
    <images>/000000.parquet   a row for every attempted URL, stored or not
    <images>/000000.idx.npy   int64 [n, 4]: offset and length of the image and of the caption
    <embeds>/000000.image_embed.npy, .text_embed.npy   float16 [n, E], unit norm,
                       unless the encoder's name ends with +raw
    <embeds>/000000.tokens.npy   int32 [n, L]     <embeds>/000000.keys.parquet   row, key, caption
    <embeds>/_statistics.npz  mean, std and spectrum of the image embeddings

Row i of every embedding file belongs to row i of the shard's index. Every reader imports this
file, and what it needs of commits and snapshots comes with it. Nothing here is ever unpickled.
"""

import io
import json
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ingest.store.commits import (
    Attempt,
    Commit,
    committed,
    committed_names,
    damage,
    inspect,
    published,
    read_commit,
    read_commits,
    recover,
    withdraw,
    withdraw_damaged,
)
from ingest.store.generations import rows_of
from ingest.store.manifests import read_manifest, remove_data_folder, write_manifest
from ingest.store.shard_cache import local_file
from ingest.store.snapshots import ShardEntry, Snapshot, load_snapshot, publish_snapshot
from ingest.store.storage import join_root

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "Attempt", "Commit", "EmbedShard", "ImageShard", "Sample", "ShardEntry", "Snapshot",
    "committed", "committed_names", "damage", "load_snapshot", "outcome",
    "publish_snapshot", "published", "read_commit", "read_commits", "read_manifest", "recover",
    "remove_data_folder", "shard_name", "withdraw", "withdraw_damaged", "write_embed_shard",
    "write_image_shard", "write_manifest",
]  # fmt: skip

MADV_POPULATE_READ = 22  # Linux's sys/mman.h has it, the mmap module not yet
STORED = "success"  # img2dataset's word in the `status` column for a row that became a sample
_ONE_HEADER = threading.Lock()  # see `_load_array`


def outcome(status: str, error: str | None) -> str:
    """Return what became of a row as commits count it: "stored", or STATUS:REASON."""
    return "stored" if status == STORED else f"{status}:{error}"


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
    Samples that were forgotten since are given as their neighbours: see `ingest.store.generations`.
    """

    def __init__(self, root: str | os.PathLike[str], name: str, *, digest: str | None = None):
        self.name, self._where = name, join_root(root, name)
        self.commit, self._rows = _open_whole(root, name, digest, self._load)
        self._stored: list[str] | None = None

    def _load(self, file: Callable[[str], Path]) -> None:
        index = _load_array(file(f"{self.name}.idx.npy"))
        spans = [slice(start, start + size) for start, size in index.reshape(-1, 2).tolist()]
        self._images, self._captions = spans[::2], spans[1::2]
        with open(file(f"{self.name}.tar"), "rb") as tar:  # never empty: it ends in two blocks
            self._tar = mmap.mmap(tar.fileno(), 0, access=mmap.ACCESS_READ)
        self._table = open(file(f"{self.name}.parquet"), "rb")  # noqa: SIM115 - read when needed

    def __len__(self) -> int:
        return len(self._images) if self._rows is None else len(self._rows)

    def image_bytes(self, i: int) -> bytes:
        """Return the encoded image of sample `i`."""
        return self._tar[self._images[i if self._rows is None else self._rows[i]]]

    def caption(self, i: int) -> str:
        """Return the caption of sample `i`."""
        return self._tar[self._captions[i if self._rows is None else self._rows[i]]].decode()

    @property
    def keys(self) -> list[str]:
        """The key of every sample, in row order; read from the Parquet file once."""
        if self._stored is None:
            import pyarrow.parquet as pq

            table = pq.ParquetFile(self._table).read(columns=["key", "status"])
            rows = zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True)
            keys = [key for key, status in rows if status == STORED]
            _require_length(self._where, len(keys), len(self._images))
            self._stored = _picked(keys, self._rows)
        return self._stored

    def require_whole(self) -> None:
        """Raise ValueError if samples were forgotten since the shard was pinned."""
        if self._rows is not None:
            raise ValueError(f"{self._where}: samples were forgotten; rerun, on the next snapshot")


def _load_array(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Read an array, or map it; one thread at a time.

    numpy parses its header by ast.literal_eval, in which two threads of CPython 3.11 once in a
    great while disturb each other (SystemError, python/cpython#106905).
    """
    with _ONE_HEADER:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)


def _picked(values: list[str], rows: np.ndarray | None) -> list[str]:
    return values if rows is None else [values[row] for row in rows]


def _open_whole(
    root: str | os.PathLike[str],
    name: str,
    digest: str | None,
    load: Callable[[Callable[[str], Path]], None],
) -> tuple[Commit, np.ndarray | None]:
    """Load the files of one generation, whose paths `load` asks for; return its commit and what
    `rows_of` says."""
    commit = _opened(root, name, digest)
    while True:
        problem = None
        try:
            rows = rows_of(root, commit, digest)
            load(partial(local_file, root, commit))
        except (OSError, ValueError) as error:
            problem = error
        before, commit = commit, _opened(root, name, digest)
        if before != commit:  # made anew between two of the files
            continue
        if problem is not None:
            raise problem
        return commit, rows


def _opened(root: str | os.PathLike[str], name: str, digest: str | None) -> Commit:
    """Return the commit of a shard whose files are all in place with their committed sizes."""
    commit, problem = inspect(root, name)
    where = f"{root}: shard {name}"
    if problem is not None:
        raise ValueError(f"{where} is damaged: {problem}; rerun its stage")
    if digest is not None and digest != commit.digest and digest not in commit.superseded:
        raise ValueError(
            f"{where} has digest {commit.digest[:12]}, the snapshot says "
            f"{digest[:12]}; it was made anew since: publish and use a new snapshot"
        )
    return commit


def _require_length(where: str | Path, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{where}: has {found} rows, expected {expected}; rerun its stage")


def _read_ahead(array: np.ndarray) -> None:
    """Ask for a mapped file in its order and map it whole.

    Rows are read in a shuffled order, by which each first touch of a page would be a fault, and on
    a cold disk a seek.
    """
    mapped = array.base
    if isinstance(mapped, mmap.mmap):
        mapped.madvise(mmap.MADV_WILLNEED)
        with suppress(OSError):  # a kernel before Linux 5.14: faults, then
            mapped.madvise(MADV_POPULATE_READ)


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
        self.name, self._where = name, join_root(root, name)
        self.commit, self._rows = _open_whole(root, name, digest, self._load)
        _require_length(self._where, len(self._arrays["tokens"]), self.commit.num_samples)
        self._texts: tuple[list[str], list[str]] | None = None

    def _load(self, file: Callable[[str], Path]) -> None:
        paths = {n: file(f"{self.name}.{n}.npy") for n in ("image_embed", "text_embed", "tokens")}
        self._arrays = {part: _load_array(path, mmap_mode="r") for part, path in paths.items()}
        sizes = {len(array) for array in self._arrays.values()}
        if len(sizes) > 1:
            found = f"its arrays have {sorted(sizes)} rows"
            raise ValueError(f"{self._where}: {found}; rerun its stage")
        path = file(f"{self.name}.keys.parquet")
        self._table = open(path, "rb")  # noqa: SIM115 - read when needed

    def _array(self, part: str) -> np.ndarray:
        _read_ahead(self._arrays[part])
        array = np.asarray(self._arrays[part])
        return array if self._rows is None else array[self._rows]

    @cached_property
    def image_embed(self) -> np.ndarray:
        """float16 [n, E], of unit norm unless the encoder keeps their length."""
        return self._array("image_embed")

    @cached_property
    def text_embed(self) -> np.ndarray:
        """float16 [n, E], of unit norm unless the encoder keeps their length."""
        return self._array("text_embed")

    @cached_property
    def tokens(self) -> np.ndarray:
        """int32 [n, L]."""
        return self._array("tokens")

    def __len__(self) -> int:
        return len(self.image_embed)

    def _columns(self) -> tuple[list[str], list[str]]:
        if self._texts is None:
            import pyarrow.parquet as pq

            table = pq.ParquetFile(self._table).read(columns=["key", "caption"])
            _require_length(self._where, table.num_rows, self.commit.num_samples)
            keys, captions = table["key"].to_pylist(), table["caption"].to_pylist()
            self._texts = _picked(keys, self._rows), _picked(captions, self._rows)
        return self._texts

    @property
    def keys(self) -> list[str]:
        """The key of every row, read once."""
        return self._columns()[0]

    @property
    def captions(self) -> list[str]:
        """The caption of every row, read once."""
        return self._columns()[1]
