"""Writes checkpoints beside the steps: training waits for a copy of its state, not for the disk."""

import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cluster.base.files import atomic_write


@contextmanager
def atomic_tensors(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a safetensors file, as `atomic_write` does.

    Raises OSError where the library raises an error of its own about one of the system.
    """
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


class Writer:
    """Does one write at a time, in a thread; what it raises, the next call raises.

    asynchronous: False writes at once, in the caller's time. seconds: what the last write took.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write") if asynchronous else None
        self._pending: Future | None = None
        self.seconds = 0.0

    @property
    def idle(self) -> bool:
        """Whether the last write has ended."""
        return self._pending is None or self._pending.done()

    def start(self, write: Callable[[], object]) -> None:
        """Start a write, after the one before has ended."""
        self.wait()
        if self._pool is None:
            self._timed(write)
        else:
            self._pending = self._pool.submit(self._timed, write)

    def wait(self) -> None:
        """Wait for the write that is under way; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _timed(self, write: Callable[[], object]) -> None:
        started = time.perf_counter()
        write()
        self.seconds = time.perf_counter() - started
