"""Sets of images in a fixed order: generated samples, committed shards, or a plain folder.

A folder of samples holds 000000.png ... and samples.jsonl, written last, a line an image. A plain
folder is read with its sub-folders.
"""

import bisect
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from PIL import Image

from cluster.base.files import Json, digest_file, digest_of
from eval.features.decoding import fitted, picture_size, read_picture
from ingest.fetching.formats import FOUND_EXTENSIONS
from ingest.shards import ImageShard, load_snapshot
from ingest.store.snapshots import Snapshot, adopt_command

SAMPLES_NAME = "samples.jsonl"
SETTINGS_NAME = "settings.json"
EDITS_NAME = "edits.jsonl"  # of a folder of edits
GRID_NAME = "grid.png"  # beside either
SUFFIXES = tuple(f".{extension}" for extension in FOUND_EXTENSIONS)


class IncompleteError(OSError):
    """Fewer images than expected: exit code 1, since a rerun may complete them."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images in a fixed order, with a caption for each where there is one.

    settings: options and weights that eval/sample.py drew them with; empty for other images.
    side: px to which each is cropped and resized; 0 = as they are. parent, numbers: the larger set
    that these are images of, and their numbers there.
    """

    source: str
    captions: list[str]
    paths: tuple[Path, ...] = ()
    shards: tuple[ImageShard, ...] = ()
    settings: Json = field(default_factory=dict)
    snapshot: Snapshot | None = None
    side: int = 0
    parent: "ImageSet | None" = None
    numbers: tuple[int, ...] = ()

    def __reduce__(self) -> str | tuple[object, ...]:
        """Pickle shards by their folder and snapshot: another process maps the files itself."""
        if self.snapshot is None:
            return super().__reduce__()
        return _reopened, (self.snapshot.root, self.snapshot.digest, self.side)

    def __len__(self) -> int:
        return len(self.paths) or sum(len(shard) for shard in self.shards)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Image.Image:
        """Return image `number`, RGB; ValueError for one that `read_picture` refuses."""
        image = read_picture(self._file(number), self.name(number))
        return fitted(image, self.side) if self.side else image

    def name(self, number: int) -> str:
        """Return what an error calls image `number`: its path, or its shard and row."""
        if self.paths:
            return str(self.paths[number])
        shard, row = self._place(number)
        return f"{self.source}: shard {shard.name}, row {row}"

    def size(self, number: int) -> tuple[int, int]:
        """Return the width and height of image `number` in px, without decoding it."""
        if self.side:
            return self.side, self.side
        return picture_size(self._file(number), self.name(number))

    def _file(self, number: int) -> Path | bytes:
        if self.paths:
            return self.paths[number]
        shard, row = self._place(number)
        return shard.image_bytes(row)

    def _place(self, number: int) -> tuple[ImageShard, int]:
        place = bisect.bisect_right(self._starts, number) - 1
        return self.shards[place], number - self._starts[place]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(len(shard) for shard in self.shards)][:-1]

    @cached_property
    def digest(self) -> str:
        """The sha256 of what is there: the snapshot's, or that of all names and bytes."""
        if self.snapshot is not None:
            return self.snapshot.digest
        return digest_of([[path.name, digest_file(path)] for path in self.paths])

    @property
    def fit(self) -> str:
        """How images are resized, as a score states it."""
        return f"centre crop, bicubic to {self.side} px" if self.side else "as they are"

    def fitted(self, side: int) -> "ImageSet":
        """Return the same images, each cropped and resized to `side` px; 0 = as they are."""
        parent = self.parent and self.parent.fitted(side)
        return replace(self, side=side, parent=parent)

    def picked(self, numbers: list[int], source: str) -> "ImageSet":
        """Return images `numbers` of a set of files, in that order."""
        captions = [self.captions[number] for number in numbers] if self.captions else []
        return ImageSet(
            source=source,
            captions=captions,
            paths=tuple(self.paths[number] for number in numbers),
            side=self.side,
            parent=self,
            numbers=tuple(numbers),
        )


def open_images(folder: str) -> ImageSet:
    """Open generated samples, committed shards (the latest snapshot) or a plain folder of images.

    Raises ValueError for an unfinished folder of samples, and where there are no images;
    IncompleteError where listed samples are missing.
    """
    if "://" in folder:
        raise ValueError(f"{folder}: found a URL, expected a local or a shared folder of images")
    root = Path(folder).absolute()  # other processes open it too
    if not root.is_dir():
        raise ValueError(f"{root}: found no such folder, expected one of images")
    if (root / "_manifest.json").is_file():
        return _open_shards(root, load_snapshot(root))
    if (root / SAMPLES_NAME).is_file():
        lines = [json.loads(line) for line in (root / SAMPLES_NAME).read_text().splitlines()]
        paths = tuple(root / line["file"] for line in lines)
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise IncompleteError(
                f"{root}: found {len(paths) - len(missing)} of {len(paths)} samples, without "
                f"{missing[0]}; delete {SAMPLES_NAME} and draw the missing ones again"
            )
        captions = [line["caption"] for line in lines]
        settings = json.loads((root / SETTINGS_NAME).read_text())
        return ImageSet(source=folder, captions=captions, paths=paths, settings=settings)
    if (root / SETTINGS_NAME).is_file():
        raise ValueError(f"{root}: found unfinished samples; rerun eval/sample.py to finish them")
    paths = _pictures_below(root)
    if not paths:
        raise ValueError(
            f"{root}: found no images, expected shards, samples or image files; make shards of "
            f"tars or tables by: {adopt_command(root)}"
        )
    return ImageSet(source=folder, captions=[], paths=paths)


def _pictures_below(root: Path) -> tuple[Path, ...]:
    """Return the pictures of a folder and of those in it, by path, and print what is no plain
    folder of pictures: hidden files such as macOS writes, grids of our own, other files."""
    paths, others, seen = [], 0, set()
    for place, folders, names in os.walk(root, followlinks=True):
        if os.path.realpath(place) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        is_ours = EDITS_NAME in names or SAMPLES_NAME in names
        for name in names:
            is_grid = is_ours and name == GRID_NAME
            if name.lower().endswith(SUFFIXES) and not name.startswith(".") and not is_grid:
                paths.append(Path(place, name))
            else:
                others += 1
    folders = {path.parent for path in paths}
    if paths and (others or folders - {root}):
        print(
            f"{root}: {len(paths)} images in {len(folders)} folders; left out {others} files that "
            "are hidden, grids or no pictures",
            flush=True,
        )
    return tuple(sorted(paths))


def _reopened(root: str, digest: str, side: int) -> ImageSet:
    return _open_shards(Path(root), load_snapshot(root, digest)).fitted(side)


def _open_shards(root: Path, snapshot: Snapshot) -> ImageSet:
    shards = tuple(ImageShard(root, entry.name, digest=entry.digest) for entry in snapshot.shards)
    captions = [shard.caption(row) for shard in shards for row in range(len(shard))]
    if not captions:
        raise ValueError(f"{root}: found shards without an image, expected at least one")
    return ImageSet(
        source=f"{root.name}@{snapshot.digest[:12]}",
        captions=captions,
        shards=shards,
        snapshot=snapshot,
    )
