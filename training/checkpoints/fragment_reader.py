"""Reads the fragments of a checkpoint by parameter, whichever ranks wrote them."""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from cluster.base.run_dir import fragment_path
from training.engine.ema import EMA, POWER

MASTER = "master"  # section of a checkpoint: master/..., beside the averages' and the moments'


class FragmentReader:
    """The flat tensors of a checkpoint; only the requested elements are read."""

    def __init__(self, folder: Path, world_size: int) -> None:
        """Open the files of `world_size` ranks."""
        self._files = [
            safe_open(str(fragment_path(folder, rank)), "pt") for rank in range(world_size)
        ]
        self._places: dict[str, list[tuple[int, int, str]]] = {}
        for number, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118 - a safetensors file is not a dict
                name, _, offset = key.rpartition("/")
                self._places.setdefault(name, []).append((int(offset), number, key))
        self.folder = folder

    def sections(self) -> dict[str, set[str]]:
        """Return the names of the parameters stored in each section."""
        names: dict[str, set[str]] = {}
        for section, _, name in (key.partition("/") for key in self._places):
            names.setdefault(section, set()).add(name)
        return names

    def holds(self, name: str) -> bool:
        """Return whether any of "section/parameter" is stored."""
        return name in self._places

    def require(self, parameters: set[str], averages: set[str]) -> None:
        """Raise ValueError where a parameter is stored that the model does not have, or other
        averages than the run keeps.

        An average that starts in the middle of a run would have another profile than its name says.
        """
        sections = self.sections()
        for name in sorted(sections.get(MASTER, set()) - parameters):
            raise ValueError(
                f"{self.folder}: parameter {name}: found it stored, expected no such parameter; "
                "the checkpoint belongs to another model, start over with --fresh"
            )
        stored = {name for name in sections if name == EMA or name.startswith(POWER)}
        if stored != averages:
            raise ValueError(
                f"train.power_ema: found the averages {', '.join(sorted(stored))} in "
                f"{self.folder}, expected {', '.join(sorted(averages))}; continue with the run's "
                "own train.power_ema, or start over with --fresh"
            )

    def read(self, name: str, offset: int, target: Tensor) -> None:
        """Fill flat `target` with elements [offset, offset + len) of "section/parameter"."""
        num_read = 0
        for start, number, key in sorted(self._places.get(name, [])):
            fragment = self._files[number].get_slice(key)
            stop = start + fragment.get_shape()[0]
            lo, hi = max(start, offset), min(stop, offset + len(target))
            if lo < hi:
                values = fragment[lo - start : hi - start]
                target[lo - offset : hi - offset] = values.to(target.dtype)
                num_read += hi - lo
        if num_read != len(target):
            raise ValueError(
                f"{self.folder}: {name}: found {num_read} of {len(target)} elements from {offset}; "
                "the checkpoint belongs to another model, start over with --fresh"
            )
