"""Read a URL list of the LAION family, a shard's rows at a time, from any storage fsspec knows."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.base.files import digest_of
from ingest.lists.formats import COMPRESSIONS, FORMATS, ListFormat, format_suffix, text_column

if TYPE_CHECKING:
    import pyarrow as pa
    from fsspec.core import OpenFile

URL_COLUMNS = ("url", "URL", "image_url", "img_url")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "CAPTION", "alt_text")
OUR_COLUMNS = ("key", "url", "caption", "status", "error", "error_message", "sha256")
OUR_COLUMNS += ("width", "height", "original_width", "original_height")
NO_CAPTIONS = (".txt",)  # formats whose rows are URLs alone
COUNT_ROWS = 100_000  # read at once where a file does not say how many it has


@dataclass(frozen=True, kw_only=True)
class UrlList:
    """A list of image URLs with captions. digest: of the files' bytes; kept: extra columns.

    caption_column: "" where there are none; every caption is empty then.
    """

    files: tuple["OpenFile", ...]
    format: ListFormat
    url_column: str
    caption_column: str
    kept: tuple[str, ...]
    num_rows: int
    digest: str
    schema: "pa.Schema"

    @property
    def kept_schema(self) -> "pa.Schema":
        """Names and types of the kept columns."""
        import pyarrow as pa

        return pa.schema([self.schema.field(name) for name in self.kept])

    def shards(self, samples_per_shard: int) -> Iterator["pa.Table"]:
        """Yield tables of `samples_per_shard` rows (the last: what is left) in the list's order.

        Columns: url and caption (strings), then the kept ones. Holds some two shards in memory, and
        what its format reads at once.
        """
        import pyarrow as pa

        waiting: list[pa.Table] = []
        for batch in self._batches(samples_per_shard):
            waiting.append(batch)
            if sum(table.num_rows for table in waiting) < samples_per_shard:
                continue
            rows = pa.concat_tables(waiting)
            whole = rows.num_rows - rows.num_rows % samples_per_shard
            for start in range(0, whole, samples_per_shard):
                yield rows.slice(start, samples_per_shard)
            waiting = [rows.slice(whole)]
        rest = pa.concat_tables(waiting) if waiting else None
        if rest is not None and rest.num_rows:
            yield rest

    def urls(self) -> Iterator["pa.ChunkedArray"]:
        """Yield the URLs in order, a batch at a time; nothing else is read."""
        import pyarrow as pa

        columns = pa.schema([self.schema.field(self.url_column)])
        for file in self.files:
            for table in self.format.batches(file, columns, COUNT_ROWS):
                yield text_column(table.column(self.url_column))

    def _batches(self, size: int) -> Iterator["pa.Table"]:
        import pyarrow as pa

        names = [name for name in (self.url_column, self.caption_column) if name]
        columns = pa.schema([self.schema.field(name) for name in [*names, *self.kept]])
        for file in self.files:
            for table in self.format.batches(file, columns, size):
                empty = pa.chunked_array([pa.array([""] * table.num_rows, pa.string())])
                url = text_column(table.column(self.url_column))
                caption = text_column(table.column(self.caption_column)) if names[1:] else empty
                kept = [self._kept(table, field) for field in self.kept_schema]
                yield pa.table([url, caption, *kept], ["url", "caption", *self.kept])

    def _kept(self, table: "pa.Table", field: "pa.Field") -> "pa.ChunkedArray":
        column = table.column(field.name)
        text = str(field.type) in ("string", "large_string")
        return text_column(column) if text else column.cast(field.type)


def open_url_list(
    path: str | os.PathLike[str],
    *,
    url_column: str | None = None,
    caption_column: str | None = None,
    keep_columns: Sequence[str] = (),
) -> UrlList:
    """Open a list: a file, a folder of files or a glob pattern of them, in name order.

    path: local or any fsspec URL; Parquet, CSV, TSV, JSON lines, or a text file of URLs, the last
    four compressed too. Columns that are None are found by the names the LAION family uses.
    Raises ValueError for a missing list or column, naming the columns found, and for a kept column
    that we could not store.
    """
    suffix, files = _files(os.fspath(path))
    reader = FORMATS[suffix]
    schemas = [reader.schema(file) for file in files]
    schema, names = schemas[0], schemas[0].names
    url = _choose(path, "url", url_column, URL_COLUMNS, names)
    caption = ""
    if suffix not in NO_CAPTIONS or caption_column is not None:
        caption = _choose(path, "caption", caption_column, CAPTION_COLUMNS, names)
    for name in keep_columns:
        _choose(path, "keep", name, (), names)
        if name in OUR_COLUMNS:
            raise ValueError(f"--keep-columns {name}: the shards use this name; rename the column")
        if str(schema.field(name).type) not in _PLAIN_TYPES:
            kind = schema.field(name).type
            raise ValueError(f"--keep-columns {name}: is {kind}, expected text, number or bool")
    for file, other in zip(files, schemas, strict=True):
        for name in {url, *([caption] if caption else []), *keep_columns} - set(other.names):
            raise ValueError(f"{file.path}: no column {name!r}, which {files[0].path} has")
    digests = [_digest(file) for file in files]
    return UrlList(
        files=files,
        format=reader,
        url_column=url,
        caption_column=caption,
        kept=tuple(keep_columns),
        num_rows=sum(_count(reader, file, schema.field(url)) for file in files),
        digest=digests[0] if len(digests) == 1 else digest_of(digests),
        schema=schema,
    )


_PLAIN_TYPES = frozenset(
    {"string", "large_string", "bool", "float", "double"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)


def _files(path: str) -> tuple[str, tuple["OpenFile", ...]]:
    """Return the suffix of the format and the files, which all have it."""
    from fsspec.core import OpenFile, url_to_fs
    from fsspec.utils import infer_compression

    try:
        storage, root = url_to_fs(path)
    except (ImportError, ValueError) as error:  # an unknown scheme, or one whose driver is absent
        raise ValueError(f"--urls {path}: {error}") from None
    if any(sign in root for sign in "*?[") and not storage.exists(root):
        found = [str(name) for name in storage.glob(root)]
    elif storage.isdir(root):
        found = [str(name) for name in storage.ls(root, detail=False) if format_suffix(str(name))]
    else:
        found = [root] if storage.isfile(root) else []
    expected = ", ".join([*FORMATS, *(f"TEXT{c}" for c in COMPRESSIONS if c)])
    if not found:
        raise ValueError(
            f"--urls {path}: not found; expected a list, or a folder or pattern of them"
        )
    suffixes = {format_suffix(name) for name in found}
    suffix = suffixes.pop()
    if suffix is None or suffixes:
        names = ", ".join(sorted(os.path.basename(name) for name in found)[:5])
        raise ValueError(
            f"--urls {path}: found {names}, expected files of one kind out of {expected}"
        )
    packed = None if suffix == ".parquet" else infer_compression
    return suffix, tuple(
        OpenFile(storage, name, mode="rb", compression=packed(name) if packed else None)
        for name in sorted(found)
    )


def _digest(file: "OpenFile") -> str:
    """Return the sha256 of a file's bytes as they are stored, hex."""
    with file.fs.open(file.path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _count(reader: ListFormat, file: "OpenFile", url: "pa.Field") -> int:
    """Count a file's rows: Parquet says it, others are read once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.path.lower().endswith(".parquet"):
        with file as stream:
            return pq.read_metadata(stream).num_rows
    batches = reader.batches(file, pa.schema([url]), COUNT_ROWS)
    return sum(table.num_rows for table in batches)


def _choose(
    path: str | os.PathLike[str],
    what: str,
    given: str | None,
    known: Sequence[str],
    found: Sequence[str],
) -> str:
    wanted = known if given is None else (given,)
    for name in wanted:
        if name in found:
            return name
    flag = "--keep-columns" if what == "keep" else f"--{what}-column"
    raise ValueError(
        f"{os.fspath(path)}: no {what} column ({', '.join(wanted)}); found {', '.join(found)}; "
        f"name one with {flag}"
    )
