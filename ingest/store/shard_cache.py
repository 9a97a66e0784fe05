"""Local copies of the files of remote shards: readers map files, and an object store has none.

    $MINIDALLE2_CACHE        their folder, ~/.cache/minidalle2 where it is not set
    $MINIDALLE2_CACHE_GIB    how much it may hold, 20 where it is not set

A copy is named by its sha256, which is checked as it comes in. Processes of a machine share the
folder; when it is full, what was used longest ago goes.
"""

import hashlib
import os
import socket
import time
import uuid
from pathlib import Path

from ingest.store.commits import Commit
from ingest.store.storage import LOCAL_PREFIX, LocalStorage, is_remote, join_root, storage_of

IN_USE_SECONDS = 60.0  # what was asked for so lately may not be mapped yet, and stays
BLOCK_BYTES = 1 << 22


def local_file(root: str | os.PathLike[str], commit: Commit, name: str) -> Path:
    """Return a local path of a committed file: its own, or that of a copy.

    Raises ValueError where a remote file does not match its commit, or is larger than the cache.
    """
    if not is_remote(root):
        return Path(os.fspath(root).removeprefix(LOCAL_PREFIX)) / name
    return LocalCopies.from_environment().path(root, name, **commit.files[name])


class LocalCopies:
    """A folder of copies that takes no more than `limit_bytes`."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes

    @classmethod
    def from_environment(cls) -> "LocalCopies":
        """Return what the variables of this module's docstring describe."""
        folder = os.environ.get("MINIDALLE2_CACHE") or "~/.cache/minidalle2"
        size = os.environ.get("MINIDALLE2_CACHE_GIB") or "20"
        try:
            limit = int(float(size) * 2**30)
        except (ValueError, OverflowError):
            raise ValueError(
                f"MINIDALLE2_CACHE_GIB: found {size!r}, expected a number of GiB"
            ) from None
        return cls(Path(folder).expanduser(), limit)

    def path(self, root: str | os.PathLike[str], name: str, *, sha256: str, size: int) -> Path:
        """Return the path of a copy of a file whose digest and bytes are known."""
        path = self._folder / sha256
        try:
            os.utime(path)
        except FileNotFoundError:
            self._make_room(f"{join_root(root, name)}", size)
            self._copy(root, name, sha256, path)
        return path

    def _copy(self, root: str | os.PathLike[str], name: str, sha256: str, path: Path) -> None:
        owner = f"{os.getpid()}@{socket.gethostname()}"
        part = path.with_name(f".{sha256}.{owner}.{uuid.uuid4().hex}")
        digest = hashlib.sha256()
        try:
            with storage_of(root).open(name) as source, open(part, "xb") as target:
                while block := source.read(BLOCK_BYTES):
                    digest.update(block)
                    target.write(block)
            if digest.hexdigest() != sha256:
                raise ValueError(
                    f"{join_root(root, name)}: differs from its committed sha256; set aside what "
                    f"is damaged by ingest/download.py --out {root} --verify, then rerun the stage "
                    "that made it"
                )
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, what: str, size: int) -> None:
        """Delete the copies used longest ago until `size` more bytes fit."""
        if size > self._limit:
            raise ValueError(
                f"{what}: has {size} bytes, the cache of local copies may hold {self._limit}; "
                "raise MINIDALLE2_CACHE_GIB"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        LocalStorage(self._folder).sweep()
        copies = sorted(_found(self._folder))
        left = self._limit - size - sum(size for _, size, _ in copies)
        for used, freed, path in copies:
            if left >= 0 or used > time.time() - IN_USE_SECONDS:
                return
            path.unlink(missing_ok=True)  # who has mapped it keeps it
            left += freed


def _found(folder: Path) -> list[tuple[float, int, Path]]:
    """Return when each copy was last used, its bytes, and its path."""
    found = []
    for path in folder.iterdir():
        try:
            status = path.stat()
        except FileNotFoundError:  # another process made room
            continue
        if not path.name.startswith("."):
            found.append((status.st_mtime, status.st_size, path))
    return found
