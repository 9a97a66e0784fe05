"""When a run began, lost its workers and went on: timeline.jsonl, and the seconds of a recovery.

{"event", "time", ...}   a line each; time: of the clock on the wall, in seconds

launched   the driver was started
lost       what watches over the workers has noticed that one is gone
placed     the first rank runs our code, in an attempt that has just begun
restored   it has read its checkpoint, and is about to train on: attempt, step, num_workers
stepped    the first step of the attempt is done
validator failed    the command that was to validate a checkpoint did not
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.jsonl import add_line, read_lines
from cluster.base.run_dir import TIMELINE_NAME


def note(run: Path, event: str, **more: Any) -> None:
    """Add a line."""
    add_line(run / TIMELINE_NAME, {"event": event, "time": time.time(), **more})


def read_timeline(run: Path) -> list[dict]:
    """Return the lines."""
    return read_lines(run / TIMELINE_NAME)


def num_attempts(run: Path) -> int:
    """Return how often a run has begun to train."""
    return sum(line["event"] == "restored" for line in read_timeline(run))


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Seconds from a fault to the next step, in four parts that follow each other.

    detection: until the loss was noticed, or the command was given again; restart: until a worker
    ran; restore: until it had built its model and read the checkpoint; step: until its first step
    was done.
    """

    detection: float
    restart: float
    restore: float
    step: float

    @property
    def total(self) -> float:
        return self.detection + self.restart + self.restore + self.step


def recovery_after(lines: list[dict], fault: float) -> Recovery | None:
    """Return the recovery from a fault at a time of the clock; None: it has not ended.

    An attempt that began and was lost again counts as a part of the restart.
    """
    after = [line for line in lines if line["time"] >= fault]
    noticed = next((x["time"] for x in after if x["event"] in ("lost", "launched")), None)
    stepped = next((n for n, line in enumerate(after) if line["event"] == "stepped"), None)
    if noticed is None or stepped is None:
        return None
    found = {line["event"]: line["time"] for line in after[: stepped + 1]}
    return Recovery(
        detection=noticed - fault,
        restart=found["placed"] - noticed,
        restore=found["restored"] - found["placed"],
        step=found["stepped"] - found["restored"],
    )
