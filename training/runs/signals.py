"""Stopping a run from outside, at its next step and with a checkpoint.

The request is a file in the run's folder, which every node sees: `touch runs/base/stop`, or a
SIGTERM to the driver, which creates it. A machine that is preempted has some seconds for this; the
same command continues the run.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.base.run_dir import STOP_NAME


def stop_wanted(run: Path, rank: int) -> bool:
    """Return whether the run is asked to stop; the first rank looks, for all."""
    return rank == 0 and (run / STOP_NAME).exists()


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

    def request_stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, before)
        (run / STOP_NAME).touch()
        with suppress(OSError, RuntimeError):  # the reader of our output may have ended first
            print(f"{run}: SIGTERM: a checkpoint at the next step, then the end", flush=True)

    signal.signal(signal.SIGTERM, request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
