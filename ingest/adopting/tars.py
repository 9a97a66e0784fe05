"""Tars by anyone: which ones a --source names, and the captions and fields of their samples."""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.base.files import Json, digest_of
from ingest.adopting.config import AdoptConfig
from ingest.adopting.sources import (
    MORE_CAPTIONS,
    TAR_ENDINGS,
    Part,
    SourceSample,
    kept_columns,
)
from ingest.adopting.tar_reader import (
    DECOMPRESSORS,
    MEMBER_NAME,
    META_NAME,
    Span,
    TarReader,
    TarSample,
    plain_tar,
)
from ingest.shards import row_schema
from ingest.store.storage import absolute_root, is_remote, split_place, storage_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

LISTING = "_listing.txt"  # of the data folder: the tars, in the order of their shards
CAPTION_EXTENSIONS = ("txt", "caption")
MAX_MEMBER_BYTES = 64 << 20


# -- which tars ------------------------------------------------------------------------------------


def is_tar_source(source: str) -> bool:
    """Return whether a --source names tars, by its ending."""
    return source.endswith((*TAR_ENDINGS, ".txt", ".json"))


def list_tars(source: str) -> list[str]:
    """Return the absolute path or URL of every tar that `source` names.

    source: a path or URL with wildcards or braces, a text file of such, or a wids index.
    """
    import braceexpand

    if source.startswith("pipe:") or "::" in source:
        raise ValueError(f"--source: found {source}, expected a path or URL: no command is run")
    if source.endswith((".txt", ".json")):
        folder, base = split_place(absolute_root(source))
        text = storage_of(folder).read(base).decode()
        if source.endswith(".txt"):
            entries = [line.strip() for line in text.splitlines()]
            entries = [line for line in entries if line and not line.startswith("#")]
        else:
            entries = _wids_entries(json.loads(text), source)
        # A relative entry is relative to the file that lists it
        entries = [e if "://" in e or os.path.isabs(e) else folder + e for e in entries]
        if any(entry.endswith((".txt", ".json")) for entry in entries):
            raise ValueError(f"--source {source}: found a list inside it, expected tars")
        return [place for entry in entries for place in list_tars(entry)]
    places: list[str] = []
    for text in braceexpand.braceexpand(source):
        place = absolute_root(text)
        if not re.search(r"[*?\[]", place):
            places.append(place)
        elif is_remote(place):
            places += _remote_glob(place)
        else:
            places += sorted(glob.glob(place, recursive=True))
    return places


def _wids_entries(index: object, source: str) -> list[str]:
    try:
        return [str(entry["url"]) for entry in index["shardlist"]]  # type: ignore[index]
    except (KeyError, TypeError):
        raise ValueError(
            f"--source {source}: found no shardlist of urls, expected a wids index"
        ) from None


def _remote_glob(pattern: str) -> list[str]:
    from fsspec.core import url_to_fs

    files, path = url_to_fs(pattern)
    return sorted(str(files.unstrip_protocol(found)) for found in files.glob(path))


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
        with suppress(OSError, ValueError):
            head = _read_head(place, config.caption_key)
            break
    if not head.has_caption:
        names = ", ".join(head.fields) or "none"
        wanted = config.caption_key or ".txt or .caption"
        print(f"warning: the first sample has no {wanted}; for --caption-key there are: {names}")
    own = row_schema().names
    available = pa.schema([(n, kind) for n, kind in head.fields.items() if n not in own])
    kept = kept_columns(config, available)
    if head.several_captions:
        kept = kept.append(pa.field(MORE_CAPTIONS, pa.list_(pa.string())))
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
        with plain_tar(part.place) as path:
            reader = TarReader(path)
            try:
                for span, sample in self.scan(reader, part):
                    image = reader.read(span) if span is not None else None
                    yield SourceSample(
                        key=sample.key, image=image, captions=sample.captions,
                        fields=sample.fields, problem=sample.problem,
                    )  # fmt: skip
            finally:
                reader.close()

    def scan(self, reader: TarReader, part: Part) -> Iterator[tuple[Span | None, SourceSample]]:
        """Yield where each sample's image is, and the sample without it."""
        wanted = {"url", *self.kept.names} - {MORE_CAPTIONS}
        wanted |= {self.caption_key} if self.caption_key else set()
        columns, rows = _rows_beside(part.place, wanted)
        for sample in reader.samples():
            values, json_span = rows.get(sample.key, {}), sample.members.get("json")
            if json_span is not None and columns != wanted:
                values = _parsed(reader.read(json_span)) | values
            span, problem = reader.image_span(sample), sample.problem
            captions = self._captions(reader, sample, values)
            if captions is None:
                problem = problem or "bad_caption"
            elif span is None:
                problem = problem or "no_image"
            elif span.size > MAX_MEMBER_BYTES:
                span, problem = None, problem or "too_large"
            yield (
                span,
                SourceSample(
                    key=_text(sample.key),
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
            several = MORE_CAPTIONS in self.kept.names or isinstance(value, str | None)
            if not isinstance(texts, list) or not several:
                return None
            right = all(isinstance(text, str) and _text(text) == text for text in texts)
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
            if column.name != MORE_CAPTIONS:
                value = values.get(column.name)
                if types.is_string(column.type) and value is not None:
                    value = _text(value if isinstance(value, str) else json.dumps(value))
                elif types.is_floating(column.type):
                    value = float(value) if isinstance(value, int | float) else None
                fields[column.name] = value
        url = values.get("url")
        fields["url"] = _text(url) if isinstance(url, str) else None
        return fields


def _text(text: str) -> str:
    """Return text that UTF-8 can hold: names of members and JSON may have other units in them."""
    return text.encode("utf-8", "replace").decode()


def _parsed(data: bytes) -> Json:
    with suppress(ValueError, RecursionError):
        values = json.loads(data)
        return values if isinstance(values, dict) else {}
    return {}


# -- fields ----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Head:
    """What the first sample of a source shows. fields: of its metadata, with their types."""

    compressed: bool = False
    has_caption: bool = True
    several_captions: bool = False
    fields: "dict[str, pa.DataType]" = field(default_factory=dict)


def _read_head(place: str, caption_key: str | None) -> _Head:
    """Read the first sample of a tar, by a stream: nothing else of it is fetched."""
    import pyarrow as pa

    folder, name = split_place(place)
    values: Json = {}
    texts = 0
    with storage_of(folder).open(name) as file:
        compressed = file.read(2) in DECOMPRESSORS
        file.seek(0)
        with suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r|*") as tar:
            key = None
            for member in tar:
                match = MEMBER_NAME.fullmatch(member.name)
                if not member.isreg() or META_NAME.match(member.name) or match is None:
                    continue
                if key not in (None, match[1]):
                    break
                key = match[1]
                texts += match[2].lower() in CAPTION_EXTENSIONS
                data = tar.extractfile(member) if match[2].lower() == "json" else None
                values = _parsed(data.read(MAX_MEMBER_BYTES)) if data is not None else values
    fields = {}
    for field_name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fields[field_name] = pa.float64() if number else pa.string()
    with _parquet_beside(place) as table:
        schema = table.schema_arrow if table is not None else []
        fields |= {column.name: _plain_type(column.type) for column in schema}
    value = _nested(values, caption_key or "")
    return _Head(
        compressed=compressed,
        has_caption=texts > 0 if caption_key is None else bool(value),
        several_captions=isinstance(value, list),
        fields=fields,
    )


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
        file = storage_of(folder).open(f"{name.partition('.')[0]}.parquet")
    except FileNotFoundError:
        yield None
        return
    with file:
        table = pq.ParquetFile(file)
        yield table if "key" in table.schema_arrow.names else None


def _rows_beside(place: str, wanted: set[str]) -> tuple[set[str], dict[str, Json]]:
    """Return which of the wanted columns the table beside a tar has, and its rows by key."""
    with _parquet_beside(place) as table:
        if table is None:
            return set(), {}
        columns = wanted & set(table.schema_arrow.names)
        rows = table.read(columns=["key", *sorted(columns)]).to_pylist()
    return columns, {str(row.pop("key")): row for row in rows}
