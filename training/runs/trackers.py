"""The reports of a run as TensorBoard events, for those who watch their runs there.

metrics.jsonl and validation.jsonl remain the record of a run: events hold the same numbers.
"""

import multiprocessing
import os
import signal
import threading
from multiprocessing.synchronize import Event
from pathlib import Path

from cluster.base.jsonl import NewLines
from cluster.base.run_dir import METRICS_NAME, TENSORBOARD_FOLDER, VALIDATION_NAME

NOT_SCORES = ("step", "num_steps")  # the axis of all, and its end
POLL_SECONDS = 1.0
CLOSE_SECONDS = 20.0


class TensorBoard:
    """Writes <run>/tensorboard, from a process of its own.

    tensorboardX hands events to a thread that a full disk ends, and then waits for that thread for
    ever. A process can be ended from outside, so that training is not held up.
    """

    def __init__(self, run: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._run, self._stop = run, spawn.Event()
        self._process = spawn.Process(
            target=_write_events, args=(run, self._stop), name="tensorboard", daemon=True
        )
        self._process.start()

    def close(self) -> None:
        """Write what is left, and end the process; print a line if events are missing."""
        self._stop.set()
        self._process.join(CLOSE_SECONDS)
        if self._process.exitcode != 0:
            print(f"{self._run}: the events for TensorBoard are incomplete", flush=True)
        self._process.kill()
        self._process.join()


def _write_events(run: Path, stop: Event) -> None:
    """Write events until `stop` is set; end the process with exit code 1 where that fails."""
    threading.excepthook = lambda _: os._exit(1)  # of tensorboardX's thread
    for number in (signal.SIGINT, signal.SIGTERM):  # the driver, which gets them too, sets `stop`
        signal.signal(number, signal.SIG_IGN)
    try:
        _follow(run, stop)
    except OSError:
        os._exit(1)


def _follow(run: Path, stop: Event) -> None:
    """Write all reports of a run, and the new ones until `stop` is set.

    A driver that was killed may not have written all, so that each one writes them again. Where the
    steps go back, as in a run that continues from a checkpoint, TensorBoard drops what it has from
    that step on.
    """
    from tensorboardX import SummaryWriter

    folder = run / TENSORBOARD_FOLDER
    folder.mkdir(exist_ok=True)
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
    driver = multiprocessing.parent_process()
    metrics, validation = NewLines(run / METRICS_NAME), NewLines(run / VALIDATION_NAME)
    writer, last_step, num_files = SummaryWriter(str(folder), flush_secs=1), -1, 1
    ended = False
    while not ended:
        ended = stop.wait(POLL_SECONDS) or driver is None or not driver.is_alive()
        lines = [("train", line) for line in metrics.read()]
        lines += [("validation", line) for line in validation.read()]
        for group, line in lines:
            step = line["step"]
            if group == "train" and step <= last_step:
                writer.close()
                suffix, num_files = f".{num_files}", num_files + 1
                writer = SummaryWriter(
                    str(folder), flush_secs=1, purge_step=step, filename_suffix=suffix
                )
            last_step = step if group == "train" else last_step
            numbers = {n: v for n, v in line.items() if isinstance(v, (int, float))}
            for name in (name for name in numbers if name not in NOT_SCORES):
                writer.add_scalar(f"{group}/{name}", numbers[name], step)
    writer.close()
