"""Averaged weights: fp32 shadows of each rank's own fragments. No communication; gathered on
export."""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.power_ema import gamma_of, new_share
from training.engine.engines import Fragment

EMA, POWER = "ema", "power_"  # sections of a checkpoint: ema/..., power_0.05/...


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


class PowerEma:
    """ema <- beta_t ema + (1 - beta_t) master, beta_t = (1 - 1/t)^(gamma + 1): see
    models/power_ema.py.

    t counts the updates, so that a skipped step leaves no gap in the profile. It is a function of
    the run's progress, not a state of its own.
    """

    def __init__(self, fragments: list[Fragment], sigma_rel: float) -> None:
        self.section = f"{POWER}{sigma_rel}"
        self._gamma = gamma_of(sigma_rel)
        self._masters = [fragment.master for fragment in fragments]
        self.shadows: list[Tensor] = [master.detach().clone() for master in self._masters]

    @torch.no_grad()
    def update(self, t: int) -> None:
        share = new_share(self._gamma, t)
        for shadow, master in zip(self.shadows, self._masters, strict=True):
            shadow.lerp_(master, share)


class Averages:
    """The classic average of a run, and the power-function ones beside it."""

    def __init__(
        self, fragments: list[Fragment], decay: float, sigma_rels: tuple[float, ...] = ()
    ) -> None:
        self.classic = Ema(fragments, decay)
        self.powers = [PowerEma(fragments, sigma_rel) for sigma_rel in sigma_rels]

    def sections(self) -> set[str]:
        """Return the sections of a checkpoint in which these averages are kept."""
        return {EMA, *(power.section for power in self.powers)}

    def update(self, step: int, nonfinite_steps: int) -> None:
        """Take in the weights after step number `step`; nonfinite_steps: those skipped so far."""
        self.classic.update(step)
        for power in self.powers:
            power.update(step + 1 - nonfinite_steps)

    def by_fragment(self) -> Iterator[dict[str, Tensor]]:
        """Yield {section: shadow} of each fragment, in the order of the fragments."""
        names = [EMA, *(power.section for power in self.powers)]
        every = [self.classic.shadows, *(power.shadows for power in self.powers)]
        for shadows in zip(*every, strict=True):
            yield dict(zip(names, shadows, strict=True))
