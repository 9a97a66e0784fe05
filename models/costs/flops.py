"""What a model costs, counted: parameters, multiplications, the bytes of its training state."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def num_parameters(model: nn.Module) -> int:
    """Count trained parameters; works on the meta device."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def forward_macs(forward: Callable[[], object]) -> int:
    """Count the multiply-accumulates of matrix products and convolutions in a call.

    Works on the meta device, which allocates and computes nothing. Training costs six FLOPs for
    each: two a multiply-accumulate, in the forward pass and twice in the backward.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops() // 2


def state_bytes(
    model: nn.Module, zero_stage: int = 0, world_size: int = 1, *, offload: bool = False
) -> int:
    """Return bytes a worker keeps in fp32 weights, gradients, moments and EMA (activations
    excluded), without those of `offloaded_bytes`.

    Stage 1 shares out moments and EMA, stage 2 the gradients as well (Rajbhandari et al. 2020);
    either steps along a flat copy of a rank's gradients. Stage 3 shares out the weights as well;
    the layers it has gathered at a time, and the small parameters it keeps whole, come on top.
    Weights are their own masters.
    """
    count = num_parameters(model)
    if zero_stage == 0:
        return count * (4 + 4 + 8) + count * 4 // world_size
    if offload:
        return count * 4 // (world_size if zero_stage == 3 else 1)
    if zero_stage == 3:
        return count * (4 + 4 + 8 + 4) // world_size
    shared = 4 + 8 + 4 + (4 if zero_stage >= 2 else 0)
    kept = 4 + (0 if zero_stage >= 2 else 4)
    return count * kept + count * shared // world_size


def offloaded_bytes(model: nn.Module, world_size: int = 1) -> int:
    """Return bytes a worker keeps on the CPU where optimizer state is offloaded: fp32 master
    weights, gradients, moments and EMA."""
    return num_parameters(model) * (4 + 4 + 8 + 4) // world_size
