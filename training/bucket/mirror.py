"""A run and the folder that its processes see, which is a copy where the run is in a bucket.

    <scratch>/<digest of the URL>/driver/    the driver's copy: configuration, logs, cards
    <scratch>/<digest of the URL>/node/      of a node that trains: checkpoints as well

Everything reads and writes the copy, as if it were the run. Checkpoints are pushed by those who
write them: what they consist of, then the record that makes it count. A thread pushes the rest, so
that whatever came before a checkpoint is in the bucket before its record. The bucket is what
counts: a launch begins with what it holds.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.base.run_dir import error_paths, step_folders
from training.runs.signals import forget_stop


class Mirror:
    """The folder of a run that is no bucket: nothing is to be copied.

    folder: what the processes of this machine read and write; place: the folder or URL of the run,
    for people.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, str(folder)

    @property
    def token(self) -> int:
        """The token of the launch, 0 where it needs no lease."""
        return 0

    def name_group(self) -> str:
        """Give a new group of workers a name; the first rank calls this, before any pulls."""
        return ""

    def join_group(self, name: str) -> None:
        """Write from now on as one of this group's, as long as there is no later one."""

    def begin(self, *, fresh: bool) -> None:
        """Make the copy what the bucket holds, before a launch reads its configuration; fresh:
        delete the run first.

        Raises ValueError where the URL holds something else than a run.
        """

    def pull(self) -> None:
        """Make the copy what the bucket holds: configuration, logs, the newest checkpoint."""

    def pull_end(self) -> None:
        """Fetch what a run has written last: its mark, its weights, errors of its ranks."""

    def push(self, *paths: Path) -> None:
        """Copy files to the bucket, in this order; what is not in a checkpoint comes before them.

        Raises LeaseLostError where another launch has taken the run over.
        """

    def remove(self, path: Path) -> None:
        """Delete a file or a folder from the bucket."""

    def has(self, path: Path) -> bool:
        """Return whether a file is there, on any node."""
        return path.is_file()

    def is_pushed(self, path: Path) -> bool:
        """Return whether a file is where other nodes see it."""
        return path.is_file()

    def fetch(self, *paths: Path) -> None:
        """Copy files of other nodes."""

    def has_errors(self) -> bool:
        """Return whether a rank of this launch has left an error that every attempt would meet."""
        return bool(error_paths(self.folder))

    def clean(self) -> None:
        """Delete the copy of a run that has finished; what trackers have written is pushed."""

    def drop(self, *paths: Path) -> None:
        """Delete files of the copy that the bucket has, and that this machine no longer needs."""

    def look(self, names: Sequence[str]) -> None:
        """Fetch these files of every complete checkpoint."""

    def publish(self, *paths: Path) -> None:
        """Copy files to the bucket that no launch writes, without its lease."""

    def forget_after(self, step: int) -> None:
        """Delete from the bucket what earlier attempts left of later checkpoints than one: parts
        of a group of another size would not agree with those to come."""

    def checkpoints(self) -> list[Path]:
        """Return the folders of all checkpoints by step, valid or not."""
        return step_folders(self.folder)

    def is_complete(self, checkpoint: Path) -> bool:
        """Return whether all ranks have written their part of a checkpoint."""
        from training.checkpoints.records import read_records

        return read_records(checkpoint) is not None

    def forget_stop(self) -> None:
        """Delete a request to stop that was met, or of an earlier launch."""
        forget_stop(self.folder)

    def hurry(self) -> None:
        """Push the last words of a process that is about to end itself."""

    @contextmanager
    def kept_alike(self, *, collects: bool = False) -> Iterator[None]:
        """Push what changes while the block runs; collects: and fetch what others write."""
        yield

    @contextmanager
    def leased(self) -> Iterator[None]:
        """Hold the run against other launches while the block runs."""
        yield
