"""Read a URL list of the LAION family, a shard's rows at a time, from any storage fsspec supports.

Parquet, CSV, TSV, JSON lines, or text files of URLs; all but Parquet also compressed. Files are
read in blocks. Bytes that are not UTF-8, and half of a surrogate pair, become U+FFFD.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import IO, TYPE_CHECKING

from cluster.base.files import Json, digest_of
from ingest.captions import holds_captions

if TYPE_CHECKING:
    import pyarrow as pa
    from fsspec.core import OpenFile

URL_COLUMNS = ("url", "URL", "image_url", "img_url")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "CAPTION", "alt_text")
OUR_COLUMNS = ("key", "url", "caption", "status", "error", "error_message", "sha256")
OUR_COLUMNS += ("width", "height", "original_width", "original_height")
PLAIN_TYPES = {"string", "large_string", "bool", "float", "double"}
PLAIN_TYPES |= {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
COUNT_ROWS = 100_000  # of a batch where only URLs are read
TYPED_LINES = 1000  # from which the names and types of their columns are taken
CSV_BLOCK_BYTES = 16 << 20
_HALF_PAIR = re.compile("[\ud800-\udfff]")


# -- formats ---------------------------------------------------------------------------------------
# Each yields tables of the given columns, of about `size` rows, in order; columns None: one empty
# table with the names and types of all columns.


def _read_parquet(
    stream: IO[bytes], columns: "pa.Schema | None", size: int
) -> "Iterator[pa.Table]":
    import pyarrow as pa
    import pyarrow.parquet as pq

    # With pre_buffer, pages of a row group stay in memory until its last one is read. And
    # pyarrow.dataset holds a complete row group decoded: of a list of one group, all of it.
    reader = pq.ParquetFile(stream, pre_buffer=False)
    if columns is None:
        yield reader.schema_arrow.empty_table()
        return
    for batch in reader.iter_batches(size, columns=columns.names):
        yield pa.table([batch.column(name) for name in columns.names], columns.names)


def _read_csv(
    stream: IO[bytes], columns: "pa.Schema | None", size: int, *, delimiter: str
) -> "Iterator[pa.Table]":
    import pyarrow as pa
    from pyarrow import csv

    types = {f.name: pa.binary() if _is_text(f.type) else f.type for f in columns or ()}
    reader = csv.open_csv(
        stream,
        read_options=csv.ReadOptions(block_size=CSV_BLOCK_BYTES),
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            include_columns=list(types) or None, column_types=types, check_utf8=False
        ),
    )
    if columns is None:
        yield reader.schema.empty_table()
        return
    yield from (pa.Table.from_batches([batch]) for batch in reader)


def _read_lines(
    stream: IO[bytes], columns: "pa.Schema | None", size: int, *, line_column: str = ""
) -> "Iterator[pa.Table]":
    """Read lines, each an object of JSON or the value of `line_column`; blank ones are skipped."""
    import pyarrow as pa

    def parsed() -> Iterator[Json]:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                text = line.strip().decode("utf-8", "replace")
                value = {line_column: text} if line_column else json.loads(text)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(value, dict):
                raise ValueError(f"line {number}: expected a JSON object")
            yield value

    def values(rows: list[Json], name: str) -> list[object]:
        cells = (row.get(name) for row in rows)
        return [_HALF_PAIR.sub("\ufffd", v) if isinstance(v, str) else v for v in cells]

    objects = parsed()
    if columns is None and line_column:
        yield pa.schema([(line_column, pa.string())]).empty_table()
        return
    if columns is None:
        rows = list(islice(objects, TYPED_LINES))
        names = dict.fromkeys(name for row in rows for name in row)
        yield pa.schema([(n, pa.array(values(rows, n)).type) for n in names]).empty_table()
        return
    while rows := list(islice(objects, size)):
        yield pa.table([pa.array(values(rows, f.name), f.type) for f in columns], columns.names)


FORMATS: dict[str, Callable[..., "Iterator[pa.Table]"]] = {
    ".parquet": _read_parquet,
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".txt": partial(_read_lines, line_column="url"),
}
COMPRESSIONS = (".gz", ".bz2", ".xz")


def _format_of(path: str) -> str | None:
    """Return the key of `FORMATS` that a file's name ends with, compressed or not."""
    stem, end = os.path.splitext(path.lower())
    packed = end in COMPRESSIONS
    suffix = os.path.splitext(stem)[1] if packed else end
    return suffix if suffix in FORMATS and not (packed and suffix == ".parquet") else None


def _read_tables(file: "OpenFile", columns: "pa.Schema | None", size: int) -> "Iterator[pa.Table]":
    suffix = _format_of(file.path) or ""
    try:
        with file as stream:
            yield from FORMATS[suffix](stream, columns, size)
    except (ValueError, TypeError) as error:  # pyarrow's errors are of these two
        raise ValueError(f"--urls {file.path}: not valid {suffix[1:]}: {error}") from None


def _is_text(kind: "pa.DataType") -> bool:
    return str(kind) in ("string", "large_string")


def _text(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """Return a column as valid strings, null where it is null; numbers become text."""
    import pyarrow as pa

    if _is_text(column.type):
        column = column.cast(pa.large_binary())  # Parquet does not check what it calls a string
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        values = (v if v is None else v.decode("utf-8", "replace") for v in column.to_pylist())
        return pa.chunked_array([pa.array(values, pa.string())])


# -- lists -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class UrlList:
    """A list of image URLs with captions. digest: of the files' bytes; kept: extra columns.

    caption_column: "" where there are none; every caption is empty then.
    """

    files: tuple["OpenFile", ...]
    url_column: str
    caption_column: str
    kept: tuple[str, ...]
    num_rows: int
    digest: str
    schema: "pa.Schema"

    def shards(self, samples_per_shard: int) -> "Iterator[pa.Table]":
        """Yield tables of `samples_per_shard` rows (the last: what is left) in the list's order.

        Columns: url and caption (strings), then the kept ones. Some two shards are in memory, and
        what the format reads at once.
        """
        return rechunk(self._tables(samples_per_shard), samples_per_shard)

    def urls(self) -> "Iterator[pa.ChunkedArray]":
        """Yield the URLs in order, a batch at a time; no other column is read."""
        import pyarrow as pa

        columns = pa.schema([self.schema.field(self.url_column)])
        for file in self.files:
            for table in _read_tables(file, columns, COUNT_ROWS):
                yield _text(table.column(self.url_column))

    def _tables(self, size: int) -> "Iterator[pa.Table]":
        import pyarrow as pa

        texts = [name for name in (self.url_column, self.caption_column) if name]
        kept = [self.schema.field(name) for name in self.kept]
        columns = pa.schema([*map(self.schema.field, texts), *kept])
        for file in self.files:
            for table in _read_tables(file, columns, size):
                values = [_text(table.column(name)) for name in texts]
                if not self.caption_column:
                    values.append(pa.chunked_array([pa.array([""] * table.num_rows, pa.string())]))
                for field in kept:
                    column, is_text = table.column(field.name), _is_text(field.type)
                    values.append(_text(column) if is_text else column.cast(field.type))
                yield pa.table(values, ["url", "caption", *self.kept])


def rechunk(tables: "Iterable[pa.Table]", size: int) -> "Iterator[pa.Table]":
    """Yield the rows of `tables`, in order, as tables of `size` rows (the last: what is left)."""
    import pyarrow as pa

    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += table.num_rows
        while count >= size:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, size)
            waiting, count = [joined.slice(size)], count - size
    if count:
        yield pa.concat_tables(waiting)


def open_url_list(
    path: str | os.PathLike[str],
    *,
    url_column: str | None = None,
    caption_column: str | None = None,
    keep_columns: Sequence[str] = (),
) -> UrlList:
    """Open a list: a file, a folder of files or a glob pattern of them, in name order.

    path: local or any fsspec URL. Columns that are None are found by the names that the LAION
    family uses.
    Raises ValueError for a missing list or column, naming the columns found, and for a kept column
    that cannot be stored.
    """
    import pyarrow.parquet as pq

    # Columns: the first file's, which the others must have too
    files = _find_files(os.fspath(path))
    schemas = [next(_read_tables(file, None, 0)).schema for file in files]
    schema, suffix = schemas[0], _format_of(files[0].path)
    wanted = URL_COLUMNS if url_column is None else (url_column,)
    url = _find_column(path, "--url-column", wanted, schema.names)
    caption = ""
    if suffix != ".txt" or caption_column is not None:
        wanted = CAPTION_COLUMNS if caption_column is None else (caption_column,)
        caption = _find_column(path, "--caption-column", wanted, schema.names)
    for name in keep_columns:
        _find_column(path, "--keep-columns", (name,), schema.names)
        if name in OUR_COLUMNS:
            raise ValueError(f"--keep-columns {name}: the shards use this name; rename the column")
        kind = schema.field(name).type
        if str(kind) not in PLAIN_TYPES and not holds_captions(kind):
            raise ValueError(
                f"--keep-columns {name}: is {kind}, expected text, a list of texts, number or bool"
            )
    for file, other in zip(files, schemas, strict=True):
        for name in {url, *([caption] if caption else []), *keep_columns} - set(other.names):
            raise ValueError(f"{file.path}: no column {name!r}, which {files[0].path} has")

    # Rows and digest: Parquet states its number of rows, other files are read once
    num_rows, digests = 0, []
    for file in files:
        if suffix == ".parquet":
            with file as stream:
                num_rows += pq.read_metadata(stream).num_rows
        else:
            columns = schema.empty_table().select([url]).schema
            num_rows += sum(table.num_rows for table in _read_tables(file, columns, COUNT_ROWS))
        with file.fs.open(file.path, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return UrlList(
        files=files,
        url_column=url,
        caption_column=caption,
        kept=tuple(keep_columns),
        num_rows=num_rows,
        digest=digests[0] if len(digests) == 1 else digest_of(digests),
        schema=schema,
    )


def _find_files(path: str) -> tuple["OpenFile", ...]:
    """Return the files of a list, all of one format, not opened yet."""
    from fsspec.core import OpenFile, url_to_fs
    from fsspec.utils import infer_compression

    try:
        storage, root = url_to_fs(path)
    except (ImportError, ValueError) as error:  # an unknown scheme, or one whose driver is absent
        raise ValueError(f"--urls {path}: {error}") from None
    if any(sign in root for sign in "*?[") and not storage.exists(root):
        names = [str(name) for name in storage.glob(root)]
    elif storage.isdir(root):
        names = [str(name) for name in storage.ls(root, detail=False) if _format_of(str(name))]
    else:
        names = [root] if storage.isfile(root) else []
    if not names:
        raise ValueError(
            f"--urls {path}: not found; expected a list, or a folder or pattern of them"
        )
    formats = {_format_of(name) for name in names}
    if None in formats or len(formats) > 1:
        some = ", ".join(sorted(os.path.basename(name) for name in names)[:5])
        expected = ", ".join([*FORMATS, *(f"TEXT{ending}" for ending in COMPRESSIONS)])
        raise ValueError(
            f"--urls {path}: found {some}, expected files of one kind out of {expected}"
        )
    return tuple(
        OpenFile(storage, name, mode="rb", compression=infer_compression(name))
        for name in sorted(names)
    )


def _find_column(
    path: str | os.PathLike[str], flag: str, wanted: Sequence[str], names: Sequence[str]
) -> str:
    """Return the first wanted column that a list has; ValueError if it has none."""
    for name in wanted:
        if name in names:
            return name
    what = flag.removeprefix("--").removesuffix("-column").removesuffix("-columns")
    raise ValueError(
        f"{os.fspath(path)}: no {what} column ({', '.join(wanted)}); found {', '.join(names)}; "
        f"name one with {flag}"
    )
