"""The time and memory of each stage of a run, kept over reruns."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.base.files import Json, write_json


@dataclass
class StageAttempt:
    """One try at a stage; the block sets `done` when nothing is left to do."""

    done: bool = False


class Timings:
    """Rows {stage, command, seconds, images, images_per_second, peak_memory_bytes, done} in a
    JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
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
                "peak_memory_bytes": peak_bytes, "done": attempt.done,
            }  # fmt: skip
            self.rows = [other for other in self.rows if other["stage"] != stage] + [row]
            write_json(self._path, self.rows, indent=1)
        self._expose(stage)

    def _expose(self, stage: str) -> None:
        """Set the metric of finished stages; "embed train" and "embed test" are one of them."""
        from cluster.base.metrics import STAGES, gauge

        kind = stage.split(" ")[0]
        done = [row for row in self.rows if row.get("done")]
        seconds = [row["seconds"] for row in done if row["stage"].split(" ")[0] == kind]
        if kind in STAGES and seconds:
            gauge("minidalle2_stage_seconds").set(sum(seconds), stage=kind)
