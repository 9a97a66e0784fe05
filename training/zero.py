"""Engines: what turns losses into steps. DeepSpeed under Ray, plain PyTorch in one process, one
small interface.

A rank owns *fragments*: flat views of fp32 master weights and optimizer state, by parameter name
and offset.
EMA and checkpoints know fragments only, so that they are the same code for every engine and
world size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.batches import Batch
from training.config import TrainConfig
from training.optimizer import Optimizer, build_optimizer, set_learning_rate
from training.precision import autocast, settled


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements [offset, offset + len(master)) of parameter `name`; all tensors are flat views of
    live memory."""

    name: str
    offset: int
    master: Tensor
    state: dict[str, Tensor]


class Engine(Protocol):
    """One optimizer step at a time; `rank` and `world_size` as torch.distributed counts."""

    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
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


def _whole_parameters(
    model: nn.Module, optimizer: Optimizer, rank: int, world_size: int
) -> Iterator[Fragment]:
    """Yield whole parameters as fragments; replicas share out the parameters, so that each is
    written once."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for i, (name, parameter) in enumerate(named):
        if i % world_size == rank:
            state = optimizer.state[parameter]
            moments = {
                k: v.view(-1) for k, v in state.items() if v.shape == parameter.shape and v.ndim
            }
            yield Fragment(name=name, offset=0, master=parameter.data.view(-1), state=moments)


def _clip(model: nn.Module, config: TrainConfig) -> float:
    """Clip the gradients to a global norm of `grad_clip`; returns the norm they had."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    return nn.utils.clip_grad_norm_(parameters, config.grad_clip or float("inf")).item()


class PlainEngine:
    """PyTorch alone, one process: unit tests, debuggers, one GPU without Ray and DeepSpeed."""

    rank, world_size = 0, 1

    def __init__(
        self, model: nn.Module, objective, config: TrainConfig, device: torch.device
    ) -> None:
        self.model, self.device, self._config = model.to(device), device, config
        self._objective = objective
        self.optimizer = build_optimizer(model, config)
        self.optimizer.prepare()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        with autocast(self.device.type, self._config.precision):
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
        return list(_whole_parameters(self.model, self.optimizer, 0, 1))

    def refresh(self) -> None:
        """Nothing to do: fragments are the parameters themselves."""


class ZeroEngine:
    """DeepSpeed, stages 0 to 2. Weights are fp32; bf16 is autocast, so one code path serves both
    precisions."""

    def __init__(
        self, model: nn.Module, objective, config: TrainConfig, device: torch.device
    ) -> None:
        import deepspeed
        import deepspeed.ops

        # On the CPU DeepSpeed would compile a shared-memory collective, minutes of two cores on a
        # fresh machine; gloo, which is there, does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.model, self.device, self._config = model.to(device), device, config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.optimizer = build_optimizer(model, config)
        self._micro_batches = 0
        self._engine: Any = deepspeed.initialize(
            model=Objective(model, objective), optimizer=self.optimizer, config=self._settings()
        )[0]
        self.optimizer.prepare()
        if config.zero_stage:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _settings(self) -> dict:
        config = self._config
        share = config.global_batch_size // self.world_size
        return {
            "train_batch_size": config.global_batch_size,
            "train_micro_batch_size_per_gpu": share // config.grad_accum_steps,
            "gradient_accumulation_steps": config.grad_accum_steps,
            # without ZeRO, DeepSpeed tells no norm and steps along a gradient that is not finite
            "gradient_clipping": config.grad_clip if config.zero_stage else 0.0,
            "zero_optimization": {"stage": config.zero_stage},
            # client optimizers pass DeepSpeed's tests for AdamW by type; ours is AdamW by
            # arithmetic
            "zero_allow_untested_optimizer": True,
            "torch_autocast": {
                "enabled": settled(config.precision, self.device.type) == "bf16",
                "dtype": "bfloat16",
            },
            "steps_per_print": 1 << 30,
        }

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return self._engine(batch)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        self._micro_batches += 1
        if self._micro_batches % self._config.grad_accum_steps:
            # DeepSpeed counts micro-batches by these calls, and moves only at the last of them
            self._engine.step()

    def step(self, learning_rate_ratio: float) -> float:
        set_learning_rate(self._engine.optimizer.param_groups, learning_rate_ratio)
        if self._config.zero_stage:
            self._engine.step()
            return float(self._engine.get_global_grad_norm())
        norm = _clip(self.model, self._config)
        if not math.isfinite(norm):
            self._engine.zero_grad()
        self._engine.step()
        return norm

    def discard(self) -> None:
        """Drop the gradient the way DeepSpeed drops one that is not finite, so that its counts of
        micro-batches and its buffers stay in order."""
        if self._config.zero_stage:
            for gradients in self._engine.optimizer.averaged_gradients.values():
                for gradient in gradients or ():
                    gradient.fill_(float("nan"))
        self._engine.zero_grad()
        self._engine.step()

    def fragments(self) -> list[Fragment]:
        if self._config.zero_stage == 0:
            return list(_whole_parameters(self.model, self.optimizer, self.rank, self.world_size))
        return list(self._partitions())

    def _partitions(self) -> Iterator[Fragment]:
        """Yield this rank's part of each parameter; `_hp_mapping` is None where it owns nothing."""
        for name, parameter in self.model.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                state = {
                    key: mapping.get_hp_fragment(optim_state_key=key)
                    for key in mapping.get_optim_state_keys()
                }
                start = mapping.lp_fragment_address.start
                yield Fragment(
                    name=name, offset=start, master=mapping.get_hp_fragment(), state=state
                )

    def refresh(self) -> None:
        """Bring every rank's weights up to the master fragments: after a checkpoint was read
        into them."""
        if self._config.zero_stage:
            self._engine.optimizer.update_lp_params()
            return
        for i, parameter in enumerate(p for p in self.model.parameters() if p.requires_grad):
            owner = i % self.world_size
            dist.broadcast(parameter.data, src=owner)
            for tensor in self.optimizer.state[parameter].values():
                dist.broadcast(tensor, src=owner)
