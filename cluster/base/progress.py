"""The progress of long work: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 10.0
MADE_BY = {"download": "images", "adopt": "images", "embed": "embeds"}


@contextmanager
def progress(what: str, total: int, *, unit: str) -> Iterator[Callable[..., None]]:
    """Show the progress of `total` units of the work `what`.

    Call what is yielded with the number just done, and a note that is shown until the next one.
    """
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), unit,
                      "{task.fields[rate]}", TimeRemainingColumn(), "{task.fields[note]}"
                      ) as bar:  # fmt: skip
            task = bar.add_task(what, total=total, note="", rate="")

            def move(count: int = 1, note: str = "") -> None:
                speed = bar.tasks[task].speed
                rate = f"{speed:,.0f}/s" if speed and speed >= 1 else ""
                bar.update(task, advance=count, note=note, rate=rate)

            yield move
        return
    started = printed = time.monotonic()
    done = 0

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, printed
        done += count
        now = time.monotonic()
        if done >= total or now - printed >= LINE_SECONDS:
            printed = now
            seconds = now - started
            left = f", {seconds * (total - done) / done:.0f} s to go" if 0 < done < total else ""
            rate = f", {done / seconds:.1f} a second" if seconds else ""
            line = f"{what}: {done} of {total} {unit} in {seconds:.0f} s{rate}{left}"
            print(f"{line}: {note}" if note else line, flush=True)

    yield advance


def show_place(stage: str, root: str, backlog: int) -> None:
    """Export how many shards a stage has still to make, and the space left where they go."""
    from cluster.base.metrics import gauge, storage_space

    gauge("minidalle2_backlog_shards").set(backlog, stage=stage)
    storage_space(root, holds=MADE_BY[stage])

def duration(seconds: float) -> str:
    """Return a duration such as "2 d 3 h", "1 h 40 min", "50 s"."""
    rounded = round(seconds)
    for unit, size, smaller, less in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if rounded >= size:
            return f"{rounded // size} {unit} {rounded % size // less} {smaller}"
    return f"{rounded // 60} min" if rounded >= 120 else f"{rounded} s"
