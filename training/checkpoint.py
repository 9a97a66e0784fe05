"""Checkpoints as fragments: each rank writes what it owns, any number of workers reads it back.

    step_00001000/fragments/rank_0000.safetensors   section/parameter/offset -> flat fp32 tensor
    step_00001000/fragments/rank_0000.json          digest of that file, world size, progress:
    written after it
    step_00001000/{model,ema}.safetensors           assembled for inference     state.json  for
    people

A checkpoint is valid when the records of all its ranks are there, agree and verify. Nothing is
pickled.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ingest.commits import digest_file
from models.weights import FINAL_NAME, save_config, save_weights
from training.ema import Ema
from training.zero import Engine, Fragment

FORMAT = 1
MASTER, EMA, BUFFER = "master", "ema", "buffer"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run has done: all that is needed beside tensors to continue it."""

    step: int = 0
    samples_seen: int = 0
    nonfinite_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Record:
    """One rank's part of a checkpoint."""

    format: int
    rank: int
    world_size: int
    optimizer_step: int
    sha256: str
    progress: dict[str, int]


def step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step:08d}"


def _write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def records(folder: Path) -> list[Record] | None:
    """Return the records of a valid checkpoint in rank order, or None, with a warning that says
    what is wrong."""
    fragments = folder / "fragments"
    found: list[Record] = []
    try:
        for path in sorted(fragments.glob("rank_*.json")):
            record = Record(**json.loads(path.read_text()))
            if record.format != FORMAT:
                warnings.warn(
                    f"{path}: found format {record.format}, expected {FORMAT}", stacklevel=2
                )
                return None
            if digest_file(path.with_suffix(".safetensors")) != record.sha256:
                warnings.warn(
                    f"{path.with_suffix('.safetensors')}: digest differs from its record",
                    stacklevel=2,
                )
                return None
            found.append(record)
    except (OSError, json.JSONDecodeError, TypeError) as error:
        warnings.warn(f"{folder}: unreadable checkpoint ({error})", stacklevel=2)
        return None
    if not found or [r.rank for r in found] != list(range(found[0].world_size)):
        warnings.warn(
            f"{folder}: found the records of {len(found)} ranks, incomplete; skipped", stacklevel=2
        )
        return None
    if any(r.progress != found[0].progress for r in found):
        warnings.warn(f"{folder}: its ranks disagree about their progress; skipped", stacklevel=2)
        return None
    return found


def newest_valid(run: Path) -> tuple[Path, Progress] | None:
    """Return the newest valid checkpoint of `run`; broken ones are skipped with a warning."""
    for folder in sorted(run.glob("step_*"), reverse=True):
        found = records(folder)
        if found:
            return folder, Progress(**found[0].progress)
    return None


def _barrier(engine: Engine) -> None:
    if engine.world_size > 1:
        dist.barrier()


def _optimizer_step(engine: Engine) -> int:
    steps = [int(state["step"]) for state in engine.optimizer.state.values() if "step" in state]
    return max(steps, default=0)


def save(run: Path, engine: Engine, ema: Ema, progress: Progress, config: dict) -> Path:
    """Write a checkpoint; every rank calls this. Returns its folder.

    A folder left by a killed run at the same step is replaced, a valid one is kept: it holds the
    same bits.
    """
    folder = step_folder(run, progress.step)
    kept = folder.is_dir() and records(folder) is not None  # every rank's view: none writes yet
    if engine.rank == 0 and folder.is_dir() and not kept:
        shutil.rmtree(folder)
    _barrier(engine)
    if not kept:
        _write_fragments(folder / "fragments", engine, ema, progress)
    _barrier(engine)
    if engine.rank == 0:
        _export(folder, engine, config)
        _write_text(folder / "state.json", json.dumps(asdict(progress)))
    return folder


def _write_fragments(fragments: Path, engine: Engine, ema: Ema, progress: Progress) -> None:
    """Write what this rank owns, then the record that makes it count."""
    fragments.mkdir(parents=True, exist_ok=True)
    stem = fragments / f"rank_{engine.rank:04d}"
    part = stem.with_suffix(".part")
    save_file(dict(_tensors(engine, ema)), str(part))
    record = Record(
        format=FORMAT,
        rank=engine.rank,
        world_size=engine.world_size,
        optimizer_step=_optimizer_step(engine),
        sha256=digest_file(part),
        progress=asdict(progress),
    )
    part.replace(stem.with_suffix(".safetensors"))
    _write_text(stem.with_suffix(".json"), json.dumps(asdict(record)))


def _tensors(engine: Engine, ema: Ema) -> Iterator[tuple[str, Tensor]]:
    for fragment, shadow in zip(engine.fragments(), ema.shadows, strict=True):
        where = f"{fragment.name}/{fragment.offset}"
        yield f"{MASTER}/{where}", fragment.master.detach().cpu().clone()
        yield f"{EMA}/{where}", shadow.cpu().clone()
        for key, value in fragment.state.items():
            yield f"{key}/{where}", value.detach().cpu().clone()
    if engine.rank == 0:
        for name, buffer in engine.model.named_buffers():
            yield f"{BUFFER}/{name}/0", buffer.detach().cpu().reshape(-1).clone()


class Fragments:
    """The flat tensors of a checkpoint, whoever wrote them; only what is asked for is read."""

    def __init__(self, folder: Path, found: list[Record]) -> None:
        self._files = [
            safe_open(str(folder / "fragments" / f"rank_{r.rank:04d}.safetensors"), "pt")
            for r in found
        ]
        self._parts: dict[str, list[tuple[int, int, str]]] = {}
        for number, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118 - a safetensors file is not a dict
                name, _, offset = key.rpartition("/")
                self._parts.setdefault(name, []).append((int(offset), number, key))
        self.folder = folder

    def require_parameters(self, expected: set[str]) -> None:
        """Raise ValueError where a parameter is stored that the model does not have."""
        stored = {name.partition("/")[2] for name in self._parts if name.startswith(f"{MASTER}/")}
        for name in sorted(stored - expected):
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


def restore(folder: Path, engine: Engine, ema: Ema) -> None:
    """Read a checkpoint into the engine and the EMA; every rank reads what it owns now."""
    found = records(folder)
    assert found, f"{folder} was valid a moment ago"
    stored = Fragments(folder, found)
    stored.require_parameters(set(engine.shapes))
    with torch.no_grad():
        for fragment, shadow in zip(engine.fragments(), ema.shadows, strict=True):
            _restore_fragment(stored, fragment, shadow)
        for name, buffer in engine.model.named_buffers():
            flat = torch.empty(buffer.numel(), dtype=buffer.dtype)
            stored.read(f"{BUFFER}/{name}", 0, flat)
            buffer.copy_(flat.view(buffer.shape))
        for state in engine.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(found[0].optimizer_step)
    engine.refresh()


def _restore_fragment(stored: Fragments, fragment: Fragment, shadow: Tensor) -> None:
    stored.read(f"{MASTER}/{fragment.name}", fragment.offset, fragment.master)
    stored.read(f"{EMA}/{fragment.name}", fragment.offset, shadow)
    for key, value in fragment.state.items():
        stored.read(f"{key}/{fragment.name}", fragment.offset, value)


def _export(folder: Path, engine: Engine, config: dict) -> None:
    """Assemble inference weights from all ranks' fragments: read from storage, without
    communication."""
    found = records(folder)
    assert found, f"{folder} was written a moment ago"
    stored = Fragments(folder, found)
    shapes = engine.shapes  # a partitioned parameter of the model's is empty
    state = engine.model.state_dict()
    for section, file in ((MASTER, "model.safetensors"), (EMA, "ema.safetensors")):
        tensors = {name: tensor for name, tensor in state.items() if name not in shapes}
        for name, shape in shapes.items():
            flat = torch.empty(shape.numel())
            stored.read(f"{section}/{name}", 0, flat)
            tensors[name] = flat.view(shape)
        save_weights(folder / file, tensors)
    save_config(folder, config)


def finish(run: Path, folder: Path) -> None:
    """Mark the run as finished: its weights are those of `folder`."""
    _write_text(run / FINAL_NAME, json.dumps({"step": folder.name}))


def prune(run: Path, keep: int, newest: Path) -> None:
    """Delete all checkpoints but `newest` and the `keep` - 1 before it.

    One after it is broken: the run would have continued from it otherwise.
    """
    folders = sorted(run.glob("step_*"))
    kept = [folder for folder in folders if folder.name <= newest.name][-keep:]
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder)
