"""Samples that readers leave out of a snapshot of embeddings, and the publication of one.

    <embeds>/_rules.json              what the last publication was asked to leave out
    <embeds>/_excluded.parquet        shard, row, reason and value of what it left out, for people

The snapshot itself bears the rows: whoever pins it reads the same samples for ever.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from cluster.base.files import canonical_json
from ingest.embedding.near_duplicates import near_duplicates
from ingest.embedding.statistics import EmbedStatistics
from ingest.shards import EmbedShard, read_commits
from ingest.store.snapshots import Snapshot, publish_snapshot
from ingest.store.storage import storage_of

RULES = "_rules.json"
REASONS = ("", "undecodable", "low_similarity", "near_duplicate")  # by code; 0 stays
STAYS, UNDECODABLE, LOW_SIMILARITY, NEAR_DUPLICATE = range(4)
Root = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """min_similarity: least cosine of caption and image, by the encoder itself; dedup: greatest
    cosine to an image before it that stays. None: no such rule."""

    min_similarity: float | None = None
    dedup: float | None = None


def publish_embeds(root: Root, rules: Rules | None = None) -> tuple[Snapshot, Counter[str]]:
    """Publish what is committed, without what the rules leave out, and take its statistics.

    rules: None for those of the last publication. Samples without an embedding are always left
    out. Returns the snapshot, and the number of samples left out by reason.
    """
    rules = _last_rules(root) if rules is None else rules
    names = [commit.shard for commit in read_commits(root)]
    cosines = [_cosines(EmbedShard(root, name)) for name in names]
    reasons = [_judge(cosine, rules) for cosine in cosines]
    if rules.dedup is not None:
        _judge_duplicates(root, names, reasons, rules.dedup)
    excluded = {
        name: np.flatnonzero(reason).tolist() for name, reason in zip(names, reasons, strict=True)
    }
    storage = storage_of(root)
    storage.replace(RULES, canonical_json(asdict(rules)))
    _write_table(root, names, reasons, cosines)
    snapshot = publish_snapshot(root, excluded)
    if snapshot.num_samples:
        EmbedStatistics.compute(snapshot).write(root)
    left_out = Counter(REASONS[code] for reason in reasons for code in reason[reason != STAYS])
    return snapshot, left_out


def _last_rules(root: Root) -> Rules:
    try:
        return Rules(**json.loads(storage_of(root).read(RULES)))
    except FileNotFoundError:
        return Rules()


def _cosines(shard: EmbedShard) -> np.ndarray:
    """Return the cosine of each image and its caption, float32 [n]; nan without an image."""
    image = np.asarray(shard.image_embed, np.float32)
    cosines = (image * np.asarray(shard.text_embed, np.float32)).sum(1)
    return np.where(np.square(image).sum(1) > 0.5, cosines, np.nan)


def _judge(cosines: np.ndarray, rules: Rules) -> np.ndarray:
    """Return the code of the reason why each sample is left out, int8 [n]."""
    reasons = np.where(np.isnan(cosines), UNDECODABLE, STAYS).astype(np.int8)
    if rules.min_similarity is not None:
        reasons[cosines < rules.min_similarity] = LOW_SIMILARITY
    return reasons


def _judge_duplicates(
    root: Root, names: list[str], reasons: list[np.ndarray], threshold: float
) -> None:
    """Mark near-duplicates among the samples that are not left out already."""

    def blocks() -> Iterator[np.ndarray]:
        for name, reason in zip(names, reasons, strict=True):
            yield EmbedShard(root, name).image_embed[reason == STAYS]

    count = sum(int((reason == STAYS).sum()) for reason in reasons)
    again, start = near_duplicates(blocks, count, threshold), 0
    for reason in reasons:
        rows = np.flatnonzero(reason == STAYS)
        reason[rows[again[start : start + len(rows)]]] = NEAR_DUPLICATE
        start += len(rows)


def _write_table(
    root: Root, names: list[str], reasons: list[np.ndarray], values: list[np.ndarray]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [np.flatnonzero(reason) for reason in reasons]
    columns = {
        "shard": [name for name, found in zip(names, rows, strict=True) for _ in found],
        "row": np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int32),
        "reason": [
            REASONS[c] for one, found in zip(reasons, rows, strict=True) for c in one[found]
        ],
        "similarity": np.concatenate(
            [np.zeros(0), *(one[found] for one, found in zip(values, rows, strict=True))]
        ).astype(np.float32),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    storage_of(root).replace("_excluded.parquet", sink.getvalue().to_pybytes())
