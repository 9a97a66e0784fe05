"""Noise schedules and the algebra between x0, eps and v.

x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps              (Ho et al. 2020, eq. 4)
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from models.configs import Prediction, ScheduleName, Spacing


def _cosine(num_timesteps: int) -> np.ndarray:
    """beta_t = 1 - f(t+1)/f(t), f(t) = cos^2((t/T + .008)/1.008 pi/2)  (Nichol & Dhariwal 2021,
    eq. 17)."""
    t = np.arange(num_timesteps + 1) / num_timesteps
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


def _linear(num_timesteps: int) -> np.ndarray:
    """Space beta from 1e-4 to 0.02 for 1000 steps, scaled for others (Ho et al. 2020, section
    4)."""
    scale = 1000 / num_timesteps
    return np.linspace(scale * 1e-4, scale * 0.02, num_timesteps)


def _scaled_linear(num_timesteps: int) -> np.ndarray:
    """Space sqrt(beta) linearly from .00085 to .012 (Rombach et al. 2022)."""
    scale = 1000 / num_timesteps
    return np.linspace((scale * 0.00085) ** 0.5, (scale * 0.012) ** 0.5, num_timesteps) ** 2


_BETAS: dict[ScheduleName, Callable[[int], np.ndarray]] = {
    "cosine": _cosine,
    "linear": _linear,
    "scaled_linear": _scaled_linear,
}


KARRAS_RHO, KARRAS_SIGMA_MAX = 7.0, 80.0  # Karras et al. 2022, table 1


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The variances of a discrete diffusion; rebuilt from its configuration, never stored.

    alpha_bar: [T] float64, decreasing in [0, 1); spacing: which timesteps samplers visit, see
    `timesteps`.
    """

    alpha_bar: Tensor
    spacing: Spacing = "trailing"
    _tables: dict[torch.device, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def build(
        cls,
        name: ScheduleName,
        num_timesteps: int = 1000,
        *,
        zero_terminal: bool = False,
        prediction: Prediction = "x0",
    ) -> "NoiseSchedule":
        """Build the named schedule; ValueError for fewer than 2 or, `linear`, too few timesteps.

        zero_terminal: no signal is left at the last timestep, so that what samplers start from is
        what training saw; with `prediction` eps, x0 cannot be computed there: a ValueError.
        """
        if zero_terminal and prediction == "eps":
            raise ValueError(
                "zero_terminal: found true with prediction eps, expected prediction v or x0: where "
                "no signal is left, eps does not determine x0"
            )
        # numpy, so that a model built on the meta device still has a schedule of numbers
        beta = _BETAS[name](num_timesteps) if num_timesteps > 1 else np.ones(1)
        if beta.max() >= 1:
            raise ValueError(
                f"schedule {name}: {num_timesteps} timesteps are too few; use at least 100"
            )
        alpha_bar = np.cumprod(1 - beta)
        if zero_terminal:
            # shift and scale the signal to end in 0 and begin as before (Lin et al. 2023, algo. 1)
            signal = np.sqrt(alpha_bar)
            alpha_bar = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
        return cls(alpha_bar=torch.from_numpy(alpha_bar))

    def spaced(self, spacing: Spacing) -> "NoiseSchedule":
        """Return the same variances for samplers that visit timesteps otherwise."""
        return replace(self, spacing=spacing)

    def timesteps(self, sample_steps: int) -> list[int]:
        """Return `sample_steps` descending timesteps.

        trailing: T k / n - 1, k = n ... 1, from the last one on (Lin et al. 2023, table 2);
        strided: evenly from T - 1 to 0, both visited (Nichol & Dhariwal 2021, section 4); karras:
        evenly in (sigma / signal)^(1/7), both ends visited (Karras et al. 2022, eq. 5), at the
        timesteps nearest to those sigmas, none twice.
        """
        last, count = self.num_timesteps - 1, sample_steps
        if not 1 <= count <= self.num_timesteps:
            raise ValueError(f"sample_steps: found {count}, expected 1 to {self.num_timesteps}")
        if self.spacing == "trailing" or count == 1:
            return [round(self.num_timesteps * k / count) - 1 for k in range(count, 0, -1)]
        if self.spacing == "strided":
            return [round(last * k / (count - 1)) for k in reversed(range(count))]
        sigma = ((1 - self.alpha_bar) / self.alpha_bar).sqrt().cpu().numpy()
        # the first step starts at the last timestep, whose sigma may be infinite, and leads to here
        largest = min(float(sigma[-1]), KARRAS_SIGMA_MAX)
        roots = np.linspace(largest ** (1 / KARRAS_RHO), float(sigma[0]) ** (1 / KARRAS_RHO), count)
        timesteps = [last]
        for left, target in zip(range(count - 2, -1, -1), roots[1:] ** KARRAS_RHO, strict=True):
            nearest = int(np.abs(sigma - target).argmin())
            timesteps.append(max(min(nearest, timesteps[-1] - 1), left))
        return timesteps

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alpha_bar)

    def coefficients(
        self, t: Tensor, like: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)), each [B, 1, ...] to broadcast over
        `like`.

        t: int64 [B]; -1 is the clean end, alpha_bar = 1, which samplers step to. dtype: None for
        that of `like`.
        """
        alpha_bar = self._alpha_bar(t, like)
        dtype = dtype or like.dtype
        return alpha_bar.sqrt().to(dtype), (1 - alpha_bar).sqrt().to(dtype)

    def _alpha_bar(self, t: Tensor, like: Tensor) -> Tensor:
        return self.table(t.device)[t].reshape(-1, *[1] * (like.ndim - 1))

    def table(self, device: torch.device) -> Tensor:
        """Return alpha_bar with the clean end's 1 appended, [T + 1], cached on each device: a copy
        to a GPU would wait for all its queued work."""
        if device not in self._tables:
            ends = torch.ones(1, dtype=self.alpha_bar.dtype, device=self.alpha_bar.device)
            self._tables[device] = torch.cat([self.alpha_bar, ends]).to(device)
        return self._tables[device]

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Diffuse `x0` to timestep `t` in one step.

        x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps      (Ho et al. 2020, eq. 4)

        x0, eps: [B, ...] in the data scale; t: [B] int64 in [0, num_timesteps). Returns x_t,
        shaped as x0.
        """
        signal, noise = self.coefficients(t, x0)
        return signal * x0 + noise * eps

    def target(self, prediction: Prediction, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return the target of a network of this `prediction`, shaped as x0 [B, ...]; t: int64 [B].

        v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0  (Salimans & Ho 2022, appendix D)
        """
        if prediction == "x0":
            return x0
        if prediction == "eps":
            return eps
        signal, noise = self.coefficients(t, x0)
        return signal * eps - noise * x0

    def to_x0(self, prediction: Prediction, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert a network's `output` [B, ...] at (x_t [B, ...], t [B]) to its estimate of x0; the
        inverse of `target`."""
        if prediction == "x0":
            return output
        signal, noise = self.coefficients(t, x_t)
        if prediction == "eps":
            return (x_t - noise * output) / signal
        return signal * x_t - noise * output

    def to_eps(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return eps of x_t [B, ...] given x0 [B, ...]: (x_t - sqrt(alpha_bar_t) x0) /
        sqrt(1 - alpha_bar_t), finite because alpha_bar_t < 1 for t >= 0."""
        signal, noise = self.coefficients(t, x_t)
        return (x_t - signal * x0) / noise

    def posterior(
        self, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and variance of q(x_s | x_t, x0), s = `t_next` < t, and that of q(x_t | x_s).

        (Ho et al. 2020, eq. 7, for any two timesteps; beta~ and beta where they are neighbours.)
        mean: as x_t; variances: [B, 1, ...]. At t_next = -1 the first variance is 0.
        """
        alpha_bar, alpha_bar_next = self._alpha_bar(t, x_t), self._alpha_bar(t_next, x_t)
        step = (alpha_bar / alpha_bar_next).sqrt()  # x_t = step x_s + fresh noise
        beta = 1 - step**2  # a difference of near equals, where steps are small: in float64
        share = (1 - alpha_bar_next) / (1 - alpha_bar)
        of_x0, of_x = alpha_bar_next.sqrt() * beta / (1 - alpha_bar), step * share
        mean = of_x0.to(x_t.dtype) * x0 + of_x.to(x_t.dtype) * x_t
        return mean, (share * beta).to(x_t.dtype), beta.to(x_t.dtype)

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio alpha_bar / (1 - alpha_bar) of `t` as float32 [B]."""
        alpha_bar = self.table(t.device)[t]
        return (alpha_bar / (1 - alpha_bar)).float()
