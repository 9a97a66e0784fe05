"""Samplers, one signature: sampler(denoise, x, schedule, sample_steps, noise) -> x0.

`denoise(x_t [B, ...], t [B] int64) -> x0` is the network behind any prediction type and any
guidance.
`noise(step) -> like x` supplies fresh standard normals, keyed by sample; deterministic samplers
ignore it.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from models.schedule import NoiseSchedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]


class Sampler(Protocol):
    def __call__(
        self, denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, sample_steps: int, noise: Noise
    ) -> Tensor: ...


def timesteps(num_timesteps: int, sample_steps: int) -> list[int]:
    """Return `sample_steps` descending timesteps that start at T - 1 ("trailing", Lin et al.
    2023, table 2)."""
    if not 1 <= sample_steps <= num_timesteps:
        raise ValueError(f"sample_steps: found {sample_steps}, expected 1 to {num_timesteps}")
    return [
        round(num_timesteps * (i + 1) / sample_steps) - 1 for i in reversed(range(sample_steps))
    ]


def _transitions(
    schedule: NoiseSchedule, sample_steps: int, x: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (step, t [B], t_next [B]) down to the clean end, t_next = -1."""
    steps = timesteps(schedule.num_timesteps, sample_steps)
    for i, (t, t_next) in enumerate(zip(steps, [*steps[1:], -1], strict=True)):
        yield (
            i,
            torch.full((len(x),), t, device=x.device),
            torch.full((len(x),), t_next, device=x.device),
        )


def ddim(eta: float = 0.0) -> Sampler:
    """Return the DDIM sampler (Song et al. 2021, eq. 12); eta = 0 is deterministic, eta = 1 is
    DDPM."""

    def sample(
        denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, sample_steps: int, noise: Noise
    ) -> Tensor:
        for i, t, t_next in _transitions(schedule, sample_steps, x):
            x0 = denoise(x, t)
            eps = schedule.to_eps(x0, x, t)
            signal, sigma = schedule.coefficients(t, x)
            signal_next, sigma_next = schedule.coefficients(t_next, x)
            # eq. 16: the share of the next noise that is drawn afresh
            fresh = eta * sigma_next / sigma * (1 - (signal / signal_next) ** 2).clamp(min=0).sqrt()
            x = signal_next * x0 + (sigma_next**2 - fresh**2).clamp(min=0).sqrt() * eps
            if eta > 0:
                x = x + fresh * noise(i)
        return x

    return sample


def dpmpp_2m(
    denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, sample_steps: int, noise: Noise
) -> Tensor:
    """Sample with DPM-Solver++ 2M, order 2, one evaluation a step (Lu et al. 2022, algorithm 2).

    lambda = log(signal / sigma); the last step to lambda = infinity is the first-order one, x = x0.
    """
    x0_last, h_last = None, None
    for _, t, t_next in _transitions(schedule, sample_steps, x):
        x0 = denoise(x, t)
        signal, sigma = schedule.coefficients(t, x)
        signal_next, sigma_next = schedule.coefficients(t_next, x)
        if (t_next < 0).all():
            return x0
        h = torch.log(signal_next / sigma_next) - torch.log(signal / sigma)
        estimate = x0
        if x0_last is not None and h_last is not None:
            estimate = x0 + (x0 - x0_last) * h / (2 * h_last)
        x = sigma_next / sigma * x - signal_next * torch.expm1(-h) * estimate
        x0_last, h_last = x0, h
    return x


SAMPLERS: dict[str, Sampler] = {"ddim": ddim(), "ddpm": ddim(eta=1.0), "dpmpp_2m": dpmpp_2m}


def sampler_named(name: str) -> Sampler:
    """Return the sampler called `name`; ValueError lists the valid names."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler: found {name!r}, expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def guided(conditional: Denoiser, unconditional: Denoiser, cfg_scale: float) -> Denoiser:
    """Wrap two denoisers into x0 = uncond + s (cond - uncond) (Ho & Salimans 2022, eq. 6); s = 1
    is off.

    The rule is affine in the prediction, so it is the same for x0, eps and v.
    """
    if cfg_scale == 1:
        return conditional

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        without = unconditional(x, t)
        return without + cfg_scale * (conditional(x, t) - without)

    return denoise


def clipped(denoise: Denoiser, bound: float) -> Denoiser:
    """Wrap `denoise` so that its x0 stays in [-bound, bound], the range of the data."""
    return lambda x, t: denoise(x, t).clamp(-bound, bound)
