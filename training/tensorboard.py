"""A run's lines as TensorBoard events, for those who watch their runs there.

metrics.jsonl and validation.jsonl remain what a run says of itself: events hold the same numbers.
"""

import time
from collections.abc import Iterable
from pathlib import Path

EVENTS_NAME = "tensorboard"
ASIDE = ("step", "num_steps")  # not scores: the axis of all, and its end


class Events:
    """Writes <run>/tensorboard, from the driver."""

    def __init__(
        self, run: Path, before: Iterable[dict] = (), validated_before: Iterable[dict] = ()
    ) -> None:
        """before, validated_before: lines that the run has already, which go in where it has no
        events yet."""
        from tensorboardX import SummaryWriter  # 0.3 s that most runs have no need of

        folder = run / EVENTS_NAME
        begins = not folder.is_dir()
        # its names tell seconds alone, and a second writer of one would overwrite the first's
        self._writer = SummaryWriter(str(folder), filename_suffix=f".{time.time_ns()}")
        if begins:
            self.add(before)
            self.add(validated_before, "validation")

    def add(self, lines: Iterable[dict], group: str = "train") -> None:
        """Write the numbers of lines, as <group>/<name> at their steps, to the disk."""
        lines = list(lines)
        for line in lines:
            for name, value in line.items():
                if name not in ASIDE and isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{group}/{name}", value, line["step"])
        if lines:
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()
