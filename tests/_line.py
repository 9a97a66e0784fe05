"""A model small enough to know every answer, y = w x + b, and a run of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.bucket.mirror import Mirror
from training.checkpoints.records import Progress
from training.config import RunConfig, TrainConfig
from training.data.dataloader import Batch
from training.data.datasets import ColumnDataset
from training.engine.engines import PlainEngine
from training.loop import Task, train
from training.runs.reporting import Reporter

NUM_SAMPLES = 10  # of batches of 4: the last one of an epoch has 2
CONFIG = TrainConfig.of(
    num_steps=7, global_batch_size=4, num_workers=0, precision="fp32", learning_rate=0.1,
    report_every=1, checkpoint_every=100, ema_decay=0.8, warmup=0.3, beta2=0.9,
)  # fmt: skip
Objective = Callable[[nn.Module, Batch], dict[str, Tensor]]


class Line(ColumnDataset):
    """Points of y = 2 x + 1."""

    data_sets = ((NUM_SAMPLES,),)

    def read(self, index: np.ndarray, keys: Tensor | None = None) -> dict[str, np.ndarray]:
        """Return `x` and `y`, float32 [n, 1]."""
        x = index[:, None].astype(np.float32) / NUM_SAMPLES
        return {"x": x, "y": 2 * x + 1}


def squared_error(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the squared error [B]."""
    return {"loss": (model(batch["x"]) - batch["y"]).square()[:, 0]}


def network() -> nn.Module:
    """Build the line, from the same weights each time."""
    torch.manual_seed(0)
    return nn.Linear(1, 1)


def run(
    path: Path | Mirror, config: TrainConfig = CONFIG, objective: Objective = squared_error,
    **fields: Any,
) -> tuple[nn.Module, Progress]:  # fmt: skip
    """Train the line in a folder, or continue; fields: more of the task's."""
    mirror = path if isinstance(path, Mirror) else Mirror(path)
    mirror.folder.mkdir(exist_ok=True)
    task = Task(
        model=network(), objective=objective, build_dataset=Line, export={"kind": "line"}, **fields
    )
    engine = PlainEngine(task.model, task.objective, config, torch.device("cpu"))
    reporter = Reporter(mirror.folder, config, 0)
    return task.model, train(task, RunConfig(train=config), engine, mirror, reporter)
