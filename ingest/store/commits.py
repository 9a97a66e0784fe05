"""Commit records: how a unit of work comes to exist, once.

    <root>/_attempts/<id>.json       who works (host, pid), written before the folder beside it
    <root>/_attempts/<id>/           the files of one attempt at one shard
    <root>/_commits/<shard>.json     created whole, only if absent: from then on the shard exists

An attempt that is whole creates its commit record. That is the decision: whoever creates it has
won, and its files are moved to <root>; if that move is interrupted, any reader or the next run
finishes it, because the record names the attempt that holds the files. <root> may be a URL.
"""

import json
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from cluster.base.files import canonical_json, digest_file, digest_of, digest_stream
from ingest.store.storage import Storage, join_root, storage_of

UNDIGESTED_SUFFIX = "_stats.json"  # timings differ from run to run: published, never digested
HELD = "_held.json"  # who makes shards anew
NAMES_AT_ONCE = 1024
NUM_READERS = 16  # of many small files: the wait is the disk's, or the network's

Result = TypeVar("Result")


def _digest(storage: Storage, name: str) -> str:
    with storage.open(name) as file:
        return digest_stream(file)


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What a committed shard holds. files: name -> {"sha256": hex, "size": bytes}.

    generation: how often it was made anew without some samples; superseded: for the digest of each
    earlier generation its num_samples, and the rows removed since, in its own numbering.
    """

    shard: str
    num_samples: int
    counts: dict[str, int]
    files: dict[str, dict[str, Any]]
    config_hash: str
    attempt: str = ""
    undigested: list[str] = field(default_factory=list)
    generation: int = 0
    superseded: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Digest of the shard's content: equal for equal bytes, whoever made them."""
        return digest_of({"n": self.num_samples, "files": self.files})


def read_commit(root: str | os.PathLike[str], shard: str) -> Commit | None:
    """Return the commit record of `shard`, None if it is not committed."""
    return _read_commit(storage_of(root), shard)


def _read_commit(storage: Storage, shard: str) -> Commit | None:
    name = _record(shard)
    try:
        return Commit(**json.loads(storage.read(name)))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{name}: not a commit record ({error})") from None


def _record(shard: str) -> str:
    return f"_commits/{shard}.json"


def committed(root: str | os.PathLike[str]) -> dict[str, Commit]:
    """Return every commit record by shard name, in name order: some 10 kB each."""
    return {commit.shard: commit for commit in read_commits(root)}


def read_commits(root: str | os.PathLike[str]) -> Iterator[Commit]:
    """Yield every commit record, in name order."""
    storage = storage_of(root)
    for commit in _side_by_side(lambda name: _read_commit(storage, name), committed_names(root)):
        if commit is not None:
            yield commit


def committed_names(root: str | os.PathLike[str]) -> list[str]:
    """Return the names of all committed shards, in order."""
    names = storage_of(root).names("_commits")
    return [name.removesuffix(".json") for name in names if _is_record(name)]


def _side_by_side(function: Callable[[str], Result], names: Sequence[str]) -> Iterator[Result]:
    """Yield function(name) for each name, in order; a bounded number is in memory."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for start in range(0, len(names), NAMES_AT_ONCE):
            yield from pool.map(function, names[start : start + NAMES_AT_ONCE])


def _is_record(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(".")


def published(root: str | os.PathLike[str], shard: str) -> Commit:
    """Return the commit of `shard` after finishing its publication if that was interrupted."""
    storage = storage_of(root)
    commit = _read_commit(storage, shard)
    if commit is None:
        raise ValueError(f"{root}: shard {shard} is not committed; rerun its stage")
    _publish(storage, commit)
    return commit


def damage(root: str | os.PathLike[str], commit: Commit, *, deep: bool = False) -> str | None:
    """Say what is wrong with a shard's files against its commit, None if nothing.

    Sizes are always compared, contents when `deep`.
    """
    storage = storage_of(root)
    for name, wanted in commit.files.items():
        size = storage.size(name)
        if size is None:
            return f"{name} is missing"
        if size != wanted["size"]:
            return f"{name} has {size} bytes, committed with {wanted['size']}"
        if deep and _digest(storage, name) != wanted["sha256"]:
            return f"{name} differs from its committed sha256"
    return None


def inspect(
    root: str | os.PathLike[str], shard: str, *, deep: bool = False
) -> tuple[Commit, str | None]:
    """Return the commit of a shard and its damage, also while the shard is being made anew."""
    while True:
        commit = published(root, shard)
        problem = damage(root, commit, deep=deep)
        if problem is None or read_commit(root, shard) == commit:
            return commit, problem


def inspect_all(
    root: str | os.PathLike[str], *, deep: bool = False
) -> Iterator[tuple[Commit, str | None]]:
    """Yield what `inspect` says of every committed shard, in name order."""
    return _side_by_side(lambda name: inspect(root, name, deep=deep), committed_names(root))


def withdraw(root: str | os.PathLike[str], commit: Commit) -> None:
    """Undo the commit of a damaged shard, so that the next run makes it anew."""
    storage = storage_of(root)
    storage.delete(_record(commit.shard))
    for name in [*commit.files, *commit.undigested]:
        storage.delete(name)


def withdraw_damaged(
    root: str | os.PathLike[str], judge: Callable[[Commit], str | None] = lambda _: None
) -> dict[str, str]:
    """Withdraw every shard that is damaged, or of which `judge` says what is wrong with it.

    Returns what was wrong with each, by name.
    """
    problems = {}
    for commit, damaged in inspect_all(root):
        problem = damaged or judge(commit)
        if problem is not None:
            withdraw(root, commit)
            problems[commit.shard] = problem
    return problems


def _publish(storage: Storage, commit: Commit) -> None:
    """Move a committed attempt's files into place; finished or shared work is no error."""
    waiting = storage.names(f"_attempts/{commit.attempt}") if commit.attempt else []
    names = [*commit.files, *commit.undigested]
    if not waiting and (not commit.attempt or all(storage.size(n) is not None for n in names)):
        return
    for name in names:
        with suppress(FileNotFoundError):  # another process moved it first, or it was lost: damage
            storage.move(f"_attempts/{commit.attempt}/{name}", name)
    storage.settle()
    _discard(storage, commit.attempt)


def _discard(storage: Storage, attempt: str) -> None:
    storage.delete(f"_attempts/{attempt}")
    storage.delete(f"_attempts/{attempt}.json")


def _process_birth(pid: int) -> str | None:
    """Return when process `pid` of this host began, in kernel ticks; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def recover(root: str | os.PathLike[str]) -> None:
    """Finish interrupted publications and remove the attempts whose process is gone.

    Attempts of other hosts that did not commit are left: nobody here can tell whether they live.
    """
    storage = storage_of(root)
    storage.sweep()
    for name in storage.names("_attempts"):
        if not _is_record(name):
            continue
        try:
            owner = json.loads(storage.read(f"_attempts/{name}"))
        except FileNotFoundError:  # its owner finished meanwhile
            continue
        attempt, commit = name.removesuffix(".json"), _read_commit(storage, owner["shard"])
        if commit is not None and commit.attempt == attempt:
            _publish(storage, commit)
            _discard(storage, attempt)
        elif owner["host"] == socket.gethostname():
            birth = _process_birth(owner["pid"])
            if birth is None or birth != owner["birth"]:
                _discard(storage, attempt)


class Attempt:
    """One try at one shard: write files under `.path`, a local folder, then `.commit(...)`.

    Leaving the `with` block without a commit, or after losing the race, discards the files.
    """

    def __init__(self, root: str | os.PathLike[str], shard: str) -> None:
        self.root, self.shard, self.id = root, shard, uuid.uuid4().hex
        self._storage, self._folder = storage_of(root), f"_attempts/{self.id}"
        self._keep = False

    def __enter__(self) -> "Attempt":
        pid = os.getpid()
        owner = {"shard": self.shard, "host": socket.gethostname(), "pid": pid}
        # The record comes first, so that no folder is ever without an owner.
        birth = {"birth": _process_birth(pid)}
        self._storage.replace(f"{self._folder}.json", canonical_json({**owner, **birth}))
        self.path = self._storage.workplace(self._folder)
        return self

    def commit(self, *, num_samples: int, counts: dict[str, int], config_hash: str) -> Commit:
        """Commit every file under `.path`; return the winner's record, which may not be ours."""
        ours = self._described(num_samples, counts, config_hash)
        self._storage.upload(self.path, self._folder)
        if not self._storage.create(_record(self.shard), canonical_json(asdict(ours))):
            return published(self.root, self.shard)
        self._keep = True  # from here on only a publication may move these files
        _publish(self._storage, ours)
        return ours

    def supersede(
        self, old: Commit, removed: Sequence[int], *, counts: dict[str, int], config_hash: str
    ) -> Commit:
        """Commit every file under `.path` in the place of `old`, whose rows `removed` are gone.

        The caller holds the folder (`exclusive`): nobody else may supersede meanwhile.
        """
        num_samples = old.num_samples - len(removed)
        ours = replace(
            self._described(num_samples, counts, config_hash),
            undigested=old.undigested,
            generation=old.generation + 1,
            superseded=_superseded(old, removed),
        )
        self._storage.upload(self.path, self._folder)
        self._storage.replace(_record(self.shard), canonical_json(asdict(ours)))
        self._keep = True
        _publish(self._storage, ours)
        return ours

    def _described(self, num_samples: int, counts: dict[str, int], config_hash: str) -> Commit:
        names = sorted(p.name for p in self.path.iterdir())
        digested = {n: self.path / n for n in names if not n.endswith(UNDIGESTED_SUFFIX)}
        return Commit(
            shard=self.shard,
            num_samples=num_samples,
            counts=dict(counts),
            files={
                n: {"sha256": digest_file(p), "size": p.stat().st_size} for n, p in digested.items()
            },
            config_hash=config_hash,
            attempt=self.id,
            undigested=[n for n in names if n not in digested],
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


def _superseded(old: Commit, removed: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return what a commit that follows `old` says of all generations before it."""
    gone, found = set(removed), {}
    for digest, entry in old.superseded.items():
        before = set(entry["removed"])
        kept = [row for row in range(entry["num_samples"]) if row not in before]
        rows = before | {row for place, row in enumerate(kept) if place in gone}
        found[digest] = {"num_samples": entry["num_samples"], "removed": sorted(rows)}
    return {**found, old.digest: {"num_samples": old.num_samples, "removed": sorted(gone)}}


@contextmanager
def exclusive(root: str | os.PathLike[str], purpose: str) -> Iterator[None]:
    """Hold a folder against others that would make its shards anew; ValueError if one does."""
    storage, pid, host = storage_of(root), os.getpid(), socket.gethostname()
    owner = {"host": host, "pid": pid, "birth": _process_birth(pid), "purpose": purpose}
    if not storage.create(HELD, canonical_json(owner)):
        found = json.loads(storage.read(HELD))
        if found["host"] != host or _process_birth(found["pid"]) == found["birth"]:
            raise ValueError(
                f"{root}: held for {found['purpose']} by process {found['pid']} of "
                f"{found['host']}; wait for it, or delete {join_root(root, HELD)} if it is gone"
            )
        storage.replace(HELD, canonical_json(owner))  # its holder was killed
    try:
        yield
    finally:
        storage.delete(HELD)
