"""Files of JSON lines of a run in a bucket, where nothing can be appended: they grow in parts.

    metrics.jsonl                            the lines up to some time
    parts/metrics.jsonl/<time>_<writer>      those that a process wrote since then

A reader joins both, and drops a line that is there twice: a process may have ended between writing
the file and deleting the parts that went into it.
"""

import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cluster.base.files import write_text
from cluster.base.run_dir import METRICS_NAME, PARTS_FOLDER, VALIDATION_NAME
from ingest.store.storage import Storage, is_remote, storage_of

MOST_PARTS = 100  # of a file that one process writes, until they are joined
OWN_FILES = (METRICS_NAME, VALIDATION_NAME)  # only the first rank writes them


class LogParts:
    """One file of lines: the local one, which processes of this machine append to, and its parts.

    A run that goes back to a checkpoint replaces its local file by a shorter one; the bucket's is
    then replaced as well.
    """

    def __init__(self, storage: Storage, folder: Path, name: str, writer: str) -> None:
        self._storage, self._path, self._name, self._writer = storage, folder / name, name, writer
        self._prefix = f"{PARTS_FOLDER}/{name}"
        self._shared = 0  # bytes of the local file that the bucket has
        self._file: IO[bytes] | None = None  # open, so that no other file gets its inode
        self._known: set[str] = set()  # parts that are in the local file
        self._stamp = ""  # of the bucket's file when it was read
        self._num_own = 0

    def pull(self) -> None:
        """Make the local file what the bucket has."""
        parts, self._stamp = self._storage.names(self._prefix), self._current_stamp()
        text = joined_lines(self._storage, self._name, parts)
        self._known, self._num_own = set(parts), 0
        if text or self._path.is_file():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, text)
            self._remember()

    def _current_stamp(self) -> str:
        try:
            return self._storage.stamp(self._name)
        except FileNotFoundError:
            return ""

    def _remember(self) -> None:
        """Take the local file as it is for what the bucket has."""
        self._swap(self._path.open("rb"))
        self._shared = self._path.stat().st_size

    def _is_replaced_by(self, file: IO[bytes]) -> bool:
        return self._file is not None and not os.path.sameopenfile(
            self._file.fileno(), file.fileno()
        )

    def _swap(self, file: IO[bytes]) -> None:
        before, self._file = self._file, file
        if before is not None:
            before.close()

    def push(self) -> None:
        """Write what the local file has got to the bucket."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        if self._is_replaced_by(file):
            self._replace(file.read())  # which may fail, and is then tried again
            self._swap(file)
            return
        self._swap(file)
        file.seek(self._shared)
        data = file.read()
        self._add(data[: data.rfind(b"\n") + 1])
        if self._num_own > MOST_PARTS and self._name in OWN_FILES:
            self._replace(self._path.read_bytes())

    def _add(self, data: bytes) -> None:
        if not data:
            return
        name = f"{time.time_ns():020d}_{self._writer}"
        self._storage.replace(f"{self._prefix}/{name}", data)
        self._known.add(name)
        self._num_own += 1
        self._shared += len(data)

    def _replace(self, data: bytes) -> None:
        """Write the bucket's file whole, and delete the parts that are in it."""
        data = data[: data.rfind(b"\n") + 1]
        parts = self._storage.names(self._prefix)
        self._storage.replace(self._name, data)
        for part in parts:
            self._storage.delete(f"{self._prefix}/{part}")
        self._shared, self._known, self._num_own = len(data), set(), 0
        self._stamp = self._current_stamp()

    def collect(self) -> None:
        """Add the lines of other processes to the local file; this process's have been pushed."""
        parts = self._storage.names(self._prefix)
        if self._known - set(parts) or self._current_stamp() != self._stamp:
            # Parts were joined, or the run went back
            self.push()
            self.pull()
            return
        for part in parts:
            if part not in self._known:
                try:
                    data = self._storage.read(f"{self._prefix}/{part}")
                except FileNotFoundError:  # joined a moment ago: the next round reads it all
                    return
                self._append(data)
                self._known.add(part)

    def _append(self, data: bytes) -> None:
        """Append others' lines; what a thread of this process appends meanwhile stays its own."""
        with self._path.open("ab", buffering=0) as file:
            file.write(data)
            start = file.tell() - len(data)
        with self._path.open("rb") as file:
            file.seek(self._shared)
            own = file.read(start - self._shared)
        self._add(own)
        self._remember()
        self._shared = start + len(data)


def joined_lines(storage: Storage, name: str, parts: list[str]) -> str:
    """Return the lines of a file of the bucket and of its parts, each once."""
    texts = []
    if storage.size(name) is not None:
        texts.append(storage.read(name))
    for part in parts:
        try:
            texts.append(storage.read(f"{PARTS_FOLDER}/{name}/{part}"))
        except FileNotFoundError:  # joined meanwhile
            texts.append(storage.read(name))
    lines = dict.fromkeys(b"".join(texts).decode().splitlines())
    return "".join(f"{line}\n" for line in lines)


@contextmanager
def notes_for(run: str) -> Iterator[Path]:
    """Yield a folder to whose files a process appends that has no copy of the run: the run's own,
    or one whose files are added to those in the bucket at the end."""
    if not is_remote(run):
        yield Path(run)
        return
    storage, writer = storage_of(run), uuid.uuid4().hex[:12]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            yield folder
        finally:
            for path in sorted(folder.iterdir()):
                if path.suffix == ".jsonl":
                    LogParts(storage, folder, path.name, writer).push()
                else:
                    is_there = storage.size(path.name) is not None
                    before = storage.read(path.name) if is_there else b""
                    storage.replace(path.name, before + path.read_bytes())
