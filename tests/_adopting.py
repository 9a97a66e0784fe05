"""What the tests of ingest/adopt.py share: pictures, hard captions, and what is stored."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from cluster.base.files import Json
from ingest import adopt
from ingest.adopting.config import AdoptConfig
from ingest.shards import ImageShard, load_snapshot

CAPTIONS = [
    "a plain one",
    "two\nlines\r\n\tand a tab",
    "😀 émoji 日本",
    "a NUL \0 in it",
    "",
    " blanks ",
]
CAPTIONS.append("long " * 1_000_000)


def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (40, 32)) -> bytes:
    """Return an image of its own colours."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(file, kind)
    return file.getvalue()


def adopted(source: Path | str, out: Path, **options: Any) -> int:
    """Adopt in this process, without resizing; return the exit code."""
    settings = {"resize_mode": "no", "num_processes": 0, **options}
    return adopt.main(AdoptConfig(source=str(source), out=str(out), **settings))


def stored(out: Path) -> list[tuple[bytes, str]]:
    """Return image bytes and caption of every stored sample, as readers see them."""
    shards = [
        ImageShard(out, entry.name, digest=entry.digest) for entry in load_snapshot(out).shards
    ]
    return [(shard.image_bytes(i), shard.caption(i)) for shard in shards for i in range(len(shard))]


def rows(out: Path) -> list[Json]:
    """Return every row of the tables, in order."""
    return [
        row for path in sorted(out.glob("0*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
