"""Sharpness-aware minimisation: the gradient is taken where the loss is worst nearby.

    w' = w + rho g / |g|,  g = grad L(w);  the step taken from w is along grad L(w')
                                                              (Foret et al. 2021, equations 2 and 3)

The paper trains its CLIP with it, rho 0.1, each replica perturbing by its own 64 samples; its point
for unCLIP is that the embeddings come out of far lower rank (Ramesh et al. 2022, section 2.1).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def perturbed(model: nn.Module, loss: Callable[[], Tensor], rho: float) -> Iterator[None]:
    """Hold the weights of `model` at w' within the block, and put them back, bit for bit, after it.

    loss: computes L(w), scalar, on the samples that perturb. Gradients that training accumulates
    are not touched; a gradient that is not finite perturbs nothing, and the loss itself will tell.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    before = [w.detach().clone() for w in weights]
    moves, pairs = norm.isfinite() & (norm > 0), zip(before, gradients, strict=True)
    _set(
        weights,
        [w if g is None else torch.where(moves, w + g * (rho / norm), w) for w, g in pairs],
    )
    try:
        yield
    finally:
        _set(weights, before)


@torch.no_grad()
def _set(weights: list[nn.Parameter], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
