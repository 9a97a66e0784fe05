"""Commit records and manifests: how a unit of work comes to exist, once.

    <root>/_manifest.json            what the folder is; resuming with anything else is refused
    <root>/_attempts/<id>.json       who works (host, pid), written before the folder beside it
    <root>/_attempts/<id>/           the files of one attempt at one shard
    <root>/_commits/<shard>.json     created whole, only if absent: from then on the shard exists

An attempt that is whole creates its commit record. That is the decision: whoever creates it has
won, and its files are moved to <root>; if that move is interrupted, any reader or the next run
finishes it, because the record names the attempt that holds the files. <root> may be a URL.
"""

import hashlib
import json
import os
import socket
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ingest.storage import Storage, is_remote, join_root, storage_of

FORMAT_VERSION = 1
UNDIGESTED_SUFFIX = "_stats.json"  # timings differ from run to run: published, never digested
NUM_READERS = 16  # of many small files: the wait is the disk's, or the network's


def local_root(root: str | os.PathLike[str]) -> Path:
    """Return `root` as a local path; ValueError for a URL, which readers cannot map."""
    text = os.fspath(root)
    if is_remote(text):
        raise ValueError(
            f"{text}: reading from remote storage is not supported yet; copy it to a local folder"
        )
    return Path(text.removeprefix("file://"))


def canonical_json(value: Any) -> bytes:
    """Encode `value` so that equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest_of(value: Any) -> str:
    """Return the sha256 of a JSON-able value, hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_file(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file's bytes, hex."""
    with open(path, "rb") as file:
        return _digest_stream(file)


def _digest(storage: Storage, name: str) -> str:
    with storage.open(name) as file:
        return _digest_stream(file)


def _digest_stream(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


# -- manifest ----------------------------------------------------------------------------------


def write_manifest(root: str | os.PathLike[str], kind: str, fields: dict[str, Any]) -> None:
    """Create `<root>/_manifest.json`, or check that the one there says the same.

    kind: "images" or "embeds"; fields: JSON-able. Raises ValueError naming the first field that
    differs, or when the folder holds something that is not ours.
    """
    storage = storage_of(root)
    wanted = json.loads(json.dumps({"kind": kind, "version": FORMAT_VERSION, **fields}))
    present = storage.names()
    if "_manifest.json" not in present and any("_manifest.json" not in name for name in present):
        raise ValueError(f"{root}: not empty and without our manifest; give another folder")
    text = json.dumps(wanted, indent=1, sort_keys=True) + "\n"
    if "_manifest.json" in present or not storage.create("_manifest.json", text.encode()):
        _require_same(root, read_manifest(root), wanted)


def _require_same(
    root: str | os.PathLike[str], found: dict[str, Any], wanted: dict[str, Any]
) -> None:
    # The hash of all settings comes last: a setting's own name says more.
    for name in sorted({*found, *wanted}, key=lambda name: (name == "config_hash", name)):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{root}: was made with {name} = {found.get(name)!r}, this run has "
                f"{wanted.get(name)!r}; use the same, another folder, or --fresh to start over"
            )


def read_manifest(root: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest of `root`; ValueError with the remedy when there is none."""
    try:
        return json.loads(storage_of(root).read("_manifest.json"))
    except FileNotFoundError:
        raise ValueError(
            f"{root}: no _manifest.json, so not a data folder; make one with "
            "ingest/download.py (images) or ingest/embed.py (embeds)"
        ) from None
    except json.JSONDecodeError as error:
        where = join_root(root, "_manifest.json")
        raise ValueError(f"{where}: not JSON ({error}); restore it or use --fresh") from None


def remove_data_folder(root: str | os.PathLike[str], kind: str) -> None:
    """Empty `root` for --fresh: only a folder that bears our manifest of that kind."""
    storage = storage_of(root)
    names = storage.names()
    if not names:
        return
    found = read_manifest(root).get("kind")
    if found != kind:
        raise ValueError(f"{root}: --fresh refused: its manifest says {found!r}, not {kind!r}")
    # The manifest goes last, so that an interrupted deletion can be repeated.
    for name in sorted(names, key=lambda name: name == "_manifest.json"):
        storage.delete(name)


# -- attempts and commits ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What a committed shard holds. files: name -> {"sha256": hex, "size": bytes}."""

    shard: str
    num_samples: int
    counts: dict[str, int]
    files: dict[str, dict[str, Any]]
    config_hash: str
    attempt: str = ""
    undigested: list[str] = field(default_factory=list)

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
    """Return every commit record by shard name, in name order."""
    storage = storage_of(root)
    names = [name for name in storage.names("_commits") if _is_record(name)]
    with ThreadPoolExecutor(NUM_READERS) as pool:
        records = list(pool.map(lambda n: _read_commit(storage, n.removesuffix(".json")), names))
    return {record.shard: record for record in records if record is not None}


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


def withdraw(root: str | os.PathLike[str], commit: Commit) -> None:
    """Undo the commit of a damaged shard, so that the next run makes it anew."""
    storage = storage_of(root)
    storage.delete(_record(commit.shard))
    for name in [*commit.files, *commit.undigested]:
        storage.delete(name)


def _publish(storage: Storage, commit: Commit) -> None:
    """Move a committed attempt's files into place; finished or shared work is no error."""
    waiting = storage.names(f"_attempts/{commit.attempt}") if commit.attempt else []
    names = [*commit.files, *commit.undigested]
    if not waiting and (not commit.attempt or all(storage.size(n) is not None for n in names)):
        return
    for name in names:
        try:
            storage.move(f"_attempts/{commit.attempt}/{name}", name)
        except FileNotFoundError:  # another process moved it first
            if storage.size(name) is None:
                raise ValueError(
                    f"{name}: committed but missing; restore it, or delete "
                    f"{_record(commit.shard)} and rerun"
                ) from None
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
        names = sorted(p.name for p in self.path.iterdir())
        digested = {n: self.path / n for n in names if not n.endswith(UNDIGESTED_SUFFIX)}
        files = {
            n: {"sha256": digest_file(p), "size": p.stat().st_size} for n, p in digested.items()
        }
        ours = Commit(
            shard=self.shard,
            num_samples=num_samples,
            counts=dict(counts),
            files=files,
            config_hash=config_hash,
            attempt=self.id,
            undigested=[n for n in names if n not in digested],
        )
        self._storage.upload(self.path, self._folder)
        if not self._storage.create(_record(self.shard), canonical_json(asdict(ours))):
            return published(self.root, self.shard)
        self._keep = True  # from here on only a publication may move these files
        _publish(self._storage, ours)
        return ours

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._storage.leave(self.path)
        if not self._keep:
            _discard(self._storage, self.id)
