"""The reports of a run as trackers get them: its lines of scores, its pictures, its checkpoints.

A report is known by its place: of which source, by which attempt, at which step. A run that goes
back to a checkpoint reports the steps after it again, by a later attempt; the later one counts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.base.jsonl import NewLines
from cluster.base.run_dir import (
    LINE_KEYS,
    METRICS_NAME,
    STATE_NAME,
    VALIDATION_FOLDER,
    VALIDATION_NAME,
    step_folder,
    step_folders,
    step_of,
)

Source = Literal["train", "validation", "checkpoint"]
Place = tuple[int, int]  # attempt, step
Places = dict[Source, Place]  # of the last report of each source

NOT_SCORES = (*LINE_KEYS, "num_steps")  # the axis of all, and its end


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run reports of a step.

    time: when it did, in seconds since 1970; scores: none of a checkpoint; picture: what the
    validation drew; checkpoint: the URL of its folder.
    """

    source: Source
    place: Place
    time: float
    scores: dict[str, float]
    picture: Path | None = None
    checkpoint: str = ""

    @property
    def step(self) -> int:
        """The step, from 1 on."""
        return self.place[1]


class Reports:
    """Reads the reports of a run that come after certain places, each once."""

    def __init__(self, run: Path, place: str, sent: Places) -> None:
        """place: the folder or URL of the run, of which `run` may be a copy."""
        self._run, self._sent = run, sent
        self._url = place if "://" in place else Path(place).as_uri()
        self._files: dict[Source, NewLines] = {
            "train": NewLines(run / METRICS_NAME, again=True),
            "validation": NewLines(run / VALIDATION_NAME, again=True),
        }

    def read(self) -> list[Report]:
        """Return the reports since the last call, those of each source in their order."""
        found = self._checkpoints()
        for source, lines in self._files.items():
            for line in lines.read():
                place = (line.get("attempt", 0), line["step"])  # runs of before have none
                scores = {
                    name: float(value)
                    for name, value in line.items()
                    if isinstance(value, int | float) and name not in NOT_SCORES
                }
                picture = None
                if source == "validation":
                    name = step_folder(self._run, line["step"]).name
                    picture = self._run / VALIDATION_FOLDER / f"{name}.png"
                found.append(
                    Report(
                        source=source, place=place, time=line.get("time", 0.0), scores=scores,
                        picture=picture if picture and picture.is_file() else None,
                    )
                )  # fmt: skip
        new = [r for r in found if r.place > self._sent.get(r.source, (-1, -1))]
        self._sent |= {report.source: report.place for report in new}
        return new

    def _checkpoints(self) -> list[Report]:
        """Return the checkpoints that are whole: their state is written last."""
        found = []
        for folder in step_folders(self._run):
            state = folder / STATE_NAME
            if (0, step_of(folder)) > self._sent.get("checkpoint", (-1, -1)) and state.is_file():
                found.append(
                    Report(
                        source="checkpoint", place=(0, step_of(folder)),
                        time=state.stat().st_mtime, scores={},
                        checkpoint=f"{self._url}/{folder.name}",
                    )
                )  # fmt: skip
        return found
