"""Samples that are gone, under readers that pinned a shard while it still had them.

    <root>/_tombstones/<shard>.json   {"digest", "removed": [rows]}: no longer given by any reader
    <root>/_tombstones/_changed       replaced after tombstones were written: readers look again

A shard keeps its rows' numbers for whoever pinned it: in the place of a sample that is gone
stands the next one that is not. So the order under a running job does not change.
"""

import json
import os
import uuid
from collections.abc import Iterable

import numpy as np

from cluster.base.files import canonical_json
from ingest.store.commits import Commit, read_commit
from ingest.store.storage import storage_of

CHANGED = "_tombstones/_changed"


def bury(root: str | os.PathLike[str], commit: Commit, removed: Iterable[int]) -> None:
    """Write a tombstone over rows of a shard; `announce` makes open readers see it."""
    data = canonical_json({"digest": commit.digest, "removed": sorted(removed)})
    storage_of(root).replace(_tombstone(commit.shard), data)


def announce(root: str | os.PathLike[str]) -> None:
    """Tell readers that are open now to look at the tombstones again."""
    storage_of(root).replace(CHANGED, uuid.uuid4().hex.encode())


def lift(root: str | os.PathLike[str], shard: str) -> None:
    """Remove the tombstone of a shard that was made anew."""
    storage_of(root).delete(_tombstone(shard))


def lift_settled(root: str | os.PathLike[str]) -> None:
    """Remove the tombstones that a killed run left over shards it had made anew."""
    storage = storage_of(root)
    for name in storage.names("_tombstones"):
        shard = name.removesuffix(".json")
        commit = read_commit(root, shard) if name != shard and not name.startswith(".") else None
        if commit is not None and not _buried(root, commit):
            storage.delete(f"_tombstones/{name}")


def last_change(root: str | os.PathLike[str]) -> bytes | None:
    """Return what differs from one announcement to the next, None before the first."""
    try:
        return storage_of(root).read(CHANGED)
    except FileNotFoundError:
        return None


def _tombstone(shard: str) -> str:
    return f"_tombstones/{shard}.json"


def _buried(root: str | os.PathLike[str], commit: Commit) -> list[int]:
    try:
        found = json.loads(storage_of(root).read(_tombstone(commit.shard)))
    except FileNotFoundError:
        return []
    return found["removed"] if found["digest"] == commit.digest else []  # else: lifted too late


def rows_of(root: str | os.PathLike[str], commit: Commit, digest: str | None) -> np.ndarray | None:
    """Return for each row of the generation `digest` the row to read now, int64 [n].

    None: each row is itself, and nothing is gone. digest None: the commit's own. Raises ValueError
    if all samples are gone.
    """
    buried = _buried(root, commit)
    if digest in (None, commit.digest):
        if not buried:
            return None
        num_rows, removed = commit.num_samples, []
    else:
        entry = commit.superseded[digest]
        num_rows, removed = entry["num_samples"], entry["removed"]
    kept = np.delete(np.arange(num_rows), removed)
    now = np.full(num_rows, -1)
    now[kept] = np.arange(len(kept))
    now[np.isin(now, buried)] = -1
    alive = np.flatnonzero(now >= 0)
    if num_rows and not len(alive):
        raise ValueError(
            f"{root}: shard {commit.shard}: all its samples were forgotten; use a newer snapshot"
        )
    return now[alive[np.searchsorted(alive, np.arange(num_rows)) % max(1, len(alive))]]
