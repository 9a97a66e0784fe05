"""The time and memory of each stage of a run, kept over reruns."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.base.files import Json, write_json
from cluster.base.progress import duration

DOUBT_SECONDS = 20.0  # of usual pace, which weigh as much as as many seconds measured here


@dataclass
class StageAttempt:
    """One try at a stage; the block sets `done` when nothing is left to do."""

    done: bool = False


class Timings:
    """Rows {stage, command, seconds, images, images_per_second, peak_memory_bytes, ended, done} in
    a JSON file; ended: Unix time in s."""

    def __init__(self, path: Path, usual: dict[str, float] | None = None) -> None:
        """usual: the stages to come, in their order, and the seconds that each takes elsewhere."""
        self._path, self._usual, self._lock = path, usual or {}, threading.Lock()
        self.rows: list[Json] = json.loads(path.read_text()) if path.is_file() else []

    @contextmanager
    def attempt(self, stage: str, command: str = "", num_images: int = 0) -> Iterator[StageAttempt]:
        """Time the block and add it to the stage's row, however the block ends.

        The seconds of interrupted attempts count. A finished row stays as it is: the time of a
        rerun that finds nothing to do is not the stage's.
        """
        from cluster.base.machine import PeakMemory

        before = next((row for row in self.rows if row["stage"] == stage), None)
        if before is not None and before.get("done"):
            yield StageAttempt(done=True)
            self._expose(stage)
            return
        attempt, peak, started = StageAttempt(), PeakMemory(), time.perf_counter()
        try:
            with peak:
                yield attempt
        finally:
            seconds = time.perf_counter() - started + (before["seconds"] if before else 0)
            peak_bytes = max(peak.bytes, before["peak_memory_bytes"] if before else 0)
            row = {
                "stage": stage, "command": command, "seconds": round(seconds, 2),
                "images": num_images,
                "images_per_second": round(num_images / seconds, 2) if num_images else None,
                "peak_memory_bytes": peak_bytes, "ended": time.time(), "done": attempt.done,
            }  # fmt: skip
            with self._lock:
                self.rows = [other for other in self.rows if other["stage"] != stage] + [row]
                write_json(self._path, self.rows, indent=1)
        self._expose(stage)

    def elapsed(self) -> float:
        """Return the seconds in which some stage ran; stages may run side by side.

        Rows of earlier versions, which ran none so, do not say when they ended.
        """
        total, until = sum(row["seconds"] for row in self.rows if "ended" not in row), 0.0
        dated = [row for row in self.rows if "ended" in row]
        spans = [(row["ended"] - row["seconds"], row["ended"]) for row in dated]
        for begin, end in sorted(spans):
            total += max(0.0, end - max(begin, until))
            until = max(until, end)
        return total

    def outlook(self, stage: str) -> str:
        """Return which stage begins, the time gone in all stages, and about the time left.

        The more seconds are gone, the more the pace of this machine counts for those to come; ""
        for a stage that is done, or none of the usual ones.
        """
        done = {row["stage"] for row in self.rows if row.get("done")}
        if stage in done or stage not in self._usual:
            return ""
        taken = self.elapsed()
        usual = sum(seconds for name, seconds in self._usual.items() if name in done)
        pace = (DOUBT_SECONDS + taken) / (DOUBT_SECONDS + usual)
        left = pace * sum(s for name, s in self._usual.items() if name not in done)
        number = [*self._usual].index(stage) + 1
        gone = duration(taken)
        about = duration(left)
        return f"stage {number} of {len(self._usual)}: {stage}, {gone} gone, about {about} left"

    def _expose(self, stage: str) -> None:
        """Set the metric of finished stages; "embed train" and "embed test" are one of them."""
        from cluster.base.metrics import STAGES, gauge

        kind = stage.split(" ")[0]
        done = [row for row in self.rows if row.get("done")]
        seconds = [row["seconds"] for row in done if row["stage"].split(" ")[0] == kind]
        if kind in STAGES and seconds:
            gauge("minidalle2_stage_seconds").set(sum(seconds), stage=kind)
