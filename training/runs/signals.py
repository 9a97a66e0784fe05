"""Stopping a run from outside, at its next step and with a checkpoint.

The request is a file in the run's folder, which every node sees: `touch runs/base/stop`, or a
SIGTERM to the driver, which creates it. A machine that is preempted has some seconds for this; the
same command continues the run.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.base.run_dir import STOP_NAME

LOOK_EVERY = 1.0  # seconds: a storage that nodes share may take milliseconds to answer


class StopRequest:
    """Whether a run is asked to stop; the first rank looks for the file, for all."""

    def __init__(self, run: Path, rank: int) -> None:
        self._path, self._looks = run / STOP_NAME, rank == 0
        self._next_look, self._found = time.monotonic(), False

    def wanted(self) -> bool:
        """Return whether this rank has found the file, for which it looks now and then."""
        now = time.monotonic()
        if self._looks and now >= self._next_look:
            self._next_look = now + LOOK_EVERY
            self._found = self._found or self._path.exists()
        return self._found


def request_stop(run: Path) -> None:
    """Ask a run that trains to stop, at its next step and with a checkpoint."""
    (run / STOP_NAME).touch()


def forget_stop(run: Path) -> None:
    """Delete the request: it was of an earlier attempt, or has been met."""
    (run / STOP_NAME).unlink(missing_ok=True)


@contextmanager
def stopping_on_sigterm(run: Path) -> Iterator[None]:
    """Turn the first SIGTERM into a request to stop; the second ends the process as before.

    Only the main thread can handle signals; in another, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def on_sigterm(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, before)
        request_stop(run)
        with suppress(OSError, RuntimeError):  # the reader of our output may have ended first
            print(f"{run}: SIGTERM: a checkpoint at the next step, then the end", flush=True)

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
