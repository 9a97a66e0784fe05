"""Averages of the weights: fp32 shadows of each rank's own fragments, without communication.

    ema   <- d ema + (1 - d) master,                d = min(decay, (1 + step) / (10 + step))
    power <- beta_t power + (1 - beta_t) master,    beta_t = (1 - 1/t)^(gamma + 1)

The ramp of d lets short runs forget their random start. The power-function averages
(models/power_ema.py) count updates t, so that a skipped step leaves no gap in their profile.
"""

from collections.abc import Iterator

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.power_ema import gamma_of, new_share
from training.engine.zero_partitions import Fragment

EMA, POWER = "ema", "power_"  # sections of a checkpoint: ema/..., power_0.05/...


class Ema:
    """The classic average of a run, and the power-function ones of widths `sigma_rels`.

    shadows: by section of a checkpoint, one tensor a fragment. They are functions of the masters
    and of the run's progress: there is no other state.
    """

    def __init__(
        self, fragments: list[Fragment], decay: float, sigma_rels: tuple[float, ...] = ()
    ) -> None:
        self._masters = [fragment.master for fragment in fragments]
        self._decay = decay
        self._gammas = {f"{POWER}{sigma_rel}": gamma_of(sigma_rel) for sigma_rel in sigma_rels}
        self.shadows: dict[str, list[Tensor]] = {
            section: [master.detach().clone() for master in self._masters]
            for section in (EMA, *self._gammas)
        }

    def update(self, step: int, nonfinite_steps: int) -> None:
        """Add the weights after step number `step`; nonfinite_steps: those skipped so far."""
        decays = {EMA: min(self._decay, (1 + step) / (10 + step))}
        for section, gamma in self._gammas.items():
            decays[section] = 1 - new_share(gamma, step + 1 - nonfinite_steps)
        for section, decay in decays.items():
            if self._masters:  # on a GPU one launch for many of them
                get_ema_multi_avg_fn(decay)(self.shadows[section], self._masters, None)

    def by_fragment(self) -> Iterator[dict[str, Tensor]]:
        """Yield {section: shadow} of each fragment, in the order of the fragments."""
        for shadows in zip(*self.shadows.values(), strict=True):
            yield dict(zip(self.shadows, shadows, strict=True))
