"""What the event log of a run proves: how long a recovery took, which samples were trained."""

from dataclasses import dataclass
from pathlib import Path

from cluster.base.files import Json
from cluster.base.jsonl import read_lines
from cluster.base.run_dir import samples_paths


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Seconds from a fault to the next step, in four stages that follow each other.

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
        """Seconds of all stages together."""
        return self.detection + self.restart + self.restore + self.step


def recovery_after(lines: list[Json], fault: float) -> Recovery | None:
    """Return the recovery from a fault at that time of the clock; None if it has not ended.

    An attempt that began and was lost again counts as a stage of the restart.
    """
    after = [line for line in lines if line["time"] >= fault]
    noticed = next((line["time"] for line in after if line["event"] in ("lost", "launched")), None)
    stepped = next((n for n, line in enumerate(after) if line["event"] == "stepped"), None)
    if noticed is None or stepped is None:
        return None
    times = {line["event"]: line["time"] for line in after[: stepped + 1]}
    return Recovery(
        detection=noticed - fault,
        restart=times["placed"] - noticed,
        restore=times["restored"] - times["placed"],
        step=times["stepped"] - times["restored"],
    )


def trained_samples(run: Path, last_step: int) -> list[list[int]]:
    """Return the keys of the samples of each of the steps 1 to `last_step`, sorted.

    Raises ValueError where the log has no line of a step, or not of all its ranks.
    """
    logged: dict[int, dict[int, list[Json]]] = {}
    for path in samples_paths(run):
        for line in read_lines(path):
            logged.setdefault(line["step"], {}).setdefault(line["attempt"], []).append(line)
    steps = []
    for step in range(1, last_step + 1):
        attempts = logged.get(step, {})
        lines = attempts[max(attempts)] if attempts else []
        expected = lines[0]["num_workers"] if lines else 1
        if len(lines) != expected:
            raise ValueError(
                f"{run}: found the samples of {len(lines)} ranks at step {step}, expected "
                f"{expected}; a run must be logged from its first step on"
            )
        steps.append(sorted(key for line in lines for key in line["keys"]))
    return steps
