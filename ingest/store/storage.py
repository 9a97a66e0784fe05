"""Where a data folder lies: a local folder, or a prefix of an object store (s3://, gs://, ...).

Names are relative to the root, with slashes. Both kinds give what commits need: a file appears
whole or not at all, and of several that create one name exactly one succeeds.
"""

import contextlib
import errno
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

LOCAL_PREFIX = "file://"
TEMPORARY = re.compile(r"\..*\.(?P<pid>\d+)@(?P<host>.*)\.[0-9a-f]{32}")
CONFLICT_SECONDS = (0.1, 0.3, 1.0, 3.0)


class Storage(Protocol):
    """The operations on a data folder. Missing names raise FileNotFoundError unless noted."""

    def read(self, name: str) -> bytes:
        """Return a file's bytes."""
        ...

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading; seekable."""
        ...

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, None if it is absent."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """Return what lies directly in a folder, sorted; empty if it is absent."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write a file so that a reader sees the old bytes or the new ones, never a part."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Create a file whole, only if absent; False if it was there."""
        ...

    def move(self, name: str, target: str) -> None:
        """Move a file over whatever bears the target's name."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file or a folder with all it holds; none there is no error."""
        ...

    def settle(self) -> None:
        """Make the moves so far durable."""
        ...

    def sweep(self) -> None:
        """Delete half-written files whose writer, a process of this host, is gone."""
        ...

    def workplace(self, folder: str) -> Path:
        """Return a new local folder whose files `upload` makes those of `folder`."""
        ...

    def upload(self, workplace: Path, folder: str) -> None:
        """Make the files of a workplace durable in `folder`."""
        ...

    def leave(self, workplace: Path) -> None:
        """Remove what a workplace takes outside the storage."""
        ...


def storage_of(root: str | os.PathLike[str]) -> Storage:
    """Return the storage behind a path or URL."""
    text = os.fspath(root)
    if is_remote(text):
        return ObjectStorage(text)
    return LocalStorage(Path(text.removeprefix(LOCAL_PREFIX)))


def is_remote(root: str | os.PathLike[str]) -> bool:
    """Say whether a root is a URL of something else than the local disk."""
    text = os.fspath(root)
    return "://" in text and not text.startswith(LOCAL_PREFIX)


def absolute_root(root: str | os.PathLike[str]) -> str:
    """Return a root that means the same in any process: an absolute path, or the URL."""
    text = os.fspath(root)
    return text if is_remote(text) else os.path.abspath(text.removeprefix(LOCAL_PREFIX))


def join_root(root: str | os.PathLike[str], name: str) -> str:
    """Return the path or URL of a name, for messages and readers."""
    return f"{os.fspath(root).rstrip('/')}/{name}"


# -- local -------------------------------------------------------------------------------------


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


class LocalStorage:
    """A folder of a local or shared POSIX file system; see `Storage`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def open(self, name: str) -> IO[bytes]:
        return open(self.root / name, "rb")

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self.root / folder))
        except FileNotFoundError:
            return []

    def replace(self, name: str, data: bytes) -> None:
        path = self.root / name
        os.replace(self._temporary(path, data), path)
        fsync_path(path.parent)

    def create(self, name: str, data: bytes) -> bool:
        # A hard link has the exclusiveness of O_EXCL, and the name never appears with a part only.
        path = self.root / name
        temporary = self._temporary(path, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        fsync_path(path.parent)
        return True

    def _temporary(self, path: Path, data: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        owner = f"{os.getpid()}@{socket.gethostname()}"
        temporary = path.with_name(f".{path.name}.{owner}.{uuid.uuid4().hex}")
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return temporary

    def move(self, name: str, target: str) -> None:
        (self.root / target).parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.root / name, self.root / target)

    def delete(self, name: str) -> None:
        path = self.root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def settle(self) -> None:
        fsync_path(self.root)

    def sweep(self) -> None:
        for path in [*self.root.glob(".*"), *self.root.glob("_*/.*")]:
            found = TEMPORARY.fullmatch(path.name)
            if found and found["host"] == socket.gethostname() and not _runs(int(found["pid"])):
                path.unlink(missing_ok=True)

    def workplace(self, folder: str) -> Path:
        path = self.root / folder
        path.mkdir(parents=True)
        return path

    def upload(self, workplace: Path, folder: str) -> None:
        for path in workplace.iterdir():
            fsync_path(path)
        fsync_path(workplace)

    def leave(self, workplace: Path) -> None:
        pass  # it lies in the storage


# -- object stores -----------------------------------------------------------------------------


class ObjectStorage:
    """A prefix of an object store that fsspec reaches; see `Storage`.

    Objects appear whole by nature. `create` needs a store with conditional writes, which Amazon S3,
    MinIO and Google Cloud Storage have.
    """

    def __init__(self, root: str) -> None:
        import fsspec.core

        try:
            found = fsspec.core.url_to_fs(root, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{root}: cannot be reached: {error}") from None
        self._files: Any = found[0]
        self._root = found[1].rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Turn what the store's library raises, beside OSError, into a ConnectionError."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # each library has a base class of its own
            raise ConnectionError(f"{self._path(name)}: {error}") from error

    def _do(self, operation: str, name: str, *arguments: object, **options: object) -> Any:
        with self._told(name):
            return getattr(self._files, operation)(self._path(name), *arguments, **options)

    def read(self, name: str) -> bytes:
        return self._do("cat_file", name)

    def open(self, name: str) -> IO[bytes]:
        return self._do("open", name, "rb")

    def size(self, name: str) -> int | None:
        try:
            return self._do("info", name)["size"]
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        try:
            found = [path.rstrip("/") for path in self._do("ls", folder, detail=False)]
        except FileNotFoundError:
            return []
        itself = self._path(folder).rstrip("/")
        return sorted(path.rpartition("/")[2] for path in found if path != itself)

    def replace(self, name: str, data: bytes) -> None:
        self._write(name, data, "overwrite")

    def _write(self, name: str, data: bytes, mode: str) -> None:
        try:
            self._do("pipe_file", name, data, mode=mode)
        except FileNotFoundError as error:
            raise ValueError(f"{self._path(name)}: cannot be written: {error}") from None

    def create(self, name: str, data: bytes) -> bool:
        for wait in CONFLICT_SECONDS:
            try:
                self._write(name, data, "create")
                return True
            except FileExistsError:
                return False
            except OSError as error:  # the store's 409: another creation is under way
                if error.errno != errno.EBUSY:
                    raise
            time.sleep(wait)
        raise OSError(errno.EBUSY, f"{self._path(name)}: creations of it never end")

    def move(self, name: str, target: str) -> None:
        self._do("cp_file", name, self._path(target))
        self.delete(name)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._do("rm", name, recursive=True)

    def settle(self) -> None:
        pass  # a store's answer is its promise

    def sweep(self) -> None:
        pass  # objects appear whole

    def workplace(self, folder: str) -> Path:
        return Path(tempfile.mkdtemp(prefix="minidalle2-"))

    def upload(self, workplace: Path, folder: str) -> None:
        for path in sorted(workplace.iterdir()):
            name = f"{folder}/{path.name}"
            with self._told(name):
                self._files.put_file(str(path), self._path(name))

    def leave(self, workplace: Path) -> None:
        shutil.rmtree(workplace, ignore_errors=True)
