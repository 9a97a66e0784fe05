"""The training loop. It knows a task, an engine and a run folder; neither the model nor the other
ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.base.files import Json
from training.checkpoints.records import Progress
from training.checkpoints.schedule import Checkpoints
from training.config import RunConfig
from training.data.dataloader import Batch, as_it_is, make_loader
from training.data.datasets import ColumnDataset
from training.engine.ema import Ema
from training.engine.engines import Engine, Scores
from training.engine.optimizer import learning_rate_ratio
from training.runs.reporting import Reporter
from training.runs.signals import stop_wanted

MAX_NONFINITE_IN_A_ROW = 10


def no_context(model: Any, batches: list[Batch]) -> AbstractContextManager:
    """Leave the model as it is while the gradient is taken."""
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained: built in every worker.

    objective(model, batch) -> {"loss": [B], other scores: [B]}; build_dataset: opens its data, here
    or in a process of Ray's; collate: adds to a batch what the objective needs of it and only the
    CPU knows without waiting, such as the lengths of its captions; it runs where batches are read
    ahead; export: what config.json says of the model; block_size: neighbouring
    samples that stay together; validate: scores of the averaged weights in a checkpoint's folder,
    None where there is no validation data; grad_context: holds while the gradient is taken, see
    engine/sam.py; on_checkpoint: called by every rank with the folder of each complete checkpoint.
    """

    model: nn.Module
    objective: Callable[[Any, Batch], Scores]
    build_dataset: Callable[[], ColumnDataset]
    export: Json
    collate: Callable[[Batch], Batch] = as_it_is
    block_size: int = 1
    validate: Callable[[Path], dict[str, float]] | None = None
    grad_context: Callable[[Any, list[Batch]], AbstractContextManager] = no_context
    on_checkpoint: Callable[[Path], None] | None = None


def train(
    task: Task, options: RunConfig, engine: Engine, run: Path, reporter: Reporter
) -> Progress:
    """Train to `train.num_steps`, or until stopped, from the run's newest valid checkpoint."""
    config = options.train
    ema = Ema(engine.fragments(), config.averages.ema_decay, config.averages.power_ema)
    checkpoints = Checkpoints(task, run, engine, ema, config, reporter)
    progress = checkpoints.resume()
    loader = make_loader(
        task.build_dataset, options, collate=task.collate, block_size=task.block_size,
        rank=engine.rank, world_size=engine.world_size, pin_memory=engine.device.type == "cuda",
    )  # fmt: skip
    steps = loader.steps(progress.step, config.schedule.num_steps)
    num_nonfinite = 0  # steps in a row
    engine.model.train()
    for step in range(progress.step, config.schedule.num_steps):
        # Data
        with reporter.fetching(step):
            micro_batches = next(steps)

        # Forward and backward: the gradient of the mean over the real samples of the global batch.
        # Engines average over ranks and micro-batches; `scale` makes that average the mean.
        seed_dropout(config.seed, step, engine.rank)
        scores: Scores = {}
        with task.grad_context(engine.model, micro_batches):
            for batch in micro_batches:
                batch = batch.to(engine.device)
                losses = engine.losses(batch)  # {"loss": [B], other scores: [B]}
                scale = engine.world_size * len(micro_batches) / max(1, batch.num_real)
                means = {name: (x * batch.weight).sum() * scale for name, x in losses.items()}
                engine.backward(means["loss"])
                for name, mean in means.items():  # stays on the device
                    mean = mean.detach() / len(micro_batches)
                    scores[name] = scores[name] + mean if name in scores else mean
        stop = stop_wanted(run, engine.rank)
        scores, flags = all_reduce_scores(engine, scores, stop=stop, written=checkpoints.is_written)

        # Optimizer step; skipped, and counted, where the loss or the gradient is not finite on any
        # rank: the gradient's norm is NaN then, see `poison_grads`
        reporter.enters(step, "step")
        lr_ratio = learning_rate_ratio(config, step)
        scores["grad_norm"] = torch.tensor(engine.step(lr_ratio))
        is_finite = bool(scores["grad_norm"].isfinite())
        if is_finite:
            ema.update(step, progress.nonfinite_steps)

        # Report
        num_nonfinite = 0 if is_finite else num_nonfinite + 1
        progress = progress.after(micro_batches[0].num_real, finite=is_finite)
        reporter.trained(progress, micro_batches)
        reporter.step(progress, scores if is_finite else {}, lr_ratio)

        # Checkpoint: copied now, written while training continues, validated once it is written
        stop, all_written = flags.tolist()
        checkpoints.after_step(progress, stop=stop, all_written=all_written)

        # Stop
        if stop:
            break
        if num_nonfinite >= MAX_NONFINITE_IN_A_ROW:
            raise FloatingPointError(
                f"{run}: the loss was not finite {num_nonfinite} steps in a row; start over with "
                "--fresh and a lower learning rate"
            )
    checkpoints.finish(progress)
    return progress


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed dropout by position: a resumed run drops what an undisturbed one would have dropped."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + rank) % (1 << 63))


def all_reduce_scores(
    engine: Engine, scores: Scores, *, stop: bool, written: bool
) -> tuple[Scores, Tensor]:
    """Average scores over the ranks in one collective, in which two flags ride along.

    stop: this rank wants to stop; written: it has written its last checkpoint. Returns the mean
    scores on the device, and bool [2]: any rank wants to stop, all ranks have written.
    """
    if engine.world_size == 1:
        return scores, torch.tensor([stop, written])
    flags = torch.tensor([stop, not written], dtype=torch.float32, device=engine.device)
    packed = torch.cat([torch.stack([x.float() for x in scores.values()]), flags])
    dist.all_reduce(packed)
    means = packed[:-2] / engine.world_size
    any_stops, any_writes = packed[-2:] > 0
    return dict(zip(scores, means, strict=True)), torch.stack([any_stops, ~any_writes])
