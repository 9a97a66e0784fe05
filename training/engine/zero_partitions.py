"""What a rank owns of the weights and the optimizer state, by DeepSpeed's stage of ZeRO.

Stage 0 shares out whole parameters, stages 1 and 2 slices of all parameters laid end to end,
stage 3 an equal part of each (Rajbhandari et al. 2020). This file alone knows the layout of
DeepSpeed's ZeRO optimizers. Nothing of DeepSpeed is replaced; one private attribute is read, since
there is no public way to learn where a slice of stages 1 and 2 begins (see `_slice_of`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.engine.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements [offset, offset + len(master)) of parameter `name`.

    master, and each tensor of `state`: flat fp32 views of live memory.
    """

    name: str
    offset: int
    master: Tensor
    state: dict[str, Tensor]


class ZeroPartition(Protocol):
    """The part of one stage that this rank owns; the optimizer's state exists from the start."""

    def fragments(self) -> Iterator[Fragment]:
        """Yield what this rank owns."""
        ...

    def sync_params(self) -> None:
        """Copy the master fragments of all ranks into every rank's weights."""
        ...

    def finalize_grads(self) -> None:
        """Complete the accumulated gradient, before a step."""
        ...

    def zero_grads(self) -> None:
        """Clear the gradient that a step leaves behind, which a later step could read again."""
        ...


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that require a gradient, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def full_parameters(
    model: nn.Module, optimizer: Optimizer, rank: int, world_size: int
) -> Iterator[Fragment]:
    """Yield every `world_size`-th parameter as one fragment: replicas write each once in all."""
    for name, parameter in trained_parameters(model)[rank::world_size]:
        state = optimizer.state[parameter]
        moments = {key: v.view(-1) for key, v in state.items() if v.ndim}  # no count of steps
        yield Fragment(name=name, offset=0, master=parameter.data.view(-1), state=moments)


class Stage0:
    """Every rank has all; each writes some parameters."""

    def __init__(self, model: nn.Module, engine: Any, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        optimizer.prepare()

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's share of the parameters."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return full_parameters(self._model, self._optimizer, rank, world_size)

    def sync_params(self) -> None:
        """Broadcast each parameter and its state from the rank that owns its fragment."""
        for i, (_, parameter) in enumerate(trained_parameters(self._model)):
            owner = i % dist.get_world_size()
            dist.broadcast(parameter.data, src=owner)
            for tensor in self._optimizer.state[parameter].values():
                dist.broadcast(tensor, src=owner)

    def finalize_grads(self) -> None:
        """Do nothing: gradients add up in place."""

    def zero_grads(self) -> None:
        """Do nothing: the engine drops the gradients of a step."""


class Stage12:
    """Stages 1 and 2: a rank owns one slice of the parameters of a group, laid end to end."""

    def __init__(self, model: nn.Module, engine: Any, optimizer: Optimizer) -> None:
        self._model, self._zero, self._optimizer = model, engine.optimizer, optimizer
        optimizer.prepare()

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's part of each parameter of its slice."""
        groups = self._optimizer.param_groups  # DeepSpeed puts a group's flat slice in its place
        for name, parameter in trained_parameters(self._model):
            place = _slice_of(parameter)
            if place is not None:
                group, start, length, offset = place
                (flat,) = groups[group]["params"]
                yield _fragment(name, offset, flat, self._optimizer, start, length)

    def sync_params(self) -> None:
        """Copy the masters into the weights and gather those of the other ranks."""
        self._zero.update_lp_params()

    def finalize_grads(self) -> None:
        """Pass on the parameters that the last micro-batch did not use: DeepSpeed offloads
        gradients within its backward pass alone."""
        if self._zero.cpu_offload:
            self._zero.finalize_gradient_accumulation_boundary()

    def zero_grads(self) -> None:
        """Clear the gradients kept on the CPU; without offloading none is kept."""
        if self._zero.cpu_offload:
            for gradient in self._zero.accumulated_grads_in_cpu.values():
                gradient.zero_()
            self._optimizer.zero_grad(set_to_none=False)


class Stage3:
    """A rank owns an equal part of every parameter; the last ones end in padding."""

    def __init__(self, model: nn.Module, engine: Any, optimizer: Optimizer) -> None:
        self._model, self._zero, self._optimizer = model, engine.optimizer, optimizer
        # the optimizer's groups hold these during a step only
        for number, flat in enumerate(self._flats()):
            group = optimizer.param_groups[self._zero.sub_group_to_group_id[number]]
            optimizer.init_state(flat, group)

    def _flats(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's part of each parameter, without its padding."""
        for name, _, offset, flat, start, length in self._parts():
            yield _fragment(name, offset, flat, self._optimizer, start, length)

    def _parts(self) -> Iterator[tuple[str, Any, int, Tensor, int, int]]:
        """Yield name, parameter, offset in it, and where the part lies: flat, start, length."""
        for name, parameter in trained_parameters(self._model):
            partitioned: Any = parameter
            group, start, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            offset = dist.get_rank() * size
            length = min(size, partitioned.ds_numel - offset)
            if length > 0:  # else padding alone
                yield name, partitioned, offset, self._flats()[group], start, length

    @torch.no_grad()
    def sync_params(self) -> None:
        """Copy the masters into this rank's parts of the weights, which are gathered at use."""
        self._zero.checkpoint_event_prologue()  # frees the small parameters kept whole
        for _, parameter, _, flat, start, length in self._parts():
            parameter.ds_tensor.view(-1)[:length].copy_(flat[start : start + length])
        self._zero.checkpoint_event_epilogue()  # gathers them again

    def finalize_grads(self) -> None:
        """Pass on the parameters that the last micro-batch did not use: DeepSpeed offloads
        gradients within its backward pass alone."""
        if self._zero.offload_optimizer:
            self._zero.finalize_gradient_accumulation_boundary()

    def zero_grads(self) -> None:
        """Clear the partitions of gradients: those of parameters that the next step does not use
        would count again."""
        self._zero.grad_partitions_flat_buffer.zero_()
        for flat in self._flats():
            if flat.grad is not None:
                flat.grad.zero_()


STAGES: dict[int, type[Stage0] | type[Stage12] | type[Stage3]] = {
    0: Stage0,
    1: Stage12,
    2: Stage12,
    3: Stage3,
}


def _fragment(
    name: str, offset: int, flat: Tensor, optimizer: Optimizer, start: int, length: int
) -> Fragment:
    """Return elements [start, start + length) of a flat partition and of its moments."""
    moments = {
        key: value.narrow(0, start, length)
        for key, value in optimizer.state[flat].items()
        if value.shape == flat.shape
    }
    master = flat.data.narrow(0, start, length)
    return Fragment(name=name, offset=offset, master=master, state=moments)


def _slice_of(parameter: nn.Parameter) -> tuple[int, int, int, int] | None:
    """Return where this rank's part of a parameter lies at stages 1 and 2, None where it owns
    nothing of it: the group, start and length in the group's slice, and offset in the parameter.

    DeepSpeed states this layout in the private `_hp_mapping` alone; KeyError where a version of it
    has none. tests/test_training_engine_zero.py checks what it says.
    """
    place: Any = vars(parameter)["_hp_mapping"]
    if place is None:
        return None
    in_slice, in_parameter = place.hp_fragment_address, place.lp_fragment_address
    return place.param_group_index, in_slice.start, in_slice.numel, in_parameter.start


def without_compiled_collectives() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives on a CPU.

    That takes two cores minutes on a fresh machine, and gloo does the same. DeepSpeed has no option
    for it: it compiles what its table of operators calls compatible.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
