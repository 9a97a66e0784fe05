"""Writes checkpoints beside the steps: a run waits for the copy of its state, not for its disk."""

import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def whole_or_not_at_all(path: Path) -> Iterator[Path]:
    """Give the path of a part to write, which becomes `path` where the block ends well.

    Else there is neither: half a file would keep a full disk full. It is on the disk before it has
    its name, as the records that vouch for it are. Raises OSError where safetensors meets one.
    """
    part = path.with_suffix(".part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except SafetensorError as error:
        part.unlink(missing_ok=True)
        found = re.search(r"\(os error (\d+)\)", str(error))
        if not found:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
    except OSError:
        part.unlink(missing_ok=True)
        raise


class Writer:
    """Does one write at a time, in a thread; what it raises, the next call raises.

    beside: False writes at once, in the caller's time. seconds: what the last write took.
    """

    def __init__(self, *, beside: bool) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write") if beside else None
        self._pending: Future | None = None
        self.seconds = 0.0

    def begin(self, capture: Callable[[], Callable[[], object]]) -> None:
        """Once the write before has ended, capture what is to be written, and begin to write it.

        capture: copies the state, and returns what writes it. Only one copy is ever held; and
        ranks that wait for each other in it know that no one's earlier write is still under way.
        """
        self.finish()
        write = capture()
        if self._pool is None:
            self._timed(write)
        else:
            self._pending = self._pool.submit(self._timed, write)

    @property
    def idle(self) -> bool:
        """Say whether the last write has ended."""
        return self._pending is None or self._pending.done()

    def finish(self) -> None:
        """Wait for the write that is under way; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _timed(self, write: Callable[[], object]) -> None:
        started = time.perf_counter()
        write()
        self.seconds = time.perf_counter() - started
