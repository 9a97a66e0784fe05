"""A folder of generated images: 000000.png ... and samples.jsonl, written last, a line an image."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ingest.shards import ImageShard, load_snapshot

SAMPLES_NAME = "samples.jsonl"
SETTINGS_NAME = "settings.json"


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images in a fixed order, with a caption for each where there is one.

    settings: how eval/sample.py drew them, with which weights; empty for images of another origin.
    """

    source: str
    captions: list[str]
    paths: tuple[Path, ...] = ()
    shards: tuple[ImageShard, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths) or sum(len(shard) for shard in self.shards)

    def __iter__(self) -> Iterator[Image.Image]:
        for path in self.paths:
            with Image.open(path) as image:
                yield image.convert("RGB")
        for shard in self.shards:
            for row in range(len(shard)):
                with Image.open(io.BytesIO(shard.image_bytes(row))) as image:
                    yield image.convert("RGB")


def open_images(folder: str) -> ImageSet:
    """Open generated samples, committed shards (the latest snapshot) or a plain folder of images.

    Raises ValueError for an unfinished folder of samples, and where there are no images.
    """
    root = Path(folder)
    if (root / "_manifest.json").is_file():
        snapshot = load_snapshot(root)
        shards = tuple(
            ImageShard(root, entry.name, digest=entry.digest) for entry in snapshot.shards
        )
        captions = [shard.caption(row) for shard in shards for row in range(len(shard))]
        return ImageSet(
            source=f"{root.name}@{snapshot.digest[:12]}", captions=captions, shards=shards
        )
    if (root / SAMPLES_NAME).is_file():
        lines = [json.loads(line) for line in (root / SAMPLES_NAME).read_text().splitlines()]
        paths = tuple(root / line["file"] for line in lines)
        captions = [line["caption"] for line in lines]
        settings = json.loads((root / SETTINGS_NAME).read_text())
        return ImageSet(source=str(root), captions=captions, paths=paths, settings=settings)
    if (root / SETTINGS_NAME).is_file():
        raise ValueError(f"{root}: found unfinished samples; rerun eval/sample.py to finish them")
    paths = tuple(
        sorted(p for p in root.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    )
    if not paths:
        raise ValueError(f"{root}: found no images, expected shards, samples or image files")
    return ImageSet(source=str(root), captions=[], paths=paths)
