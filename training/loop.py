"""The training loop. It knows an objective, an engine and a feed; not which model it trains, nor
who else does."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.base.run_dir import step_folder, step_folders, step_of
from training.checkpoints import checkpoint
from training.checkpoints.records import Progress, agreed, newest_agreed
from training.checkpoints.writer import Writer
from training.config import RunConfig, TrainConfig
from training.data.dataloader import Batch, Reader
from training.data.feeds import make_feed
from training.engine.ema import Averages
from training.engine.engines import Engine
from training.engine.optimizer import learning_rate_ratio
from training.runs.events import num_attempts, report_incident
from training.runs.reporting import Reporter
from training.runs.signals import stop_wanted

MAX_NONFINITE_IN_A_ROW = 10


def as_it_is(model: Any, batches: list[Batch]) -> AbstractContextManager:
    """Leave the model alone while the gradient is taken."""
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained: made anew in every worker.

    objective(model, batch) -> {"loss": [B], other scores: [B]}; build_reader: makes its reader,
    here or in a process of Ray's; export: what config.json tells of the model; validate: scores of
    the averaged weights in a checkpoint's folder, None: there is nothing to validate on; around:
    holds the model otherwise while the gradient is taken, see engine/sam.py; hand_over: is told
    of each whole checkpoint's folder, by every rank.
    """

    model: nn.Module
    objective: Callable[[Any, Batch], dict[str, Tensor]]
    build_reader: Callable[[], Reader]
    export: dict
    block_size: int = 1
    validate: Callable[[Path], dict[str, float]] | None = None
    around: Callable[[Any, list[Batch]], AbstractContextManager] = as_it_is
    hand_over: Callable[[Path], None] | None = None


def train(job: Job, whole: RunConfig, engine: Engine, run: Path, reporter: Reporter) -> Progress:
    """Train to `train.num_steps`, or until stopped, from the run's newest valid checkpoint on."""
    config = whole.train
    feed = make_feed(job, whole, engine.rank, engine.world_size)
    averages = Averages(engine.fragments(), config.averages.ema_decay, config.averages.power_ema)
    writer, copies = Writer(beside=config.checkpoint.async_checkpoints), checkpoint.Copies()
    save = partial(_checkpoint, run, engine, averages, job=job, config=config, copies=copies)
    progress = _begun(run, engine, averages, reporter)
    if agreed(engine, int(_ended_early(run, progress, config))):
        writer.begin(partial(save, progress))
        writer.finish()
    if progress.step and _due(progress, config):  # killed between a checkpoint and its scores
        _validate(job, run, engine, progress, reporter)
    batches = feed.iterate(progress.step, config.schedule.num_steps)
    judge, in_a_row = _Judge(partial(_judge, job, run, engine, reporter), writer, reporter), 0
    engine.model.train()
    for step in range(progress.step, config.schedule.num_steps):
        # Fetch
        with reporter.fetching(step):
            micro_batches = next(batches)

        # Forward, Backward and step
        _seed_dropout(config.seed, step, engine.rank)
        with job.around(engine.model, micro_batches):
            scores = _forward_backward(engine, micro_batches)
        stop, written = stop_wanted(run, engine.rank), writer.idle
        finite, stop, written = _agreed(engine, scores, stop=stop, written=written)
        reporter.enters(step, "step")
        ratio = learning_rate_ratio(config, step)
        finite = _stepped(engine, scores, ratio, finite=finite)

        # Averages
        if finite:
            averages.update(step, progress.nonfinite_steps)

        # Report
        in_a_row = 0 if finite else in_a_row + 1
        progress = progress.after(micro_batches[0].num_real, finite=finite)
        reporter.trained(progress, micro_batches)
        reporter.step(progress, scores if finite else {}, ratio)

        # Checkpoint
        captures = _captures(run, engine, averages, progress, save, config, stop=stop)
        if written or captures:
            judge.now()
        for capture in captures:
            with reporter.checkpointing(step, writer):
                writer.begin(capture)
        if (job.validate or job.hand_over) and _due(progress, config):
            judge.later(progress)

        # Stop?
        if stop:
            break
        _require_finite(run, in_a_row)
    writer.finish()
    judge.now()
    _end(run, engine, progress, config)
    return progress


def _require_finite(run: Path, in_a_row: int) -> None:
    """Raise FloatingPointError where too many steps in a row moved nothing."""
    if in_a_row >= MAX_NONFINITE_IN_A_ROW:
        raise FloatingPointError(
            f"{run}: the loss was not finite {in_a_row} steps in a row; start over with --fresh "
            "and a lower learning rate"
        )


class _Judge:
    """Lets a checkpoint be judged once it is written, while training goes on: by all ranks after
    the same step, since handing over lets them meet."""

    def __init__(
        self, judge: Callable[[Progress], None], writer: Writer, reporter: Reporter
    ) -> None:
        self._judge, self._writer, self._reporter = judge, writer, reporter
        self._due: Progress | None = None

    def later(self, progress: Progress) -> None:
        self._due = progress

    def now(self) -> None:
        """Judge what is to be judged, if anything is; it is written before it is read."""
        due, self._due = self._due, None
        if due is not None:
            self._reporter.enters(due.step, "checkpoint")  # no step, however long it is waited for
            self._writer.finish()
            self._judge(due)


def _end(run: Path, engine: Engine, progress: Progress, config: TrainConfig) -> None:
    """Mark a run that has done all its steps as finished, scores and all."""
    if engine.rank == 0 and progress.step == config.schedule.num_steps:
        checkpoint.finish(run, step_folder(run, progress.step))


def _ended_early(run: Path, progress: Progress, config: TrainConfig) -> bool:
    """Say whether a run was killed after a checkpoint's fragments and before what follows them:
    its weights for inference, the deletion of older ones, and the run's end."""
    if not progress.step:
        return False
    whole = checkpoint.is_exported(step_folder(run, progress.step))
    return progress.step == config.schedule.num_steps or not whole


def _begun(run: Path, engine: Engine, averages: Averages, reporter: Reporter) -> Progress:
    """Continue from the newest checkpoint, and say so."""
    step = newest_agreed(run, engine)
    progress = checkpoint.restore(run, step, engine, averages) if step >= 0 else Progress()
    broken = [folder.name for folder in step_folders(run) if step_of(folder) > progress.step]
    if broken and engine.rank == 0:
        names = ", ".join(broken)
        message = f"{names}: no complete checkpoint; continues from step {progress.step}"
        report_incident(run, "broken", progress.step, message)
    attempt = agreed(engine, num_attempts(run))
    reporter.started(progress, num_workers=engine.world_size, attempt=attempt)
    return progress


def _captures(
    run: Path, engine: Engine, averages: Averages, progress: Progress, save: Callable,
    config: TrainConfig, *, stop: bool,
) -> list[Callable]:  # fmt: skip
    """Return what is to be captured and written after a step; save: makes a checkpoint."""
    due: list[Callable] = []
    if _snapshot_due(progress, config):
        due.append(partial(checkpoint.snapshot, run, engine, averages, progress))
    if stop or _due(progress, config):
        due.append(partial(save, progress))
    return due


def _snapshot_due(progress: Progress, config: TrainConfig) -> bool:
    """Say whether a snapshot of the power-function averages is due.

    It is written before the checkpoint of the same step, after which a killed run would go on
    without it. Until the first update, there is no average.
    """
    if not config.averages.snapshot_every or not progress.updates:
        return False
    last = progress.step == config.schedule.num_steps
    return progress.step % config.averages.snapshot_every == 0 or last


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed dropout by position, so that a resumed run drops what an undisturbed one would have
    dropped."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + rank) % (1 << 63))


def _forward_backward(engine: Engine, micro_batches: list[Batch]) -> dict[str, Tensor]:
    """Accumulate the gradient of the mean loss over the real samples of the global batch; return
    mean scores."""
    sums: dict[str, Tensor] = {}
    for batch in micro_batches:
        batch = batch.to(engine.device)
        scores = engine.losses(batch)
        # engines average over ranks and micro-batches; this makes that average the mean over real
        # samples
        share = engine.world_size * len(micro_batches) / max(1, batch.num_real)
        means = {name: (value * batch.weight).sum() * share for name, value in scores.items()}
        engine.backward(means["loss"])
        for name, value in means.items():
            mine = value.detach() / len(micro_batches)
            sums[name] = sums[name] + mine if name in sums else mine
    # read once, at the end: a GPU is not waited for between micro-batches
    packed = torch.stack([value.float() for value in sums.values()]).cpu()
    return dict(zip(sums, packed, strict=True))


def _agreed(
    engine: Engine, scores: dict[str, Tensor], *, stop: bool, written: bool
) -> tuple[bool, bool, bool]:
    """Say whether every rank's loss is finite, whether any rank wants to stop, and whether every
    rank has written its part of the last checkpoint; turn `scores` into means over ranks."""
    if engine.world_size > 1:
        mine = [*scores.values(), torch.tensor(float(stop)), torch.tensor(float(written))]
        packed = torch.stack([value.to(engine.device) for value in mine])
        dist.all_reduce(packed)
        packed = packed.cpu()
        for name, value in zip(scores, packed[:-2] / engine.world_size, strict=True):
            scores[name] = value
        stop, written = packed[-2].item() > 0, packed[-1].item() == engine.world_size
    return math.isfinite(scores["loss"].item()), stop, written


def _stepped(engine: Engine, scores: dict[str, Tensor], ratio: float, *, finite: bool) -> bool:
    """Step where the loss is finite; say whether the gradient, whose norm joins `scores`, was
    too."""
    if not finite:
        engine.discard()
        return False
    norm = engine.step(ratio)
    scores["grad_norm"] = torch.tensor(norm)
    return math.isfinite(norm)


def _judge(job: Job, run: Path, engine: Engine, reporter: Reporter, progress: Progress) -> None:
    """Score a new checkpoint, and hand it over where somebody else is to."""
    _validate(job, run, engine, progress, reporter)
    if job.hand_over is not None:
        job.hand_over(step_folder(run, progress.step))


def _validate(job: Job, run: Path, engine: Engine, progress: Progress, reporter: Reporter) -> None:
    """Score a checkpoint that has no scores yet, where the job knows how; one rank does, and the
    others wait for it."""
    if job.validate is None or engine.rank or reporter.is_validated(progress):
        return
    with reporter.validating(progress.step):
        reporter.validated(progress, job.validate(step_folder(run, progress.step)))


def _due(progress: Progress, config: TrainConfig) -> bool:
    last = progress.step == config.schedule.num_steps
    return progress.step % config.checkpoint.checkpoint_every == 0 or last


def _checkpoint(
    run: Path, engine: Engine, averages: Averages, progress: Progress, *,
    job: Job, config: TrainConfig, copies: checkpoint.Copies,
) -> Callable[[], None]:  # fmt: skip
    """Copy a checkpoint; returns what writes it and drops older ones."""
    write = checkpoint.capture(run, engine, averages, replace(progress), job.export, copies)

    def finish() -> None:
        folder = write()
        if engine.rank == 0:
            kept = config.checkpoint
            checkpoint.prune(run, kept.keep_checkpoints, folder, kept.keep_every)

    return finish
