"""A run's lines as TensorBoard events, for those who watch their runs there.

metrics.jsonl and validation.jsonl remain what a run says of itself: events hold the same numbers.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

EVENTS_NAME = "tensorboard"
ASIDE = ("step", "num_steps")  # not scores: the axis of all, and its end


class Events:
    """Writes <run>/tensorboard, from the driver, with tensorboardX's own encoding of files.

    Not by its SummaryWriter: that writes from a thread of its own, which a full disk ends, and
    whoever adds to it afterwards waits for ever.
    """

    def __init__(self, run: Path, before: Iterable[dict], validated_before: Iterable[dict]) -> None:
        """before, validated_before: lines that the run has already; a driver that was killed may
        not have written them, so that every one writes them anew. Raises OSError."""
        from tensorboardX.event_file_writer import EventsWriter  # which most runs have no need of

        folder = run / EVENTS_NAME
        folder.mkdir(exist_ok=True)
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._writer = EventsWriter(str(folder / "events"))
        self._last: dict[str, int] = {}
        self.add(before)
        self.add(validated_before, "validation")

    def add(self, lines: Iterable[dict], group: str = "train") -> None:
        """Write the numbers of lines, as <group>/<name> at their steps; raises OSError.

        Where they go back, as a run does to a checkpoint, TensorBoard is told to forget what it has
        from there on.
        """
        from tensorboardX.proto import event_pb2

        made: Any = event_pb2  # whose classes are made at import
        for line in lines:
            step = line["step"]
            if step <= self._last.get(group, -1):
                began = made.SessionLog(status=made.SessionLog.START)
                self._writer.write_event(
                    made.Event(wall_time=time.time(), step=step, session_log=began)
                )
            self._last[group] = step
            event = made.Event(wall_time=time.time(), step=step)
            for name, value in line.items():
                if name not in ASIDE and isinstance(value, (int, float)):
                    event.summary.value.add(tag=f"{group}/{name}", simple_value=value)
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """End the file; raises OSError."""
        self._writer.close()
