"""What is done to a folder of shards after its download: verify it, forget, drop repetitions.

<images>/_quarantine/<shard>.<digest>/    the files of a damaged shard, for whoever wants to look
<images>/_derived/<digest>.json           a folder of embeddings that was made from these images
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.base.files import canonical_json, digest_of
from cluster.base.progress import progress
from ingest.embedding.publish import publish_embeds
from ingest.lists.duplicates import repeated
from ingest.shards import STORED
from ingest.store.commits import (
    Commit,
    committed_names,
    exclusive,
    inspect_all,
    published,
    read_commit,
    read_commits,
    recover,
    withdraw,
)
from ingest.store.forgotten import FORGOTTEN, Forgotten, read_forgotten, record
from ingest.store.generations import announce, bury, lift_settled
from ingest.store.manifests import read_manifest
from ingest.store.rewrite import follow_images, remove_rows
from ingest.store.snapshots import publish_snapshot
from ingest.store.storage import absolute_root, storage_of

UNIQUE = "_unique"  # the state of the folder in which no image was left repeated
Root = str | os.PathLike[str]


# -- verify --------------------------------------------------------------------------------------


def verify(root: Root) -> dict[str, str]:
    """Read every file of every commit again; put damaged shards into quarantine.

    Returns what was wrong with each, by name. A snapshot without them is published, and without
    what the last publication of embeddings left out.
    """
    recover(root)
    problems = {}
    with progress("verify", len(committed_names(root)), unit="shards") as advance:
        for commit, problem in inspect_all(root, deep=True):
            if problem is not None:
                problems[commit.shard] = problem
                _quarantine(root, commit)
            advance(note=f"{len(problems)} damaged")
    if problems and read_manifest(root).get("kind") == "embeds":
        publish_embeds(root)
    elif problems:
        publish_snapshot(root)
    return problems


def _quarantine(root: Root, commit: Commit) -> None:
    storage = storage_of(root)
    folder = f"_quarantine/{commit.shard}.{commit.digest[:12]}"
    for name in commit.files:
        if storage.size(name) is not None:
            storage.move(name, f"{folder}/{name}")
    withdraw(root, commit)


def strangers(root: Root) -> list[str]:
    """Return the files in the root that belong to no commit, sorted."""
    known = {name for c in read_commits(root) for name in [*c.files, *c.undigested]}
    return [n for n in storage_of(root).names() if n not in known and not n.startswith(("_", "."))]


# -- forget --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What a request came to: samples and rows of tables, shards made anew, and what was derived.

    unreached: folders of embeddings that were made from these images and are not there now.
    """

    num_samples: int
    num_rows: int
    num_shards: int
    unreached: tuple[str, ...] = ()


def forget(root: Root, request: Forgotten) -> Removed:
    """Remove all samples of a request, from these images and the embeddings made of them.

    It is written down first, so that no later fetch stores them; then tombstones go over all of
    them, which readers honour at once; then shards are made anew. A killed run is completed by
    the next, with any request.
    """
    if read_manifest(root).get("kind") != "images":
        raise ValueError(f"{root}: found embeddings, expected the folder of their images")
    with exclusive(root, "--forget"):
        recover(root)
        if request:
            record(root, request)
        found = dict(_matches(root, read_forgotten(root)))
        derived = list(_derived(root))
        _bury_all(root, found, [embeds for embeds in derived if _is_there(embeds)])
        num_samples = 0
        with progress("rewrite", len(found), unit="shards") as advance:
            for name, rows in found.items():
                old = published(root, name)
                made = remove_rows(root, old, {row: FORGOTTEN for row in rows})
                num_samples += old.num_samples - made.num_samples
                advance()
        for embeds in filter(_is_there, derived):
            follow(root, embeds)
        publish_snapshot(root)
        storage_of(root).delete("_quarantine")  # damaged files may hold what is to be forgotten
    return Removed(
        num_samples=num_samples,
        num_rows=sum(map(len, found.values())),
        num_shards=len(found),
        unreached=tuple(embeds for embeds in derived if not _is_there(embeds)),
    )


def _matches(root: Root, forgotten: Forgotten) -> Iterator[tuple[str, list[int]]]:
    """Yield the shards that hold what is to be forgotten, with the rows of their tables."""
    names = committed_names(root)
    with progress("search", len(names), unit="shards") as advance:
        for name in names:
            table = _columns(root, name, "url", "sha256")
            pairs = zip(table["url"], table["sha256"], strict=True)
            rows = [row for row, pair in enumerate(pairs) if forgotten.covers(*pair)]
            if rows:
                yield name, rows
            advance()


def _bury_all(root: Root, found: dict[str, list[int]], derived: list[str]) -> None:
    for folder in [root, *derived]:
        lift_settled(folder)
    for name, rows in found.items():
        places = enumerate(_stored_rows(root, name))
        removed = [place for place, row in places if row in set(rows)]
        images = published(root, name)
        bury(root, images, removed)
        for embeds in derived:
            theirs = read_commit(embeds, name)
            if theirs is not None and theirs.config_hash == images.digest:
                bury(embeds, theirs, removed)
    for folder in [root, *derived]:
        announce(folder)


def derive(images: Root, embeds: Root) -> None:
    """Note that a folder of embeddings is made from these images, for `forget` to find it."""
    entry = {"root": absolute_root(embeds)}
    try:
        storage_of(images).create(f"_derived/{digest_of(entry)}.json", canonical_json(entry))
    except PermissionError:
        print(f"warning: {images} cannot be written: its --forget will not find {embeds}")


def _derived(root: Root) -> Iterator[str]:
    storage = storage_of(root)
    for name in storage.names("_derived"):
        if name.endswith(".json") and not name.startswith("."):
            yield json.loads(storage.read(f"_derived/{name}"))["root"]


def _is_there(embeds: str) -> bool:
    return storage_of(embeds).size("_manifest.json") is not None


def follow(images: Root, embeds: Root) -> int:
    """Bring embeddings up to what their images lost; return the number of shards made anew.

    Embeddings of anything but an earlier generation are left to ingest/embed.py.
    """
    count = 0
    with exclusive(embeds, "--forget"):
        recover(embeds)
        for commit in read_commits(embeds):
            current = read_commit(images, commit.shard)
            if current is not None and follow_images(embeds, commit, current) is not None:
                count += 1
        if count:
            publish_embeds(embeds)
    return count


# -- repetitions ---------------------------------------------------------------------------------


def drop_repeated_images(root: Root) -> int:
    """Remove every stored image whose bytes, as fetched, a stored row before it has.

    Before: in the order of shards and rows, so the same samples go whatever came first. Returns
    the number of samples removed.
    """
    if _unique_state(root) == _unique_marker(root):
        return 0
    names, sizes = committed_names(root), [one.num_samples for one in read_commits(root)]
    again = repeated((_image_hashes(root, name) for name in names), sum(sizes))
    with exclusive(root, "--filters.unique images"):
        for name, places in zip(names, np.split(again, np.cumsum(sizes)), strict=False):
            if places.any():
                rows = np.array(_stored_rows(root, name))[places]
                reasons = {int(row): "duplicate_image" for row in rows}
                remove_rows(root, published(root, name), reasons)
        storage_of(root).replace(UNIQUE, _unique_state(root))
    return int(again.sum())


def _unique_state(root: Root) -> bytes:
    return digest_of([[one.shard, one.digest] for one in read_commits(root)]).encode()


def _unique_marker(root: Root) -> bytes | None:
    storage = storage_of(root)
    return storage.read(UNIQUE) if storage.size(UNIQUE) is not None else None


def _image_hashes(root: Root, name: str) -> np.ndarray:
    """Return 64 bits of each stored row's digest, uint64 [n]."""
    table = _columns(root, name, "status", "sha256")
    rows = zip(table["status"], table["sha256"], strict=True)
    heads = [int(sha[:16], 16) if sha else 0 for status, sha in rows if status == STORED]
    return np.array(heads, np.uint64)


# -- tables --------------------------------------------------------------------------------------


def _columns(root: Root, name: str, *columns: str) -> dict[str, list[Any]]:
    """Return columns of an image shard's table."""
    import pyarrow.parquet as pq

    with storage_of(root).open(f"{name}.parquet") as file:
        return pq.ParquetFile(file).read(columns=list(columns)).to_pydict()


def _stored_rows(root: Root, name: str) -> list[int]:
    """Return the row of the table of each sample of an image shard."""
    status = _columns(root, name, "status")["status"]
    return [row for row, word in enumerate(status) if word == STORED]
