"""What vouches for the parts of a checkpoint: records, and which checkpoint a run goes on from.

A checkpoint is valid when the records of all its ranks are there, agree and verify.
"""

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.base.files import digest_file
from cluster.base.run_dir import step_folder, step_folders, step_of
from training.engine.engines import Engine

FORMAT = 1
VERSION = version("minidalle2")
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
        """Return the progress after one more step, of so many samples."""
        return Progress(
            step=self.step + 1,
            samples_seen=self.samples_seen + num_real,
            nonfinite_steps=self.nonfinite_steps + (not finite),
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """One rank's part of a checkpoint; version: of the project, which wrote it."""

    format: int
    rank: int
    world_size: int
    optimizer_step: int
    sha256: str
    progress: dict[str, int]
    version: str = ""


def record_name(rank: int) -> str:
    return f"rank_{rank:04d}.json"


def records(folder: Path) -> list[Record] | None:
    """Return the records of a valid checkpoint in rank order, or None, with a warning that says
    what is wrong."""
    found = told_of(folder)
    return found if found and _verify(folder, found) else None


def told_of(folder: Path) -> list[Record] | None:
    """Return the records of all ranks where they agree, or None with a warning; the fragments that
    they vouch for are not read.

    Raises OSError where a storage fails: what it does not give now it may give to the next attempt,
    and a run that went on without would delete it.
    """
    found: list[Record] = []
    for path in sorted((folder / "fragments").glob("rank_*.json")):
        try:
            told = json.loads(path.read_text())
            if told["format"] == FORMAT:
                found.append(Record(**told))
                continue
        except (FileNotFoundError, *NOT_A_RECORD) as error:
            warnings.warn(f"{folder}: unreadable checkpoint ({error})", stacklevel=2)
            return None
        raise ValueError(_other_format(path, told))
    if not found or [r.rank for r in found] != list(range(found[0].world_size)):
        warnings.warn(
            f"{folder}: found the records of {len(found)} ranks, incomplete; skipped", stacklevel=2
        )
        return None
    if any(r.progress != found[0].progress for r in found):
        warnings.warn(f"{folder}: its ranks disagree about their progress; skipped", stacklevel=2)
        return None
    return found


def _verify(folder: Path, vouched: Iterable[Record]) -> bool:
    """Say whether the fragments of these ranks bear the digests of their records; warn if not."""
    for record in vouched:
        path = folder / "fragments" / f"rank_{record.rank:04d}.safetensors"
        try:
            if digest_file(path) == record.sha256:
                continue
        except FileNotFoundError as error:
            warnings.warn(f"{folder}: unreadable checkpoint ({error})", stacklevel=2)
            return False
        warnings.warn(f"{path}: digest differs from its record", stacklevel=2)
        return False
    return True


def _other_format(path: Path, told: dict) -> str:
    """Say whose checkpoint it is: to skip it would be to begin a long run anew."""
    who = f"version {told['version']}" if told.get("version") else "another version"
    return (
        f"{path}: found a checkpoint of format {told.get('format')}, expected {FORMAT}: {who} of "
        "minidalle2 wrote it; continue with that one, or start over with --fresh"
    )


def newest_valid(run: Path) -> tuple[Path, Progress] | None:
    """Return the newest valid checkpoint of `run`; broken ones are skipped with a warning."""
    for folder in reversed(step_folders(run)):
        found = records(folder)
        if found:
            return folder, Progress(**found[0].progress)
    return None


def newest_agreed(run: Path, engine: Engine) -> int:
    """Return the step of the newest checkpoint that is valid for all ranks, or -1; every rank calls
    this.

    It is looked for where the first rank sees one: two ranks whose views of a storage differ must
    not begin at two steps. Each verifies its share of the fragments, which are read once in all.
    Raises OSError where a rank does not find what the first one found.
    """
    folders = step_folders(run) if engine.rank == 0 else []
    while True:
        candidates = (f for f in reversed(folders) if told_of(f) is not None)
        folder = next(candidates, None)
        step = agreed(engine, -1 if folder is None else step_of(folder))
        if step < 0:
            return step
        told = told_of(step_folder(run, step))
        if not told:
            raise OSError(
                f"{step_folder(run, step)}: found no whole checkpoint, expected the one that rank "
                "0 found: is the run folder on storage that all nodes share?"
            )
        mine = told[engine.rank :: engine.world_size]
        if agreed_by_all(engine, _verify(step_folder(run, step), mine)):
            return step
        folders = [f for f in folders if step_of(f) < step]


def agreed(engine: Engine, value: int) -> int:
    """Return the first rank's value; every rank calls this, and waits for it."""
    if engine.world_size == 1:
        return value
    told = torch.tensor(value, dtype=torch.int64, device=engine.device)
    dist.broadcast(told, src=0)
    return int(told)


def agreed_by_all(engine: Engine, value: bool) -> bool:
    """Say whether all ranks say so; every rank calls this, and waits for the others."""
    if engine.world_size == 1:
        return value
    told = torch.tensor(int(value), dtype=torch.int64, device=engine.device)
    dist.all_reduce(told, dist.ReduceOp.MIN)
    return bool(told)
