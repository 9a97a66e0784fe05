"""Commit records: how a unit of work comes to exist, once.

    <root>/_attempts/<id>.json       the owner (host, pid), written before the folder beside it
    <root>/_attempts/<id>/           the files of one attempt at one shard
    <root>/_commits/<shard>.json     created complete, only if absent: from then on the shard exists

An attempt with all its files creates the commit record. That is the decision: the creator has won,
and its files are moved to <root>. If that move is interrupted, any reader or the next run finishes
it, because the record names the attempt that holds the files. <root> may be a URL.

Removing samples rewrites a shard: its commit record is replaced by that of the next generation,
which lists the rows that each earlier generation has lost.
"""

import json
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import NotRequired, TypedDict, TypeVar

import numpy as np

from cluster.base.files import Json, canonical_json, digest_file, digest_of, digest_stream
from ingest.store.storage import (
    Root,
    Storage,
    has_ended,
    join_root,
    process_birth,
    split_place,
    storage_of,
)

UNDIGESTED_SUFFIX = "_stats.json"  # timings differ from run to run: published, never digested
TOMBSTONES = "_tombstones"  # rows that readers skip: of earlier versions; no longer written
HELD = "_held.json"  # the process that rewrites shards
NAMES_AT_ONCE = 1024
NUM_READERS = 16  # of many small files: their time is waiting for the disk or the network

Result = TypeVar("Result")


class FileEntry(TypedDict):
    """What a commit records of a file; size in bytes.

    A file that an adoption left where it is has a url, its absolute path or URL, and a stamp, by
    which a change is noticed (see `Storage.stamp`). Nothing but --out's own files is ever written.
    """

    sha256: str
    size: int
    url: NotRequired[str]
    stamp: NotRequired[str]


class Superseded(TypedDict):
    """What a commit records of an earlier generation; removed: rows, in its own numbering."""

    num_samples: int
    removed: list[int]


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The content of a committed shard, whose `files` are recorded by name.

    generation: how often the shard was rewritten without some samples; superseded: what has become
    of each earlier generation, by its digest.
    """

    shard: str
    num_samples: int
    counts: dict[str, int]
    files: dict[str, FileEntry]
    config_hash: str
    attempt: str = ""
    undigested: list[str] = field(default_factory=list)
    generation: int = 0
    superseded: dict[str, Superseded] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Digest of the shard's content: equal for equal bytes, whoever made them, wherever."""
        files = {n: {"sha256": e["sha256"], "size": e["size"]} for n, e in self.files.items()}
        return digest_of({"n": self.num_samples, "files": files})

    @property
    def elsewhere(self) -> dict[str, FileEntry]:
        """The files that are outside of the data folder: they are read, and never changed."""
        return {name: entry for name, entry in self.files.items() if "url" in entry}

    @property
    def own_names(self) -> list[str]:
        """The names of the files in the data folder."""
        return [*(name for name in self.files if name not in self.elsewhere), *self.undigested]

    def locate(self, root: Root, name: str) -> tuple[Root, str]:
        """Return the folder that a file of the shard is in, and its name there."""
        url = self.files[name].get("url")
        return (root, name) if url is None else split_place(url)


# -- reading records -----------------------------------------------------------------------------


def read_commit(root: Root, shard: str) -> Commit | None:
    """Return the commit record of `shard`, None if it is not committed."""
    name = _record(shard)
    try:
        return Commit(**json.loads(storage_of(root).read(name)))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{name}: not a commit record ({error})") from None


def _record(shard: str) -> str:
    return f"_commits/{shard}.json"


def is_record(name: str) -> bool:
    """Return whether a file of a folder of records is one: not one that is being written."""
    return name.endswith(".json") and not name.startswith(".")


def committed_names(root: Root) -> list[str]:
    """Return the names of all committed shards, in order."""
    names = storage_of(root).names("_commits")
    return [name.removesuffix(".json") for name in names if is_record(name)]


def read_commits(root: Root) -> Iterator[Commit]:
    """Yield every commit record, in name order."""
    commits = _map_names(lambda name: read_commit(root, name), committed_names(root))
    yield from (commit for commit in commits if commit is not None)


def committed(root: Root) -> dict[str, Commit]:
    """Return every commit record by shard name, in name order: some 10 kB each."""
    return {commit.shard: commit for commit in read_commits(root)}


def _map_names(function: Callable[[str], Result], names: Sequence[str]) -> Iterator[Result]:
    """Yield function(name) for each name, in order; threads work on at most 1,024 names ahead."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for start in range(0, len(names), NAMES_AT_ONCE):
            yield from pool.map(function, names[start : start + NAMES_AT_ONCE])


# -- damage --------------------------------------------------------------------------------------


def damage(root: Root, commit: Commit, *, deep: bool = False) -> str | None:
    """Return how a shard's files differ from its commit, None if they do not.

    Sizes are always compared, contents when `deep`.
    """
    for name, expected in commit.files.items():
        folder, base = commit.locate(root, name)
        storage, what = storage_of(folder), expected.get("url", name)
        remedy = "; rerun ingest/adopt.py" if "url" in expected else ""
        size = storage.size(base)
        if size is None:
            return f"{what} is missing{remedy}"
        if size != expected["size"]:
            return f"{what} has {size} bytes, committed with {expected['size']}{remedy}"
        if "stamp" in expected and storage.stamp(base) != expected["stamp"]:
            return f"{what} was changed since it was adopted{remedy}"
        if deep:
            with storage.open(base) as file:
                if digest_stream(file) != expected["sha256"]:
                    return f"{what} differs from its committed sha256{remedy}"
    return None


def inspect(root: Root, shard: str, *, deep: bool = False) -> tuple[Commit, str | None]:
    """Return the commit of a shard and its damage, also while the shard is being rewritten."""
    while True:
        commit = published(root, shard)
        problem = damage(root, commit, deep=deep)
        if problem is None or read_commit(root, shard) == commit:
            return commit, problem


def inspect_all(root: Root, *, deep: bool = False) -> Iterator[tuple[Commit, str | None]]:
    """Yield what `inspect` returns for every committed shard, in name order."""
    return _map_names(lambda name: inspect(root, name, deep=deep), committed_names(root))


def withdraw(root: Root, commit: Commit) -> None:
    """Delete a damaged shard and its commit, so that the next run makes it again.

    Files that are elsewhere stay.
    """
    storage = storage_of(root)
    for name in [_record(commit.shard), *commit.own_names]:
        storage.delete(name)


def withdraw_damaged(
    root: Root, check: Callable[[Commit], str | None] = lambda _: None
) -> dict[str, str]:
    """Withdraw every shard that is damaged, or for which `check` returns a problem.

    Returns the problem of each, by name.
    """
    problems = {}
    for commit, damaged in inspect_all(root):
        problem = damaged or check(commit)
        if problem is not None:
            withdraw(root, commit)
            problems[commit.shard] = problem
    return problems


# -- publication ---------------------------------------------------------------------------------


def published(root: Root, shard: str) -> Commit:
    """Return the commit of `shard` after finishing its publication if that was interrupted."""
    commit = read_commit(root, shard)
    if commit is None:
        raise ValueError(f"{root}: shard {shard} is not committed; rerun its stage")
    _publish(storage_of(root), commit)
    return commit


def _publish(storage: Storage, commit: Commit) -> None:
    """Move a committed attempt's files into place; several processes may do so at once."""
    if not commit.attempt:
        return
    names = commit.own_names
    waiting = storage.names(f"_attempts/{commit.attempt}")
    if not waiting and all(storage.size(name) is not None for name in names):
        return
    for name in names:
        with suppress(FileNotFoundError):  # another process moved it first, or it was lost: damage
            storage.move(f"_attempts/{commit.attempt}/{name}", name)
    storage.settle()
    _discard(storage, commit.attempt)


def _discard(storage: Storage, attempt: str) -> None:
    storage.delete(f"_attempts/{attempt}")
    storage.delete(f"_attempts/{attempt}.json")


def recover(root: Root) -> None:
    """Finish interrupted publications and remove the attempts whose process has ended.

    Attempts of other hosts that did not commit stay: this host cannot know whether they are alive.
    """
    storage = storage_of(root)
    storage.sweep()
    for name in filter(is_record, storage.names("_attempts")):
        try:
            owner = json.loads(storage.read(f"_attempts/{name}"))
        except FileNotFoundError:  # its owner finished meanwhile
            continue
        attempt, commit = name.removesuffix(".json"), read_commit(root, owner["shard"])
        if commit is not None and commit.attempt == attempt:
            _publish(storage, commit)
            _discard(storage, attempt)
        elif owner["host"] == socket.gethostname() and has_ended(owner["pid"], owner["birth"]):
            _discard(storage, attempt)


def _this_process() -> Json:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "birth": process_birth(pid)}


class Attempt:
    """One try at one shard: write files under `.path`, a local folder, then `.commit(...)`.

    Leaving the `with` block without a commit, or after losing the race, discards the files.
    """

    def __init__(self, root: Root, shard: str) -> None:
        self.root, self.shard, self.id = root, shard, uuid.uuid4().hex
        self._storage, self._folder = storage_of(root), f"_attempts/{self.id}"
        self._keep = False

    def __enter__(self) -> "Attempt":
        # The record comes first, so that no folder is ever without an owner.
        owner = canonical_json({"shard": self.shard, **_this_process()})
        self._storage.replace(f"{self._folder}.json", owner)
        self.path = self._storage.workplace(self._folder)
        return self

    def commit(
        self,
        *,
        num_samples: int,
        counts: dict[str, int],
        config_hash: str,
        elsewhere: Mapping[str, FileEntry] | None = None,
    ) -> Commit:
        """Commit every file under `.path`; return the winner's record, which may be another's.

        elsewhere: the shard's files that stay where they are.
        """
        commit = self._described(num_samples, counts, config_hash)
        commit.files.update(elsewhere or {})
        self._storage.upload(self.path, self._folder)
        if not self._storage.create(_record(self.shard), canonical_json(asdict(commit))):
            return published(self.root, self.shard)
        self._keep = True  # from here on only a publication may move these files
        _publish(self._storage, commit)
        return commit

    def supersede(
        self, old: Commit, removed: Sequence[int], *, counts: dict[str, int], config_hash: str
    ) -> Commit:
        """Commit every file under `.path` as the generation after `old`, without `removed` rows.

        The caller holds the folder (`exclusive`): nobody else may supersede meanwhile.
        """
        # What is recorded of the generations before: the rows removed since, in their numbering
        superseded: dict[str, Superseded] = {}
        for digest, entry in old.superseded.items():
            kept = np.delete(np.arange(entry["num_samples"]), entry["removed"])
            rows = sorted([*entry["removed"], *kept[np.array(removed, int)].tolist()])
            superseded[digest] = {"num_samples": entry["num_samples"], "removed": rows}
        superseded[old.digest] = {"num_samples": old.num_samples, "removed": sorted(removed)}
        described = self._described(old.num_samples - len(removed), counts, config_hash)
        described.files.update(old.elsewhere)
        commit = replace(
            described,
            undigested=old.undigested,
            generation=old.generation + 1,
            superseded=superseded,
        )
        self._storage.upload(self.path, self._folder)
        self._storage.replace(_record(self.shard), canonical_json(asdict(commit)))
        self._keep = True
        _publish(self._storage, commit)
        return commit

    def _described(self, num_samples: int, counts: dict[str, int], config_hash: str) -> Commit:
        paths = sorted(self.path.iterdir())
        digested = [path for path in paths if not path.name.endswith(UNDIGESTED_SUFFIX)]
        return Commit(
            shard=self.shard,
            num_samples=num_samples,
            counts=dict(counts),
            files={p.name: {"sha256": digest_file(p), "size": p.stat().st_size} for p in digested},
            config_hash=config_hash,
            attempt=self.id,
            undigested=[path.name for path in paths if path not in digested],
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._storage.leave(self.path)
        if not self._keep:
            _discard(self._storage, self.id)


# -- generations ---------------------------------------------------------------------------------


def current_rows(root: Root, commit: Commit, digest: str | None) -> np.ndarray | None:
    """Return, for each row of the generation `digest`, the row to read now; int64 [n].

    A shard keeps its row numbers for whoever pinned it, so that the order under a running job does
    not change: a removed sample is replaced by the next one that remains. None: no row differs.
    digest None: the commit's own. Raises ValueError if all samples are removed.
    """
    hidden: list[int] = []  # of the commit's rows: by a --forget of an earlier version, unfinished
    with suppress(FileNotFoundError):
        tombstone = json.loads(storage_of(root).read(f"{TOMBSTONES}/{commit.shard}.json"))
        hidden = tombstone["removed"] if tombstone["digest"] == commit.digest else []
    if digest in (None, commit.digest) and not hidden:
        return None
    now = Superseded(num_samples=commit.num_samples, removed=[])
    entry = commit.superseded.get(digest or "", now)
    rows = np.arange(entry["num_samples"])
    kept = np.delete(rows, entry["removed"])  # row i of the commit is row kept[i] of `digest`
    remaining = np.delete(np.arange(len(kept)), hidden)
    if len(rows) and not len(remaining):
        raise ValueError(
            f"{root}: shard {commit.shard}: all its samples were forgotten; use a newer snapshot"
        )
    return remaining[np.searchsorted(kept[remaining], rows) % max(1, len(remaining))]


@contextmanager
def exclusive(root: Root, purpose: str) -> Iterator[None]:
    """Hold a folder against others that rewrite its shards; ValueError if another holds it."""
    storage, owner = storage_of(root), {**_this_process(), "purpose": purpose}
    if not storage.create(HELD, canonical_json(owner)):
        holder = json.loads(storage.read(HELD))
        if holder["host"] != owner["host"] or not has_ended(holder["pid"], holder["birth"]):
            raise ValueError(
                f"{root}: held for {holder['purpose']} by process {holder['pid']} of "
                f"{holder['host']}; wait for it, or delete {join_root(root, HELD)} if it is gone"
            )
        storage.replace(HELD, canonical_json(owner))  # its holder was killed
    try:
        yield
    finally:
        storage.delete(HELD)
