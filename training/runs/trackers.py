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
        # which most runs have no need of
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        kinds: Any = (event_pb2, summary_pb2)  # whose classes are made at import
        self._event, self._session = kinds[0].Event, kinds[0].SessionLog
        self._summary = kinds[1].Summary
        folder = run / EVENTS_NAME
        folder.mkdir(exist_ok=True)
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._writer = EventsWriter(str(folder / "events"))
        self._trained = -1
        self.trained(before)
        self.validated(validated_before)

    def trained(self, lines: Iterable[dict]) -> None:
        """Write lines of metrics.jsonl; raises OSError.

        Where they go back, as a run does to a checkpoint, TensorBoard is told to forget all that it
        has from there on, validations too.
        """
        for line in lines:
            if line["step"] <= self._trained:
                began = self._session(status=self._session.START)
                self._write(line["step"], session_log=began)
            self._trained = line["step"]
            self._scalars("train", line)
        self._writer.flush()

    def validated(self, lines: Iterable[dict]) -> None:
        """Write lines of validation.jsonl; raises OSError."""
        for line in lines:
            self._scalars("validation", line)
        self._writer.flush()

    def close(self) -> None:
        """End the file; raises OSError."""
        self._writer.close()

    def _scalars(self, group: str, line: dict) -> None:
        """Write the numbers of a line as <group>/<name> at its step."""
        values = [
            self._summary.Value(tag=f"{group}/{name}", simple_value=value)
            for name, value in line.items()
            if name not in ASIDE and isinstance(value, (int, float))
        ]
        self._write(line["step"], summary=self._summary(value=values))

    def _write(self, step: int, **told: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **told))
