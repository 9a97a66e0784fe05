"""Read a URL list of the LAION family, a shard's rows at a time."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ingest.commits import digest_file, digest_of

if TYPE_CHECKING:
    import pyarrow as pa

URL_COLUMNS = ("url", "URL", "image_url", "img_url")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "CAPTION", "alt_text")
OUR_COLUMNS = ("key", "url", "caption", "status", "error", "error_message", "sha256")
OUR_COLUMNS += ("width", "height", "original_width", "original_height")


@dataclass(frozen=True, kw_only=True)
class UrlList:
    """A list of image URLs with captions. digest: of the files' bytes; kept: extra columns."""

    files: tuple[Path, ...]
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

        Columns: url and caption (strings), then the kept ones. Holds some two shards in memory.
        """
        import pyarrow as pa

        waiting: list[pa.Table] = []
        for batch in self._batches(samples_per_shard):
            waiting.append(batch)
            while sum(table.num_rows for table in waiting) >= samples_per_shard:
                rows = pa.concat_tables(waiting)
                yield rows.slice(0, samples_per_shard)
                waiting = [rows.slice(samples_per_shard)]
        rest = pa.concat_tables(waiting) if waiting else None
        if rest is not None and rest.num_rows:
            yield rest

    def _batches(self, size: int) -> Iterator["pa.Table"]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = [self.url_column, self.caption_column, *self.kept]
        fields = [("url", pa.string()), ("caption", pa.string())]
        schema = pa.schema([*map(lambda f: pa.field(*f), fields), *self.kept_schema])
        for path in self.files:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=size, columns=names):
                table = pa.table([batch.column(name) for name in names], names=schema.names)
                yield table.cast(schema)


def open_url_list(
    path: str | os.PathLike[str],
    *,
    url_column: str | None = None,
    caption_column: str | None = None,
    keep_columns: Sequence[str] = (),
) -> UrlList:
    """Open a Parquet file, or a folder of them, in name order.

    Columns that are None are found by the names the LAION family uses. Raises ValueError for a
    missing list or column, naming the columns found, and for a kept column we could not store.
    """
    import pyarrow.parquet as pq

    files = _files(Path(path))
    schemas = [_schema(file) for file in files]
    schema, names = schemas[0], schemas[0].names
    url = _choose(path, "url", url_column, URL_COLUMNS, names)
    caption = _choose(path, "caption", caption_column, CAPTION_COLUMNS, names)
    for name in keep_columns:
        _choose(path, "keep", name, (), names)
        if name in OUR_COLUMNS:
            raise ValueError(f"--keep-columns {name}: the shards use this name; rename the column")
        if str(schema.field(name).type) not in _PLAIN_TYPES:
            kind = schema.field(name).type
            raise ValueError(f"--keep-columns {name}: is {kind}, expected text, number or bool")
    for file, other in zip(files, schemas, strict=True):
        for name in {url, caption, *keep_columns} - set(other.names):
            raise ValueError(f"{file}: no column {name!r}, which {files[0].name} has")
    digests = [digest_file(file) for file in files]
    return UrlList(
        files=files,
        url_column=url,
        caption_column=caption,
        kept=tuple(keep_columns),
        num_rows=sum(pq.read_metadata(file).num_rows for file in files),
        digest=digests[0] if len(digests) == 1 else digest_of(digests),
        schema=schema,
    )


_PLAIN_TYPES = frozenset(
    {"string", "large_string", "bool", "float", "double"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)


def _files(path: Path) -> tuple[Path, ...]:
    files = tuple(sorted(path.glob("*.parquet"))) if path.is_dir() else (path,)
    if not files or not files[0].is_file():
        raise ValueError(f"--urls {path}: not found; expected a Parquet file or a folder of them")
    return files


def _schema(file: Path) -> "pa.Schema":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"--urls {file}: not a Parquet file ({error})") from None


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
