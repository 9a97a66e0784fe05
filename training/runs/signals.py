"""Stopping a run from outside, at its next step and with a checkpoint.

The wish is a file in the run's folder, which every node sees: `touch runs/base/stop`, or a SIGTERM
to the driver, which writes it. What preempts a machine gives it some seconds; what stays open is
taken up by the same command.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STOP_NAME = "stop"


def stop_wanted(run: Path, rank: int) -> bool:
    """Say whether someone wants the run to stop; the first rank looks, for all."""
    return rank == 0 and (run / STOP_NAME).exists()


def forget_stop(run: Path) -> None:
    """Take back the wish: it was of an earlier attempt, or has been met."""
    (run / STOP_NAME).unlink(missing_ok=True)


@contextmanager
def stopping_on_sigterm(run: Path) -> Iterator[None]:
    """Turn the first SIGTERM into a wish to stop; the second ends the process as before.

    Only the main thread can listen to signals; from another, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def wish(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, before)
        (run / STOP_NAME).touch()
        with suppress(OSError, RuntimeError):  # whoever read our output may have ended first
            print(f"{run}: SIGTERM: a checkpoint at the next step, then the end", flush=True)

    signal.signal(signal.SIGTERM, wish)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
