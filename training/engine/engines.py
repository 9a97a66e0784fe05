"""Engines: what turns losses into steps. DeepSpeed under Ray, plain PyTorch in one process, one
small interface.

A rank owns *fragments*: flat views of fp32 master weights and optimizer state, by parameter name
and offset.
EMA and checkpoints know fragments only, so that they are the same code for every engine and
world size.
"""

import math
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.config import TrainConfig
from training.data.dataloader import Batch
from training.engine.optimizer import Optimizer, build_optimizer, set_learning_rate
from training.engine.precision import autocast, settled
from training.engine.zero_partitions import (
    SHARES,
    Fragment,
    Shares,
    gather_by_broadcasts,
    take_norms_in_fp32,
    trained_shapes,
    whole_parameters,
)

# Elements up to which stage 3 keeps a parameter whole on every rank: gathering norms, biases and
# other small ones at each use would cost more than they weigh. DeepSpeed's default.
WHOLE_UP_TO = 100_000
# Elements that DeepSpeed reduces at once, its default, for which it allocates memory whether or not
# there are as many.
BUCKET = 500_000_000


class Engine(Protocol):
    """One optimizer step at a time; `rank` and `world_size` as torch.distributed counts.

    shapes: of the trained parameters, whole; `model` may hold them partitioned, and then computes
    inside of `losses` only.
    """

    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
    shapes: dict[str, torch.Size]
    optimizer: Optimizer

    def losses(self, batch: Batch) -> dict[str, Tensor]: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, learning_rate_ratio: float) -> float:
        """Return the gradient's global norm; where that is not finite, nothing has moved."""
        ...

    def discard(self) -> None: ...

    def fragments(self) -> list[Fragment]: ...

    def refresh(self) -> None: ...


class Objective(nn.Module):
    """A model and its objective as one module, so that an engine's forward pass is the
    objective's."""

    def __init__(self, model: nn.Module, objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self._objective(self.model, batch)


def _clip(model: nn.Module, config: TrainConfig) -> float:
    """Clip the gradients to a global norm of `grad_clip`; returns the norm they had.

    What no micro-batch used gets a gradient of zero, as from DeepSpeed's sum over ranks: a curve
    does not tell which engine drew it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip or float("inf")).item()


class PlainEngine:
    """PyTorch alone, one process: unit tests, debuggers, one GPU without Ray and DeepSpeed."""

    rank, world_size = 0, 1

    def __init__(
        self, model: nn.Module, objective, config: TrainConfig, device: torch.device
    ) -> None:
        self.model, self.device, self._config = model.to(device), device, config
        self.shapes = trained_shapes(model)
        self._objective = objective
        self.optimizer = build_optimizer(model, config)
        self.optimizer.prepare()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        with autocast(self.device.type, self._config.workers.precision):
            return self._objective(self.model, batch)

    def backward(self, loss: Tensor) -> None:
        (loss / self._config.grad_accum_steps).backward()

    def step(self, learning_rate_ratio: float) -> float:
        norm = _clip(self.model, self._config)
        if math.isfinite(norm):
            set_learning_rate(self.optimizer.param_groups, learning_rate_ratio)
            self.optimizer.step()
        self.discard()
        return norm

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def fragments(self) -> list[Fragment]:
        return list(whole_parameters(self.model, self.optimizer, 0, 1))

    def refresh(self) -> None:
        """Nothing to do: fragments are the parameters themselves."""


class ZeroEngine:
    """DeepSpeed, stages 0 to 3. Weights are fp32; bf16 is autocast, so one code path serves both
    precisions."""

    def __init__(
        self, model: nn.Module, objective, config: TrainConfig, device: torch.device
    ) -> None:
        import deepspeed
        import deepspeed.ops

        # On the CPU DeepSpeed would compile a shared-memory collective, minutes of two cores on a
        # fresh machine; gloo, which is there, does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        take_norms_in_fp32()
        if device.type == "cpu":
            gather_by_broadcasts()
        self.model, self.device, self._config = model.to(device), device, config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.shapes = trained_shapes(model)
        _require_trained(model, config)
        self.optimizer = build_optimizer(model, config)
        self._micro_batches, self._num_parts = 0, config.micro_batches(self.world_size)
        self._engine: Any = deepspeed.initialize(
            model=Objective(model, objective), optimizer=self.optimizer, config=self._settings()
        )[0]
        shares = SHARES[config.workers.zero_stage]
        self._shares: Shares = shares(model, self._engine, self.optimizer)

    def _settings(self) -> dict:
        config, workers = self._config, self._config.workers
        samples = config.samples_a_worker(self.world_size)
        return {
            "train_batch_size": samples * self.world_size,
            "train_micro_batch_size_per_gpu": samples // self._num_parts,
            "gradient_accumulation_steps": self._num_parts,
            # without ZeRO, DeepSpeed tells no norm and steps along a gradient that is not finite
            "gradient_clipping": config.optimizer.grad_clip if workers.zero_stage else 0.0,
            "zero_optimization": {
                "stage": workers.zero_stage,
                # stages 1 and 2 then add up a bucket in its place, not in a copy (measured on CPU);
                # stage 3 would rely on the order in which ranks' gradients come
                "reduce_scatter": self.device.type != "cpu" or workers.zero_stage == 3,
                "reduce_bucket_size": min(BUCKET, sum(map(math.prod, self.shapes.values()))),
                "stage3_param_persistence_threshold": WHOLE_UP_TO,
                **({"offload_optimizer": {"device": "cpu"}} if workers.offload == "cpu" else {}),
            },
            # client optimizers pass DeepSpeed's tests for AdamW by type; ours is AdamW by
            # arithmetic, on the CPU as well, where DeepSpeed's own would have to be compiled
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {
                "enabled": settled(config.workers.precision, self.device.type) == "bf16",
                "dtype": "bfloat16",
            },
            "steps_per_print": 1 << 30,
        }

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return self._engine(batch)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        self._micro_batches += 1
        if self._micro_batches % self._num_parts:
            # DeepSpeed counts micro-batches by these calls, and moves only at the last of them
            self._engine.step()

    def step(self, learning_rate_ratio: float) -> float:
        set_learning_rate(self._engine.optimizer.param_groups, learning_rate_ratio)
        if self._config.workers.zero_stage:
            self._shares.settle()
            self._engine.step()
            self._shares.forget()
            return float(self._engine.get_global_grad_norm())
        norm = _clip(self.model, self._config)
        if not math.isfinite(norm):
            self._engine.zero_grad()
        self._engine.step()
        return norm

    def discard(self) -> None:
        """Drop the gradient the way DeepSpeed drops one that is not finite, so that its counts of
        micro-batches and its buffers stay in order."""
        self._shares.spoil()
        self._engine.step()
        self._shares.forget()

    def fragments(self) -> list[Fragment]:
        return list(self._shares.fragments())

    def refresh(self) -> None:
        """Bring every rank's weights up to the master fragments: after a checkpoint was read
        into them."""
        self._shares.refresh()


def _require_trained(model: nn.Module, config: TrainConfig) -> None:
    """Raise ValueError where stage 3 would partition a parameter that no fragment tells of."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if config.workers.zero_stage == 3 and frozen:
        raise ValueError(
            f"train.zero_stage: found 3 with the frozen parameter {frozen[0]}, expected at most 2: "
            "it partitions all parameters, and checkpoints hold the trained ones"
        )
