"""Local copies of the files of remote shards: readers map files, and an object store has none.

    $MINIDALLE2_CACHE        their folder, ~/.cache/minidalle2 where it is not set
    $MINIDALLE2_CACHE_GIB    its limit, 20 where it is not set

A copy is named by its sha256, which is checked while it is downloaded. The processes of a machine
share the folder; when it is full, the copies used longest ago are deleted.
"""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from ingest.store.commits import Commit
from ingest.store.storage import (
    Root,
    is_remote,
    join_root,
    local_path,
    storage_of,
    temporary_name,
)

IN_USE_SECONDS = 60.0  # a copy requested so recently may not be mapped yet, and stays
BLOCK_BYTES = 1 << 22


def local_file(root: Root, commit: Commit, name: str) -> Path:
    """Return a local path of a committed file: its own, or that of a copy.

    Raises ValueError where a remote file does not match its commit, or is larger than the cache.
    """
    folder, base = commit.locate(root, name)
    if not is_remote(folder):
        return local_path(folder) / base
    entry = commit.files[name]
    copies = LocalCopies.from_environment()
    return copies.path(folder, base, sha256=entry["sha256"], size=entry["size"])


class LocalCopies:
    """A folder of copies that takes at most `limit_bytes`."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes

    @classmethod
    def from_environment(cls) -> "LocalCopies":
        """Return the cache that this module's environment variables describe."""
        folder = os.environ.get("MINIDALLE2_CACHE") or "~/.cache/minidalle2"
        size = os.environ.get("MINIDALLE2_CACHE_GIB") or "20"
        try:
            limit = int(float(size) * 2**30)
        except (ValueError, OverflowError):
            raise ValueError(
                f"MINIDALLE2_CACHE_GIB: found {size!r}, expected a number of GiB"
            ) from None
        return cls(Path(folder).expanduser(), limit)

    def path(self, root: Root, name: str, *, sha256: str, size: int) -> Path:
        """Return the path of a copy of a file whose digest and size in bytes are known."""
        path = self._folder / sha256
        with suppress(FileNotFoundError):
            os.utime(path)
            return path

        # Room: the copies used longest ago are deleted until the file fits
        where = join_root(root, name)
        if size > self._limit:
            raise ValueError(
                f"{where}: has {size} bytes, the cache of local copies may hold {self._limit}; "
                "raise MINIDALLE2_CACHE_GIB"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        storage_of(self._folder).sweep()
        copies: list[tuple[float, int, Path]] = []
        for copy in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another process made room
                status = copy.stat()
                if not copy.name.startswith("."):
                    copies.append((status.st_mtime, status.st_size, copy))
        left = self._limit - size - sum(size for _, size, _ in copies)
        for used, freed, copy in sorted(copies):
            if left >= 0 or used > time.time() - IN_USE_SECONDS:
                break
            copy.unlink(missing_ok=True)  # a process that has mapped it keeps it
            left += freed

        # The copy, which appears complete or not at all
        temporary = path.with_name(temporary_name(sha256))
        digest = hashlib.sha256()
        try:
            with storage_of(root).open(name) as source, open(temporary, "xb") as target:
                while block := source.read(BLOCK_BYTES):
                    digest.update(block)
                    target.write(block)
            if digest.hexdigest() != sha256:
                raise ValueError(
                    f"{where}: differs from its committed sha256; set aside what "
                    f"is damaged by ingest/download.py --out {root} --verify, then rerun the stage "
                    "that made it"
                )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path
