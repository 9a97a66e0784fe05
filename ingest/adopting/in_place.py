"""One tar, indexed where it lies: one pass over it writes our index, table and commit."""

from dataclasses import dataclass

from ingest.adopting.sources import Source
from ingest.lists.filters import RowFilter
from ingest.shards import Commit
from ingest.store.shard_runner import Unit


@dataclass(frozen=True, kw_only=True)
class InPlaceJob:
    """What every shard of an adoption in place has in common; min_image_side: px."""

    root: str
    source: Source
    row_filter: RowFilter
    min_image_side: int
    config_hash: str

    def __call__(self, unit: Unit) -> Commit:
        """Index the tar of a unit."""
        raise NotImplementedError
