"""The options of ingest/adopt.py."""

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import UseAppendAction

from ingest.fetching.decode import MIN_IMAGE_SIDE, ResizeMode
from ingest.lists.filters import FilterConfig


@dataclass(frozen=True, kw_only=True)
class AdoptConfig:
    """Tars stay where they are; folders, Parquet files and compressed tars are copied."""

    source: str = ""
    """What to adopt: tars (a path, a glob, {00000..01242}, a text file of paths, or a wids JSON
    index), a folder of images, or Parquet or Arrow files; local or any fsspec URL."""
    out: str = "data/images"
    """Folder for the shards."""
    copy: bool = False
    """Make shards of resized images, as a download does, instead of an index of the tars."""
    caption_key: str | None = None
    """Where captions are: a dotted path in each .json such as meta.text, or a column; None: .txt or
    .caption, or a column caption, text or TEXT."""
    image_column: str | None = None
    """Column of the image bytes of a table; None: image, jpg, png, webp, img, bytes, ..."""
    captions: str = ""
    """Captions of a folder: metadata (metadata.jsonl, .csv or .parquet, captions.csv or .tsv), coco
    (captions*.json), txt (a text file beside each image), name (the file's own), or the path of a
    metadata or COCO file; empty: what it has."""
    keep_columns: Annotated[tuple[str, ...], UseAppendAction] = ()
    """Further field or column to store with every row; repeatable."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    min_image_side: int = MIN_IMAGE_SIDE
    """Leave out images whose shorter side is below this, px."""
    image_size: int = 256
    """Side of copied images, px."""
    resize_mode: ResizeMode = "keep_ratio"
    """Of copied images: keep_ratio, center_crop, keep_ratio_largest, border as in a download; no:
    the image's own bytes."""
    samples_per_shard: int = 1000
    """Rows per shard of what is no tar; each tar is one shard."""
    num_processes: int | None = None
    """Shards at once; None: one per CPU of the Ray cluster; 0: in this process, without Ray."""
    metrics_port: int | None = None
    """Serve Prometheus metrics on this port of 127.0.0.1; 0: any free; None: do not."""
    fresh: bool = False
    """Delete the shards in --out first; the source is never touched."""
