"""How far long work is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 10.0


@contextmanager
def progress(what: str, total: int, *, unit: str) -> Iterator[Callable[..., None]]:
    """Show the progress of `total` units; what is yielded is called with the number just done."""
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), unit,
                      TimeRemainingColumn()) as bar:  # fmt: skip
            task = bar.add_task(what, total=total)
            yield lambda count=1: bar.advance(task, count)
        return
    started = said = time.monotonic()
    done = 0

    def advance(count: int = 1) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if done >= total or now - said >= LINE_SECONDS:
            said = now
            print(f"{what}: {done} of {total} {unit} in {now - started:.0f} s", flush=True)

    yield advance
