"""Image bytes in tables: Parquet files, Arrow files, and Hugging Face data sets on the disk.

An image is a column of bytes, or a struct of bytes and path as Hugging Face stores it; a path alone
is refused, row by row. A caption is text, or a list of texts: the first, then further captions.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import basename
from typing import TYPE_CHECKING

from cluster.base.files import Json, digest_of
from ingest.adopting.config import AdoptConfig
from ingest.adopting.sources import (
    Part,
    RangeSource,
    SourceSample,
    expand,
    kept_columns,
    open_place,
)
from ingest.lists.columns import (
    FURTHER_CAPTIONS,
    PLAIN_TYPES,
    holds_captions,
    is_list,
    plain_values,
    undecoded,
)
from ingest.lists.url_list import CAPTION_COLUMNS, OUR_COLUMNS, URL_COLUMNS
from ingest.store.storage import is_remote, local_path

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET, ARROW = (".parquet",), (".arrow", ".feather", ".ipc")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes", "image_bytes", "picture")
TEXT_COLUMNS = (*CAPTION_COLUMNS, "captions", "txt")
ROWS_AT_ONCE = 32  # decoded, with their images
MAX_GROUP_SHARDS = 8  # shards' worth of rows in a row group, which each of them reads again
READ_BYTES = 1 << 20  # of a Parquet file, at once
SPLIT = re.compile(r"(.*?)-\d+-of-\d+\.")  # of a data set's files, as Hugging Face names them


@dataclass(frozen=True, kw_only=True)
class TableSource(RangeSource):
    """Rows of files of one kind. A part is a range of a file's rows, a shard's number or what is
    left of the file; None of one that is damaged.

    columns: that are read, by what they are: image, caption, url; the others keep their name.
    """

    columns: dict[str, str]

    def read(self, part: Part) -> Iterator[SourceSample]:
        """Yield the rows of a part; OSError or ValueError for a file that is damaged."""
        import pyarrow as pa

        first, last = part.payload.get("rows") or (0, _num_rows(part.place))
        name = basename(part.place)
        try:
            for start, batch in _read_batches(part.place, [*self.columns.values()], first, last):
                columns = {what: _column(batch, path) for what, path in self.columns.items()}
                images = columns.pop("image").to_pylist()
                captions = caption_tuples(columns.pop("caption"))
                fields = {what: plain_values(column) for what, column in columns.items()}
                for row, (image, caption) in enumerate(zip(images, captions, strict=True)):
                    yield _sample(
                        f"{name}:{start + row}",
                        image,
                        caption,
                        {what: values[row] for what, values in fields.items()},
                    )
        except (pa.ArrowException, KeyError) as error:
            raise ValueError(f"not a table like the others: {error}") from None


def _sample(
    key: str, image: Json | bytes | None, captions: tuple[str, ...] | None, fields: Json
) -> SourceSample:
    """Return a row as a sample. image: bytes, or a dictionary of bytes and path."""
    data = image["bytes"] if isinstance(image, dict) else image
    problem = None if captions else "bad_caption" if captions is None else "no_caption"
    if data is None:
        problem = "no_image_bytes" if isinstance(image, dict) and image["path"] else "no_image"
    return SourceSample(
        key=key, image=data, captions=captions or (), fields=fields, problem=problem
    )


# -- opening ---------------------------------------------------------------------------------------


def find_tables(source: str) -> tuple[str, ...]:
    """Return the files of a source, in order; none where it is no table, file or folder of them.

    Raises ValueError where a data set has several splits: one is named as a source of its own.
    """
    from fsspec.core import url_to_fs

    storage, root = url_to_fs(source)
    if storage.isdir(root):
        if storage.exists(f"{root}/dataset_dict.json"):  # as DatasetDict.save_to_disk writes it
            splits = json.loads(storage.cat_file(f"{root}/dataset_dict.json"))["splits"]
            if len(splits) > 1:
                raise ValueError(_ambiguous(source, splits, f"{source.rstrip('/')}/{splits[0]}"))
            root = f"{root}/{splits[0]}"
        names = sorted(map(storage.unstrip_protocol, storage.ls(root, detail=False)))
    else:
        names = expand(source)
    names = [name for name in names if name.lower().endswith((*PARQUET, *ARROW))]
    names = [name for name in names if not re.match(r"[._]|cache-|metadata\.", basename(name))]
    splits = sorted({found[1] for name in names if (found := SPLIT.match(basename(name)))})
    if len(splits) > 1 and storage.isdir(root):
        pattern = f"{source.rstrip('/')}/{splits[0]}-*{os.path.splitext(names[0])[1]}"
        raise ValueError(_ambiguous(source, splits, f'"{pattern}"'))
    return tuple(names)


def _ambiguous(source: str, splits: Sequence[str], example: str) -> str:
    return (
        f"--source {source}: found the splits {', '.join(splits)}, expected one of them; name it: "
        f"--source {example}"
    )


def open_tables(config: AdoptConfig, files: Sequence[str]) -> TableSource:
    """Find the columns, and the ranges of rows that become shards, from the files' metadata alone.

    Raises ValueError for a missing column, naming those that are there.
    """
    import pyarrow as pa

    # Rows by file; None where a file is damaged, which its part then reports
    counts: list[int | None] = []
    schema: pa.Schema | None = None
    problem = "no such file"
    for file in files:
        try:
            counts.append(_num_rows(file, config.samples_per_shard))
            schema = schema or _schema(file)
        except (OSError, ValueError, pa.ArrowException) as error:
            counts.append(None)
            problem = str(error)
    if schema is None:
        raise ValueError(f"--source {config.source}: {problem}; expected Parquet or Arrow files")

    # Columns
    image = _find_image(config, schema)
    caption, kind = _find_caption(config, schema)
    kept = kept_columns(config, plain_schema(schema))
    columns = {"image": image, "caption": caption, **{name: name for name in kept.names}}
    url = next((name for name in URL_COLUMNS if name in schema.names), None)
    columns |= {"url": url} if url else {}
    if is_list(kind):
        kept = kept.append(pa.field(FURTHER_CAPTIONS, pa.list_(pa.string())))

    # Parts
    step, ranges = config.samples_per_shard, list[Part]()
    for file, count in zip(files, counts, strict=True):
        starts = range(0, count, step) if count is not None else ()
        rows = [(n, min(n + step, count or 0)) for n in starts]
        ranges += [Part(place=file, payload={"rows": each}) for each in rows]
        ranges += [Part(place=file)] if count is None else []
    listing = [[basename(file), count] for file, count in zip(files, counts, strict=True)]
    return TableSource(
        digest=digest_of({"files": listing, "columns": columns}),
        kept=kept,
        columns=columns,
        ranges=tuple(ranges),
    )


def _find_image(config: AdoptConfig, schema: "pa.Schema") -> str:
    """Return the column of the images: the one named, one of a usual name, or the only one that
    Hugging Face would decode."""
    import pyarrow as pa

    def holds_images(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return {"bytes", "path"} <= {kind.field(n).name for n in range(kind.num_fields)}
        return str(kind).removeprefix("large_") in ("binary", "binary_view")

    if config.image_column:
        if config.image_column in schema.names:
            kind = schema.field(config.image_column).type
            if holds_images(kind):
                return config.image_column
            raise ValueError(
                f"--image-column {config.image_column}: found {kind}, expected bytes, or a struct "
                "of bytes and path"
            )
    else:
        named = [name for name in IMAGE_COLUMNS if name in schema.names]
        structs = [field.name for field in schema if pa.types.is_struct(field.type)]
        names = [*named, *(structs if len(structs) == 1 else ())]
        image = next((name for name in names if holds_images(schema.field(name).type)), None)
        if image is not None:
            return image
    there = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise ValueError(
        f"--source {config.source}: no column of image bytes ({config.image_column or 'image'}); "
        f"found {there}; name one with --image-column"
    )


def _find_caption(config: AdoptConfig, schema: "pa.Schema") -> "tuple[str, pa.DataType]":
    """Return the column of the captions, or the dotted path to a field of one, and its type."""
    import pyarrow as pa

    wanted = TEXT_COLUMNS if config.caption_key is None else (config.caption_key,)
    for path in wanted:
        try:
            kind = _column(pa.RecordBatch.from_pylist([], schema), path).type
        except KeyError:
            continue
        if not holds_captions(kind):
            raise ValueError(
                f"--source {config.source}: column {path}: found {kind}, expected text, or a list "
                "of texts; name another with --caption-key"
            )
        return path, kind
    raise ValueError(
        f"--source {config.source}: no caption column ({', '.join(wanted)}); found "
        f"{', '.join(schema.names)}; name one with --caption-key"
    )


# -- reading ---------------------------------------------------------------------------------------


def _num_rows(path: str, samples_per_shard: int | None = None) -> int:
    """Return the number of rows; with `samples_per_shard`, warn of what would read slowly."""
    import pyarrow.parquet as pq

    if not path.lower().endswith(PARQUET):
        return sum(batch.num_rows for batch in _read_arrow(path))
    with open_place(path) as stream:
        metadata = pq.read_metadata(stream)
    groups = (metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))
    largest = max(groups, default=0)
    if samples_per_shard and largest > MAX_GROUP_SHARDS * samples_per_shard:
        print(
            f"warning: {path}: a row group has {largest} rows and is read again for each "
            f"{samples_per_shard} of them; --samples-per-shard {largest} reads it once",
            flush=True,
        )
    return metadata.num_rows


def _schema(path: str) -> "pa.Schema":
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.lower().endswith(PARQUET):
        with open_place(path) as stream:
            return pq.read_schema(stream)
    batch = next(_read_arrow(path), None)
    return batch.schema if batch is not None else pa.schema([])


def _read_arrow(path: str) -> "Iterator[pa.RecordBatch]":
    """Yield the record batches of an Arrow file or stream; a local one is mapped, not read."""
    import pyarrow as pa

    with open_place(path) if is_remote(path) else pa.memory_map(str(local_path(path))) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if not is_file:
            yield from pa.ipc.open_stream(stream)
            return
        reader = pa.ipc.open_file(stream)
        yield from (reader.get_batch(n) for n in range(reader.num_record_batches))


def _read_batches(
    path: str, columns: list[str], first: int, last: int
) -> "Iterator[tuple[int, pa.RecordBatch]]":
    """Yield rows `first` to `last` of a file, a few at once, with the number of the first one."""
    for start, batch in _numbered(path, columns, first, last):
        low, high = max(first - start, 0), min(last - start, batch.num_rows)
        for row in range(low, high, ROWS_AT_ONCE):
            yield start + row, batch.slice(row, min(ROWS_AT_ONCE, high - row))
        if start + batch.num_rows >= last:
            return


def _numbered(
    path: str, columns: list[str], first: int, last: int
) -> "Iterator[tuple[int, pa.RecordBatch]]":
    """Yield batches that hold at least these rows, with the number of their first row."""
    import pyarrow.parquet as pq

    start = 0
    if not path.lower().endswith(PARQUET):
        for batch in _read_arrow(path):
            yield start, batch
            start += batch.num_rows
        return
    with open_place(path) as stream:
        # Pages are read one by one and leave memory as they are read, not with their row group.
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=READ_BYTES)
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            if start < last and end > first:
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                    yield start, batch
                    start += batch.num_rows
            start = end


def _column(batch: "pa.RecordBatch", path: str) -> "pa.Array":
    """Return a column by its name, or a field of a struct by a dotted path; KeyError if absent."""
    import pyarrow as pa

    if path in batch.schema.names:
        return batch.column(path)
    name, *fields = path.split(".")
    column = batch.column(name)
    for field in fields:
        place = column.type.get_field_index(field) if pa.types.is_struct(column.type) else -1
        if place < 0:
            raise KeyError(path)
        column = column.flatten()[place]
    return column


def plain_schema(schema: "pa.Schema") -> "pa.Schema":
    """Return the columns that may be kept, as they are stored: text and lists of text as strings,
    no dictionary."""
    import pyarrow as pa

    fields: list[pa.Field] = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        if holds_captions(kind):
            kind = pa.list_(pa.string()) if is_list(kind) else pa.string()
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if name not in OUR_COLUMNS and (holds_captions(kind) or str(kind) in PLAIN_TYPES):
            fields.append(pa.field(name, kind))
    return pa.schema(fields)


def caption_tuples(column: "pa.Array") -> Iterator[tuple[str, ...] | None]:
    """Yield the captions of each row, without nulls; None where one is not UTF-8."""
    for value in undecoded(column):
        texts = value if is_list(column.type) else [value]
        try:
            yield tuple(text.decode() for text in texts or () if text is not None)
        except UnicodeDecodeError:
            yield None
