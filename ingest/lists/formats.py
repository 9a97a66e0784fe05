"""The file formats of a URL list, one interface: columns, rows in batches, never a file whole.

Text is whatever bytes it is: what is not UTF-8, and half a surrogate pair, become U+FFFD.
"""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa
    from fsspec.core import OpenFile

JSON_LINES_LOOKED_AT = 1000  # for the names and types of their columns
BLOCK_BYTES = 16 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")


class ListFormat(Protocol):
    """How to read one kind of list; `file` is an fsspec file that was not opened yet."""

    def schema(self, file: "OpenFile") -> "pa.Schema":
        """Return names and types of the columns; ValueError if the file is of another kind."""
        ...

    def batches(self, file: "OpenFile", columns: "pa.Schema", size: int) -> Iterator["pa.Table"]:
        """Yield tables of `columns`, of about `size` rows, in order."""
        ...


class ParquetFormat:
    """Apache Parquet, a row group at a time."""

    def schema(self, file: "OpenFile") -> "pa.Schema":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with file as stream:
            try:
                return pq.read_schema(stream)
            except pa.ArrowInvalid as error:
                raise ValueError(f"--urls {file.path}: not a Parquet file ({error})") from None

    def batches(self, file: "OpenFile", columns: "pa.Schema", size: int) -> Iterator["pa.Table"]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with file as stream:
            # buffered ahead, what was read of a row group is kept until the last one is
            reader = pq.ParquetFile(stream, pre_buffer=False)
            for batch in reader.iter_batches(size, columns=columns.names):
                yield pa.table([batch.column(name) for name in columns.names], columns.names)


class CsvFormat:
    """Comma- or tab-separated values with a header line; a quoted value may span lines."""

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter

    def schema(self, file: "OpenFile") -> "pa.Schema":
        with file as stream:
            return self._open(file, stream, None).schema

    def batches(self, file: "OpenFile", columns: "pa.Schema", size: int) -> Iterator["pa.Table"]:
        import pyarrow as pa

        with file as stream:
            reader = self._open(file, stream, columns)
            while True:
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    return
                except pa.ArrowInvalid as error:
                    raise ValueError(f"--urls {file.path}: {error}") from None
                yield pa.Table.from_batches([batch])

    def _open(self, file: "OpenFile", stream: IO[bytes], columns: "pa.Schema | None") -> Any:
        import pyarrow as pa
        from pyarrow import csv

        types = _as_bytes(columns) if columns is not None else {}
        try:
            return csv.open_csv(
                stream,
                read_options=csv.ReadOptions(block_size=BLOCK_BYTES),
                parse_options=csv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True),
                convert_options=csv.ConvertOptions(
                    include_columns=list(types) or None, column_types=types, check_utf8=False
                ),
            )
        except pa.ArrowInvalid as error:
            raise ValueError(f"--urls {file.path}: not a table of values ({error})") from None


class JsonLinesFormat:
    """One JSON object a line."""

    def schema(self, file: "OpenFile") -> "pa.Schema":
        import pyarrow as pa

        first = list(islice(self._objects(file), JSON_LINES_LOOKED_AT))
        names = dict.fromkeys(name for line in first for name in line)
        try:
            return pa.schema([(n, pa.array([_sound(o.get(n)) for o in first]).type) for n in names])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"--urls {file.path}: a column of several types ({error})") from None

    def batches(self, file: "OpenFile", columns: "pa.Schema", size: int) -> Iterator["pa.Table"]:
        import pyarrow as pa

        objects = self._objects(file)
        while rows := list(islice(objects, size)):
            try:
                found = {
                    field.name: pa.array([_sound(row.get(field.name)) for row in rows], field.type)
                    for field in columns
                }
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise ValueError(f"--urls {file.path}: {error}") from None
            yield pa.table(found)

    def _objects(self, file: "OpenFile") -> Iterator[dict[str, Any]]:
        with file as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    found = json.loads(line.decode("utf-8", "replace"))
                except ValueError as error:
                    raise ValueError(f"--urls {file.path}: line {number}: {error}") from None
                if not isinstance(found, dict):
                    raise ValueError(f"--urls {file.path}: line {number}: expected a JSON object")
                yield found


class TextFormat:
    """One URL a line, without captions."""

    def schema(self, file: "OpenFile") -> "pa.Schema":
        import pyarrow as pa

        return pa.schema([("url", pa.string())])

    def batches(self, file: "OpenFile", columns: "pa.Schema", size: int) -> Iterator["pa.Table"]:
        import pyarrow as pa

        with file as stream:
            lines = (line.strip() for line in stream)
            urls = (line.decode("utf-8", "replace") for line in lines if line)
            while rows := list(islice(urls, size)):
                yield pa.table({"url": rows})


FORMATS: Mapping[str, ListFormat] = {
    ".parquet": ParquetFormat(),
    ".csv": CsvFormat(","),
    ".tsv": CsvFormat("\t"),
    ".jsonl": JsonLinesFormat(),
    ".ndjson": JsonLinesFormat(),
    ".txt": TextFormat(),
}
COMPRESSIONS = ("", ".gz", ".bz2", ".xz")


def format_suffix(path: str) -> str | None:
    """Return the key of `FORMATS` that a file's name ends with, compressed or not."""
    for suffix, compression in ((s, c) for s in FORMATS for c in COMPRESSIONS):
        if path.lower().endswith(suffix + compression) and (
            suffix != ".parquet" or not compression
        ):
            return suffix
    return None


def text_column(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """Return a column as valid strings, null where it is; numbers are spelled out."""
    import pyarrow as pa

    kind = column.type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            return column.cast(pa.string())
        column = column.cast(pa.large_binary())  # Parquet does not check what it calls a string
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        values = (v if v is None else v.decode("utf-8", "replace") for v in column.to_pylist())
        return pa.chunked_array([pa.array(values, pa.string())])


def _as_bytes(columns: "pa.Schema") -> dict[str, "pa.DataType"]:
    import pyarrow as pa

    texts = (pa.types.is_string, pa.types.is_large_string)
    return {
        field.name: pa.binary() if any(test(field.type) for test in texts) else field.type
        for field in columns
    }


def _sound(value: Any) -> Any:
    """Replace halves of surrogate pairs, which JSON may spell and UTF-8 cannot."""
    return _SURROGATE.sub("\ufffd", value) if isinstance(value, str) else value
