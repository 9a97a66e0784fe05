"""Read a URL list of the LAION family, a shard's rows at a time, from any storage fsspec supports.

Parquet, CSV, TSV, JSON lines, a JSON array, or text files of URLs; all but Parquet also compressed.
Files are read in blocks. Bytes that are not UTF-8, and half of a surrogate pair, become U+FFFD.
"""

import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import IO, TYPE_CHECKING

from cluster.base.files import digest_of
from ingest.lists.columns import (
    FURTHER_CAPTIONS,
    Column,
    Survey,
    all_texts,
    common_type,
    find_name,
    from_parquet,
    is_list,
    plain_type,
    require_fit,
    to_array,
)
from ingest.lists.filters import MALFORMED, FilterConfig, RowFilter
from ingest.lists.formats import CONVERT, Row, TextLayout, find_layout, read_rows

if TYPE_CHECKING:
    import pyarrow as pa
    from fsspec.core import OpenFile

URL_COLUMNS = ("url", "URL", "image_url", "img_url")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "CAPTION", "alt_text")
OUR_COLUMNS = ("key", "url", "caption", "status", "error", "error_message", "sha256")
OUR_COLUMNS += ("width", "height", "original_width", "original_height", FURTHER_CAPTIONS)
COUNT_ROWS = 100_000  # of a batch where only URLs are read
SURVEY_ROWS = 10_000
FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt")
COMPRESSIONS = (".gz", ".bz2", ".xz")


def format_of(path: str) -> str | None:
    """Return which of `FORMATS` a file's name ends with, compressed or not."""
    stem, end = os.path.splitext(path.lower())
    packed = end in COMPRESSIONS
    suffix = os.path.splitext(stem)[1] if packed else end
    return suffix if suffix in FORMATS and not (packed and suffix == ".parquet") else None


# -- files -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RowFile:
    """A file of rows. open: anew each time; names: of its columns, none in an empty file.

    schema: the columns of Parquet; layout: that of any other file.
    """

    path: str
    open: Callable[[], AbstractContextManager[IO[bytes]]]
    names: tuple[str, ...]
    schema: "pa.Schema | None" = None
    layout: TextLayout | None = None

    @property
    def all_columns(self) -> "pa.Schema":
        """The columns with their types, the first of equal names; pa.null() in a text file."""
        import pyarrow as pa

        fields = dict.fromkeys(self.names, pa.null())
        if self.schema is not None:
            fields = dict(zip(reversed(self.names), reversed(self.schema.types), strict=True))
        return pa.schema([(name, fields[name]) for name in dict.fromkeys(self.names)])

    def tables(self, columns: Sequence[Column], size: int) -> "Iterator[pa.Table]":
        """Yield the columns in tables of about `size` rows, in order; those of a text file have
        `MALFORMED` too."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with errors_of(self.path), self.open() as stream:
            if self.layout is not None:
                for rows in _batches(stream, self.layout, size):
                    yield _table(rows, self.layout, columns)
                return
            # With pre_buffer, pages of a row group stay in memory until its last one is read. And
            # pyarrow.dataset holds a complete row group decoded: of a list of one group, all of it.
            reader = pq.ParquetFile(stream, pre_buffer=False)
            for batch in reader.iter_batches(size, columns=[c.source for c in columns]):
                places = [batch.schema.get_all_field_indices(c.source)[0] for c in columns]
                arrays = [
                    from_parquet(pa.chunked_array([batch.column(place)]), column)
                    for place, column in zip(places, columns, strict=True)
                ]
                yield pa.table(arrays, [c.name for c in columns])

    def survey(self, columns: Sequence[Column]) -> "FileFacts":
        """Read the file once, of Parquet its metadata, for its rows and the types of columns.

        Raises ValueError for a column that is not what it is needed for.
        """
        import pyarrow.parquet as pq

        with errors_of(self.path), self.open() as stream:
            if self.layout is not None:
                return _survey(_batches(stream, self.layout, SURVEY_ROWS), self.layout, columns)
            schema = self.all_columns
            kinds = {column.name: schema.field(column.source).type for column in columns}
            for column in columns:
                require_fit(kinds[column.name], column)
            return FileFacts(
                types={name: plain_type(kind) or kind for name, kind in kinds.items()},
                num_rows=pq.read_metadata(stream).num_rows,
            )


@dataclass(kw_only=True)
class FileFacts:
    """What a survey finds. types: by column; first_malformed: a row; num_replaced: with U+FFFD."""

    types: "dict[str, pa.DataType]"
    num_rows: int = 0
    num_malformed: int = 0
    first_malformed: int = 0
    num_replaced: int = 0


def open_rows(
    path: str,
    open_stream: Callable[[], AbstractContextManager[IO[bytes]]],
    known: Collection[str],
    named: Sequence[str] = (),
) -> RowFile:
    """Look at a file's columns; known, named: see `find_layout`.

    Raises ValueError for a file that is not what its name says.
    """
    import pyarrow.parquet as pq

    with errors_of(path), open_stream() as stream:
        if not stream.read(1):
            return RowFile(path=path, open=open_stream, names=())
        stream.seek(0)
        suffix = format_of(path) or ""
        if suffix == ".parquet":
            schema = pq.ParquetFile(stream).schema_arrow
            return RowFile(path=path, open=open_stream, names=(*schema.names,), schema=schema)
        layout = find_layout(stream, suffix, known, named)
        return RowFile(path=path, open=open_stream, names=layout.names, layout=layout)


@contextmanager
def errors_of(path: str) -> Iterator[None]:
    """Raise what a reader says of a file's content as a ValueError that names the file."""
    import pyarrow as pa

    suffix = (format_of(path) or ".")[1:]
    try:
        yield
    except (
        ValueError, EOFError, pa.ArrowException, gzip.BadGzipFile, zlib.error, lzma.LZMAError,
    ) as error:  # fmt: skip
        ours = "" if type(error) is ValueError else f"not valid {suffix}: "
        raise ValueError(f"{path}: {ours}{' '.join(str(error).split())}") from None
    except OSError as error:  # Arrow's and bzip2's of bad content have no number
        if error.errno is not None or type(error) is not OSError:
            raise
        text = " ".join(str(error).split())
        raise ValueError(f"{path}: not valid {suffix}: {text}") from None


def _batches(stream: IO[bytes], layout: TextLayout, size: int) -> Iterator[list[Row]]:
    rows = read_rows(stream, layout)
    return iter(lambda: list(islice(rows, size)), [])


def _table(rows: list[Row], layout: TextLayout, columns: Sequence[Column]) -> "pa.Table":
    import pyarrow as pa

    malformed, arrays = [row is None for row in rows], []
    for column in columns:
        array, bad = to_array(layout.column(rows, column.source), column)
        arrays.append(array)
        for place in bad:
            malformed[place] = True
    return pa.table([*arrays, pa.array(malformed)], [*(c.name for c in columns), MALFORMED])


def _survey(
    batches: Iterable[list[Row]], layout: TextLayout, columns: Sequence[Column]
) -> FileFacts:
    """Look at all rows of a text file."""
    facts = FileFacts(types={})
    surveys = {c.name: Survey(is_csv=layout.kind == "csv") for c in columns}
    numbers: dict[str, bool] = {}  # by column with any value: whether one is a number
    for rows in batches:
        malformed = {place for place, row in enumerate(rows) if row is None}
        for column in columns:
            values = layout.column(rows, column.source)
            if column.need in ("captions", "kept"):
                surveys[column.name].add(values)
            if column.need == "captions":
                facts.num_replaced += sum(isinstance(v, str) and "\ufffd" in v for v in values)
            if column.need == "kept":  # whose type is one that holds all
                continue
            if column.need != "number" and all_texts(values):
                continue
            array, bad = to_array(values, column)
            malformed.update(bad)
            if column.need == "number" and (bad or array.null_count < len(array)):
                known = numbers.get(column.name, False)
                numbers[column.name] = known or array.null_count < len(array)
        if malformed and not facts.num_malformed:
            facts.first_malformed = facts.num_rows + min(malformed)
        facts.num_malformed += len(malformed)
        facts.num_rows += len(rows)
    for column in columns:
        if not numbers.get(column.name, True):
            raise ValueError(f"column {column.source} holds no number, expected numbers")
    facts.types = {
        c.name: surveys[c.name].type if c.need in ("captions", "kept") else c.type for c in columns
    }
    return facts


# -- lists -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class UrlList:
    """A list of image URLs with captions.

    url_column, caption_column: as the first file spells them; no captions: "". kept: the columns
    that are stored beside them, `FURTHER_CAPTIONS` last where rows have several. digest: of the
    files' bytes. files: each with the columns that are read of it.
    """

    files: tuple[tuple[RowFile, tuple[Column, ...]], ...]
    url_column: str
    caption_column: str
    kept: tuple[str, ...]
    row_filter: RowFilter
    num_rows: int
    num_malformed: int
    digest: str

    def shards(self, samples_per_shard: int) -> "Iterator[pa.Table]":
        """Yield tables of `samples_per_shard` rows (the last: what is left) in the list's order.

        Columns: url and caption (strings), the kept ones and those that the filter needs; and
        `MALFORMED`, where there are such rows. Some two shards are in memory, and what the format
        reads at once.
        """
        return rechunk(self._tables(samples_per_shard), samples_per_shard)

    def urls(self) -> "Iterator[pa.ChunkedArray]":
        """Yield the URLs in order, a batch at a time; no other column is read."""
        for file, columns in self.files:
            for table in file.tables(columns[:1], COUNT_ROWS):
                yield table.column("url")

    def _tables(self, size: int) -> "Iterator[pa.Table]":
        import pyarrow as pa

        for file, columns in self.files:
            for table in file.tables(columns, size):
                if not self.caption_column:
                    texts = pa.array([""] * table.num_rows, pa.string())
                    table = table.add_column(1, "caption", texts)
                if is_list(table.schema.field("caption").type):
                    lists = [[t for t in v or () if t] for v in table["caption"].to_pylist()]
                    first = pa.array([texts[0] if texts else None for texts in lists], pa.string())
                    more = pa.array([texts[1:] for texts in lists], pa.list_(pa.string()))
                    table = table.set_column(1, "caption", first)
                    table = table.append_column(FURTHER_CAPTIONS, more)
                names = table.column_names
                if MALFORMED in names and not self.num_malformed:
                    names.remove(MALFORMED)
                yield table.select(names)


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
    columns: Sequence[str] = (),
    filters: FilterConfig | None = None,
) -> UrlList:
    """Open a list: a file, a folder of files or a glob pattern of them, in name order.

    path: local or any fsspec URL. Columns that are None are found by the names that the LAION
    family uses. columns: names for CSV without a header line. filters: what their columns must be
    read for. Text files are read once, for their number of rows and the types of columns.
    Raises ValueError for a missing list or column, naming the columns found, and for a column that
    is not what it is needed for.
    """
    import pyarrow as pa

    # Files: the first that is not empty says which columns the others must have too
    wanted = URL_COLUMNS if url_column is None else (url_column,)
    storage_files = _find_files(os.fspath(path))
    known = {*URL_COLUMNS, *wanted}
    files = [open_rows(file.path, partial(_open, file), known, columns) for file in storage_files]
    for file in files:
        if not file.names:
            print(f"warning: {file.path} is empty", flush=True)
    files = [file for file in files if file.names]
    if not files:
        raise ValueError(f"--urls {path}: found no rows, expected a list of URLs and captions")
    first = files[0]

    # Columns, by what they are needed for
    url = _find_column(first, "--url-column", wanted)
    caption = ""
    if format_of(first.path) != ".txt" or caption_column is not None:
        wanted = CAPTION_COLUMNS if caption_column is None else (caption_column,)
        caption = _find_column(first, "--caption-column", wanted)
    row_filter = RowFilter.open(filters or FilterConfig(), first.all_columns)
    read = _columns(first, url, caption, row_filter, keep_columns)
    read_of = {file.path: [_in_file(column, file, first) for column in read] for file in files}

    # Rows, and the types that hold the values of all files
    facts = {}
    for file in files:
        facts[file.path] = found = file.survey(read_of[file.path])
        if found.num_malformed:
            print(
                f"warning: {file.path}: {found.num_malformed:,} of {found.num_rows:,} rows are "
                f"malformed, the first is row {found.first_malformed + 1:,}",
                flush=True,
            )
        if found.num_replaced:
            print(
                f"warning: {file.path}: {found.num_replaced:,} of {found.num_rows:,} captions hold "
                f"U+FFFD, which bytes become that are not UTF-8; {CONVERT} cp1252 -t utf-8",
                flush=True,
            )
    num_rows = sum(found.num_rows for found in facts.values())
    num_malformed = sum(found.num_malformed for found in facts.values())
    if 0 < num_rows == num_malformed:
        raise ValueError(
            f"--urls {path}: found {num_rows} rows that are all malformed, expected cells as in "
            "the header, URLs and captions of text, and scores of numbers"
        )
    types = {c.name: c.type for c in read}
    for column in read:
        if column.need in ("captions", "kept"):
            types[column.name] = common_type(found.types[column.name] for found in facts.values())
    further = [FURTHER_CAPTIONS] if caption and is_list(types["caption"]) else []
    types["caption"] = types["caption"] if further else pa.string()
    digests = [_digest(file) for file in storage_files]
    return UrlList(
        files=tuple(
            (file, tuple(replace(c, type=types[c.name]) for c in read_of[file.path]))
            for file in files
        ),
        url_column=url,
        caption_column=caption,
        kept=(*dict.fromkeys(keep_columns), *further),
        row_filter=row_filter,
        num_rows=num_rows,
        num_malformed=num_malformed,
        digest=digests[0] if len(digests) == 1 else digest_of(digests),
    )


def _columns(
    first: RowFile, url: str, caption: str, row_filter: RowFilter, keep_columns: Sequence[str]
) -> list[Column]:
    """Return the columns that are read, url and caption first. One that a filter needs and that is
    kept is read as the filter needs it."""
    import pyarrow as pa

    texts = {"url": url, **{name: name for name in row_filter.texts}}
    columns = {n: Column(name=n, source=s, need="text", type=pa.string()) for n, s in texts.items()}
    kind = pa.list_(pa.string())
    if caption:
        column = Column(name="caption", source=caption, need="captions", type=kind)
        columns = {"url": columns.pop("url"), "caption": column, **columns}
    for name in row_filter.scores:
        columns[name] = Column(name=name, source=name, need="number", type=pa.float64())
    for name in keep_columns:
        source = _find_column(first, "--keep-columns", (name,))
        if name in OUR_COLUMNS:
            raise ValueError(f"--keep-columns {name}: the shards use this name; rename the column")
        kept = Column(name=name, source=source, need="kept", type=pa.string())
        columns.setdefault(name, kept)
    for column in columns.values():
        if first.names.count(column.source) > 1:
            print(
                f"warning: {first.path}: several columns are named {column.source}; the first is "
                "used",
                flush=True,
            )
    return list(columns.values())


def _in_file(column: Column, file: RowFile, first: RowFile) -> Column:
    """Return a column of the first file as another file spells it."""
    source = find_name((column.source,), file.names)
    if source is None:
        raise ValueError(f"{file.path}: no column {column.source!r}, which {first.path} has")
    return replace(column, source=source)


def _open(file: "OpenFile") -> "OpenFile":
    return file


def _digest(file: "OpenFile") -> str:
    """Return the sha256 of a file's bytes, as they are stored."""
    with file.fs.open(file.path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _find_files(path: str) -> tuple["OpenFile", ...]:
    """Return the files of a list, all of one format, not opened yet.

    Of a folder those of its sub-folders NAME=VALUE too, as Spark partitions them. Files and folders
    that are hidden or marks, such as ._a.parquet and _SUCCESS, are left out.
    """
    from fsspec.core import OpenFile, url_to_fs
    from fsspec.utils import infer_compression

    try:
        storage, root = url_to_fs(path)
    except (ImportError, ValueError) as error:  # an unknown scheme, or one whose driver is absent
        raise ValueError(f"--urls {path}: {error}") from None
    if any(sign in root for sign in "*?[") and not storage.exists(root):
        names = [str(name) for name in storage.glob(root)]
        names = [name for name in names if os.path.basename(name)[:1] not in (".", "_")]
    elif storage.isdir(root):
        below = {name: name[len(root) :].strip("/").split("/") for name in storage.find(root)}
        names = [
            name
            for name, (*folders, last) in below.items()
            if format_of(name) and last[0] not in "._" and all(map(_is_partition, folders))
        ]
        if len({format_of(name) for name in names}) > 1:  # such as a data set's own description
            names = [name for name in names if format_of(name) != ".json"]
    else:
        names = [root] if storage.isfile(root) else []
    if not names:
        raise ValueError(
            f"--urls {path}: not found; expected a list, or a folder or pattern of them"
        )
    formats = {format_of(name) for name in names}
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


def _is_partition(folder: str) -> bool:
    return "=" in folder and folder[0] not in "._"


def _find_column(file: RowFile, flag: str, wanted: Sequence[str]) -> str:
    """Return the first wanted column that a file has; ValueError if it has none."""
    if (found := find_name(wanted, file.names)) is not None:
        return found
    what = flag.removeprefix("--").removesuffix("-column").removesuffix("-columns")
    raise ValueError(
        f"{file.path}: no {what} column ({', '.join(wanted)}); found {', '.join(file.names)}; "
        f"name one with {flag}"
    )
