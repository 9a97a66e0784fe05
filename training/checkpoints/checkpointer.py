"""Checkpoints as fragments: each rank writes what it owns, any number of workers reads it back.

    step_00001000/fragments/rank_0000.safetensors   section/parameter/offset -> flat fp32 tensor
    step_00001000/fragments/rank_0000.json          digest of that file, world size, progress:
                                                    written after it
    step_00001000/{model,ema}.safetensors           assembled for inference
    step_00001000/state.json                        progress, for people; written last
    ema_snapshots/step_00001000/fragments/...       power-function averages alone, never pruned

A checkpoint is valid when the records of all its ranks are present, agree and verify. Nothing is
pickled. Files are written by a thread: training waits for a copy of its state, not for the disk.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cluster.base.files import Json, atomic_write, digest_file, write_json
from cluster.base.run_dir import (
    EMA_SNAPSHOTS_FOLDER,
    FRAGMENTS_FOLDER,
    STATE_NAME,
    STEP_PREFIX,
    fragment_path,
    record_path,
    step_folder,
    step_folders,
    step_of,
)
from models.weights import (
    CONFIG_NAME,
    EMA_NAME,
    FINAL_NAME,
    MODEL_NAME,
    save_config,
    save_weights,
)
from training.bucket.mirror import Mirror
from training.checkpoints.records import (
    FORMAT,
    MASTER,
    VERSION,
    FragmentReader,
    Progress,
    Record,
    from_first_rank,
    newest_valid_step,
    read_records,
    valid_records,
)
from training.config import TrainConfig
from training.engine.ema import EMA, POWER, Ema
from training.engine.engines import Engine, Fragment

AWAIT_SECONDS = 3600  # for the other ranks' fragments of a checkpoint
BUFFER = "buffer"
MOMENTUM, SQUARES = "exp_avg", "exp_avg_sq"  # as the optimizer names them


@contextmanager
def atomic_tensors(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a safetensors file, as `atomic_write` does.

    Raises OSError where the library raises an error of its own about one of the system.
    """
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


class Writer:
    """Does one write at a time, in a thread; what it raises, the next call raises.

    asynchronous: False writes at once, in the caller's time. seconds: what the last write took.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write") if asynchronous else None
        self._pending: Future | None = None
        self.seconds = 0.0

    @property
    def idle(self) -> bool:
        """Whether the last write has ended."""
        return self._pending is None or self._pending.done()

    def start(self, write: Callable[[], object]) -> None:
        """Start a write, after the one before has ended."""
        self.wait()
        if self._pool is None:
            self._timed(write)
        else:
            self._pending = self._pool.submit(self._timed, write)

    def wait(self) -> None:
        """Wait for the write that is under way; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _timed(self, write: Callable[[], object]) -> None:
        started = time.perf_counter()
        write()
        self.seconds = time.perf_counter() - started


class Checkpointer:
    """Saves, resumes, exports and deletes the checkpoints of one run; one object in each rank.

    `save` blocks for a copy of the state; a thread writes it, without communication, while training
    continues. Every rank makes the same calls.
    """

    def __init__(
        self, mirror: Mirror, engine: Engine, ema: Ema, export: Json,
        config: TrainConfig,
    ) -> None:  # fmt: skip
        """export: what config.json says of the model."""
        self._mirror, self._run, self._engine, self._ema = mirror, mirror.folder, engine, ema
        self._export_config, self._config = export, config
        self._writer = Writer(asynchronous=config.checkpoint.async_checkpoints)
        self._copies: dict[str, Tensor] = {}

    # -- resume ------------------------------------------------------------------------------------

    def resume(self) -> Progress:
        """Restore the newest checkpoint that is valid for all ranks; the start where there is none.

        A run may have been killed after a checkpoint's fragments: what follows them (the weights
        for inference, the deletion of older checkpoints, the end of the run) is done again.
        """
        if self._engine.rank == 0:
            # What a killed attempt left beside the files that it was writing
            unfinished = (f".{FINAL_NAME}.*.part", f"{STEP_PREFIX}*/.*.part")
            for path in (path for pattern in unfinished for path in self._run.glob(pattern)):
                with suppress(OSError):  # such as a file that is open on NFS: it is in no one's way
                    path.unlink()
        step = newest_valid_step(self._run, self._engine)
        if self._engine.rank == 0:
            self._mirror.forget_after(step)
        if step < 0:
            return Progress()
        progress = self.restore(step)
        is_exported = (step_folder(self._run, step) / STATE_NAME).is_file()
        is_last = step == self._config.schedule.num_steps
        if from_first_rank(self._engine, int(is_last or not is_exported)):
            self.save(progress)
            self.wait()
        return progress

    @torch.no_grad()
    def restore(self, step: int) -> Progress:
        """Read a valid checkpoint into the engine and the averages; each rank reads what it owns
        now, whoever wrote it."""
        engine, ema = self._engine, self._ema
        stored, records = _open(step_folder(self._run, step))
        stored.require(set(engine.shapes), set(ema.shadows))
        for fragment, shadows in zip(engine.fragments(), ema.by_fragment(), strict=True):
            restore_fragment(stored, fragment, shadows)
        for name, buffer in engine.model.named_buffers():
            flat = torch.empty(buffer.numel(), dtype=buffer.dtype)
            stored.read(f"{BUFFER}/{name}", 0, flat)
            buffer.copy_(flat.view(buffer.shape))
        engine.optimizer.num_steps = records[0].optimizer_step
        engine.sync_params()
        return Progress(**records[0].progress)

    # -- save --------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether the last write has ended."""
        return self._writer.idle

    @property
    def write_seconds(self) -> float:
        """What the last write took."""
        return self._writer.seconds

    def save(self, progress: Progress) -> None:
        """Copy the state and start to write it as the checkpoint of its step.

        The first rank then waits for the fragments of the others, exports the weights for inference
        and deletes older checkpoints.
        """
        self._writer.wait()  # only one copy is ever held
        engine, folder = self._engine, step_folder(self._run, progress.step)
        write = self._copy(folder, checkpoint_tensors(engine, self._ema), progress)
        if engine.rank:
            self._writer.start(write)
            return
        untrained = {
            name: tensor.detach().cpu().clone()
            for name, tensor in engine.model.state_dict().items()
            if name not in engine.shapes
        }
        kept, mirror = self._config.checkpoint, self._mirror

        def write_and_export() -> None:
            write()
            await_ranks(folder, mirror)
            export(folder, engine.shapes, untrained, self._export_config)
            exported = [folder / name for name in (MODEL_NAME, EMA_NAME, CONFIG_NAME)]
            mirror.push(*exported, write_json(folder / STATE_NAME, asdict(progress)))
            prune(mirror, kept.keep_checkpoints, folder, kept.keep_every)

        self._writer.start(write_and_export)

    def save_averages(self, progress: Progress) -> None:
        """Copy the power-function averages and start to write them as a snapshot."""
        self._writer.wait()
        folder = step_folder(self._run / EMA_SNAPSHOTS_FOLDER, progress.step)
        tensors = checkpoint_tensors(self._engine, self._ema)
        powers = (pair for pair in tensors if pair[0].startswith(POWER))
        self._writer.start(self._copy(folder, powers, progress))

    def wait(self) -> None:
        """Wait for the write under way; raises what it raised."""
        self._writer.wait()

    def finish(self, progress: Progress) -> None:
        """Wait for the last write; mark a run that has done all its steps as finished."""
        self.wait()
        if self._engine.rank == 0 and progress.step == self._config.schedule.num_steps:
            step = step_folder(self._run, progress.step).name
            self._mirror.push(write_json(self._run / FINAL_NAME, {"step": step}))

    def _copy(
        self, folder: Path, tensors: Iterable[tuple[str, Tensor]], progress: Progress
    ) -> Callable[[], None]:
        """Copy named flat tensors, and return what writes them to `folder`.

        Where an earlier attempt left the folder complete, with the same bits, nothing is written; a
        folder that a killed run left incomplete is deleted before any rank writes to it. The
        memory of the copy is kept for the next one: on a CPU most of a copy's time goes to pages
        that are touched for the first time, and pinned memory, to which a GPU copies several times
        faster, takes long to allocate.
        """
        engine = self._engine
        complete = engine.rank == 0 and folder.is_dir() and valid_records(folder) is not None
        if engine.rank == 0 and folder.is_dir() and not complete:
            self._mirror.remove(folder)
            shutil.rmtree(folder)
        if from_first_rank(engine, int(complete)):
            return lambda: None
        copied = {}
        for name, tensor in tensors:
            room = self._copies.get(name)
            if room is None or (room.shape, room.dtype) != (tensor.shape, tensor.dtype):
                room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._copies[name] = room
            copied[name] = room.copy_(tensor.detach())
        record = Record(
            format=FORMAT, rank=engine.rank, world_size=engine.world_size, sha256="",
            optimizer_step=engine.optimizer.num_steps, progress=asdict(progress), version=VERSION,
        )  # fmt: skip
        return partial(write_fragments, folder, copied, record, self._mirror)


def checkpoint_tensors(engine: Engine, ema: Ema) -> Iterator[tuple[str, Tensor]]:
    """Yield what a rank owns: "section/parameter/offset", flat tensor."""
    for fragment, shadows in zip(engine.fragments(), ema.by_fragment(), strict=True):
        sections = {MASTER: fragment.master, **shadows, **fragment.state}
        for section, tensor in sections.items():
            yield f"{section}/{fragment.name}/{fragment.offset}", tensor
    if engine.rank == 0:
        for name, buffer in engine.model.named_buffers():
            yield f"{BUFFER}/{name}/0", buffer.reshape(-1)


def write_fragments(
    folder: Path, tensors: dict[str, Tensor], record: Record, mirror: Mirror
) -> None:
    """Write what a rank owns, then the record that makes it count, with the digest."""
    path = fragment_path(folder, record.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_tensors(path) as temporary:
        save_file(tensors, str(temporary))
        record = replace(record, sha256=digest_file(temporary))
    mirror.push(path, write_json(record_path(folder, record.rank), asdict(record)))
    if record.rank:
        older = [each for each in step_folders(folder.parent) if each.name < folder.name]
        for each in older:
            mirror.drop(fragment_path(each, record.rank), record_path(each, record.rank))


def await_ranks(folder: Path, mirror: Mirror) -> None:
    """Wait for the records of all ranks that write a checkpoint, and for what they vouch for.

    The first rank's record says how many: an earlier, larger or smaller group may have written it.
    A rank that fails ends the group, and this wait.
    """
    world_size = json.loads(record_path(folder, 0).read_text())["world_size"]
    deadline, missing = time.monotonic() + AWAIT_SECONDS, list(range(world_size))
    while missing:
        missing = [rank for rank in missing if not mirror.is_pushed(record_path(folder, rank))]
        if missing and time.monotonic() > deadline:
            ranks = ", ".join(map(str, missing))
            raise OSError(f"{folder}: found no record of rank {ranks} in {AWAIT_SECONDS} s")
        time.sleep(0.02 if missing else 0.0)
    for rank in range(world_size):
        mirror.fetch(fragment_path(folder, rank), record_path(folder, rank))


def restore_fragment(
    stored: FragmentReader, fragment: Fragment, shadows: dict[str, Tensor]
) -> None:
    """Fill a fragment and the averages of it from a checkpoint."""
    stored.read(f"{MASTER}/{fragment.name}", fragment.offset, fragment.master)
    state, name = dict(fragment.state), fragment.name
    has_momentum, has_squares = (stored.holds(f"{key}/{name}") for key in (MOMENTUM, SQUARES))
    if SQUARES in state and has_momentum and not has_squares:
        # Muon's when it was written, AdamW's now, as CLIP's text_projection: its momentum shows how
        # large its gradients were
        squares = state.pop(SQUARES)
        stored.read(f"{MOMENTUM}/{name}", fragment.offset, squares)
        squares.square_()
        print(f"{stored.folder}: {name}: no {SQUARES}, starts at {MOMENTUM} squared", flush=True)
    for key, value in {**shadows, **state}.items():
        stored.read(f"{key}/{name}", fragment.offset, value)


def export(
    folder: Path, shapes: dict[str, torch.Size], untrained: dict[str, Tensor], config: Json
) -> None:
    """Assemble the weights for inference from the fragments of all ranks, read from storage.

    untrained: the model's other tensors.
    """
    stored, _ = _open(folder)
    for section, file in ((MASTER, MODEL_NAME), (EMA, EMA_NAME)):
        tensors = dict(untrained)
        for name, shape in shapes.items():
            flat = torch.empty(shape.numel())
            stored.read(f"{section}/{name}", 0, flat)
            tensors[name] = flat.view(shape)
        with atomic_tensors(folder / file) as temporary:
            save_weights(temporary, tensors)
    save_config(folder, config)


def _open(folder: Path) -> tuple[FragmentReader, list[Record]]:
    records = read_records(folder)
    assert records, f"{folder} was verified or written a moment ago"
    return FragmentReader(folder, len(records)), records


def prune(mirror: Mirror, num_kept: int, newest: Path, keep_every: int = 0) -> None:
    """Delete all checkpoints but `newest`, the `num_kept` - 1 before it, and those at multiples of
    `keep_every` steps (0: none).

    One after `newest` is broken, or the run would have continued from it; so is an earlier one that
    a kill cut short. Snapshots of averages are in another folder, and stay. What cannot be deleted
    now, such as a file that is open on NFS, is left to the next time.
    """
    folders = mirror.checkpoints()
    complete = [f for f in folders if f.name <= newest.name and mirror.is_complete(f)]
    kept = [*complete[-num_kept:], newest]
    if keep_every:
        kept += [f for f in complete if step_of(f) % keep_every == 0]
    for folder in folders:
        if folder in kept:
            continue
        try:
            mirror.remove(folder)
            for record in (folder / FRAGMENTS_FOLDER).glob("rank_*.json"):
                record.unlink()  # first: half of a checkpoint is none
            if folder.is_dir():
                shutil.rmtree(folder)
        except OSError as error:
            print(f"{folder}: not deleted, the next checkpoint tries again: {error}", flush=True)
