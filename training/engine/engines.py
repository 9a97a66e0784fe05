"""Engines turn losses into steps: DeepSpeed under Ray, plain PyTorch in one process.

A rank owns *fragments*: flat views of fp32 master weights and optimizer state, by parameter name
and offset. EMA and checkpoints know fragments only, so they are the same code for every engine and
world size.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.base.files import Json
from training.config import TrainConfig
from training.data.dataloader import Batch
from training.engine.choices import MAX_BUCKET, zero_stage
from training.engine.optimizer import Optimizer, build_optimizer, set_learning_rate
from training.engine.precision import autocast, settled
from training.engine.zero_partitions import (
    STAGES,
    Fragment,
    ZeroPartition,
    full_parameters,
    trained_parameters,
    without_compiled_collectives,
)

# Elements up to which stage 3 keeps a parameter whole on every rank: gathering norms, biases and
# other small ones at each use would cost more than they weigh. DeepSpeed's default.
WHOLE_UP_TO = 100_000
Scores = dict[str, Tensor]  # {"loss": [B], ...}


class Engine(Protocol):
    """One optimizer step at a time; `rank` and `world_size` as torch.distributed counts.

    shapes: of the trained parameters, complete; `model` may hold them partitioned, and then
    computes inside of `losses` only.
    """

    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
    shapes: dict[str, torch.Size]
    optimizer: Optimizer

    def losses(self, batch: Batch) -> Scores:
        """Return the loss [B] of each sample, and its other scores."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar loss, divided by the number of micro-batches.

        Where the loss is not finite the gradient is NaN, on all ranks after their sum.
        """
        ...

    def step(self, learning_rate_ratio: float) -> Tensor:
        """Step along the accumulated gradient and return its global norm, scalar, on the device.

        Where the norm is not finite, no rank moves.
        """
        ...

    def fragments(self) -> list[Fragment]:
        """Return what this rank owns of the weights and the optimizer state."""
        ...

    def sync_params(self) -> None:
        """Copy the master fragments, after a restore, into every rank's weights."""
        ...


class Objective(nn.Module):
    """A model and its objective as one module: an engine's forward pass is the objective's."""

    def __init__(self, model: nn.Module, objective: Callable[[Any, Batch], Scores]) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, batch: Batch) -> Scores:
        """Return the losses [B] and scores [B] of a batch."""
        return self._objective(self.model, batch)


def poison_grads(loss: Tensor) -> Tensor:
    """Return `loss`, whose gradient is NaN where the loss is not finite, and unchanged elsewhere.

    An infinite loss may have a finite gradient. The ranks' sum carries the NaN to all of them, so
    all skip the step, and none waits for the host to look at its loss.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def _clip(model: nn.Module, config: TrainConfig) -> Tensor:
    """Clip the gradients to a global norm of `grad_clip`; returns the norm before, scalar.

    A parameter that no micro-batch used gets a gradient of zero, as from DeepSpeed's sum over
    ranks: both engines draw the same curve.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip or float("inf"))


class PlainEngine:
    """PyTorch alone, one process: unit tests, debuggers, one GPU without Ray and DeepSpeed."""

    rank, world_size = 0, 1

    def __init__(
        self, model: nn.Module, objective: Callable, config: TrainConfig, device: torch.device
    ) -> None:
        self.model, self.device, self._config = model.to(device), device, config
        self.shapes = {name: p.shape for name, p in trained_parameters(model)}
        self._objective = objective
        self.optimizer = build_optimizer(model, config)
        self.optimizer.prepare()

    def losses(self, batch: Batch) -> Scores:
        """Return the losses [B] of a batch, computed in the run's precision."""
        with autocast(self.device.type, self._config.workers.precision):
            return self._objective(self.model, batch)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch."""
        (poison_grads(loss) / self._config.grad_accum_steps).backward()

    def step(self, learning_rate_ratio: float) -> Tensor:
        """Clip, step where the norm is finite, and drop the gradient; returns the norm."""
        norm = _clip(self.model, self._config)
        set_learning_rate(self.optimizer.param_groups, learning_rate_ratio)
        self.optimizer.found_inf = 1.0 - norm.isfinite().float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def fragments(self) -> list[Fragment]:
        """Return all parameters, each as one fragment."""
        return list(full_parameters(self.model, self.optimizer, 0, 1))

    def sync_params(self) -> None:
        """Do nothing: fragments are the parameters themselves."""


def bucket_elements(sizes: Iterable[int]) -> int:
    """Return how many elements DeepSpeed reduces at once, by the sizes of all parameters.

    About a sixteenth of them: the first bucket is full, and its reduction begins, after that share
    of the gradients.
    """
    sizes = list(sizes)
    return min(MAX_BUCKET, max(*sizes, sum(sizes) // 16))


class ZeroEngine:
    """DeepSpeed, stages 0 to 3, through its public interface.

    Weights are fp32; bf16 is autocast, so one code path serves both precisions. Stages 1 to 3
    reduce gradients while the last micro-batch's backward pass still computes others. Stage 0
    reduces them after it, and in fp32. Stages 1 and 2 gather new weights in fp32: DeepSpeed gathers
    bf16 only where the weights that layers read are bf16 themselves. Their step looks at the norm
    on the host, and so waits for the GPU once.
    """

    def __init__(
        self, model: nn.Module, objective: Callable, config: TrainConfig, device: torch.device
    ) -> None:
        import deepspeed

        without_compiled_collectives()
        self.model, self.device, self._config = model.to(device), device, config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.shapes = {name: p.shape for name, p in trained_parameters(model)}
        self._stage = zero_stage(config, self._num_parameters, device.type)
        if config.workers.zero_stage is None and self.rank == 0:
            print(f"zero_stage: {self._stage}, for {self._num_parameters:,} parameters", flush=True)
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        if self._stage == 3 and frozen:
            raise ValueError(
                f"train.zero_stage: found 3 with the frozen parameter {frozen[0]}, expected at "
                "most 2: it partitions all parameters, and checkpoints hold the trained ones"
            )
        self.optimizer = build_optimizer(model, config)
        self._num_backwards = 0
        self._grad_accum_steps = config.micro_batches(self.world_size)
        self._engine: Any = deepspeed.initialize(
            model=Objective(model, objective), optimizer=self.optimizer, config=self._settings()
        )[0]
        partition = STAGES[self._stage]
        self._partition: ZeroPartition = partition(model, self._engine, self.optimizer)

    @property
    def _num_parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    def _settings(self) -> Json:
        """Return DeepSpeed's configuration."""
        config, workers = self._config, self._config.workers
        samples = config.samples_a_worker(self.world_size)
        return {
            "train_batch_size": samples * self.world_size,
            "train_micro_batch_size_per_gpu": samples // self._grad_accum_steps,
            "gradient_accumulation_steps": self._grad_accum_steps,
            # Without ZeRO, DeepSpeed returns no norm and steps along a gradient that is not finite:
            # `step` clips.
            "gradient_clipping": config.optimizer.grad_clip if self._stage else 0.0,
            "zero_optimization": {
                "stage": self._stage,
                # stages 1 and 2 then add up a bucket in its place, not in a copy (measured on CPU);
                # stage 3 would rely on the order in which ranks' gradients come
                "reduce_scatter": self.device.type != "cpu" or self._stage == 3,
                "reduce_bucket_size": bucket_elements(map(math.prod, self.shapes.values())),
                # without it stages 1 and 2 reduce after the backward pass
                "overlap_comm": True,
                "stage3_param_persistence_threshold": WHOLE_UP_TO,
                **({"offload_optimizer": {"device": "cpu"}} if workers.offload == "cpu" else {}),
            },
            # DeepSpeed recognises AdamW by type; ours is AdamW by arithmetic, on the CPU as well,
            # where DeepSpeed's own would have to be compiled
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {
                "enabled": settled(workers.precision, self.device.type) == "bf16",
                "dtype": "bfloat16",
            },
            "steps_per_print": 1 << 30,
        }

    def losses(self, batch: Batch) -> Scores:
        """Return the losses [B] of a batch."""
        return self._engine(batch)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch."""
        self._engine.backward(poison_grads(loss))
        self._num_backwards += 1
        if self._num_backwards % self._grad_accum_steps:
            # DeepSpeed counts micro-batches by these calls, and moves only at the last of them
            self._engine.step()

    def step(self, learning_rate_ratio: float) -> Tensor:
        """Step at the end of the accumulation; returns the norm of the gradient."""
        set_learning_rate(self._engine.optimizer.param_groups, learning_rate_ratio)
        if self._stage:
            self._partition.finalize_grads()
            self._engine.step()
            self._partition.zero_grads()
            return torch.as_tensor(self._engine.get_global_grad_norm(), device=self.device)
        norm = _clip(self.model, self._config)
        self.optimizer.found_inf = 1.0 - norm.isfinite().float()
        self._engine.step()
        return norm

    def fragments(self) -> list[Fragment]:
        """Return this rank's part of the weights and the optimizer state."""
        return list(self._partition.fragments())

    def sync_params(self) -> None:
        """Copy the master fragments into every rank's weights."""
        self._partition.sync_params()
