"""A shard of ours made of a part of any source: its images resized as a download's, in a new tar.

With --resize-mode no, a JPEG, PNG or WebP keeps its bytes; its member of the tar is named by them.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from cluster.base.files import Json
from ingest.adopting.sources import (
    Source,
    left_out,
    row_key,
    table_row,
)
from ingest.fetching.decode import (
    DecodeError,
    ImageLimits,
    ResizedImage,
    Resizer,
    header_problem,
    verify_image,
)
from ingest.fetching.formats import image_extension
from ingest.lists.filters import RowFilter
from ingest.shards import (
    SIZE_COLUMNS,
    SOURCE_KEY,
    Attempt,
    Commit,
    Sample,
    outcome,
    write_image_shard,
)
from ingest.store.removal import FORGOTTEN, read_forgotten
from ingest.store.shard_runner import Unit

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLES_AT_ONCE = 32  # in memory, with their images as found


@dataclass(frozen=True, kw_only=True)
class CopyJob:
    """What every shard of copied images has in common."""

    root: str
    source: Source
    row_filter: RowFilter
    limits: ImageLimits
    resizer: Resizer
    config_hash: str

    def __call__(self, unit: Unit) -> Commit:
        """Copy the part of a unit; return the commit of whoever made its shard first.

        OSError or ValueError: the part cannot be read, or the shard not be written.
        """
        with Attempt(self.root, unit.name) as attempt:
            table: list[Json] = []
            samples = self._samples(unit, table)
            num_samples = write_image_shard(
                attempt.path, unit.name, samples, table, kept=self._columns
            )
            counts = Counter(outcome(row["status"], row["error"]) for row in table)
            return attempt.commit(
                num_samples=num_samples,
                counts=dict(sorted(counts.items())),
                config_hash=self.config_hash,
            )

    @property
    def _columns(self) -> "pa.Schema":
        import pyarrow as pa

        return pa.schema([(SOURCE_KEY, pa.string()), *self.source.kept])

    def _samples(self, unit: Unit, table: list[Json]) -> Iterator[Sample]:
        """Yield what is stored; append to `table` a row for every sample of the part."""
        forgotten = read_forgotten(self.root)
        stream = iter(self.source.read(unit.payload))
        while batch := list(islice(stream, SAMPLES_AT_ONCE)):
            reasons = left_out(batch, self.row_filter, self.source.kept, forgotten)
            for place, sample in enumerate(batch):
                image, sha256, reason = None, None, reasons.get(place)
                if sample.image is None:
                    reason = reason or "no_image"
                elif reason is None:
                    sha256 = hashlib.sha256(sample.image).hexdigest()
                    reason = FORGOTTEN if forgotten.covers(None, sha256) else None
                    image, reason = (None, reason) if reason else self._image(sample.image)
                key = row_key(unit.name, len(table))
                sizes = image and [getattr(image, name) for name in SIZE_COLUMNS]
                row = table_row(key, sample, reason, sha256=sha256, sizes=sizes)
                table.append(row)
                if image is not None:
                    json = {name: value for name, value in row.items() if name != "error"}
                    yield Sample(key=key, image_bytes=image.data, caption=row["caption"], json=json)

    def _image(self, data: bytes) -> tuple[ResizedImage | None, str | None]:
        """Return what is stored of an image, or the reason why nothing is."""
        try:
            if self.resizer.resize_mode == "no" and image_extension(data) is not None:
                sizes = dict(zip(SIZE_COLUMNS, 2 * verify_image(data, self.limits), strict=True))
                return ResizedImage(data=data, **sizes), None
            problem = header_problem(data, self.limits)
            return (None, problem) if problem else (self.resizer(data), None)
        except DecodeError as error:
            return None, error.reason
