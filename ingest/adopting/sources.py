"""What a source of samples is, whatever it is made of: parts that are read in order, each a shard.

source = open_source(config)
for part in source.parts():
    for sample in source.read(part): ...
"""

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Protocol

from cluster.base.files import Json
from cluster.base.outcomes import status_of
from ingest.adopting.config import AdoptConfig
from ingest.lists.columns import FURTHER_CAPTIONS
from ingest.lists.filters import RowFilter
from ingest.shards import SIZE_COLUMNS, SOURCE_KEY, STORED
from ingest.store.removal import FORGOTTEN, Forgotten
from ingest.store.storage import absolute_root, is_remote, split_place, storage_of

if TYPE_CHECKING:
    import pyarrow as pa

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
LIST_ENDINGS = (".txt", ".json")  # of a list of tars: their paths, or a wids index


@dataclass(frozen=True, kw_only=True)
class Part:
    """One shard's worth of a source.

    place: its file or folder, a path or URL; payload: which piece of it.
    """

    place: str
    payload: Json = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SourceSample:
    """One sample as its source has it.

    key: its name there; image: the file's bytes; captions: the first is the main one; fields: the
    row's other columns that are kept, and `url` where there is one; problem: the reason out of
    `cluster.base.outcomes` why it is no sample.
    """

    key: str
    image: bytes | None
    captions: tuple[str, ...] = ()
    fields: Mapping[str, object] = field(default_factory=dict)
    problem: str | None = None


class Source(Protocol):
    """Samples to adopt; picklable, since `read` runs in Ray tasks."""

    @property
    def digest(self) -> str:
        """Of the listing (names in order and reading options, not contents): the manifest compares
        it."""
        ...

    @property
    def kept(self) -> "pa.Schema":
        """The columns stored beside those of every table; `captions_more` is one of them where
        samples have further captions."""
        ...

    @property
    def copied(self) -> bool:
        """Whether samples are copied in any case: they cannot be read at random where they are."""
        ...

    def parts(self) -> Sequence[Part]:
        """Return all parts, in the order of their shards."""
        ...

    def read(self, part: Part) -> Iterator[SourceSample]:
        """Yield a part's samples in order, a few in memory at a time.

        OSError or ValueError: the part cannot be read; it is named, and the others are adopted.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class RangeSource:
    """What sources that are always copied have in common. ranges: their parts; see `Source`."""

    digest: str
    kept: "pa.Schema"
    ranges: tuple[Part, ...]
    copied: bool = True

    def __getstate__(self) -> Json:
        """Leave the parts out: each travels to a Ray task by itself."""
        return {**self.__dict__, "ranges": ()}

    def parts(self) -> Sequence[Part]:
        """Return all parts, in the order of their shards."""
        return self.ranges


def open_source(config: AdoptConfig) -> Source:
    """Return the source that `config.source` describes; ValueError for what is none."""
    from ingest.adopting.folders import open_folder
    from ingest.adopting.tables import ARROW, PARQUET, find_tables, open_tables
    from ingest.adopting.tars import open_tars, tars_in

    if config.source.endswith((*TAR_ENDINGS, *LIST_ENDINGS)):
        return open_tars(config)
    if tars := tars_in(config.source):
        print(f"{config.source}: {len(tars)} tars are adopted, and nothing else of it", flush=True)
        return open_tars(config)
    if files := find_tables(config.source):
        return open_tables(config, files)
    if (folder := open_folder(config)) is not None:
        return folder
    found = config.source if exists(config.source) else f"nothing at {config.source}"
    raise ValueError(
        f"--source: found {found}, expected tars (.tar, .tgz, .tar.gz, .tar.bz2, .tar.xz), "
        "a text file that lists them, a wids index (.json), images in tables "
        f"({', '.join((*PARQUET, *ARROW))}), or a folder of any of them or of pictures"
    )


# -- files -----------------------------------------------------------------------------------------


def expand(source: str) -> list[str]:
    """Return the absolute path or URL of every file that a path or URL with wildcards or braces
    names: braces in their order, what a wildcard finds by name."""
    import braceexpand
    from fsspec.core import url_to_fs

    places: list[str] = []
    for text in braceexpand.braceexpand(source):
        place = absolute_root(text)
        if not re.search(r"[*?\[]", place):
            places.append(place)
        elif is_remote(place):
            storage, pattern = url_to_fs(place)
            places += sorted(str(storage.unstrip_protocol(name)) for name in storage.glob(pattern))
        else:
            places += sorted(glob.glob(place, recursive=True))
    return places


def exists(source: str) -> bool:
    """Return whether there is a file or folder of this path or URL."""
    from fsspec.core import url_to_fs

    storage, root = url_to_fs(source)
    return storage.exists(root)


def open_place(place: str) -> IO[bytes]:
    """Open a file by its path or URL for reading; seekable."""
    folder, name = split_place(absolute_root(place))
    return storage_of(folder).open(name)


# -- columns and rows of a shard's table -----------------------------------------------------------


def kept_columns(config: AdoptConfig, available: "pa.Schema") -> "pa.Schema":
    """Return the columns that are stored: --keep-columns, then those that filters need.

    available: the columns that the source has. Raises ValueError for one that it has not.
    """
    import pyarrow as pa

    missing = [name for name in config.keep_columns if name not in available.names]
    if missing:
        raise ValueError(
            f"--keep-columns: found {missing[0]}, expected "
            + (f"one of {', '.join(available.names)}" if available.names else "none: there is none")
        )
    needed = RowFilter.open(config.filters, available).columns.values()
    names = dict.fromkeys([*config.keep_columns, *needed])
    return pa.schema([available.field(name) for name in names])


def as_text(text: str) -> str:
    """Return text that UTF-8 can hold: names of files and JSON may have other units in them."""
    return text.encode("utf-8", "replace").decode()


def row_key(shard: str, row: int) -> str:
    """Return the key of a row: how many rows a part has is known only when it was read."""
    return f"{shard}{row:06d}"


def left_out(
    samples: Sequence[SourceSample], row_filter: RowFilter, kept: "pa.Schema", forgotten: Forgotten
) -> dict[int, str]:
    """Return the reason of each sample that is left out before its image is looked at, by place."""
    import pyarrow as pa

    schema = pa.schema([("url", pa.string()), ("caption", pa.string()), *kept])
    rows = [{**sample.fields, "caption": "".join(sample.captions[:1])} for sample in samples]
    reasons = row_filter.problems(pa.Table.from_pylist(rows, schema=schema))
    for place, sample in enumerate(samples):
        url = sample.fields.get("url")
        if forgotten.covers(url if isinstance(url, str) else None):
            reasons[place] = FORGOTTEN
        elif sample.problem is not None:
            reasons[place] = sample.problem
    return reasons


def table_row(
    key: str,
    sample: SourceSample,
    reason: str | None,
    *,
    sha256: str | None = None,
    sizes: Sequence[int] | None = None,
) -> Json:
    """Return the row of the table of a sample.

    reason: why it is not stored; sha256: of the image's bytes as found; sizes: see SIZE_COLUMNS.
    """
    row: Json = {"key": key, "status": status_of(reason) if reason else STORED}
    row["error"] = reason
    if reason == FORGOTTEN:  # nothing of it is kept
        return row
    row |= sample.fields
    row |= {SOURCE_KEY: sample.key, "caption": "".join(sample.captions[:1]), "sha256": sha256}
    row[FURTHER_CAPTIONS] = list(sample.captions[1:])
    return row | dict(zip(SIZE_COLUMNS, sizes or (), strict=False))
