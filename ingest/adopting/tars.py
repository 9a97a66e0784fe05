"""Tars by anyone: which ones a --source names, and the captions and fields of their samples."""

import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cluster.base.files import Json, digest_of
from ingest.adopting.config import AdoptConfig
from ingest.adopting.sources import (
    LIST_ENDINGS,
    TAR_ENDINGS,
    Part,
    SourceSample,
    as_text,
    expand,
    kept_columns,
    open_place,
)
from ingest.adopting.tar_reader import (
    BLOCK,
    MEMBER_NAME,
    META_NAME,
    NoDecompressorError,
    Span,
    TarReader,
    TarSample,
    compression_of,
    decompressed,
    plain_tar,
)
from ingest.lists.columns import FURTHER_CAPTIONS, holds_captions, is_list
from ingest.shards import row_schema
from ingest.store.storage import absolute_root, is_remote, split_place, storage_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

LISTING = "_listing.txt"  # of the data folder: the tars, in the order of their shards
CAPTION_EXTENSIONS = ("txt", "caption")
MAX_MEMBER_BYTES = 64 << 20
DAMAGED = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError)
HEAD_SAMPLES = 16  # whose fields decide which columns there are


# -- which tars ------------------------------------------------------------------------------------


def list_tars(source: str) -> list[str]:
    """Return the absolute path or URL of every tar that `source` names.

    source: a path or URL with wildcards or braces, a text file of such, a wids index, or a folder.
    """
    if source.startswith("pipe:") or "::" in source:
        raise ValueError(f"--source: found {source}, expected a path or URL: no command is run")
    if source.endswith(LIST_ENDINGS):
        folder, base = split_place(absolute_root(source))
        text = storage_of(folder).read(base).decode()
        if source.endswith(".txt"):
            entries = [line.strip() for line in text.splitlines()]
            entries = [line for line in entries if line and not line.startswith("#")]
        else:
            entries = _wids_entries(json.loads(text), source)
        # A relative entry is relative to the file that lists it
        entries = [e if "://" in e or os.path.isabs(e) else folder + e for e in entries]
        if any(entry.endswith(LIST_ENDINGS) for entry in entries):
            raise ValueError(f"--source {source}: found a list inside it, expected tars")
        return [place for entry in entries for place in list_tars(entry)]
    return expand(source) if source.endswith(TAR_ENDINGS) else tars_in(source)


def tars_in(source: str) -> list[str]:
    """Return the tars in a folder and in the folders below, by name; none where it is no folder."""
    from fsspec.core import url_to_fs

    storage, root = url_to_fs(source)
    if not storage.isdir(root):
        return []
    names = (str(name) for name in storage.find(root, maxdepth=2) if name.endswith(TAR_ENDINGS))
    return sorted(absolute_root(storage.unstrip_protocol(name)) for name in names)


def _wids_entries(index: object, source: str) -> list[str]:
    try:
        return [str(entry["url"]) for entry in index["shardlist"]]  # type: ignore[index]
    except (KeyError, TypeError):
        raise ValueError(
            f"--source {source}: found no shardlist of urls, expected a wids index"
        ) from None


def open_tars(config: AdoptConfig) -> "TarSource":
    """Return the source of the tars that `config.source` names.

    Tars that earlier runs listed keep their place, also where they are gone: new ones come last.
    """
    import pyarrow as pa

    try:
        listed = list_tars(config.source)
    except (OSError, ImportError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--source {config.source}: {error}") from None
    before: list[str] = []
    if not config.fresh:
        with suppress(FileNotFoundError):
            before = storage_of(config.out).read(LISTING).decode().splitlines()
    places = list(dict.fromkeys([*before, *listed]))
    if not places:
        raise ValueError(f"--source: found no tar at {config.source}")
    _require_outside(config.out, places)

    # The first tar that can be read shows which fields there are
    head = _Head()
    for place in places[:8]:
        try:
            head = _read_head(place, config.caption_key)
            break
        except NoDecompressorError as error:
            raise ValueError(f"--source: {place} {error}") from None
        except (OSError, ValueError):  # its shard reports it
            continue
    if not head.has_caption:
        names = ", ".join(head.fields) or "none"
        wanted = config.caption_key or ".txt or .caption"
        print(f"warning: the first samples have no {wanted}; for --caption-key there are: {names}")
    own = row_schema().names
    available = pa.schema([(n, kind) for n, kind in head.fields.items() if n not in own])
    kept = kept_columns(config, available)
    if head.further_captions:
        kept = kept.append(pa.field(FURTHER_CAPTIONS, pa.list_(pa.string())))
    options = {"caption_key": config.caption_key, "keep_columns": config.keep_columns}
    return TarSource(
        places=tuple(places),
        copied=head.compressed,
        caption_key=config.caption_key,
        kept=kept,
        digest=digest_of(options),
    )


def _require_outside(out: str, places: Sequence[str]) -> None:
    """Refuse tars inside the data folder, where --fresh and a damaged shard delete files."""
    if is_remote(out):
        inside = [place for place in places if place.startswith(f"{out.rstrip('/')}/")]
    else:
        root = os.path.realpath(absolute_root(out)) + os.sep
        local = (place for place in places if not is_remote(place))
        inside = [place for place in local if os.path.realpath(place).startswith(root)]
    if inside:
        raise ValueError(
            f"--source: found {inside[0]} inside of --out {out}, expected another folder"
        )


# -- samples -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TarSource:
    """Tars, each of which becomes a shard. copied: the first one is compressed; see `Source`."""

    places: tuple[str, ...]
    copied: bool
    caption_key: str | None
    kept: "pa.Schema"
    digest: str

    def parts(self) -> list[Part]:
        """Return the tars, in order."""
        return [Part(place=place) for place in self.places]

    def read(self, part: Part) -> Iterator[SourceSample]:
        """Yield a tar's samples with their images."""
        with plain_tar(part.place) as path, closing(TarReader(path)) as reader:
            for span, sample in self.scan(reader, part):
                yield replace(sample, image=reader.read(span) if span is not None else None)

    def scan(self, reader: TarReader, part: Part) -> Iterator[tuple[Span | None, SourceSample]]:
        """Yield where each sample's image is, and the sample without it."""
        wanted = {"url", *self.kept.names} - {FURTHER_CAPTIONS}
        wanted |= {self.caption_key} if self.caption_key else set()
        beside = _RowsBeside.open(part.place, wanted)
        for sample in reader.samples():
            span, problem = reader.image_span(sample), sample.problem
            values, json_span = beside.row(sample.key), sample.members.get("json")
            if any(each.size > MAX_MEMBER_BYTES for each in (span, json_span) if each):
                span, problem = None, problem or "too_large"
            elif json_span is not None and beside.columns != wanted:
                values = _parsed(reader.read(json_span)) | values
            captions = self._captions(reader, sample, values)
            if captions is None:
                problem = problem or "bad_caption"
            elif span is None:
                problem = problem or "no_image"
            yield (
                span,
                SourceSample(
                    key=as_text(sample.key),
                    image=None,
                    captions=captions or (),
                    fields=self._fields(values),
                    problem=problem,
                ),
            )

    def _captions(
        self, reader: TarReader, sample: TarSample, values: Json
    ) -> tuple[str, ...] | None:
        """Return the captions of a sample; None: what should be captions is something else."""
        if self.caption_key is not None:
            value = values.get(self.caption_key) or _nested(values, self.caption_key)
            texts = [] if value is None else [value] if isinstance(value, str) else value
            several = FURTHER_CAPTIONS in self.kept.names or isinstance(value, str | None)
            if not isinstance(texts, list) or not several:
                return None
            right = all(isinstance(text, str) and as_text(text) == text for text in texts)
            return tuple(texts) if right else None
        span = next((sample.members[e] for e in CAPTION_EXTENSIONS if e in sample.members), None)
        if span is None:
            return ()
        try:
            return (reader.read(span).decode(),) if span.size <= MAX_MEMBER_BYTES else None
        except UnicodeDecodeError:
            return None

    def _fields(self, values: Json) -> Json:
        from pyarrow import types

        fields: Json = {}
        for column in self.kept:
            if column.name != FURTHER_CAPTIONS:
                value = values.get(column.name)
                if is_list(column.type) and holds_captions(column.type) and value is not None:
                    texts = value if isinstance(value, list) else [value]
                    value = [as_text(text) for text in texts if isinstance(text, str)]
                elif types.is_string(column.type) and value is not None:
                    value = as_text(value if isinstance(value, str) else json.dumps(value))
                elif types.is_floating(column.type):
                    value = float(value) if isinstance(value, int | float) else None
                fields[column.name] = value
        url = values.get("url")
        fields["url"] = as_text(url) if isinstance(url, str) else None
        return fields


def _parsed(data: bytes) -> Json:
    with suppress(ValueError, RecursionError):
        values = json.loads(data)
        return values if isinstance(values, dict) else {}
    return {}


# -- fields ----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Head:
    """What the first samples of a source show. fields: of their metadata, with their types."""

    compressed: bool = False
    has_caption: bool = True
    further_captions: bool = False
    fields: "dict[str, pa.DataType]" = field(default_factory=dict)


def _read_head(place: str, caption_key: str | None) -> _Head:
    """Read the first samples of a tar, by a stream: nothing else of it is fetched.

    The first value of a field that is not null or empty decides its type.
    """
    values: Json = {}
    texts = 0
    with open_place(place) as file:
        compression = compression_of(file.read(BLOCK))
        file.seek(0)
        stream, keys = decompressed(file, compression), set[str]()
        # A damaged one is reported by its shard
        with suppress(*DAMAGED), tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                match = MEMBER_NAME.fullmatch(member.name)
                if not member.isreg() or META_NAME.match(member.name) or match is None:
                    continue
                keys.add(match[1])
                if len(keys) > HEAD_SAMPLES:
                    break
                texts += match[2].lower() in CAPTION_EXTENSIONS
                data = tar.extractfile(member) if match[2].lower() == "json" else None
                found = _parsed(data.read(MAX_MEMBER_BYTES)) if data is not None else {}
                values |= {n: v for n, v in found.items() if values.get(n) in (None, [])}
    fields = {name: _type_of(value) for name, value in values.items()}
    with _parquet_beside(place) as table:
        schema = table.schema_arrow if table is not None else []
        fields |= {column.name: _plain_type(column.type) for column in schema}
    value = _nested(values, caption_key or "")
    return _Head(
        compressed=compression is not None,
        has_caption=texts > 0 if caption_key is None else bool(value),
        further_captions=isinstance(value, list),
        fields=fields,
    )


def _type_of(value: object) -> "pa.DataType":
    """Return the type of the column of a field of .json."""
    import pyarrow as pa

    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return pa.list_(pa.string())
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return pa.float64() if number else pa.string()


def _plain_type(kind: "pa.DataType") -> "pa.DataType":
    from pyarrow import types

    return kind.value_type if types.is_dictionary(kind) else kind


def _nested(values: object, path: str) -> object:
    """Return the value at a dotted path, such as meta.text, None where there is none."""
    for name in path.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


@contextmanager
def _parquet_beside(place: str) -> "Iterator[pq.ParquetFile | None]":
    """Yield the table of a tar as img2dataset writes it, 000000.parquet with a column key."""
    import pyarrow.parquet as pq

    folder, name = split_place(place)
    try:
        file = open_place(f"{folder}{name.partition('.')[0]}.parquet")
    except FileNotFoundError:
        yield None
        return
    with file:
        table = pq.ParquetFile(file)
        yield table if "key" in table.schema_arrow.names else None


@dataclass(frozen=True, kw_only=True)
class _RowsBeside:
    """The wanted columns that the table beside a tar has, as Arrow, and its rows by their keys."""

    columns: set[str] = field(default_factory=set)
    table: "pa.Table | None" = None
    numbers: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, place: str, wanted: set[str]) -> "_RowsBeside":
        with _parquet_beside(place) as file:
            if file is None:
                return cls()
            columns = wanted & set(file.schema_arrow.names)
            table = file.read(columns=["key", *sorted(columns)])
        keys = table["key"].to_pylist()
        numbers = {str(key): number for number, key in enumerate(keys)}
        return cls(columns=columns, table=table.select(sorted(columns)), numbers=numbers)

    def row(self, key: str) -> Json:
        """Return the values of a sample; none where the table has no row for it."""
        number = self.numbers.get(key)
        if self.table is None or number is None:
            return {}
        return {name: self.table[name][number].as_py() for name in self.columns}
