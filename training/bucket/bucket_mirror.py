"""The copy of a run in a bucket: see training/bucket/mirror.py."""

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from cluster.base.files import digest_file
from cluster.base.run_dir import (
    CODE_NAME,
    CONFIG_NAME,
    EMA_SNAPSHOTS_FOLDER,
    ERROR_PREFIX,
    ERRORS_FOLDER,
    FRAGMENTS_FOLDER,
    HEARTBEATS_FOLDER,
    INCIDENTS_NAME,
    LEASE_FOLDER,
    LOCKS,
    METRICS_NAME,
    PARTS_FOLDER,
    RAY_FOLDER,
    SNAPSHOT_PREFIX,
    STATE_NAME,
    STEP_PREFIX,
    STOP_NAME,
    TENSORBOARD_FOLDER,
    TIMELINE_NAME,
    VALIDATION_FOLDER,
    VALIDATION_NAME,
    WANDB_FOLDER,
    WATCH_FOLDER,
    WATCH_NAME,
    record_path,
    step_folders,
    step_of,
)
from ingest.store.storage import is_remote, storage_of
from models.names import FINAL_NAME
from training.bucket.lease import Lease, LeaseLostError
from training.bucket.log_parts import LogParts, notes_for
from training.bucket.mirror import Mirror
from training.runs.events import report_refusal

LOOK_SECONDS = 3.0  # between two rounds of the thread
LIFE_SECONDS = 10.0  # between two signs of life of a launch
RETRY_SECONDS = 600.0  # that a push is tried again for, while the storage does not answer
LONGEST_PAUSE = 15.0
HURRY_SECONDS = 10.0
LOGS = (METRICS_NAME, VALIDATION_NAME, TIMELINE_NAME, INCIDENTS_NAME)
DRIVER, NODE, CONTROLLER, WATCHER = "driver", "node", "controller", "watcher"  # whose copy it is
# What is no small file: pushed by those who write it
APART = (
    STEP_PREFIX, EMA_SNAPSHOTS_FOLDER, FINAL_NAME, STOP_NAME, ERROR_PREFIX, LEASE_FOLDER,
    PARTS_FOLDER, ERRORS_FOLDER,
)  # fmt: skip
# Without a configuration: of a run that was deleted, or killed before it had one
LEFT = (CODE_NAME, STOP_NAME, PARTS_FOLDER, ERRORS_FOLDER, WATCH_NAME, WATCH_FOLDER)
OF_TRACKERS = (TENSORBOARD_FOLDER, WANDB_FOLDER)  # pushed once, at the end
LOCAL = (RAY_FOLDER, HEARTBEATS_FOLDER, *OF_TRACKERS)  # of this machine alone
T = TypeVar("T")


class _BucketMirror(Mirror):
    """The copy of a run in a bucket; one object in each process that has to do with the copy."""

    def __init__(self, url: str, folder: Path, token: int = 0) -> None:
        """token: of the launch that this process belongs to."""
        super().__init__(folder)
        self.place = self._url = url.rstrip("/")
        self._storage = storage_of(self._url)
        self._lease = Lease(self._storage, self._url, token)
        self._writer = uuid.uuid4().hex[:12]
        self._logs: dict[str, LogParts] = {}
        self._pushed: dict[str, tuple[int, int]] = {}  # of other files: size and time of change
        self._lock = threading.Lock()  # the thread and a checkpoint's writer push
        # Whether this process keeps the copy: it knows what the bucket has of it. A controller's
        # copy is new, and nobody else's.
        self._keeps = folder.name.startswith(CONTROLLER)

    def name_group(self) -> str:
        return self._patiently(self._lease.name_group)

    def join_group(self, name: str) -> None:
        self._lease.group = name

    @property
    def _errors(self) -> str:
        """What ranks of this launch leave as their errors is here."""
        return f"{ERRORS_FOLDER}/{self._lease.token:06d}"

    def _name(self, path: Path) -> str:
        """Return the name in the bucket of a path of the copy."""
        if path.name.startswith(ERROR_PREFIX):
            return f"{self._errors}/{path.name}"
        return path.relative_to(self.folder).as_posix()

    # -- from the bucket ---------------------------------------------------------------------------

    def begin(self, *, fresh: bool) -> None:
        names = [name for name in self._storage.names() if name != LEASE_FOLDER]
        others = [name for name in names if name not in LEFT]
        if others and CONFIG_NAME not in names:
            raise ValueError(
                f"{self._url}: found {others[0]} without {CONFIG_NAME}, expected a run or nothing; "
                "name another --run"
            )
        if self.token and (fresh or CONFIG_NAME not in names):
            for name in sorted(names, key=lambda name: name == CONFIG_NAME):  # makes it a run
                self._storage.delete(name)
        self._pull_small(self._storage.find())

    def pull(self) -> None:
        self._patiently(self._pull)

    def _pull(self) -> None:
        names = self._storage.find()
        self._pull_small(names)
        self._pull_checkpoint([name for name in names if name.startswith(STEP_PREFIX)])

    def _pull_small(self, names: Sequence[str]) -> None:
        """Make the copy what the bucket holds, but for checkpoints; names: of all its files."""
        self._keeps = True
        self.folder.mkdir(parents=True, exist_ok=True)
        if CONFIG_NAME not in names:  # nothing of an earlier run is left
            for path in [path for path in self.folder.iterdir() if path.name not in LOCKS]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        parts = [n.removeprefix(f"{PARTS_FOLDER}/") for n in names if n.startswith(PARTS_FOLDER)]
        logs = {name.rpartition("/")[0] for name in parts}
        logs |= {name for name in names if name.endswith(".jsonl") and name not in parts}
        for name in sorted(logs):
            self._log(name).pull()
        final = [name for name in names if name == FINAL_NAME]
        for name in [n for n in names if n not in logs and not n.startswith(APART)] + final:
            self._storage.get(name, self.folder / name)
            self._pushed[name] = _state(self.folder / name)
        for path in self._small_files():
            name = path.relative_to(self.folder).as_posix()
            if name not in names and name not in logs and not name.startswith(f"{WATCH_FOLDER}/"):
                path.unlink()
        for parent in (self.folder, self.folder / EMA_SNAPSHOTS_FOLDER):
            for folder in step_folders(parent):
                left = [path for path in folder.rglob("*") if path.is_file()]
                for path in [path for path in left if self._name(path) not in names]:
                    path.unlink()  # of an attempt that did not get so far
                    left.remove(path)
                if not left:
                    shutil.rmtree(folder)
        for name in {FINAL_NAME, STOP_NAME} - set(names):
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.glob(f"{ERROR_PREFIX}*"):
            path.unlink()

    def _small_files(self) -> list[Path]:
        """Return the files of the copy that the thread pushes."""
        found = []
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if not path.name.startswith(".") and not name.startswith(APART + LOCAL):
                found += [path] if path.is_file() else []
        return found

    def _pull_checkpoint(self, names: Sequence[str]) -> None:
        """Fetch the newest checkpoint whose ranks have all written their part, with the digests
        that they recorded.

        names: of the files of all checkpoints.
        """
        from training.checkpoints.records import read_records, valid_records

        for step in sorted({name.partition("/")[0] for name in names}, reverse=True):
            inside = [name for name in names if name.startswith(f"{step}/")]
            records = [name for name in inside if _is_record(name)]
            for name in records:
                self._storage.get(name, self.folder / name)
            if read_records(self.folder / step) is None:
                continue
            for name in inside:
                if name not in records and not self._is_here(name):
                    self._storage.get(name, self.folder / name)
            if valid_records(self.folder / step):
                return

    def _is_here(self, name: str) -> bool:
        """Return whether the copy of a rank's fragments has the digest that the rank recorded."""
        path = self.folder / name
        if not path.is_file() or not path.with_suffix(".json").is_file():
            return False
        record = json.loads(path.with_suffix(".json").read_text())
        return digest_file(path) == record.get("sha256")

    def has(self, path: Path) -> bool:
        return path.is_file() or self.is_pushed(path)

    def is_pushed(self, path: Path) -> bool:
        return self._patiently(lambda: self._storage.size(self._name(path))) is not None

    def fetch(self, *paths: Path) -> None:
        for path in paths:
            if not path.is_file():
                self._patiently(lambda path=path: self._storage.get(self._name(path), path))

    def pull_end(self) -> None:
        for name in self._patiently(lambda: self._storage.names(self._errors)):
            self.fetch(self.folder / name)
        if not self.has(self.folder / FINAL_NAME):
            return
        from models.weights import exported

        self.fetch(self.folder / FINAL_NAME)
        step = exported(self.folder)
        names = self._patiently(lambda: self._storage.find(step.name))
        wanted = [name for name in names if f"/{FRAGMENTS_FOLDER}/" not in name]
        top = self._patiently(self._storage.names)
        wanted += [name for name in top if name.startswith(SNAPSHOT_PREFIX)]
        self.fetch(*(self.folder / name for name in wanted), record_path(step, 0))

    def has_errors(self) -> bool:
        return bool(self._patiently(lambda: self._storage.names(self._errors)))

    def clean(self) -> None:
        written = [path for name in OF_TRACKERS for path in (self.folder / name).rglob("*")]
        if written:
            self.push(*(path for path in written if path.is_file() and not path.is_symlink()))
        shutil.rmtree(self.folder)

    def drop(self, *paths: Path) -> None:
        for path in paths:
            path.unlink(missing_ok=True)

    def look(self, names: Sequence[str]) -> None:
        for checkpoint in self.checkpoints():
            known = (checkpoint / STATE_NAME).is_file()  # fetched last, and kept
            if not known and self.is_complete(checkpoint):
                with suppress(FileNotFoundError):  # pruned meanwhile
                    self.fetch(*(checkpoint / name for name in names))

    def publish(self, *paths: Path) -> None:
        for path in paths:
            self._patiently(lambda path=path: self._storage.put(path, self._name(path)))

    def forget_after(self, step: int) -> None:
        snapshots = self.folder / EMA_SNAPSHOTS_FOLDER
        names = self._patiently(lambda: self._storage.names(EMA_SNAPSHOTS_FOLDER))
        for folder in (*self.checkpoints(), *(snapshots / name for name in names)):
            if step_of(folder) > step:
                self.remove(folder)

    def checkpoints(self) -> list[Path]:
        names = self._patiently(self._storage.names)
        found = {self.folder / name for name in names if name.startswith(STEP_PREFIX)}
        return sorted(found | set(step_folders(self.folder)))

    def is_complete(self, checkpoint: Path) -> bool:
        return self.has(checkpoint / STATE_NAME)  # which is written last

    # -- to the bucket -----------------------------------------------------------------------------

    def push(self, *paths: Path) -> None:
        self._patiently(self._push_rest)
        for path in paths:
            self._patiently(lambda path=path: self._put(path))

    def _put(self, path: Path) -> None:
        """Write a file while this launch holds the run, before and after."""
        self._lease.require()
        self._storage.put(path, self._name(path))
        self._lease.require()

    def remove(self, path: Path) -> None:
        name = self._name(path)
        records = filter(_is_record, self._patiently(lambda: self._storage.find(name)))
        for each in (*records, name):  # records first: half of a checkpoint is none
            self._patiently(lambda each=each: self._delete(each))

    def _delete(self, name: str) -> None:
        self._lease.require()
        self._storage.delete(name)

    def _push_rest(self) -> None:
        """Push what is new beside checkpoints."""
        if not self._keeps:
            return
        self._lease.require()
        with self._lock:
            for path in sorted(self._small_files(), key=lambda path: path.name != CONFIG_NAME):
                name = path.relative_to(self.folder).as_posix()
                if name.endswith(".jsonl"):
                    self._log(name).push()
                    continue
                with suppress(FileNotFoundError):  # replaced meanwhile
                    state = _state(path)
                    if self._pushed.get(name) != state:
                        self._storage.put(path, name)
                        self._pushed[name] = state

    def hurry(self) -> None:
        if not self._keeps:  # the process that does has a moment
            time.sleep(2 * LOOK_SECONDS)
            return
        last = threading.Thread(target=self._push_rest, daemon=True)
        last.start()
        last.join(HURRY_SECONDS)

    def _log(self, name: str) -> LogParts:
        if name not in self._logs:
            self._logs[name] = LogParts(self._storage, self.folder, name, self._writer)
        return self._logs[name]

    def _patiently(self, call: Callable[[], T]) -> T:
        """Call until the storage answers, for a while: a checkpoint is worth waiting for."""
        deadline, pause = time.monotonic() + RETRY_SECONDS, 0.5
        while True:
            try:
                return call()
            except (FileNotFoundError, PermissionError, LeaseLostError):
                raise
            except OSError as error:
                if time.monotonic() > deadline:
                    raise
                warnings.warn(f"{self._url}: does not answer, tried again: {error}", stacklevel=2)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    # -- while it runs -----------------------------------------------------------------------------

    @contextmanager
    def kept_alike(self, *, collects: bool = False) -> Iterator[None]:
        def exchange() -> None:
            self._push_rest()
            self._exchange_stop(collects)
            if collects:
                self._collect()

        try:
            with _repeated(exchange, LOOK_SECONDS):
                yield
        finally:
            self._patiently(self._push_rest)
            if collects:
                self._patiently(self._collect)

    def _collect(self) -> None:
        """Fetch what trackers and the progress bar show: pictures and marks of checkpoints before
        the lines that come with them."""
        pictures = self._storage.names(VALIDATION_FOLDER)
        names = [f"{VALIDATION_FOLDER}/{name}" for name in pictures]
        names += [f"{f.name}/{STATE_NAME}" for f in self.checkpoints() if self.is_complete(f)]
        for name in names:
            if not (self.folder / name).is_file():
                self._storage.get(name, self.folder / name)
                self._pushed[name] = _state(self.folder / name)
        with self._lock:
            for name in LOGS:
                self._log(name).collect()

    def _exchange_stop(self, is_driver: bool) -> None:
        """Pass a request to stop on: from the driver to the bucket, from there to a node."""
        path = self.folder / STOP_NAME
        if is_driver and path.is_file():
            self._storage.replace(STOP_NAME, b"")
        elif not path.is_file() and self._storage.size(STOP_NAME) is not None:
            path.touch()

    def forget_stop(self) -> None:
        super().forget_stop()
        self._storage.delete(STOP_NAME)

    @contextmanager
    def leased(self) -> Iterator[None]:
        try:
            self._lease = Lease.acquire(self._storage, self._url)
        except ValueError:
            with notes_for(self._url) as notes:
                report_refusal(notes)
            raise
        try:
            with _repeated(self._lease.show_life, LIFE_SECONDS):
                yield
        finally:
            self._lease.release()

    @property
    def token(self) -> int:
        return self._lease.token


def mirror_of(run: str, scratch: str, role: str, token: int = 0) -> Mirror:
    """Return the mirror of a run, by its folder or URL.

    scratch: a folder of this machine for copies, "" for one below the system's temporary folder;
    role: "driver" or "node". Raises ValueError for a URL that cannot be a run's.
    """
    if not is_remote(run):
        return Mirror(Path(run).absolute())
    if any(letter in run for letter in "*?["):  # fsspec would take it for a pattern
        raise ValueError(f"--run: found {run}, expected a URL without * ? and [")
    base = Path(scratch or Path(tempfile.gettempdir()) / f"minidalle2-{os.getuid()}").absolute()
    digest = hashlib.sha256(run.rstrip("/").encode()).hexdigest()[:16]
    return _BucketMirror(run, base / digest / role, token)


@contextmanager
def _repeated(act: Callable[[], None], seconds: float) -> Iterator[None]:
    """Do something again and again, in a thread, while the block runs; what fails is tried again,
    unless the run was taken over."""
    stop = threading.Event()

    def repeat() -> None:
        failed = False
        while not stop.wait(seconds):
            try:
                act()
                failed = False
            except LeaseLostError as error:  # the next checkpoint raises it as well
                print(error, flush=True)
                return
            except OSError as error:
                if not failed:
                    print(f"the bucket does not answer, is tried again: {error}", flush=True)
                failed = True

    thread = threading.Thread(target=repeat, name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _is_record(name: str) -> bool:
    """Return whether a file of a checkpoint is what vouches for a rank's fragments."""
    return f"/{FRAGMENTS_FOLDER}/" in name and name.endswith(".json")


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
