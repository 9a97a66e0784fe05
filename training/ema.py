"""Averaged weights: an fp32 shadow of each rank's own fragments. No communication; gathered on
export."""

import torch
from torch import Tensor

from training.zero import Fragment


class Ema:
    """ema <- d ema + (1 - d) master after every step, d = min(decay, (1 + step) / (10 + step)).

    The ramp lets short runs forget their random start (Kingma & Ba 2015 correct the same bias by
    division).
    """

    def __init__(self, fragments: list[Fragment], decay: float) -> None:
        self.decay = decay
        self._masters = [fragment.master for fragment in fragments]
        self.shadows: list[Tensor] = [master.detach().clone() for master in self._masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for shadow, master in zip(self.shadows, self._masters, strict=True):
            shadow.lerp_(master, 1 - decay)
