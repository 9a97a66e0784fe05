"""What a checkpoint holds: records, which vouch for its fragments, and the fragments by parameter.

A checkpoint is valid when the records of all its ranks are present, agree and verify.
"""

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from cluster.base.files import digest_file
from cluster.base.run_dir import FRAGMENTS_FOLDER, fragment_path, step_folder, step_folders, step_of
from training.engine.ema import EMA, POWER
from training.engine.engines import Engine

FORMAT = 1
VERSION = version("minidalle2")
MASTER = "master"  # section of a checkpoint: master/..., beside the averages' and the moments'
NOT_A_RECORD = (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run has done: all that is needed beside tensors to continue it."""

    step: int = 0
    samples_seen: int = 0
    nonfinite_steps: int = 0

    @property
    def updates(self) -> int:
        """Steps that moved the weights: the time of power-function averages."""
        return self.step - self.nonfinite_steps

    def after(self, num_real: int, *, finite: bool) -> "Progress":
        """Return the progress after one more step, of `num_real` samples."""
        return Progress(
            step=self.step + 1,
            samples_seen=self.samples_seen + num_real,
            nonfinite_steps=self.nonfinite_steps + (not finite),
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one rank wrote; version: of the project that wrote it; sha256: of its fragments."""

    format: int
    rank: int
    world_size: int
    optimizer_step: int
    sha256: str
    progress: dict[str, int]
    version: str = ""


def valid_records(folder: Path) -> list[Record] | None:
    """Return the records of a valid checkpoint in rank order, or None with a warning that says
    what is wrong."""
    records = read_records(folder)
    return records if records and _verify(folder, records) else None


def read_records(folder: Path) -> list[Record] | None:
    """Return the records of all ranks where they agree, or None with a warning; the fragments that
    they vouch for are not read.

    Raises OSError where the storage fails: it may answer the next attempt, and a run that continued
    without this checkpoint would delete it.
    """
    records: list[Record] = []
    for path in sorted((folder / FRAGMENTS_FOLDER).glob("rank_*.json")):
        try:
            values = json.loads(path.read_text())
            if values["format"] == FORMAT:
                records.append(Record(**values))
                continue
        except (FileNotFoundError, *NOT_A_RECORD) as error:
            warnings.warn(f"{folder}: unreadable checkpoint ({error})", stacklevel=2)
            return None
        # Skipping it would restart a long run
        writer = f"version {values['version']}" if values.get("version") else "another version"
        raise ValueError(
            f"{path}: found a checkpoint of format {values.get('format')}, expected {FORMAT}: "
            f"{writer} of minidalle2 wrote it; continue with that one, or start over with --fresh"
        )
    if not records or [r.rank for r in records] != list(range(records[0].world_size)):
        warnings.warn(
            f"{folder}: found the records of {len(records)} ranks, incomplete; skipped",
            stacklevel=2,
        )
        return None
    if any(r.progress != records[0].progress for r in records):
        warnings.warn(f"{folder}: its ranks disagree about their progress; skipped", stacklevel=2)
        return None
    return records


def _verify(folder: Path, records: Iterable[Record]) -> bool:
    """Return whether the fragments have the digests of their records; warn if not."""
    for record in records:
        path = fragment_path(folder, record.rank)
        try:
            if digest_file(path) == record.sha256:
                continue
        except FileNotFoundError as error:
            warnings.warn(f"{folder}: unreadable checkpoint ({error})", stacklevel=2)
            return False
        warnings.warn(f"{path}: digest differs from its record", stacklevel=2)
        return False
    return True


def newest_valid_step(run: Path, engine: Engine) -> int:
    """Return the step of the newest checkpoint that is valid for all ranks, or -1; every rank calls
    this.

    The first rank proposes the checkpoint: two ranks whose views of a storage differ must not start
    at two steps. Each verifies its share of the fragments, so that all are read once. Raises
    OSError where a rank does not see what the first one sees.
    """
    folders = step_folders(run) if engine.rank == 0 else []
    while True:
        candidates = (f for f in reversed(folders) if read_records(f) is not None)
        proposed = next(candidates, None)
        step = from_first_rank(engine, -1 if proposed is None else step_of(proposed))
        if step < 0:
            return step
        folder = step_folder(run, step)
        records = read_records(folder)
        if not records:
            raise OSError(
                f"{folder}: found no complete checkpoint, expected the one that rank 0 found: is "
                "the run folder on storage that all nodes share?"
            )
        if on_all_ranks(engine, _verify(folder, records[engine.rank :: engine.world_size])):
            return step
        folders = [f for f in folders if step_of(f) < step]


def from_first_rank(engine: Engine, value: int) -> int:
    """Return the first rank's value; every rank calls this, and waits for it."""
    if engine.world_size == 1:
        return value
    shared = torch.tensor(value, dtype=torch.int64, device=engine.device)
    dist.broadcast(shared, src=0)
    return int(shared)


def on_all_ranks(engine: Engine, value: bool) -> bool:
    """Return whether `value` is true on all ranks; every rank calls this, and waits for all."""
    if engine.world_size == 1:
        return value
    shared = torch.tensor(int(value), dtype=torch.int64, device=engine.device)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return bool(shared)


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
