"""A folder of images and their captions, local or on any storage.

Captions are of one kind: tables that name the files (metadata.jsonl, .csv or .parquet, captions.csv
or .tsv), COCO's captions*.json, a text file beside each image, or the names of the files. A file
name in a table or in COCO's JSON is relative to that file or to the folder, or is the only one of
its name anywhere below. Every other file of the folder is a row, with the reason why it is none.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from os.path import basename
from typing import TYPE_CHECKING, cast

from cluster.base.files import Json, digest_of
from ingest.adopting.config import AdoptConfig
from ingest.adopting.sources import (
    Part,
    RangeSource,
    SourceSample,
    as_text,
    kept_columns,
    open_place,
)
from ingest.adopting.tables import TEXT_COLUMNS
from ingest.adopting.tars import MAX_MEMBER_BYTES
from ingest.fetching.decode import DecodeError
from ingest.fetching.formats import FOUND_EXTENSIONS
from ingest.lists.columns import FURTHER_CAPTIONS, Column, common_type, find_name, plain_type
from ingest.lists.url_list import OUR_COLUMNS, URL_COLUMNS, open_rows

if TYPE_CHECKING:
    import pyarrow as pa
    from fsspec import AbstractFileSystem

SUFFIXES = tuple(f".{extension}" for extension in FOUND_EXTENSIONS)
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.csv", "captions.tsv")
COCO = re.compile(r"captions.*\.json")
KINDS = ("metadata", "coco", "txt", "name")
FILE_COLUMNS = ("file_name", "file_path", "filename", "image", "image_path", "path", "file", "img")
NUMBER = re.compile(r"([\s_.-]*(\(\d+\)|\d+))+$")  # at the end of a file's name
TABLE_ROWS = 10_000  # of a caption table, read at once


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of the folder, or one that only a caption names. text: the file of its caption."""

    name: str
    captions: tuple[str, ...] = ()
    text: str = ""
    fields: Json = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class FolderSource(RangeSource):
    """The files of a folder in the order of their paths, a shard's number at a time.

    root: an absolute path or a URL.
    """

    root: str

    def read(self, part: Part) -> Iterator[SourceSample]:
        """Read the files of a part; what vanished or may not be read meanwhile is counted."""
        folder = _Folder.open(self.root)
        for entry in cast(list[Entry], part.payload["entries"]):
            image, captions, problem = None, entry.captions, entry.problem
            try:
                if problem is None:
                    image = folder.read(entry.name)
                if entry.text:
                    captions = (folder.read(entry.text).decode("utf-8-sig"),)
            except FileNotFoundError:
                problem = "no_caption" if image else "no_image"
            except PermissionError:
                problem = "forbidden"
            except UnicodeDecodeError:
                problem = "bad_caption"
            except DecodeError as error:
                problem = error.reason
            yield SourceSample(
                key=as_text(entry.name),
                image=image,
                captions=captions,
                fields=entry.fields,
                problem=problem,
            )


def open_folder(config: AdoptConfig) -> FolderSource | None:
    """List a folder and find its captions; None if the source is no folder.

    Raises ValueError where there are no captions, or several kinds of them, naming the choices.
    """
    import pyarrow as pa

    folder = _Folder.open(config.source)
    if not folder.storage.isdir(folder.root):
        return None
    files = folder.files()
    images = [file.name for file in files if _is_image(file)]
    if not images:
        raise ValueError(
            f"--source {config.source}: found no images ({', '.join(SUFFIXES)}), tars or tables in "
            "the folder, expected some; name other files by a pattern"
        )
    kind, sources = _find_captions(config, folder, files, images)
    captioned, schema = _read_captions(config, folder, images, kind, sources)
    used = set(sources)
    others = {file.name: _without_caption(file, kind) for file in files if file.name not in used}
    entries = others | captioned
    listed = [entries[name] for name in sorted(entries)]

    kept = kept_columns(config, schema)
    if any(len(entry.captions) > 1 for entry in listed):
        kept = kept.append(pa.field(FURTHER_CAPTIONS, pa.list_(pa.string())))
    step = config.samples_per_shard
    listing = [[as_text(entry.name), entry.captions, entry.problem] for entry in listed]
    return FolderSource(
        digest=digest_of({"captions": kind, "entries": listing}),
        kept=kept,
        root=folder.url,
        ranges=tuple(
            Part(place=config.source, payload={"entries": listed[n : n + step]})
            for n in range(0, len(listed), step)
        ),
    )


# -- files -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Folder:
    storage: "AbstractFileSystem"
    root: str
    local: bool

    @classmethod
    def open(cls, path: str) -> "_Folder":
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        storage, root = url_to_fs(path)
        local = isinstance(storage, LocalFileSystem)
        return cls(storage=storage, root=os.path.realpath(root) if local else root, local=local)

    @property
    def url(self) -> str:
        """The folder as another process finds it."""
        return self.root if self.local else self.storage.unstrip_protocol(self.root)

    def files(self) -> list[Entry]:
        """Return every file, sorted; hidden folders and links to folders are one entry each."""
        if not self.local:
            names = (str(name) for name in self.storage.find(self.root))
            return [_entry(name[len(self.root) :].lstrip("/")) for name in sorted(names)]
        entries: list[Entry] = []

        def refused(error: OSError) -> None:
            name = os.path.relpath(error.filename, self.root)
            entries.append(Entry(name=f"{name}/", problem="forbidden"))

        for folder, folders, files in os.walk(self.root, onerror=refused):
            inside = os.path.relpath(folder, self.root)
            prefix = "" if inside == "." else f"{inside}/"
            entries += [_entry(f"{prefix}{name}") for name in files]
            for name in tuple(folders):
                link = os.path.islink(os.path.join(folder, name))
                if link or name.startswith("."):
                    problem = "link_refused" if link else "hidden_file"
                    entries.append(Entry(name=f"{prefix}{name}/", problem=problem))
                    folders.remove(name)
        return sorted(entries, key=lambda entry: entry.name)

    def read(self, name: str) -> bytes:
        """Return a file's bytes; DecodeError for a link that leads out of the folder, and for more
        bytes than an image has."""
        path = f"{self.root}/{name}"
        if self.local:
            if not os.path.realpath(path).startswith(f"{self.root}{os.sep}"):
                raise DecodeError("link_refused")
            if not os.path.isfile(path):  # nor is a pipe or a device one
                raise FileNotFoundError(path)
            if os.path.getsize(path) > MAX_MEMBER_BYTES:
                raise DecodeError("too_large")
        return cast(bytes, self.storage.cat_file(path))


def _entry(name: str) -> Entry:
    hidden = any(each.startswith(".") for each in name.split("/"))
    return Entry(name=name, problem="hidden_file" if hidden else None)


def _without_caption(file: Entry, kind: str) -> Entry:
    """Return a file that has no caption, with the reason why it is no sample."""
    if file.problem is not None:
        return file
    if _is_image(file):
        return replace(file, problem="no_caption")
    is_caption = kind == "txt" and file.name.lower().endswith(".txt")
    return replace(file, problem="no_image" if is_caption else "other_file")


def _is_image(file: Entry) -> bool:
    return file.problem is None and file.name.lower().endswith(SUFFIXES)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


# -- captions --------------------------------------------------------------------------------------


def _find_captions(
    config: AdoptConfig, folder: _Folder, files: list[Entry], images: list[str]
) -> tuple[str, list[str]]:
    """Return the kind of the captions, and the files that hold them."""
    names = [file.name for file in files if file.problem is None]
    stems = {_stem(name) for name in images}
    found = {
        "metadata": [name for name in names if basename(name) in TABLES],
        "coco": [name for name in names if COCO.fullmatch(basename(name))],
        "txt": [n for n in names if n.lower().endswith(".txt") and _stem(n) in stems],
    }
    wanted = config.captions
    if wanted == "name" or found.get(wanted):
        return wanted, found.get(wanted, [])
    if wanted and wanted not in KINDS:  # a path
        path = os.path.realpath(wanted) if os.path.exists(wanted) else wanted
        path = path.removeprefix(f"{folder.root}/")
        return ("coco" if path.lower().endswith(".json") else "metadata"), [path]
    if wanted:
        raise ValueError(f"--captions {wanted}: found none of this kind in {config.source}")
    kinds = [kind for kind, sources in found.items() if sources]
    if len(kinds) == 1:
        print(f"captions: {kinds[0]}, of {', '.join(found[kinds[0]][:3])}", flush=True)
        return kinds[0], found[kinds[0]]
    if kinds:
        several = " and ".join(f"{kind} ({found[kind][0]})" for kind in kinds)
        choices = " or ".join(f"--captions {kind}" for kind in kinds)
        raise ValueError(
            f"--source {config.source}: found captions of several kinds, {several}, expected one; "
            f"choose by {choices}"
        )
    raise ValueError(
        f"--source {config.source}: found {len(images)} images and no captions, expected one of "
        f"{', '.join(TABLES)}, COCO's captions*.json or a .txt beside each image; choose the "
        "files' own names by --captions name, or a file by --captions PATH"
    )


def _read_captions(
    config: AdoptConfig, folder: _Folder, images: list[str], kind: str, sources: list[str]
) -> "tuple[dict[str, Entry], pa.Schema]":
    """Return the images that have captions, and the captions without an image, by name; and the
    columns that a table of captions has beside."""
    import pyarrow as pa

    schema = pa.schema([])
    if kind == "name":
        return {name: _named(name) for name in images}, schema
    if kind == "txt":
        texts = {_stem(name): name for name in sources}
        there = [name for name in images if _stem(name) in texts]
        return {name: Entry(name=name, text=texts[_stem(name)]) for name in there}, schema

    # Rows that name a file; several of one file are its captions
    entries: dict[str, Entry] = {}
    known, times = set(images), Counter(map(basename, images))
    by_base = {basename(name): name for name in images if times[basename(name)] == 1}
    for source in sources:
        inside = source if "://" not in source and not os.path.isabs(source) else ""
        path = f"{folder.url}/{source}" if inside else source
        try:
            schema, stream = _read_coco(path) if kind == "coco" else _read_table(config, path)
            rows = list(stream)
        except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"captions of {path}: {error!s}") from None
        for name, captions, fields in rows:
            near = os.path.normpath(os.path.join(os.path.dirname(inside), name))
            place = next((n for n in (near, name) if n in known), by_base.get(basename(name), name))
            earlier = entries.get(place, Entry(name=place, fields=fields))
            texts = (*earlier.captions, *(captions or ()))
            problem = None if texts else "bad_caption" if captions is None else "no_caption"
            problem = problem if place in known else "no_image"
            entries[place] = replace(earlier, captions=texts, problem=problem)
    return entries, schema


def _named(name: str) -> Entry:
    """Return a file with its own name as caption: that of "red_cube-07.png" is "red cube"."""
    words = re.split(r"[\s_-]+", NUMBER.sub("", _stem(basename(as_text(name)))))
    caption = " ".join(words).strip()
    return (
        Entry(name=name, captions=(caption,)) if caption else Entry(name=name, problem="no_caption")
    )


# A file's name, its captions (None: not UTF-8), and the other columns
Rows = Iterator[tuple[str, tuple[str, ...] | None, Json]]


def _read_table(config: AdoptConfig, path: str) -> "tuple[pa.Schema, Rows]":
    """Return the plain columns of a table, and its rows."""
    import pyarrow as pa

    wanted = TEXT_COLUMNS if config.caption_key is None else (config.caption_key,)
    table = open_rows(path, partial(open_place, path), {*FILE_COLUMNS, *wanted})
    places = {"file": FILE_COLUMNS, "captions": wanted, "url": URL_COLUMNS}
    found = {what: find_name(names, table.names) for what, names in places.items()}
    if found["file"] is None or found["captions"] is None:
        raise ValueError(
            f"found columns {', '.join(table.names)}, expected one of {', '.join(FILE_COLUMNS)}, "
            f"and one of {', '.join(wanted)}; name the captions' with --caption-key"
        )

    # The columns that every table has, then those that may be kept
    texts, text = pa.list_(pa.string()), pa.string()
    columns = [
        Column(name=f"_{what}", source=source, need="captions", type=texts)
        if what == "captions"
        else Column(name=f"_{what}", source=source, need="text", type=text)
        for what, source in found.items()
        if source is not None
    ]
    kept = [
        Column(name=field.name, source=field.name, need="kept", type=text)
        for field in table.all_columns
        if field.name not in OUR_COLUMNS and plain_type(field.type) is not None
    ]
    facts = table.survey([*columns, *kept])
    if facts.num_malformed:
        raise ValueError(
            f"found a malformed row, the {facts.first_malformed + 1}th, expected the header's cells"
        )
    kept = [replace(column, type=common_type([facts.types[column.name]])) for column in kept]

    def rows() -> Rows:
        for each in table.tables([*columns, *kept], TABLE_ROWS):
            for row in each.to_pylist():
                fields = {column.name: row[column.name] for column in kept}
                fields |= {"url": row["_url"]} if "_url" in row else {}
                captions = tuple(row["_captions"] or ())
                mended = any("\ufffd" in caption for caption in captions)
                yield str(row["_file"]), None if mended else captions, fields

    return pa.schema([(column.name, column.type) for column in kept]), rows()


def _read_coco(path: str) -> "tuple[pa.Schema, Rows]":
    """Return the captions of COCO's JSON (Chen et al. 2015), `annotations` of `images`."""
    import pyarrow as pa

    with open_place(path) as stream:
        content = json.load(stream)
    captions: dict[object, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return pa.schema([]), (
        (image["file_name"], tuple(captions.get(image["id"], ())), {"url": image.get("coco_url")})
        for image in content["images"]
    )
