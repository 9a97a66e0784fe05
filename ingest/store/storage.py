"""Where a data folder is: a local folder, or a prefix of an object store (s3://, gs://, ...).

Names are relative to the root, with slashes. Both kinds give what commits need: a file appears
complete or not at all, and of several processes that create one name exactly one succeeds.
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
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

LOCAL_PREFIX = "file://"
TEMPORARY = re.compile(r"\..*\.(?P<pid>\d+)@(?P<host>.*)\.[0-9a-f]{32}")
CONFLICT_SECONDS = (0.1, 0.3, 1.0, 3.0)  # pauses while another process creates the same name
# Of what stores report of an object, the first that there is shows a change.
STAMPS = (
    "ETag", "etag", "blob_id", "md5Hash", "content_md5", "LastModified", "last_modified",
    "Last-Modified", "updated", "mtime", "created",
)  # fmt: skip
Root = str | os.PathLike[str]


def storage_of(root: Root) -> "Storage":
    """Return the storage behind a path or URL."""
    text = os.fspath(root)
    return _ObjectStorage(text) if is_remote(text) else Storage(text)


def is_remote(root: Root) -> bool:
    """Return whether a root is a URL of something other than the local disk."""
    text = os.fspath(root)
    return "://" in text and not text.startswith(LOCAL_PREFIX)


def local_path(root: Root) -> Path:
    """Return the folder of a root that is not remote."""
    return Path(os.fspath(root).removeprefix(LOCAL_PREFIX))


def absolute_root(root: Root) -> str:
    """Return a root that means the same in any process: an absolute path, or the URL."""
    return os.fspath(root) if is_remote(root) else os.path.abspath(local_path(root))


def join_root(root: Root, name: str) -> str:
    """Return the path or URL of a name, for messages."""
    return f"{os.fspath(root).rstrip('/')}/{name}"


def split_place(place: str) -> tuple[str, str]:
    """Return the folder of a file's path or URL, and its name there."""
    folder, _, name = place.rpartition("/")
    return f"{folder}/", name


def _process_fields(pid: int) -> list[str]:
    """Return /proc's fields of a process, from its state on; none where they cannot be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended, or this host has no /proc, or hides the processes of others
        return []


def process_birth(pid: int) -> str | None:
    """Return when process `pid` of this host started, in kernel ticks; None: not known."""
    fields = _process_fields(pid)
    return fields[19] if fields else None


def has_ended(pid: int, birth: str | None = None) -> bool:
    """Return whether a process of this host is known to have ended.

    birth: the process's, by which a later process of the same number is recognised; None: not
    known. Where the fields of a process cannot be read, a number in use counts as alive.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    fields = _process_fields(pid)
    return bool(fields) and (fields[0] == "Z" or birth not in (None, fields[19]))


def read_table(root: Root, name: str, *columns: str) -> "pa.Table":
    """Return a Parquet file of a data folder: the named columns, or all."""
    import pyarrow.parquet as pq

    with storage_of(root).open(name) as file:
        return pq.ParquetFile(file).read(columns=list(columns) or None)


def write_table(root: Root, name: str, table: "pa.Table") -> None:
    """Write a table to a data folder as Parquet, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage_of(root).replace(name, sink.getvalue().to_pybytes())


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Storage:
    """The operations on a data folder, here one of a local or shared POSIX file system.

    A missing name raises FileNotFoundError unless noted.
    """

    def __init__(self, root: str) -> None:
        self.root = local_path(root)

    def read(self, name: str) -> bytes:
        """Return a file's bytes."""
        return (self.root / name).read_bytes()

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading; seekable."""
        return open(self.root / name, "rb")

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, None if it is absent."""
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return None

    def stamp(self, name: str) -> str:
        """Return what differs after a file was written again, as far as it is cheap to see."""
        return str((self.root / name).stat().st_mtime_ns)

    def names(self, folder: str = "") -> list[str]:
        """Return the names directly in a folder, sorted; empty if it is absent."""
        try:
            return sorted(os.listdir(self.root / folder))
        except FileNotFoundError:
            return []

    def find(self, folder: str = "") -> list[str]:
        """Return the names of all files below a folder, sorted; empty if it is absent."""
        found = (self.root / folder).rglob("*")
        return sorted(path.relative_to(self.root).as_posix() for path in found if path.is_file())

    def replace(self, name: str, data: bytes) -> None:
        """Write a file atomically: a reader sees the old bytes or the new ones."""
        path = self.root / name
        os.replace(_write_temporary(path, data), path)
        fsync_path(path.parent)

    def create(self, name: str, data: bytes) -> bool:
        """Create a file atomically, only if absent; return False if it exists."""
        # A hard link is as exclusive as O_EXCL, and the file has its content when the name appears.
        path = self.root / name
        temporary = _write_temporary(path, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        fsync_path(path.parent)
        return True

    def put(self, path: Path, name: str) -> None:
        """Write a local file of any size atomically; a reader sees the old bytes or the new."""
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(temporary_name(target.name))
        shutil.copyfile(path, temporary)
        fsync_path(temporary)
        os.replace(temporary, target)
        fsync_path(target.parent)

    def get(self, name: str, path: Path) -> None:
        """Copy a file to a local path, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(temporary_name(path.name))
        try:
            self._download(name, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _download(self, name: str, path: Path) -> None:
        shutil.copyfile(self.root / name, path)

    def move(self, name: str, target: str) -> None:
        """Move a file; an existing target is replaced."""
        (self.root / target).parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.root / name, self.root / target)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with its content; an absent name is no error."""
        path = self.root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def settle(self) -> None:
        """Make the moves so far durable; an object store has done so when it answers."""
        fsync_path(self.root)

    def sweep(self) -> None:
        """Delete half-written files of processes of this host that have ended, if there are any."""
        for path in [*self.root.glob(".*"), *self.root.glob("_*/.*")]:
            owner = TEMPORARY.fullmatch(path.name)
            if owner and owner["host"] == socket.gethostname() and has_ended(int(owner["pid"])):
                path.unlink(missing_ok=True)

    def workplace(self, folder: str) -> Path:
        """Return a new local folder, whose files `upload` puts into `folder`."""
        path = self.root / folder
        path.mkdir(parents=True)
        return path

    def upload(self, workplace: Path, folder: str) -> None:
        """Make the files of a workplace durable in `folder`."""
        for path in [*workplace.iterdir(), workplace]:
            fsync_path(path)

    def leave(self, workplace: Path) -> None:
        """Delete a workplace that is outside the storage."""


def _write_temporary(path: Path, data: bytes) -> Path:
    """Write a durable file beside `path`; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    with open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def temporary_name(name: str) -> str:
    """Return a name that no other process uses, and by which `sweep` recognises its owner."""
    return f".{name}.{os.getpid()}@{socket.gethostname()}.{uuid.uuid4().hex}"


class _ObjectStorage(Storage):
    """A prefix of an object store that fsspec reaches; see `Storage`.

    Objects appear complete by nature. `create` needs a store with conditional writes, which Amazon
    S3, MinIO and Google Cloud Storage have.
    """

    def __init__(self, root: str) -> None:
        import fsspec.core

        try:
            self._files, path = fsspec.core.url_to_fs(root, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{root}: cannot be reached: {error}") from None
        self._root = path.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _connection(self, name: str) -> Iterator[None]:
        """Turn the errors of the store's library, other than OSError, into a ConnectionError."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # each library has its own base class
            raise ConnectionError(f"{self._path(name)}: {error}") from error

    def _call(self, operation: str, name: str, *arguments: object, **options: object) -> Any:
        with self._connection(name):
            return getattr(self._files, operation)(self._path(name), *arguments, **options)

    def read(self, name: str) -> bytes:
        return self._call("cat_file", name)

    def open(self, name: str) -> IO[bytes]:
        return self._call("open", name, "rb")

    def size(self, name: str) -> int | None:
        try:
            return self._call("info", name)["size"]
        except FileNotFoundError:
            return None

    def stamp(self, name: str) -> str:
        facts = self._call("info", name)
        return next((str(facts[key]) for key in STAMPS if facts.get(key) is not None), "")

    def names(self, folder: str = "") -> list[str]:
        try:
            paths = [path.rstrip("/") for path in self._call("ls", folder, detail=False)]
        except FileNotFoundError:
            return []
        itself = self._path(folder).rstrip("/")
        return sorted(path.rpartition("/")[2] for path in paths if path != itself)

    def find(self, folder: str = "") -> list[str]:
        start = len(self._path("").rstrip("/")) + 1
        return sorted(path[start:] for path in self._call("find", folder))

    def replace(self, name: str, data: bytes) -> None:
        self._write(name, data, "overwrite")

    def _write(self, name: str, data: bytes, mode: str) -> None:
        try:
            self._call("pipe_file", name, data, mode=mode)
        except FileNotFoundError as error:
            raise ValueError(f"{self._path(name)}: cannot be written: {error}") from None

    def create(self, name: str, data: bytes) -> bool:
        for pause in CONFLICT_SECONDS:
            try:
                self._write(name, data, "create")
                return True
            except FileExistsError:
                return False
            except OSError as error:  # the store's 409: another process is creating it
                if error.errno != errno.EBUSY:
                    raise
            time.sleep(pause)
        raise OSError(errno.EBUSY, f"{self._path(name)}: other processes keep creating it")

    def put(self, path: Path, name: str) -> None:
        with self._connection(name):
            self._files.put_file(str(path), self._path(name))

    def _download(self, name: str, path: Path) -> None:
        with self._connection(name):
            self._files.get_file(self._path(name), str(path))

    def move(self, name: str, target: str) -> None:
        self._call("cp_file", name, self._path(target))
        self.delete(name)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._call("rm", name, recursive=True)

    def workplace(self, folder: str) -> Path:
        return Path(tempfile.mkdtemp(prefix="minidalle2-"))

    def upload(self, workplace: Path, folder: str) -> None:
        for path in sorted(workplace.iterdir()):
            self.put(path, f"{folder}/{path.name}")

    def settle(self) -> None:
        pass  # a put is lasting when it returns

    def sweep(self) -> None:
        pass  # workplaces are the machine's own temporary folders

    def leave(self, workplace: Path) -> None:
        shutil.rmtree(workplace, ignore_errors=True)
