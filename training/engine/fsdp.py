"""torch's FSDP2 behind the `Engine` protocol: ZeRO-2 whose two collectives hide behind the passes.

Each rank owns rows of every parameter, its masters; a group's weights are gathered ahead of its
forward pass, in bf16 under autocast, and kept until its gradients have been computed and reduced to
the rows that each rank owns, beside the rest of the backward pass.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from training.config import TrainConfig
from training.data.dataloader import Batch
from training.engine.engines import Objective, Scores, poison_grads
from training.engine.optimizer import build_optimizer, set_learning_rate
from training.engine.precision import autocast, settled
from training.engine.zero_partitions import Fragment, trained_parameters


class FsdpEngine:
    """FSDP2. Groups are the elements of lists of modules, which are a U-Net's levels and a
    transformer's blocks, and all else; weights of the latter are gathered in fp32.

    Scalars, which have no rows, and frozen parameters are on every rank.
    """

    def __init__(
        self, model: nn.Module, objective: Callable, config: TrainConfig, device: torch.device
    ) -> None:
        self.model, self.device, self._config = model.to(device), device, config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.shapes = {name: p.shape for name, p in trained_parameters(model)}
        self._num_backwards = 0
        self._grad_accum_steps = config.micro_batches(self.world_size)
        self._root: Any = self._sharded(Objective(model, objective))
        self._parameters = trained_parameters(model)
        self._scalars = [p for _, p in self._parameters if p.ndim == 0]

        # The optimizer steps along this rank's rows, as plain tensors
        self.optimizer = build_optimizer(model, config)
        self._rows = {p: _local(p) for _, p in self._parameters}
        for group in self.optimizer.param_groups:
            group["params"] = [self._rows[p] for p in group["params"] if self._rows[p].numel()]
        self.optimizer.prepare()

    def _sharded(self, objective: Objective) -> FSDPModule:
        """Return the module, sharded in place."""
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        whole = {p for p in objective.parameters() if p.ndim == 0 or not p.requires_grad}
        # not on a CPU, whose autocast leaves layer norms alone: with bf16 weights they refuse fp32
        sent = settled(self._config.workers.precision, self.device.type) == "bf16"
        dtype = torch.bfloat16 if sent and self.device.type != "cpu" else None
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=dtype, cast_forward_inputs=False
        )
        lists = [module for module in objective.modules() if isinstance(module, nn.ModuleList)]
        inner = {id(m) for blocks in lists for block in blocks for m in block.modules()}
        for block in (block for blocks in lists if id(blocks) not in inner for block in blocks):
            fully_shard(
                block, mesh=mesh, reshard_after_forward=False, mp_policy=policy,
                ignored_params=whole,
            )  # fmt: skip
        return fully_shard(objective, mesh=mesh, reshard_after_forward=False, ignored_params=whole)

    def losses(self, batch: Batch) -> Scores:
        """Return the losses [B] of a batch, computed in the run's precision."""
        with autocast(self.device.type, self._config.workers.precision):
            return self._root(batch)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch, each rank its rows of the ranks' mean."""
        self._num_backwards += 1
        is_last = self._num_backwards % self._grad_accum_steps == 0
        self._root.set_reshard_after_backward(is_last)  # weights stay for the next micro-batch
        (poison_grads(loss) / self._grad_accum_steps).backward()

    def step(self, learning_rate_ratio: float) -> Tensor:
        """Clip, step where the norm is finite, and drop the gradient; returns the norm."""
        norm = self._clipped()
        set_learning_rate(self.optimizer.param_groups, learning_rate_ratio)
        self.optimizer.found_inf = 1.0 - norm.isfinite().float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for _, parameter in self._parameters:
            parameter.grad = None
        return norm

    def _clipped(self) -> Tensor:
        """Give this rank's rows their gradient, clipped by its global norm, which is returned.

        A parameter that no micro-batch used has a gradient of zero, as with the other engines.
        """
        for parameter, rows in self._rows.items():
            grad = parameter.grad
            rows.grad = torch.zeros_like(rows) if grad is None else _local(grad)
        scalars = [self._rows[p].grad for p in self._scalars]
        square = torch.zeros((), device=self.device)
        if scalars:  # whose gradients no hook reduces
            means = torch.stack([grad for grad in scalars if grad is not None])
            dist.all_reduce(means)
            means /= self.world_size
            for parameter, mean in zip(self._scalars, means, strict=True):
                self._rows[parameter].grad = mean
            square = means.square().sum() / self.world_size
        rows = [own for p, own in self._rows.items() if p.ndim and own.numel()]
        if rows:
            norm = get_total_norm([own.grad for own in rows if own.grad is not None])
            square = square + norm.square()
        dist.all_reduce(square)
        norm = square.sqrt()
        limit = self._config.optimizer.grad_clip
        if limit:
            clip_grads_with_norm_(list(self._rows.values()), limit, norm)
        return norm

    def fragments(self) -> list[Fragment]:
        """Return this rank's rows of each parameter and of its state."""
        return list(self._fragments())

    def _fragments(self) -> Iterator[Fragment]:
        for name, parameter in self._parameters:
            rows, shape = self._rows[parameter], self.shapes[name]
            if not rows.numel() or (not shape and self.rank):
                continue  # fewer rows than ranks; scalars are the first rank's
            first = self.rank * -(-shape[0] // self.world_size) if shape else 0
            state = self.optimizer.state[rows]
            yield Fragment(
                name=name, offset=first * (shape[1:].numel() if shape else 1),
                master=rows.view(-1),
                state={key: value.view(-1) for key, value in state.items() if key != "step"},
            )  # fmt: skip

    def sync_params(self) -> None:
        """Copy the scalars of the first rank; rows are gathered from their masters at use."""
        for parameter in self._scalars:
            rows = self._rows[parameter]
            for tensor in (rows, *self.optimizer.state[rows].values()):
                dist.broadcast(tensor, src=0)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's rows, without padding, in the memory of `tensor`; all of a plain one."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
