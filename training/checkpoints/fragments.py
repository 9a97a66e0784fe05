"""What the ranks of a checkpoint wrote, read by parameter, whoever wrote it."""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from training.engine.ema import EMA, POWER

MASTER = "master"  # section of a checkpoint: master/..., beside the averages' and the moments'


class Fragments:
    """The flat tensors of a checkpoint, whoever wrote them; only what is asked for is read."""

    def __init__(self, folder: Path, world_size: int) -> None:
        """Open the files of so many ranks."""
        self._files = [
            safe_open(str(folder / "fragments" / f"rank_{rank:04d}.safetensors"), "pt")
            for rank in range(world_size)
        ]
        self._parts: dict[str, list[tuple[int, int, str]]] = {}
        for number, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118 - a safetensors file is not a dict
                name, _, offset = key.rpartition("/")
                self._parts.setdefault(name, []).append((int(offset), number, key))
        self.folder = folder

    def sections(self) -> dict[str, set[str]]:
        """Return the names of the parameters stored in each section."""
        found: dict[str, set[str]] = {}
        for section, _, name in (key.partition("/") for key in self._parts):
            found.setdefault(section, set()).add(name)
        return found

    def holds(self, name: str) -> bool:
        """Say whether any of "section/parameter" is stored."""
        return name in self._parts

    def require_averages(self, expected: set[str]) -> None:
        """Raise ValueError where other averages are stored than the run keeps: one that begins
        in the middle of a run would be of another profile than its name says."""
        averages = {name for name in self.sections() if name == EMA or name.startswith(POWER)}
        if averages != expected:
            raise ValueError(
                f"train.power_ema: found the averages {', '.join(sorted(averages))} in "
                f"{self.folder}, expected {', '.join(sorted(expected))}; continue with the run's "
                "own train.power_ema, or start over with --fresh"
            )

    def require_parameters(self, expected: set[str]) -> None:
        """Raise ValueError where a parameter is stored that the model does not have."""
        for name in sorted(self.sections().get(MASTER, set()) - expected):
            raise ValueError(
                f"{self.folder}: parameter {name}: found it stored, expected no such parameter; "
                "the checkpoint belongs to another model, start over with --fresh"
            )

    def read(self, name: str, offset: int, target: Tensor) -> None:
        """Fill flat `target` with elements [offset, offset + len) of "section/parameter"."""
        filled = 0
        for start, number, key in sorted(self._parts.get(name, [])):
            part = self._files[number].get_slice(key)
            stop = start + part.get_shape()[0]
            lo, hi = max(start, offset), min(stop, offset + len(target))
            if lo < hi:
                target[lo - offset : hi - offset] = part[lo - start : hi - start].to(target.dtype)
                filled += hi - lo
        if filled != len(target):
            raise ValueError(
                f"{self.folder}: {name}: found {filled} of {len(target)} elements from {offset}; "
                "the checkpoint belongs to another model, start over with --fresh"
            )
