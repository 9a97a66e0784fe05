"""The training loop. It knows a task, an engine and a run folder; neither the model nor the other
ranks."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.base.files import Json
from training.bucket.mirror import Mirror
from training.checkpoints.records import Progress
from training.checkpoints.schedule import Checkpoints
from training.config import RunConfig
from training.data.dataloader import Batch, Upload, as_it_is, make_loader
from training.data.datasets import ColumnDataset
from training.engine.ema import Ema
from training.engine.engines import Engine, Scores
from training.engine.optimizer import learning_rate_ratio
from training.runs.reporting import Reporter
from training.runs.signals import StopRequest

MAX_NONFINITE_IN_A_ROW = 10
QUEUED = ("cuda",)  # devices that compute behind the host
LONG_STEP = 1.0  # seconds, of which the wait for the end of a step is no share worth mentioning


def no_context(model: Any, batches: list[Batch]) -> AbstractContextManager:
    """Leave the model as it is while the gradient is taken."""
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained: built in every worker.

    objective(model, batch) -> {"loss": [B], other scores: [B]}; build_dataset: opens its data, here
    or in a process of Ray's; collate: adds to a batch what the objective needs of it and only the
    CPU knows without waiting, such as the lengths of its captions; it runs where batches are read
    ahead; export: what config.json says of the model; block_size: neighbouring samples that stay
    together; encoder: frozen, outside the engine; validate: scores of the averaged weights in a
    checkpoint's folder, None where there is no validation data; grad_context: holds while the
    gradient is taken, see engine/sam.py; on_checkpoint: called by every rank with the folder of
    each complete checkpoint.
    """

    model: nn.Module
    objective: Callable[[Any, Batch], Scores]
    build_dataset: Callable[[], ColumnDataset]
    export: Json
    collate: Callable[[Batch], Batch] = as_it_is
    block_size: int = 1
    encoder: nn.Module | None = None
    validate: Callable[[Path], dict[str, float]] | None = None
    grad_context: Callable[[Any, list[Batch]], AbstractContextManager] = no_context
    on_checkpoint: Callable[[Path], None] | None = None


def train(
    task: Task, options: RunConfig, engine: Engine, mirror: Mirror, reporter: Reporter
) -> Progress:
    """Train to `train.num_steps`, or until stopped, from the run's newest valid checkpoint."""
    config = options.train
    ema = Ema(engine.fragments(), config.averages.ema_decay, config.averages.power_ema)
    run = mirror.folder
    checkpoints = Checkpoints(task, mirror, engine, ema, config, reporter)
    account = Account(engine, ema, reporter, run, checkpoints.resume())
    loader = make_loader(
        task.build_dataset, options, collate=task.collate, block_size=task.block_size,
        rank=engine.rank, world_size=engine.world_size, pin_memory=engine.device.type == "cuda",
    )  # fmt: skip
    start, stop_request = account.progress.step, StopRequest(run, engine.rank)
    steps, on_device = loader.steps(start, config.schedule.num_steps), Upload(engine.device)
    engine.model.train()
    for step in range(start, config.schedule.num_steps):
        # Data
        with reporter.fetching(step):
            micro_batches = next(steps)

        # Forward and backward: the gradient of the mean over the real samples of the global batch.
        # Engines average over ranks and micro-batches; `scale` makes that average the mean.
        seed_dropout(config.seed, step, engine.rank)
        scores: Scores = {}
        with task.grad_context(engine.model, micro_batches):
            for batch in map(on_device, micro_batches):
                losses = engine.losses(batch)  # {"loss": [B], other scores: [B]}
                scale = engine.world_size * len(micro_batches) / max(1, batch.num_real)
                means = {name: (x * batch.weight).sum() * scale for name, x in losses.items()}
                engine.backward(means["loss"])
                for name, mean in means.items():  # stays on the device
                    mean = mean.detach() / len(micro_batches)
                    scores[name] = scores[name] + mean if name in scores else mean

        # Average, count and report the step before, whose scores have arrived meanwhile
        account.settle()

        # Optimizer step; skipped, and counted, where the loss or the gradient is not finite on any
        # rank: the gradient's norm is NaN then, see `poison_grads`
        reporter.enters(step, "step")
        lr_ratio = learning_rate_ratio(config, step)
        norm = engine.step(lr_ratio)
        stop, written = stop_request.wanted(), checkpoints.is_written
        account.add(micro_batches, lr_ratio, scores, norm, stop=stop, written=written)

        # Checkpoint: copied now, written while training continues, validated once it is written
        if account.waits or checkpoints.is_due(step + 1, account.flags):
            account.settle()
        if checkpoints.is_due(step + 1, account.flags):
            checkpoints.after_step(account.progress, account.flags)

        # Stop
        if account.flags.stop:
            break
    checkpoints.finish(account.progress)
    return account.progress


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed dropout by position: a resumed run drops what an undisturbed one would have dropped."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + rank) % (1 << 63))


# -- what the host learns of a step ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What the ranks agree about.

    stop: one of them is asked to stop; written: all have written the last checkpoint; slow: one
    took more than LONG_STEP over a step.
    """

    stop: bool = False
    written: bool = False
    slow: bool = False


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a step leaves: `values`, which `arrived` on the host, are the mean scores by `names`,
    of several ranks their flags, and the norm of the gradient."""

    micro_batches: list[Batch]
    lr_ratio: float
    names: list[str]
    values: Tensor
    arrived: torch.cuda.Event | None


class Account:
    """What the host knows of a run's steps, of which the newest may still be on the device.

    A GPU works off what the host puts into its queue, and idles where the host waits for the end of
    it. So `add` only sends for what a step leaves, and `settle` reads it when the gradient of the
    next step is in the queue but no weight has moved: progress and averages are then those of the
    step. Where a step is long, before a checkpoint and on a CPU, it is settled at once.
    """

    def __init__(
        self, engine: Engine, ema: Ema, reporter: Reporter, run: Path, progress: Progress
    ) -> None:
        self.progress, self.flags = progress, Flags()
        self._engine, self._ema, self._reporter, self._run = engine, ema, reporter, run
        self._results: Results | None = None
        self._num_nonfinite = 0  # steps in a row
        self._added = time.monotonic()

    @property
    def waits(self) -> bool:
        """Whether a step is settled at its end; all ranks agree."""
        return self._engine.device.type not in QUEUED or self.flags.slow

    def add(
        self, micro_batches: list[Batch], lr_ratio: float, scores: Scores, norm: Tensor,
        *, stop: bool, written: bool,
    ) -> None:  # fmt: skip
        """Send for what a step leaves on the device; stop, written: this rank's flags, which of
        several ranks hold once the step is settled."""
        before, self._added = self._added, time.monotonic()
        flags = Flags(stop=stop, written=written, slow=self._added - before > LONG_STEP)
        if self._engine.world_size == 1:
            self.flags = flags
        values = all_reduce_scores(self._engine, scores, flags)
        values = torch.cat([values, norm.detach().float().reshape(1)])
        values = values.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        arrived = None
        if norm.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._results = Results(
            micro_batches=micro_batches, lr_ratio=lr_ratio, names=list(scores), values=values,
            arrived=arrived,
        )  # fmt: skip

    def settle(self) -> None:
        """Average, count and report the last step, unless that is done; waits for its end.

        Raises FloatingPointError at the end of MAX_NONFINITE_IN_A_ROW steps without a finite one.
        """
        results, self._results = self._results, None
        if results is None:
            self.flags = Flags(slow=self.flags.slow)
            return
        if results.arrived is not None:
            results.arrived.synchronize()
        *values, norm = results.values.tolist()
        scores = dict(zip(results.names, values, strict=False)) | {"grad_norm": norm}
        if self._engine.world_size > 1:
            stop, unwritten, slow = values[len(results.names) :]
            self.flags = Flags(stop=stop > 0, written=not unwritten, slow=slow > 0)

        is_finite = math.isfinite(norm)
        if is_finite:
            self._ema.update(self.progress.step, self.progress.nonfinite_steps)
        self._num_nonfinite = 0 if is_finite else self._num_nonfinite + 1
        num_real = results.micro_batches[0].num_real
        self.progress = self.progress.after(num_real, finite=is_finite)
        self._reporter.trained(self.progress, results.micro_batches)
        self._reporter.step(self.progress, scores if is_finite else {}, results.lr_ratio)
        if self._num_nonfinite >= MAX_NONFINITE_IN_A_ROW:
            raise FloatingPointError(
                f"{self._run}: the loss was not finite {self._num_nonfinite} steps in a row; start "
                "over with --fresh and a lower learning rate"
            )


def all_reduce_scores(engine: Engine, scores: Scores, flags: Flags) -> Tensor:
    """Average the S scores over the ranks in one collective, in which their flags ride along.

    Returns [S], of several ranks [S + 3]: on how many one wants to stop, has not written its last
    checkpoint, or was slow.
    """
    packed = torch.stack([x.float() for x in scores.values()])
    if engine.world_size == 1:
        return packed
    raised = torch.tensor(
        [flags.stop, not flags.written, flags.slow], dtype=torch.float32,
        pin_memory=engine.device.type == "cuda",
    )  # fmt: skip
    packed = torch.cat([packed, raised.to(engine.device, non_blocking=True)])
    dist.all_reduce(packed)
    return torch.cat([packed[:-3] / engine.world_size, packed[-3:]])
