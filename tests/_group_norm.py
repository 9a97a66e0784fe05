"""Run under TRITON_INTERPRET=1: print, for each case, how far the kernel is from float64.

Errors are relative in norm, of the result and of each gradient.
"""

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.networks.group_norm import group_norm


@dataclass(frozen=True)
class Case:
    """A shape, a type, and what follows the norm."""

    shape: tuple[int, int, int, int]
    num_groups: int
    dtype: str = "float32"
    modulated: bool = True
    silu: bool = True
    mean: float = 0.5
    min_programs: int = 528  # below it, cells are split


CASES = {
    "one channel a group": Case((2, 32, 5, 7), 32),
    "three channels a group": Case((2, 96, 9, 5), 32),
    "three channels a group, bf16": Case((2, 96, 9, 5), 32, "bfloat16"),
    "four channels a group, bf16": Case((3, 128, 8, 8), 32, "bfloat16"),
    "four channels a group, fp16": Case((3, 128, 8, 8), 32, "float16"),
    "48 channels a group": Case((2, 96, 16, 17), 2),
    "one group": Case((2, 18, 13, 11), 1),
    "splits of one cell more": Case((1, 64, 1, 1025), 32),
    "no splits": Case((2, 18, 33, 31), 1, min_programs=1),
    "no scale": Case((2, 32, 11, 12), 8, modulated=False),
    "no SiLU": Case((2, 32, 11, 12), 8, silu=False),
    "the norm alone": Case((2, 32, 11, 12), 8, modulated=False, silu=False),
    "a mean of 1000 deviations": Case((1, 32, 31, 33), 8, mean=1000.0),
}
# relative, of a rounding; a mean of 1000 deviations costs three digits of seven
TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
NAMES = ("y", "x", "weight", "bias", "scale", "shift")


def inputs(case: Case) -> list[Tensor]:
    """Return x, weight, bias and, if any, scale and shift, as rows of a wider matrix."""
    generator = torch.Generator().manual_seed(0)
    batch, channels = case.shape[:2]
    dtype = getattr(torch, case.dtype)
    x = case.mean + torch.randn(case.shape, generator=generator)
    weight, bias = 1 + 0.3 * torch.randn(2, channels, generator=generator)
    wide = torch.randn(batch, 2 * channels + 3, generator=generator).to(dtype)
    found = [x.to(dtype, memory_format=torch.channels_last), weight, bias]
    return found + ([wide[:, :channels], wide[:, channels:-3]] if case.modulated else [])


def reference(case: Case, x: Tensor, weight: Tensor, bias: Tensor, *modulation: Tensor) -> Tensor:
    """Return the result by torch's functions."""
    h = F.group_norm(x, case.num_groups, weight, bias)
    if modulation:
        scale, shift = (each[:, :, None, None] for each in modulation)
        h = h * (1 + scale) + shift
    return F.silu(h) if case.silu else h


def kernel(case: Case, x: Tensor, weight: Tensor, bias: Tensor, *modulation: Tensor) -> Tensor:
    """Return the result by the kernel."""
    scale, shift = modulation or (None, None)
    return group_norm(x, weight, bias, scale, shift, case.num_groups, 1e-5, case.silu)[0]


def evaluated(case: Case, function, leaves: list[Tensor]) -> list[Tensor]:
    """Return the result and the gradient of each input."""
    leaves = [each.detach().requires_grad_() for each in leaves]
    y = function(case, *leaves)
    dy = torch.randn(case.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def main() -> None:
    from models.networks import group_norm_triton

    # The fake operators, autograd's registration, and a trace forward and backward
    leaves = [each.requires_grad_() for each in inputs(Case((2, 8, 3, 4), 2))]
    torch.library.opcheck(group_norm, (*leaves, 2, 1e-5, True))
    results = {}
    for name, case in CASES.items():
        group_norm_triton.MIN_PROGRAMS = case.min_programs
        leaves = inputs(case)
        wanted = evaluated(case, reference, [each.double() for each in leaves])
        found = evaluated(case, kernel, leaves)
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        assert [each.dtype for each in found[1:]] == [each.dtype for each in leaves]
        results[name] = {
            part: float((f.double() - w).norm() / w.norm())
            for part, f, w in zip(NAMES, found, wanted, strict=False)
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
