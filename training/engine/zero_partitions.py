"""Shares: what a rank owns of the weights and the optimizer state, by DeepSpeed's stage.

Stage 0 shares out whole parameters, stages 1 and 2 slices of all parameters laid end to end,
stage 3 an equal part of each. This file alone knows DeepSpeed's optimizers from the inside, and
spares them what copies memory for nothing: weights are fp32 here, and a rank may be alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.engine.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements [offset, offset + len(master)) of parameter `name`; all tensors are flat views of
    live memory."""

    name: str
    offset: int
    master: Tensor
    state: dict[str, Tensor]


class Shares(Protocol):
    """What this rank owns; the optimizer's state exists from the start."""

    def fragments(self) -> Iterator[Fragment]: ...

    def refresh(self) -> None:
        """Bring every rank's weights up to the master fragments."""
        ...

    def settle(self) -> None:
        """Make the gradient complete, before a step."""
        ...

    def spoil(self) -> None:
        """Make the gradient one that the next step drops."""
        ...

    def forget(self) -> None:
        """Clear what a step leaves of its gradient."""
        ...


def trained_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shape of every trained parameter, which a partitioned one no longer tells."""
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


def whole_parameters(
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


class Replicas:
    """Stage 0: every rank has all; each writes some parameters."""

    def __init__(self, model: nn.Module, engine: Any, optimizer: Optimizer) -> None:
        self._model, self._engine, self._optimizer = model, engine, optimizer
        engine.enable_backward_allreduce = dist.get_world_size() > 1
        optimizer.prepare()

    def fragments(self) -> Iterator[Fragment]:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return whole_parameters(self._model, self._optimizer, rank, world_size)

    def refresh(self) -> None:
        for i, parameter in enumerate(p for p in self._model.parameters() if p.requires_grad):
            owner = i % dist.get_world_size()
            dist.broadcast(parameter.data, src=owner)
            for tensor in self._optimizer.state[parameter].values():
                dist.broadcast(tensor, src=owner)

    def settle(self) -> None:
        """Nothing to do: gradients add up where they are."""

    def spoil(self) -> None:
        self._engine.zero_grad()

    def forget(self) -> None:
        """Nothing to do: the engine drops the gradients of a step."""


class Slices:
    """Stages 1 and 2: a rank owns one slice of the parameters of a group, laid end to end."""

    def __init__(self, model: nn.Module, engine: Any, optimizer: Optimizer) -> None:
        self._model, self._engine, self._zero = model, engine, engine.optimizer
        if not self._zero.cpu_offload:
            rank = dist.get_rank()
            slices = [parts[rank] for parts in self._zero.parallel_partitioned_bit16_groups]
            _step_in_place(self._zero.single_partition_of_fp32_groups, slices)
            self._zero._link_all_hp_params()
            if dist.get_world_size() == 1:
                self._reduce_with_nobody()
        optimizer.prepare()
        self._zero._lazy_init_hp_params_optimizer_state()

    def _reduce_with_nobody(self) -> None:
        """Leave gradients where backward put them: DeepSpeed would copy them to a bucket and back,
        and divide them by one. Under autocast they stay fp32, while those that ranks send each
        other are bf16."""
        zero = self._zero
        groups = range(len(zero.bit16_groups))
        assert not any(zero._use_compact_grad_partition_buffer(i) for i in groups), "reads buckets"
        _replace(zero, "reduce_ready_partitions_and_remove_grads", lambda parameter, group: None)
        _replace(zero, "reduce_bucket_size", 1)  # elements of buffers that backward allocates

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's part of each parameter; `_hp_mapping` is None where it owns nothing."""
        for name, parameter in self._model.named_parameters():
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
        self._zero.update_lp_params()

    def settle(self) -> None:
        """Hand on what the last micro-batch did not use: DeepSpeed offloads at that one alone."""
        zero = self._zero
        if zero.cpu_offload:
            zero._offload_accumulated_param_ids -= zero.norm_for_param_grads.keys()
            zero._finalize_cpu_offload_gradient_accumulation()

    def spoil(self) -> None:
        _spoil(self._zero)
        self._engine.zero_grad()

    def forget(self) -> None:
        _clear(self._zero.single_partition_of_fp32_groups)
        if self._zero.cpu_offload:
            for gradient in self._zero.accumulated_grads_in_cpu.values():
                gradient.zero_()


class Partitions:
    """Stage 3: a rank owns the same part of every parameter; the last ones end in padding."""

    def __init__(self, model: nn.Module, engine: Any, optimizer: Optimizer) -> None:
        self._model, self._engine, self._zero = model, engine, engine.optimizer
        self._optimizer = optimizer
        zero = self._zero
        if not zero.offload_optimizer:
            _step_in_place(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat)
        # the groups hold their flat partitions during a step only
        self._zero._set_fp32_optimizer_param_groups()
        optimizer.prepare()
        self._zero._clear_fp32_optimizer_param_groups()

    def fragments(self) -> Iterator[Fragment]:
        zero: Any = self._zero
        for name, parameter in self._model.named_parameters():
            whole: Any = parameter
            group, start, size = zero.grad_position[zero.get_param_id(parameter)]
            offset = dist.get_rank() * size
            length = min(size, whole.ds_numel - offset)
            if length <= 0:  # padding alone
                continue
            flat = zero.fp32_partitioned_groups_flat[group]
            state = {
                key: value.narrow(0, start, length)
                for key, value in self._optimizer.state[flat].items()
                if value.shape == flat.shape
            }
            master = flat.data.narrow(0, start, length)
            yield Fragment(name=name, offset=offset, master=master, state=state)

    def refresh(self) -> None:
        self._zero.checkpoint_event_prologue()  # lets go of the small parameters kept whole
        for group in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero.checkpoint_event_epilogue()  # gathers them again

    def settle(self) -> None:
        """Hand on what the last micro-batch did not use: DeepSpeed offloads at that one alone."""
        zero = self._zero
        if zero.offload_optimizer:
            parameters: Any = self._model.parameters()
            zero._offload_boundary_param_ids -= {
                p.ds_id for p in parameters if zero.get_param_id(p) in zero.norm_for_param_grads
            }
            zero._finalize_offload_gradient_accumulation()

    def spoil(self) -> None:
        _spoil(self._zero)
        self._engine.zero_grad()

    def forget(self) -> None:
        """A parameter that the next step does not use would find its old gradient there."""
        self._zero.grad_partitions_flat_buffer.zero_()
        _clear(self._zero.fp32_partitioned_groups_flat)


def _step_in_place(masters: list[Tensor], weights: list[Tensor]) -> None:
    """Let masters be this rank's part of the weights, of which DeepSpeed has made a copy: it would
    hold both, and copy the one to the other after every step."""
    for master, mine in zip(masters, weights, strict=True):
        assert master.dtype == mine.dtype, "masters are fp32, and so are the weights"
        master.data = mine


def gather_by_broadcasts() -> None:
    """Let stages 1 and 2 gather the weights, once each rank has stepped its own, by one broadcast
    from each: of gloo's ways between CPUs the quickest, some three times its all_gather. For all
    engines of this process, which are on CPUs then."""
    from deepspeed.runtime.zero import stage_1_and_2

    def gather(partitioned_param_groups: list[list[Tensor]], dp_process_group: list, **_: Any):
        for slices, group in zip(partitioned_param_groups, dp_process_group, strict=True):
            works: list[Any] = [dist.broadcast(each, owner, group, async_op=True)
                                for owner, each in enumerate(slices)]  # fmt: skip
            for work in works:
                work.wait()

    _replace(stage_1_and_2, "all_gather_dp_groups", gather)


def take_norms_in_fp32() -> None:
    """Let DeepSpeed take the norms of gradients as torch does: it would copy each gradient to fp64
    first, a tenth of a step on two cores, and on a GPU memory for the largest one twice over."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (stage_1_and_2, stage3):
        _replace(module, "get_norm_dtype", lambda: torch.float32)


def _replace(owner: Any, name: str, value: Any) -> None:
    """Give DeepSpeed another attribute in the place of one that it must have: a version that has
    renamed it would go on without ours, and silently."""
    if not hasattr(owner, name):
        raise AttributeError(
            f"deepspeed: {owner}: found no {name}; training/engine/zero_partitions.py replaces it"
        )
    setattr(owner, name, value)


def _spoil(zero: Any) -> None:
    """Make the gradient's norm not finite: of the gradients themselves, or, where they are
    offloaded, of the norms that were taken on their way."""
    for gradients in zero.averaged_gradients.values():
        for gradient in gradients or ():
            gradient.fill_(math.nan)
    norms = getattr(zero, "norm_for_param_grads", {})
    norms.update({key: torch.tensor(math.nan) for key in norms})


def _clear(masters: list[Tensor]) -> None:
    for master in masters:
        if master.grad is not None:  # kept where it is offloaded
            master.grad.zero_()


SHARES: dict[int, type[Replicas] | type[Slices] | type[Partitions]] = {
    0: Replicas,
    1: Slices,
    2: Slices,
    3: Partitions,
}
