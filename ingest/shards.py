"""THE sample schema: the names, index and layout of image and embedding shards.

    <images>/000000.tar       key.jpg key.txt key.json, members of a key adjacent, in row order;
                              key.png or key.webp where an adopted image keeps its bytes
    <images>/000000.parquet   a row for every attempted URL, stored or not
    <images>/000000.idx.npy   int64 [n, 4]: offset and length of the image and of the caption
    <images>/000000.captions  of a tar that lies elsewhere: UTF-8, which the index points into
    <embeds>/000000.image_embed.npy, .text_embed.npy   float16 [n, E], unit norm,
                       unless the encoder's name ends with +raw
    <embeds>/000000.image_tokens.npy   float16 [n, k, E], unit norm: of ingest/embed.py
                       --image-tokens k
    <embeds>/000000.tokens.npy   int32 [n, L]     <embeds>/000000.keys.parquet   row, key, caption
    <embeds>/000000.COLUMN.text_embed.npy, .tokens.npy   float16 [m, E], int32 [m, L]: of the
                       captions in a kept COLUMN of the images' table, texts or lists of texts;
                       keys.parquet has them in COLUMN, a list for each row
    <embeds>/000000.COLUMN.offsets.npy   int64 [n + 1]: row i has captions [o[i], o[i + 1]) of them
    <embeds>/_statistics.npz  mean, std and spectrum of the image embeddings, moments of tokens

Row i of every embedding file belongs to row i of the shard's index. Every reader imports this
file, which exports what they need of commits and snapshots too. Nothing is ever unpickled.
"""

import json
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ingest.captions import (
    FURTHER_ARRAYS,
    FurtherCaptions,
    as_captions,
    further_columns,
)
from ingest.fetching.formats import EXTENSIONS, image_extension
from ingest.lists.columns import holds_captions
from ingest.store.commits import (
    Attempt,
    Commit,
    committed,
    committed_names,
    current_rows,
    damage,
    inspect,
    published,
    read_commit,
    read_commits,
    recover,
    withdraw,
    withdraw_damaged,
)
from ingest.store.shard_cache import local_file
from ingest.store.snapshots import (
    ShardEntry,
    Snapshot,
    load_snapshot,
    publish_snapshot,
    read_manifest,
    remove_data_folder,
    write_manifest,
)
from ingest.store.storage import Root, join_root

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "IMAGE_TOKENS", "Attempt", "Commit", "EmbedShard", "ImageShard", "Sample", "ShardEntry",
    "Snapshot", "caption_columns", "committed", "committed_names", "damage", "load_snapshot",
    "outcome", "publish_snapshot", "published", "read_commit", "read_commits", "read_manifest",
    "recover", "remove_data_folder", "shard_name", "withdraw", "withdraw_damaged",
    "write_embed_shard", "write_image_shard", "write_manifest",
]  # fmt: skip

MADV_POPULATE_READ = 22  # Linux's sys/mman.h has it, the mmap module not yet
STORED = "success"  # img2dataset's word in the `status` column for a row that became a sample
SOURCE_KEY = "source_key"  # column of adopted samples: their name in the source
SIZE_COLUMNS = ("width", "height", "original_width", "original_height")  # px
CAPTIONS_END = b"\n"  # of a file of captions, which is never empty: it is mapped
EMBED_ARRAYS = ("image_embed", "text_embed", "tokens")
IMAGE_TOKENS = "image_tokens"  # the array that a shard of embeddings may have beside those
_HEADER_LOCK = threading.Lock()  # see `_load_array`


def outcome(status: str, error: str | None) -> str:
    """Return what became of a row as commits count it: "stored", or STATUS:REASON."""
    return "stored" if status == STORED else f"{status}:{error}"


def shard_name(number: int) -> str:
    """Return the name of the `number`-th shard, six digits at least."""
    return f"{number:06d}"


# -- image shards ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image-caption pair as stored. image_bytes: a JPEG, PNG or WebP; json: its metadata."""

    key: str
    image_bytes: bytes
    caption: str
    json: Mapping[str, object]


def row_schema() -> "pa.Schema":
    """Return the columns of every `<shard>.parquet`; kept columns of the list follow them."""
    import pyarrow as pa

    text = ["key", "url", "caption", "status", "error", "sha256"]
    return pa.schema([(n, pa.string()) for n in text] + [(n, pa.int32()) for n in SIZE_COLUMNS])


def write_image_shard(
    folder: Path,
    name: str,
    samples: Iterable[Sample],
    rows: Sequence[Mapping[str, object]],
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
    import webdataset

    # The tar, at time 0, so that equal samples give equal bytes
    tar_path = folder / f"{name}.tar"
    keys: list[str] = []
    with open(tar_path, "xb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            keys.append(sample.key)
            metadata = json.dumps(dict(sample.json), sort_keys=True, ensure_ascii=False)
            tar.write(
                {
                    "__key__": sample.key,
                    image_extension(sample.image_bytes) or "jpg": sample.image_bytes,
                    "json": metadata.encode(),
                    "txt": sample.caption.encode(),
                }
            )

    # Its index, and the table
    stored = [row["key"] for row in rows if row["status"] == STORED]
    if stored != keys or keys != sorted(set(keys)):
        raise ValueError(f"{tar_path}: samples are not the stored rows, in strictly rising order")
    np.save(folder / f"{name}.idx.npy", index_tar(tar_path), allow_pickle=False)
    schema = pa.schema([*row_schema(), *(kept or [])])
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    pq.write_table(table, folder / f"{name}.parquet")
    return len(keys)


def index_tar(path: Root) -> np.ndarray:
    """Return int64 [n, 4]: offset and length of each sample's image and .txt in the tar."""
    import tarfile

    places: dict[str, dict[str, tuple[int, int]]] = {}  # by key and extension
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            places.setdefault(key, {})[extension] = (member.offset_data, member.size)
    rows = [
        (*next(members[e] for e in EXTENSIONS if e in members), *members["txt"])
        for members in places.values()
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


class _Shard:
    """A committed shard, of one generation.

    digest: of the snapshot's entry; given, another content under the same name is a ValueError.
    A sample that was forgotten since is replaced by its neighbour; see `current_rows`.
    """

    def __init__(self, root: Root, name: str, *, digest: str | None = None) -> None:
        self.name, self._where = name, join_root(root, name)
        while True:
            problem = None
            self.commit, damaged = inspect(root, name)
            if damaged is not None:
                remedy = "" if self.commit.elsewhere else "; rerun its stage"  # has one of its own
                raise ValueError(f"{root}: shard {name} is damaged: {damaged}{remedy}")
            if digest not in (None, self.commit.digest, *self.commit.superseded):
                raise ValueError(
                    f"{root}: shard {name} has digest {self.commit.digest[:12]}, the snapshot "
                    f"says {(digest or '')[:12]}; it was made again since: publish and use a new "
                    "snapshot"
                )
            try:
                self._rows = current_rows(root, self.commit, digest)
                self._load(partial(local_file, root, self.commit))
            except (OSError, ValueError) as error:
                problem = error
            if read_commit(root, name) != self.commit:  # rewritten between two of the files
                continue
            if problem is not None:
                raise problem
            return

    def _load(self, file: Callable[[str], Path]) -> None:
        """Open the files, of which `file` returns the paths."""
        raise NotImplementedError

    def require_complete(self) -> None:
        """Raise ValueError if samples were forgotten since the shard was pinned."""
        if self._rows is not None:
            raise ValueError(f"{self._where}: samples were forgotten; rerun, on the next snapshot")


class _FileSlices:
    """Slices of a file that may be cut by its owner, where a memory map would end the process."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, open(path, "rb")  # noqa: SIM115 - as long as the shard

    def __getitem__(self, span: slice) -> bytes:
        data = os.pread(self._file.fileno(), span.stop - span.start, span.start)
        if len(data) < span.stop - span.start:
            raise ValueError(f"{self._path}: was cut since it was adopted; rerun ingest/adopt.py")
        return data


class ImageShard(_Shard):
    """Random access to a committed image shard through its index and a memory map."""

    def _load(self, file: Callable[[str], Path]) -> None:
        index = _load_array(file(f"{self.name}.idx.npy"))
        spans = [slice(start, start + size) for start, size in index.reshape(-1, 2).tolist()]
        self._images, self._captions = spans[::2], spans[1::2]
        adopted = bool(self.commit.elsewhere)
        path = file(f"{self.name}.tar")
        with open(file(f"{self.name}.captions") if adopted else path, "rb") as texts:  # never empty
            self._texts = mmap.mmap(texts.fileno(), 0, access=mmap.ACCESS_READ)
        self._tar = _FileSlices(path) if adopted else self._texts
        self._table = open(file(f"{self.name}.parquet"), "rb")  # noqa: SIM115 - read when needed
        self._further: dict[str, list[list[str]]] = {}  # captions by column

    def __len__(self) -> int:
        return len(self._images) if self._rows is None else len(self._rows)

    def image_bytes(self, i: int) -> bytes:
        """Return the encoded image of sample `i`."""
        return self._tar[self._images[i if self._rows is None else self._rows[i]]]

    def caption(self, i: int) -> str:
        """Return the caption of sample `i`."""
        return self._texts[self._captions[i if self._rows is None else self._rows[i]]].decode()

    @cached_property
    def keys(self) -> list[str]:
        """The key of every sample, in row order; read from the Parquet file once."""
        return self._column("key")

    @cached_property
    def caption_columns(self) -> list[str]:
        """The kept columns of the table that hold texts or lists of texts."""
        import pyarrow.parquet as pq

        schema = pq.ParquetFile(self._table).schema_arrow
        reserved = {*row_schema().names, SOURCE_KEY, "row"}  # "row": of the table of embeddings
        return [f.name for f in schema if f.name not in reserved and holds_captions(f.type)]

    def further_captions(self, column: str) -> list[list[str]]:
        """Return the captions of every sample in a column, read once; none, where it is absent."""
        if column not in self._further:
            stored = column in self.caption_columns
            values = self._column(column) if stored else [None] * len(self)
            self._further[column] = [as_captions(value) for value in values]
        return self._further[column]

    def _column(self, name: str) -> list:
        """Read a column of the table, of the samples."""
        import pyarrow.parquet as pq

        table = pq.ParquetFile(self._table).read(columns=[name, "status"])
        pairs = zip(table[name].to_pylist(), table["status"].to_pylist(), strict=True)
        values = [value for value, status in pairs if status == STORED]
        _require_length(self._where, len(values), len(self._images))
        return values if self._rows is None else [values[row] for row in self._rows]


def caption_columns(images: Snapshot) -> list[str]:
    """Return the columns of texts or lists of texts that the tables of these images have."""
    for entry in images.shards[:1]:  # all shards have the same
        return ImageShard(images.root, entry.name, digest=entry.digest).caption_columns
    return []


def _load_array(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Read an array, or map it; one thread at a time.

    numpy parses the header by ast.literal_eval, in which two threads of CPython 3.11 can, very
    rarely, disturb each other (SystemError, python/cpython#106905).
    """
    with _HEADER_LOCK:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)


def _require_length(where: str | Path, num_rows: int, expected: int) -> None:
    if num_rows != expected:
        raise ValueError(f"{where}: has {num_rows} rows, expected {expected}; rerun its stage")


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
    further: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> int:
    """Write the files of an embedding shard into `folder`; return the number of rows n.

    image_embed, text_embed: [n, E], stored as float16, image_embed with k tokens of each image
    [n, 1 + k, E]; tokens: [n, L], stored as int32; further: lists of captions, by column, whose
    embeddings `FurtherCaptions` writes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        "image_embed": image_embed.astype(np.float16),
        "text_embed": text_embed.astype(np.float16),
        "tokens": tokens.astype(np.int32),
    }
    if image_embed.ndim == 3:
        vectors = arrays["image_embed"]
        arrays |= {"image_embed": vectors[:, 0], IMAGE_TOKENS: vectors[:, 1:]}
    for column, array in arrays.items():
        path = folder / f"{name}.{column}.npy"
        _require_length(path, len(array), len(keys))
        np.save(path, array, allow_pickle=False)
    table = pa.table(
        {
            "row": pa.array(range(len(keys)), pa.int32()),
            "key": pa.array(keys, pa.string()),
            "caption": pa.array(captions, pa.string()),
        }
    )
    for column, texts in (further or {}).items():
        table = table.append_column(column, pa.array(texts, pa.list_(pa.string())))
    pq.write_table(table, folder / f"{name}.keys.parquet")
    return len(keys)


class EmbedShard(_Shard):
    """A committed embedding shard: arrays stay on the disk until they are indexed.

    image_embed, text_embed: float16 [n, E]; tokens: int32 [n, L]. captions: the columns of further
    captions that are opened, where the shard has them; image_tokens: open those likewise.
    """

    def __init__(
        self,
        root: Root,
        name: str,
        *,
        digest: str | None = None,
        captions: Sequence[str] = (),
        image_tokens: bool = False,
    ) -> None:
        self._columns = captions
        self._reads_tokens = image_tokens
        super().__init__(root, name, digest=digest)

    def _load(self, file: Callable[[str], Path]) -> None:
        stored = self._reads_tokens and f"{self.name}.{IMAGE_TOKENS}.npy" in self.commit.files
        main = (*EMBED_ARRAYS, IMAGE_TOKENS) if stored else EMBED_ARRAYS
        columns = set(self._columns) & set(further_columns(self.name, self.commit.files))
        further = [f"{column}.{array}" for column in columns for array in FURTHER_ARRAYS]
        paths = {name: file(f"{self.name}.{name}.npy") for name in (*main, *further)}
        self._arrays = {name: _load_array(path, "r") for name, path in paths.items()}
        for name in main:
            _require_length(self._where, len(self._arrays[name]), self.commit.num_samples)
        self._table = open(file(f"{self.name}.keys.parquet"), "rb")  # noqa: SIM115 - read when needed
        self._further: dict[str, FurtherCaptions] = {}  # by column
        self._further_texts: dict[str, list[list[str]]] = {}

    def _array(self, column: str) -> np.ndarray:
        array = self._in_memory(column)
        return array if self._rows is None else array[self._rows]

    def _in_memory(self, name: str) -> np.ndarray:
        array = self._arrays[name]
        # The file is read sequentially into memory. Rows are read in a shuffled order, in which
        # each first touch of a page would be a fault, and on a cold disk a seek.
        if isinstance(array.base, mmap.mmap):
            array.base.madvise(mmap.MADV_WILLNEED)
            with suppress(OSError):  # before Linux 5.14
                array.base.madvise(MADV_POPULATE_READ)
        return np.asarray(array)

    @cached_property
    def image_embed(self) -> np.ndarray:
        """float16 [n, E], of unit norm unless the encoder keeps their length."""
        return self._array("image_embed")

    @cached_property
    def text_embed(self) -> np.ndarray:
        """float16 [n, E], of unit norm unless the encoder keeps their length."""
        return self._array("text_embed")

    @cached_property
    def image_tokens(self) -> np.ndarray:
        """float16 [n, k, E], of unit norm; k = 0 where there are none."""
        if IMAGE_TOKENS not in self._arrays:
            return self.image_embed[:, None][:, :0]
        return self._array(IMAGE_TOKENS)

    @cached_property
    def tokens(self) -> np.ndarray:
        """int32 [n, L]."""
        return self._array("tokens")

    def __len__(self) -> int:
        return len(self.image_embed)

    @cached_property
    def _texts(self) -> "pa.Table":
        import pyarrow.parquet as pq

        table = pq.ParquetFile(self._table).read(columns=["key", "caption"])
        _require_length(self._where, table.num_rows, self.commit.num_samples)
        return table if self._rows is None else table.take(self._rows)

    @cached_property
    def keys(self) -> list[str]:
        """The key of every row, read once."""
        return self._texts["key"].to_pylist()

    @cached_property
    def captions(self) -> list[str]:
        """The caption of every row, read once."""
        return self._texts["caption"].to_pylist()

    def caption(self, i: int) -> str:
        """Return the caption of row `i`."""
        return self.captions[i]

    def further(self, column: str) -> FurtherCaptions:
        """Return the embeddings of a column of captions; of none, where it is absent."""
        if column not in self._further:
            if f"{column}.offsets" in self._arrays:
                names = (f"{column}.{name}" for name in FURTHER_ARRAYS)
                captions = FurtherCaptions.of(*map(self._in_memory, names))
            else:
                text_embed, tokens = self._arrays["text_embed"][:0], self._arrays["tokens"][:0]
                offsets = np.zeros(self.commit.num_samples + 1, np.int64)
                captions = FurtherCaptions.of(offsets, text_embed, tokens)
            self._further[column] = captions if self._rows is None else captions.at(self._rows)
        return self._further[column]

    def further_captions(self, column: str) -> list[list[str]]:
        """Return the captions of every row in a column, read once; none, where it is absent."""
        import pyarrow.parquet as pq

        if f"{column}.offsets" not in self._arrays:
            return [[]] * len(self)
        if column not in self._further_texts:
            table = pq.ParquetFile(self._table).read(columns=[column])
            table = table if self._rows is None else table.take(self._rows)
            self._further_texts[column] = table[column].to_pylist()
        return self._further_texts[column]
