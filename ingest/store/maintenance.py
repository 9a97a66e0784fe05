"""Work on a folder of shards after its download: verify, forget, drop repeated images.

<images>/_quarantine/<shard>.<digest>/    the files of a damaged shard, for inspection
<images>/_forgetting.json                 a removal is incomplete
<images>/_derived/<digest>.json           a folder of embeddings that was made from these images
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.base.files import canonical_json, digest_of
from cluster.base.progress import progress
from ingest.embedding.publish import publish_embeds
from ingest.lists.duplicates import repeated
from ingest.shards import STORED
from ingest.store.commits import (
    TOMBSTONES,
    committed,
    committed_names,
    exclusive,
    inspect_all,
    is_record,
    published,
    read_commit,
    read_commits,
    recover,
    withdraw,
)
from ingest.store.removal import (
    FORGOTTEN,
    Forgotten,
    read_forgotten,
    record_request,
    remove_embeddings,
    remove_rows,
)
from ingest.store.snapshots import (
    MANIFEST,
    WIDS_INDEX,
    latest_digest,
    load_snapshot,
    publish_snapshot,
    read_manifest,
)
from ingest.store.storage import Root, absolute_root, read_table, storage_of

FORGETTING = "_forgetting.json"  # exists while a removal is incomplete
UNIQUE = "_unique"  # the state of the folder after repeated images were dropped


# -- verify --------------------------------------------------------------------------------------


def verify(root: Root) -> dict[str, str]:
    """Read every file of every commit again; move damaged shards into quarantine.

    Returns the problem of each, by name. If there are any, a snapshot without them is published;
    what the last publication of embeddings left out stays out.
    """
    recover(root)
    storage, problems = storage_of(root), {}
    with progress("verify", len(committed_names(root)), unit="shards") as advance:
        for commit, problem in inspect_all(root, deep=True):
            if problem is not None:
                problems[commit.shard] = problem
                folder = f"_quarantine/{commit.shard}.{commit.digest[:12]}"
                own = (name for name in commit.files if name not in commit.elsewhere)
                for name in (name for name in own if storage.size(name) is not None):
                    storage.move(name, f"{folder}/{name}")
                withdraw(root, commit)
            advance(note=f"{len(problems)} damaged")
    if problems and read_manifest(root).get("kind") == "embeds":
        publish_embeds(root)
    elif problems:
        publish_snapshot(root)
    return problems


def record_failed(root: Root, problems: Mapping[str, str]) -> None:
    """Record the problem of each shard that a run could not make; delete records of earlier runs.

    <root>/_quarantine/<shard>.json   {"problem"}: the next run tries the shard again. Folders of
    damaged shards, which --verify puts there, stay.
    """
    storage = storage_of(root)
    for name in storage.names("_quarantine"):
        if name.endswith(".json") and name.removesuffix(".json") not in problems:
            storage.delete(f"_quarantine/{name}")
    for shard, problem in problems.items():
        storage.replace(f"_quarantine/{shard}.json", canonical_json({"problem": problem}))


def orphan_files(root: Root) -> list[str]:
    """Return the files in the root that belong to no commit, sorted."""
    known = {name for commit in read_commits(root) for name in commit.own_names} | {WIDS_INDEX}
    return [n for n in storage_of(root).names() if n not in known and not n.startswith(("_", "."))]


# -- forget --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What a request removed: samples, rows of tables, and the number of rewritten shards.

    num_unmatched: hosts, URLs and images of the request that no row has; unreached: folders of
    embeddings that were made from these images and are absent now; sources: tars of the user's own
    that still hold removed samples.
    """

    num_samples: int
    num_rows: int
    num_shards: int
    num_unmatched: int = 0
    unreached: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


def forget(root: Root, request: Forgotten) -> Removed:
    """Remove all samples of a request, from these images and the embeddings made of them.

    The request is recorded first, so that no later fetch stores them. Then shards are rewritten,
    and a snapshot is published: readers that are open notice it and open their shards again. The
    next run completes a killed one, whatever its request.
    """
    if read_manifest(root).get("kind") != "images":
        raise ValueError(f"{root}: found embeddings, expected the folder of their images")
    storage, num_samples, num_rows, num_shards = storage_of(root), 0, 0, 0
    sources: list[str] = []
    with exclusive(root, "--forget"):
        recover(root)
        storage.replace(FORGETTING, b"{}")
        if request:
            record_request(root, request)
        forgotten, names = read_forgotten(root), committed_names(root)
        unmatched = request.urls | request.images
        with progress("forget", len(names), unit="shards") as advance:
            for name in names:
                table = _columns(root, name, "url", "sha256")
                rows = map(forgotten.matches, table["url"], table["sha256"])
                found = {row: matches for row, matches in enumerate(rows) if matches}
                unmatched = unmatched.difference(*found.values())
                reasons = dict.fromkeys(found, FORGOTTEN)
                if reasons:
                    old = published(root, name)
                    num_samples += old.num_samples - remove_rows(root, old, reasons).num_samples
                    num_rows, num_shards = num_rows + len(reasons), num_shards + 1
                    sources += [entry.get("url", "") for entry in old.elsewhere.values()]
                advance()
        publish_snapshot(root)
        unreached = []
        for name in filter(is_record, storage.names("_derived")):
            embeds = json.loads(storage.read(f"_derived/{name}"))["root"]
            if storage_of(embeds).size(MANIFEST) is None:
                unreached.append(embeds)
                continue
            follow_images(root, embeds)
            for shard in stale_tombstones(embeds):
                storage_of(embeds).delete(f"{TOMBSTONES}/{shard}.json")
        storage.delete(TOMBSTONES)  # every shard that a request covers was rewritten
        storage.delete("_quarantine")  # damaged files may hold what is to be forgotten
        storage.delete(FORGETTING)
    return Removed(
        num_samples=num_samples,
        num_rows=num_rows,
        num_shards=num_shards,
        num_unmatched=len(unmatched),
        unreached=tuple(unreached),
        sources=tuple(sources),
    )


def is_forgetting(root: Root) -> bool:
    """Return whether a removal was begun and not completed: the next run completes it."""
    storage = storage_of(root)
    shards = {name.removesuffix(".json") for name in storage.names(TOMBSTONES) if is_record(name)}
    return storage.size(FORGETTING) is not None or bool(shards - stale_tombstones(root))


def stale_tombstones(root: Root) -> set[str]:
    """Return the shards whose tombstone, which an earlier version wrote, is of an older generation:
    they were rewritten. The embeddings of images that are damaged or absent now were not."""
    storage, stale = storage_of(root), set()
    for name in filter(is_record, storage.names(TOMBSTONES)):
        shard = name.removesuffix(".json")
        commit = read_commit(root, shard)
        tombstone = json.loads(storage.read(f"{TOMBSTONES}/{name}"))
        if commit is None or tombstone["digest"] != commit.digest:
            stale.add(shard)
    return stale


def record_derived(images: Root, embeds: Root) -> None:
    """Record that a folder of embeddings is made from these images; `forget` looks it up."""
    entry = {"root": absolute_root(embeds)}
    try:
        storage_of(images).create(f"_derived/{digest_of(entry)}.json", canonical_json(entry))
    except PermissionError:
        print(f"warning: {images} cannot be written: its --forget will not find {embeds}")


def follow_images(images: Root, embeds: Root) -> None:
    """Remove from embeddings the samples that their images have lost.

    Embeddings of anything but an earlier generation are left to ingest/embed.py.
    """
    count = 0
    with exclusive(embeds, "--forget"):
        recover(embeds)
        for commit in read_commits(embeds):
            current = read_commit(images, commit.shard)
            if current is not None and remove_embeddings(embeds, commit, current) is not None:
                count += 1
        if count or _is_outdated(embeds):
            publish_embeds(embeds)


def _is_outdated(root: Root) -> bool:
    """Return whether the latest snapshot has other generations than the commits: a removal was
    killed before it published one."""
    if latest_digest(root) is None:
        return False
    digests = {entry.name: entry.digest for entry in load_snapshot(root).shards}
    committed = {commit.shard: commit.digest for commit in read_commits(root)}
    return any(committed.get(name, digest) != digest for name, digest in digests.items())


# -- repeated images -----------------------------------------------------------------------------


def drop_repeated_images(root: Root) -> int:
    """Remove every stored image whose bytes, as fetched, an earlier stored row has.

    Earlier: in the order of shards and rows, so the result does not depend on what was fetched
    first. Returns the number of samples removed.
    """
    storage = storage_of(root)
    if storage.size(UNIQUE) is not None and storage.read(UNIQUE) == _state(root):
        return 0
    commits = committed(root)
    sizes = [commit.num_samples for commit in commits.values()]
    repeats = repeated((_image_hashes(root, name) for name in commits), sum(sizes))
    with exclusive(root, "--filters.unique images"):
        for name, places in zip(commits, np.split(repeats, np.cumsum(sizes)), strict=False):
            if places.any():
                status = _columns(root, name, "status")["status"]
                stored = np.flatnonzero([text == STORED for text in status])
                reasons = {int(row): "duplicate_image" for row in stored[places]}
                remove_rows(root, published(root, name), reasons)
        storage.replace(UNIQUE, _state(root))
    return int(repeats.sum())


def _state(root: Root) -> bytes:
    return digest_of([[commit.shard, commit.digest] for commit in read_commits(root)]).encode()


def _image_hashes(root: Root, name: str) -> np.ndarray:
    """Return 64 bits of each stored row's digest, uint64 [n]."""
    table = _columns(root, name, "status", "sha256")
    rows = zip(table["status"], table["sha256"], strict=True)
    heads = [int(sha[:16], 16) if sha else 0 for status, sha in rows if status == STORED]
    return np.array(heads, np.uint64)


def _columns(root: Root, name: str, *columns: str) -> dict[str, list[Any]]:
    """Return columns of an image shard's table."""
    return read_table(root, f"{name}.parquet", *columns).to_pydict()
