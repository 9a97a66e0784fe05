"""Commit records and manifests: how a unit of work comes to exist, once.

    <root>/_manifest.json            what the folder is; resuming with anything else is refused
    <root>/_attempts/<id>.json       who works (host, pid), written before the folder beside it
    <root>/_attempts/<id>/           the files of one attempt at one shard
    <root>/_commits/<shard>.json     created whole, only if absent: from then on the shard exists

An attempt that is whole links its commit record into place. The link is the decision: whoever
makes it has won, and its files are moved to <root>; if that move is interrupted, any reader or the
next run finishes it, because the record names the attempt that holds the files.
"""

import hashlib
import json
import os
import shutil
import socket
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

FORMAT_VERSION = 1
UNDIGESTED_SUFFIX = "_stats.json"  # timings differ from run to run: published, never digested


def local_root(root: str | os.PathLike[str]) -> Path:
    """Return `root` as a local path; ValueError for a remote URL, which this step cannot write."""
    text = os.fspath(root)
    if text.startswith("file://"):
        text = text[len("file://") :]
    if "://" in text:
        raise ValueError(f"{text}: remote storage is not supported yet; give a local folder")
    return Path(text)


def canonical_json(value: Any) -> bytes:
    """Encode `value` so that equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest_of(value: Any) -> str:
    """Return the sha256 of a JSON-able value, hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_file(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_temporary(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def replace_file(path: Path, data: bytes) -> None:
    """Write `path` so that a reader sees the old bytes or the new ones, never a part."""
    os.replace(_write_temporary(path, data), path)
    fsync_path(path.parent)


def create_file(path: Path, data: bytes) -> bool:
    """Create `path` whole, only if absent; False if it was there.

    A hard link has the exclusiveness of O_EXCL, and the name never appears with part of its bytes.
    """
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    fsync_path(path.parent)
    return True


# -- manifest ----------------------------------------------------------------------------------


def write_manifest(root: str | os.PathLike[str], kind: str, fields: dict[str, Any]) -> None:
    """Create `<root>/_manifest.json`, or check that the one there says the same.

    kind: "images" or "embeds"; fields: JSON-able. Raises ValueError naming the first field that
    differs, or when the folder holds something that is not ours.
    """
    folder = local_root(root)
    wanted = json.loads(json.dumps({"kind": kind, "version": FORMAT_VERSION, **fields}))
    path = folder / "_manifest.json"
    strangers = folder.exists() and any("_manifest.json" not in p.name for p in folder.iterdir())
    if strangers and not path.exists():
        raise ValueError(f"{folder}: not empty and without our manifest; give another folder")
    text = json.dumps(wanted, indent=1, sort_keys=True) + "\n"
    if path.exists() or not create_file(path, text.encode()):
        _require_same(folder, read_manifest(folder), wanted)


def _require_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    # The hash of all settings comes last: a setting's own name says more.
    for name in sorted({*found, *wanted}, key=lambda name: (name == "config_hash", name)):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{folder}: was made with {name} = {found.get(name)!r}, this run has "
                f"{wanted.get(name)!r}; use the same, another folder, or --fresh to start over"
            )


def read_manifest(root: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest of `root`; ValueError with the remedy when there is none."""
    path = local_root(root) / "_manifest.json"
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{path.parent}: no _manifest.json, so not a data folder; make one with "
            "ingest/download.py (images) or ingest/embed.py (embeds)"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); restore it or use --fresh") from None


def remove_data_folder(root: str | os.PathLike[str], kind: str) -> None:
    """Empty `root` for --fresh: only a folder that bears our manifest of that kind."""
    folder = local_root(root)
    if not folder.exists() or not any(folder.iterdir()):
        return
    found = read_manifest(folder).get("kind")
    if found != kind:
        raise ValueError(f"{folder}: --fresh refused: its manifest says {found!r}, not {kind!r}")
    # The manifest goes last, so that an interrupted deletion can be repeated.
    for path in sorted(folder.iterdir(), key=lambda p: p.name == "_manifest.json"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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
    path = local_root(root) / "_commits" / f"{shard}.json"
    try:
        return Commit(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path}: not a commit record ({error})") from None


def committed(root: str | os.PathLike[str]) -> dict[str, Commit]:
    """Return every commit record by shard name, in name order."""
    folder = local_root(root) / "_commits"
    if not folder.is_dir():
        return {}
    names = sorted(p.stem for p in folder.glob("*.json") if not p.name.startswith("."))
    with ThreadPoolExecutor(16) as pool:  # 200,000 small files: the wait is the disk's
        records = list(pool.map(lambda name: read_commit(root, name), names))
    return {record.shard: record for record in records if record is not None}


def published(root: str | os.PathLike[str], shard: str) -> Commit:
    """Return the commit of `shard` after finishing its publication if that was interrupted."""
    commit = read_commit(root, shard)
    if commit is None:
        raise ValueError(f"{local_root(root)}: shard {shard} is not committed; rerun its stage")
    _publish(local_root(root), commit)
    return commit


def damage(root: str | os.PathLike[str], commit: Commit, *, deep: bool = False) -> str | None:
    """Say what is wrong with a shard's files against its commit, None if nothing.

    Sizes are always compared, contents when `deep`.
    """
    for name, wanted in commit.files.items():
        path = local_root(root) / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != wanted["size"]:
            return f"{name} has {path.stat().st_size} bytes, committed with {wanted['size']}"
        if deep and digest_file(path) != wanted["sha256"]:
            return f"{name} differs from its committed sha256"
    return None


def withdraw(root: str | os.PathLike[str], commit: Commit) -> None:
    """Undo the commit of a damaged shard, so that the next run makes it anew."""
    folder = local_root(root)
    (folder / "_commits" / f"{commit.shard}.json").unlink(missing_ok=True)
    for name in [*commit.files, *commit.undigested]:
        (folder / name).unlink(missing_ok=True)


def _publish(folder: Path, commit: Commit) -> None:
    """Move a committed attempt's files into place; finished or shared work is no error."""
    attempt = folder / "_attempts" / commit.attempt
    names = [*commit.files, *commit.undigested]
    if not commit.attempt or (not attempt.exists() and all((folder / n).exists() for n in names)):
        return
    for name in names:
        try:
            os.replace(attempt / name, folder / name)
        except FileNotFoundError:  # another process moved it first
            if not (folder / name).exists():
                raise ValueError(
                    f"{folder / name}: committed but missing; restore it, or delete "
                    f"_commits/{commit.shard}.json and rerun"
                ) from None
    fsync_path(folder)
    _discard(folder, commit.attempt)


def _discard(folder: Path, attempt: str) -> None:
    shutil.rmtree(folder / "_attempts" / attempt, ignore_errors=True)
    (folder / "_attempts" / f"{attempt}.json").unlink(missing_ok=True)


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
    folder = local_root(root)
    for record in sorted((folder / "_attempts").glob("[!.]*.json")):
        try:
            owner = json.loads(record.read_bytes())
        except FileNotFoundError:  # its owner finished meanwhile
            continue
        commit = read_commit(folder, owner["shard"])
        if commit is not None and commit.attempt == record.stem:
            _publish(folder, commit)
            _discard(folder, record.stem)
        elif owner["host"] == socket.gethostname():
            birth = _process_birth(owner["pid"])
            if birth is None or birth != owner["birth"]:
                _discard(folder, record.stem)


class Attempt:
    """One try at one shard: write files under `.path`, then `.commit(...)`.

    Leaving the `with` block without a commit, or after losing the race, discards the files.
    """

    def __init__(self, root: str | os.PathLike[str], shard: str) -> None:
        self.root, self.shard, self.id = local_root(root), shard, uuid.uuid4().hex
        self.path = self.root / "_attempts" / self.id
        self._keep = False

    def __enter__(self) -> "Attempt":
        pid = os.getpid()
        owner = {"shard": self.shard, "host": socket.gethostname(), "pid": pid}
        # The record comes first, so that no folder is ever without an owner.
        replace_file(
            self.path.with_name(f"{self.id}.json"),
            canonical_json({**owner, "birth": _process_birth(pid)}),
        )
        self.path.mkdir()
        return self

    def commit(self, *, num_samples: int, counts: dict[str, int], config_hash: str) -> Commit:
        """Commit every file under `.path`; return the winner's record, which may not be ours."""
        names = sorted(p.name for p in self.path.iterdir())
        for name in names:
            fsync_path(self.path / name)
        fsync_path(self.path)
        digested = [n for n in names if not n.endswith(UNDIGESTED_SUFFIX)]
        paths = {n: self.path / n for n in digested}
        ours = Commit(
            shard=self.shard,
            num_samples=num_samples,
            counts=dict(counts),
            files={
                n: {"sha256": digest_file(p), "size": p.stat().st_size} for n, p in paths.items()
            },
            config_hash=config_hash,
            attempt=self.id,
            undigested=[n for n in names if n not in paths],
        )
        record = self.root / "_commits" / f"{self.shard}.json"
        if not create_file(record, canonical_json(asdict(ours))):
            return published(self.root, self.shard)
        self._keep = True  # from here on only a publication may move these files
        _publish(self.root, ours)
        return ours

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._keep:
            _discard(self.root, self.id)
