"""Checkpoints as fragments: each rank writes what it owns, any number of workers reads it back.

    step_00001000/fragments/rank_0000.safetensors   section/parameter/offset -> flat fp32 tensor
    step_00001000/fragments/rank_0000.json          digest of that file, world size, progress:
    written after it
    step_00001000/{model,ema}.safetensors           assembled for inference     state.json  for
    people
    ema_snapshots/step_00001000/fragments/...       power-function averages alone, never pruned

A checkpoint is valid when the records of all its ranks are there, agree and verify. Nothing is
pickled.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from cluster.base.files import digest_file
from cluster.base.run_dir import STATE_NAME, step_folder, step_folders, step_of
from models.weights import FINAL_NAME, save_config, save_weights
from training.checkpoints.fragments import MASTER, Fragments
from training.checkpoints.records import (
    FORMAT,
    VERSION,
    Progress,
    Record,
    agreed,
    record_name,
    records,
    told_of,
)
from training.checkpoints.writer import whole_or_not_at_all
from training.engine.ema import EMA, POWER, Averages
from training.engine.engines import Engine, Fragment

AWAIT_SECONDS = 3600  # for the other ranks' parts of a checkpoint
BUFFER = "buffer"
SNAPSHOTS = "ema_snapshots"
MOMENTUM, SQUARES = "exp_avg", "exp_avg_sq"  # as the optimizer names them


def _write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _barrier(engine: Engine) -> None:
    if engine.world_size > 1:
        dist.barrier()


def _optimizer_step(engine: Engine) -> int:
    steps = [int(state["step"]) for state in engine.optimizer.state.values() if "step" in state]
    return max(steps, default=0)


class Copies:
    """Memory in which the state of one checkpoint after the other is copied.

    It is kept between them: on a CPU most of a copy's time goes to pages that are touched for the
    first time, and a GPU copies to memory that is pinned, which takes long to get, several times
    faster. Its size is that of a rank's part of a checkpoint, from the first one on.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def of(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return copies of named flat tensors; those before them of the same names are gone."""
        copied = {}
        for name, tensor in tensors:
            kept = self._kept.get(name)
            if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
                pin = tensor.is_cuda
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
                self._kept[name] = kept
            copied[name] = kept.copy_(tensor.detach())
        return copied


def capture(
    run: Path, engine: Engine, averages: Averages, progress: Progress, config: dict,
    copies: Copies | None = None,
) -> Callable[[], Path]:  # fmt: skip
    """Copy the state of a checkpoint; every rank calls this.

    copies: where to, in the place of what was captured there before and must have been written;
    None: new memory. Returns what writes it, without communication, so that a thread can while
    training goes on; the first rank's then waits for the others' parts to appear, and returns the
    folder when it is whole.
    """
    folder = step_folder(run, progress.step)
    write = _captured(folder, engine, _tensors(engine, averages), progress, copies or Copies())
    if engine.rank:
        return write
    shapes = engine.shapes  # a partitioned parameter of the model's is empty
    state = engine.model.state_dict().items()
    others = {name: tensor.detach().cpu().clone() for name, tensor in state if name not in shapes}

    def whole() -> Path:
        write()
        _await_ranks(folder)
        _export(folder, shapes, others, config)
        _write_text(folder / STATE_NAME, json.dumps(asdict(progress)))
        return folder

    return whole


def is_exported(folder: Path) -> bool:
    """Say whether the weights for inference are there, beside the fragments."""
    return (folder / STATE_NAME).is_file()


def save(run: Path, engine: Engine, averages: Averages, progress: Progress, config: dict) -> Path:
    """Write a checkpoint at once; every rank calls this. Returns its folder."""
    folder = capture(run, engine, averages, progress, config)()
    _barrier(engine)
    return folder


def snapshot(
    run: Path, engine: Engine, averages: Averages, progress: Progress
) -> Callable[[], Path]:
    """Copy the power-function averages for a snapshot; every rank calls this. Returns what writes
    it, as `capture` does."""
    folder = step_folder(run / SNAPSHOTS, progress.step)
    return _captured(folder, engine, _power_tensors(engine, averages), progress, Copies())


def _captured(
    folder: Path, engine: Engine, tensors: Iterable[tuple[str, Tensor]], progress: Progress,
    copies: Copies,
) -> Callable[[], Path]:  # fmt: skip
    """Return what writes this rank's `tensors`, copied now, to a folder of all ranks' fragments.

    A folder left by a killed run at the same step is replaced, a valid one is kept: it holds the
    same bits.
    """
    kept = engine.rank == 0 and folder.is_dir() and records(folder) is not None
    if engine.rank == 0 and folder.is_dir() and not kept:
        shutil.rmtree(folder)
    kept = bool(agreed(engine, int(kept)))  # the first rank's view; no one writes before it
    mine = {} if kept else copies.of(tensors)
    optimizer_step = _optimizer_step(engine)

    def write() -> Path:
        if not kept:
            record = partial(
                Record, format=FORMAT, rank=engine.rank, world_size=engine.world_size,
                optimizer_step=optimizer_step, progress=asdict(progress), version=VERSION,
            )  # fmt: skip
            _write_fragments(folder / "fragments", engine.rank, mine, record)
        return folder

    return write


def _await_ranks(folder: Path) -> None:
    """Wait until the records of all that write a checkpoint are there: as many as the first rank's
    says, which may be of an earlier, larger or smaller, group. A rank that fails ends the group,
    and this wait."""
    told = json.loads((folder / "fragments" / record_name(0)).read_text())
    deadline, missing = time.monotonic() + AWAIT_SECONDS, list(range(told["world_size"]))
    while missing:
        missing = [r for r in missing if not (folder / "fragments" / record_name(r)).is_file()]
        if missing and time.monotonic() > deadline:
            told = ", ".join(map(str, missing))
            raise OSError(f"{folder}: found no record of rank {told} in {AWAIT_SECONDS} s")
        time.sleep(0.02 if missing else 0.0)


def _write_fragments(
    fragments: Path, rank: int, tensors: dict[str, Tensor], record: Callable[..., Record]
) -> None:
    """Write what this rank owns, then the record that makes it count."""
    fragments.mkdir(parents=True, exist_ok=True)
    stem = fragments / f"rank_{rank:04d}"
    with whole_or_not_at_all(stem.with_suffix(".safetensors")) as part:
        save_file(tensors, str(part))
        told = record(sha256=digest_file(part))
    _write_text(stem.with_suffix(".json"), json.dumps(asdict(told)))


def _power_tensors(engine: Engine, averages: Averages) -> Iterator[tuple[str, Tensor]]:
    for fragment, shadows in zip(engine.fragments(), averages.by_fragment(), strict=True):
        for section, shadow in shadows.items():
            if section.startswith(POWER):
                yield f"{section}/{fragment.name}/{fragment.offset}", shadow


def _tensors(engine: Engine, averages: Averages) -> Iterator[tuple[str, Tensor]]:
    for fragment, shadows in zip(engine.fragments(), averages.by_fragment(), strict=True):
        where = f"{fragment.name}/{fragment.offset}"
        yield f"{MASTER}/{where}", fragment.master
        for section, shadow in shadows.items():
            yield f"{section}/{where}", shadow
        for key, value in fragment.state.items():
            yield f"{key}/{where}", value
    if engine.rank == 0:
        for name, buffer in engine.model.named_buffers():
            yield f"{BUFFER}/{name}/0", buffer.reshape(-1)


def restore(run: Path, step: int, engine: Engine, averages: Averages) -> Progress:
    """Read a checkpoint that `newest_agreed` found into the engine and the averages; every rank
    reads what it owns now."""
    folder = step_folder(run, step)
    found = told_of(folder)
    assert found, f"{folder} was verified a moment ago"
    stored = Fragments(folder, len(found))
    stored.require_parameters(set(engine.shapes))
    stored.require_averages(averages.sections())
    with torch.no_grad():
        for fragment, shadows in zip(engine.fragments(), averages.by_fragment(), strict=True):
            _restore_fragment(stored, fragment, shadows)
        for name, buffer in engine.model.named_buffers():
            flat = torch.empty(buffer.numel(), dtype=buffer.dtype)
            stored.read(f"{BUFFER}/{name}", 0, flat)
            buffer.copy_(flat.view(buffer.shape))
        for state in engine.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(found[0].optimizer_step)
    engine.refresh()
    return Progress(**found[0].progress)


def _restore_fragment(stored: Fragments, fragment: Fragment, shadows: dict[str, Tensor]) -> None:
    stored.read(f"{MASTER}/{fragment.name}", fragment.offset, fragment.master)
    state, name = dict(fragment.state), fragment.name
    has = [stored.holds(f"{key}/{name}") for key in (MOMENTUM, SQUARES)]
    if SQUARES in state and has == [True, False]:
        # Muon's when it was written, AdamW's now, as CLIP's text_projection: its momentum tells how
        # large its gradients were
        squares = state.pop(SQUARES)
        stored.read(f"{MOMENTUM}/{name}", fragment.offset, squares)
        squares.square_()
        print(f"{stored.folder}: {name}: no {SQUARES}, begins at {MOMENTUM} squared", flush=True)
    for key, value in {**shadows, **state}.items():
        stored.read(f"{key}/{fragment.name}", fragment.offset, value)


def _export(
    folder: Path, shapes: dict[str, torch.Size], others: dict[str, Tensor], config: dict
) -> None:
    """Assemble inference weights from all ranks' fragments: read from storage, without
    communication. others: the tensors that are not trained."""
    found = told_of(folder)
    assert found, f"{folder} was written a moment ago"
    stored = Fragments(folder, len(found))
    for section, file in ((MASTER, "model.safetensors"), (EMA, "ema.safetensors")):
        tensors = dict(others)
        for name, shape in shapes.items():
            flat = torch.empty(shape.numel())
            stored.read(f"{section}/{name}", 0, flat)
            tensors[name] = flat.view(shape)
        with whole_or_not_at_all(folder / file) as part:
            save_weights(part, tensors)
    save_config(folder, config)


def finish(run: Path, folder: Path) -> None:
    """Mark the run as finished: its weights are those of `folder`."""
    _write_text(run / FINAL_NAME, json.dumps({"step": folder.name}))


def prune(run: Path, keep: int, newest: Path, keep_every: int = 0) -> None:
    """Delete all checkpoints but `newest`, the `keep` - 1 before it, and those at multiples of
    `keep_every` steps (0: none).

    One after `newest` is broken: the run would have continued from it otherwise; so is one that a
    kill has cut short before. Snapshots of averages lie elsewhere, and stay.
    """
    folders = step_folders(run)
    whole = [f for f in folders if f.name <= newest.name and told_of(f) is not None]
    kept = [*whole[-keep:], newest]
    if keep_every:
        kept += [f for f in whole if step_of(f) % keep_every == 0]
    for folder in folders:
        if folder not in kept:
            _delete(folder)


def _delete(folder: Path) -> None:
    """Delete a checkpoint, its records first: half of one is none.

    What cannot be deleted now, such as a file that somebody has open on NFS, is told, and left to
    the next time: the training does not need its room yet.
    """
    try:
        for record in (folder / "fragments").glob("rank_*.json"):
            record.unlink()
        shutil.rmtree(folder)
    except OSError as error:
        print(f"{folder}: not deleted, the next checkpoint tries again: {error}", flush=True)
