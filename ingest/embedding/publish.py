"""Publication of a snapshot of embeddings, without the samples that rules leave out.

    <embeds>/_rules.json              what the last publication was asked to leave out
    <embeds>/_excluded.parquet        shard, row, reason and value of what it left out, for people

The snapshot itself contains the rows: whoever pins it always reads the same samples.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from cluster.base.files import canonical_json
from ingest.embedding.near_duplicates import near_duplicates
from ingest.embedding.statistics import EmbedStatistics
from ingest.shards import EmbedShard, read_commits
from ingest.store.snapshots import Snapshot, publish_snapshot
from ingest.store.storage import Root, storage_of, write_table

RULES = "_rules.json"
REASONS = ("", "undecodable", "low_similarity", "near_duplicate")  # by code; 0 stays
STAYS, UNDECODABLE, LOW_SIMILARITY, NEAR_DUPLICATE = range(4)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """min_similarity: least cosine of caption and image, by the encoder itself.

    dedup: least cosine to an earlier image that stays at which a sample is left out. None: no rule.
    """

    min_similarity: float | None = None
    dedup: float | None = None


def publish_embeds(root: Root, rules: Rules | None = None) -> tuple[Snapshot, Counter[str]]:
    """Publish what is committed, without what the rules leave out, and take its statistics.

    rules: None for those of the last publication. Samples without an embedding are always left
    out. Returns the snapshot, and the number of samples left out by reason.
    """
    import pyarrow as pa

    storage = storage_of(root)
    if rules is None:
        try:
            rules = Rules(**json.loads(storage.read(RULES)))
        except FileNotFoundError:
            rules = Rules()

    # By shard: the cosine of each image and its caption, nan without an image, and the code of
    # the reason why each sample is left out
    names = [commit.shard for commit in read_commits(root)]
    cosines: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    for name in names:
        shard = EmbedShard(root, name)
        image = np.asarray(shard.image_embed, np.float32)
        cosine = (image * np.asarray(shard.text_embed, np.float32)).sum(1)
        cosine = np.where(np.square(image).sum(1) > 0.5, cosine, np.nan)
        code = np.where(np.isnan(cosine), UNDECODABLE, STAYS).astype(np.int8)
        if rules.min_similarity is not None:
            code[cosine < rules.min_similarity] = LOW_SIMILARITY
        cosines.append(cosine)
        codes.append(code)

    # Near-duplicates among the samples that are not left out already
    if rules.dedup is not None:
        kept = [np.flatnonzero(code == STAYS) for code in codes]

        def blocks() -> Iterator[np.ndarray]:
            for name, rows in zip(names, kept, strict=True):
                yield EmbedShard(root, name).image_embed[rows]

        repeats = near_duplicates(blocks, sum(map(len, kept)), rules.dedup)
        start = 0
        for code, rows in zip(codes, kept, strict=True):
            code[rows[repeats[start : start + len(rows)]]] = NEAR_DUPLICATE
            start += len(rows)

    # The rules, the table for people, the snapshot and its statistics
    storage.replace(RULES, canonical_json(asdict(rules)))
    excluded = {name: np.flatnonzero(code) for name, code in zip(names, codes, strict=True)}
    all_codes = np.concatenate([np.zeros(0, np.int8), *codes])
    all_cosines = np.concatenate([np.zeros(0), *cosines])
    reasons = [REASONS[code] for code in all_codes if code != STAYS]
    columns = {
        "shard": [name for name, rows in excluded.items() for _ in rows],
        "row": np.concatenate([np.zeros(0, np.int32), *excluded.values()]).astype(np.int32),
        "reason": reasons,
        "similarity": all_cosines[all_codes != STAYS].astype(np.float32),
    }
    write_table(root, "_excluded.parquet", pa.table(columns))
    snapshot = publish_snapshot(root, {name: rows.tolist() for name, rows in excluded.items()})
    if snapshot.num_samples:
        EmbedStatistics.compute(snapshot).write(root)
    return snapshot, Counter(reasons)
