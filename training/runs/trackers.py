"""The reports of a run as TensorBoard events, for those who watch their runs there.

metrics.jsonl and validation.jsonl remain the record of a run: events hold the same numbers.
"""

import time
from importlib import import_module
from pathlib import Path

from cluster.base.jsonl import NewLines
from cluster.base.run_dir import METRICS_NAME, TENSORBOARD_FOLDER, VALIDATION_NAME

NOT_SCORES = ("step", "num_steps")  # the axis of all, and its end


class TensorBoard:
    """Writes <run>/tensorboard.

    A driver that was killed may not have written all reports, so that each one writes them again.
    Events are written in the caller's thread: tensorboardX's own `SummaryWriter` hands them to a
    thread that a full disk ends, and then waits for that thread for ever.
    """

    def __init__(self, run: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        folder = run / TENSORBOARD_FOLDER
        folder.mkdir(exist_ok=True)
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._events = EventsWriter(str(folder / "events"))
        self._messages = import_module("tensorboardX.proto.event_pb2")
        self._summaries = import_module("tensorboardX.proto.summary_pb2")
        self._metrics = NewLines(run / METRICS_NAME)
        self._validation = NewLines(run / VALIDATION_NAME)
        self._last_step = -1

    def write(self) -> None:
        """Write the reports that the run has made since the last call.

        Where the steps go back, as in a run that continues from a checkpoint, TensorBoard drops
        what it has from that step on. Raises OSError where the disk is full.
        """
        messages, summaries = self._messages, self._summaries
        lines = [("train", line) for line in self._metrics.read()]
        lines += [("validation", line) for line in self._validation.read()]
        if not lines:
            return
        for group, line in lines:
            step, now = line["step"], time.time()
            if group == "train" and step <= self._last_step:
                start = messages.SessionLog(status=messages.SessionLog.START)
                event = messages.Event(wall_time=now, step=step, session_log=start)
                self._events.write_event(event)
            self._last_step = step if group == "train" else self._last_step
            numbers = {n: v for n, v in line.items() if isinstance(v, (int, float))}
            values = [
                summaries.Summary.Value(tag=f"{group}/{name}", simple_value=value)
                for name, value in numbers.items()
                if name not in NOT_SCORES
            ]
            summary = summaries.Summary(value=values)
            self._events.write_event(messages.Event(wall_time=now, step=step, summary=summary))
        self._events.flush()

    def close(self) -> None:
        """Close the file."""
        self._events.close()
