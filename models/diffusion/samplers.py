"""Samplers, one signature: sampler(denoise, x, schedule, sample_steps, noise) -> x0.

`denoise(x_t [B, ...], t [B] int64) -> Denoised` is the network behind any prediction type and any
guidance. `noise(step) -> like x` returns fresh standard normals, keyed by sample; deterministic
samplers ignore it. The schedule determines the timesteps that they visit.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from models.configs import Spacing, SpacingChoice
from models.diffusion.schedule import NoiseSchedule


class Denoised(NamedTuple):
    """What a model knows of x0 at (x_t, t).

    x0: its estimate, [B, ...]; fraction: [B, ...], about [-1, 1], where the step's variance lies
    between its bounds, for a model that learned it; x0_variance: [B], the mean over dimensions of
    Var(x0 | x_t), for a model that knows its data's covariance.
    """

    x0: Tensor
    fraction: Tensor | None = None
    x0_variance: Tensor | None = None


Network = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> eps, x0 or v, [B, ...]
Denoiser = Callable[[Tensor, Tensor], Denoised]
Noise = Callable[[int], Tensor]
# From x_T [B, ...], or any x at the schedule's first timestep, to x0 [B, ...]
Sampler = Callable[[Denoiser, Tensor, NoiseSchedule, int, Noise], Tensor]


def _transitions(
    schedule: NoiseSchedule, sample_steps: int, x: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, bool]]:
    """Yield (step, t [B], t_next [B], is_last) down to the clean end, t_next = -1."""
    steps = schedule.timesteps(sample_steps)
    for i, (t, t_next) in enumerate(zip(steps, [*steps[1:], -1], strict=True)):
        now, after = (torch.full((len(x),), value, device=x.device) for value in (t, t_next))
        yield i, now, after, t_next < 0


# -- samplers --------------------------------------------------------------------------------------


def ddim(eta: float = 0.0) -> Sampler:
    """Return the DDIM sampler (Song et al. 2021, eq. 12); eta = 0 is deterministic, eta = 1 is
    DDPM."""

    def sample(
        denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, sample_steps: int, noise: Noise
    ) -> Tensor:
        for i, t, t_next, _ in _transitions(schedule, sample_steps, x):
            x0 = denoise(x, t).x0
            eps = schedule.to_eps(x0, x, t)
            # in float64: nearly all of a first step's noise is fresh, and the rest a difference
            signal, sigma = schedule.coefficients(t, x, torch.float64)
            signal_next, sigma_next = schedule.coefficients(t_next, x, torch.float64)
            # eq. 16: the standard deviation of the fresh part of the next noise
            fresh = eta * sigma_next / sigma * (1 - (signal / signal_next) ** 2).clamp(min=0).sqrt()
            kept = (sigma_next**2 - fresh**2).clamp(min=0).sqrt()
            x = signal_next.to(x.dtype) * x0 + kept.to(x.dtype) * eps
            if eta > 0:
                x = x + fresh.to(x.dtype) * noise(i)
        return x

    return sample


def analytic_ddpm(
    denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, sample_steps: int, noise: Noise
) -> Tensor:
    """Sample by DDPM with the optimal variance of each step (Bao et al. 2022, "Analytic-DPM", eq.
    8).

    The step from t to s draws from q(x_s | x_t, x0), whose mean contains a x0; the uncertainty of
    x0 adds a^2 Var(x0 | x_t) to its variance. Raises ValueError for a model that does not know it.
    """
    for i, t, t_next, is_last in _transitions(schedule, sample_steps, x):
        x0, _, x0_variance = denoise(x, t)
        if x0_variance is None:
            raise ValueError(
                "sampler: found analytic_ddpm for a model without its data's covariance, expected "
                "one of the others; diffusion priors have it"
            )
        if is_last:
            return x0
        mean, variance, beta = schedule.posterior(x0, x, t, t_next)
        of_x0 = schedule.coefficients(t_next, x)[0] * beta / schedule.coefficients(t, x)[1] ** 2
        unknown = x0_variance.to(x).reshape(-1, *[1] * (x.ndim - 1))
        x = mean + (variance + of_x0**2 * unknown).sqrt() * noise(i)
    return x


def learned_ddpm(
    denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, sample_steps: int, noise: Noise
) -> Tensor:
    """Sample by DDPM with the variance that the network learned (Nichol & Dhariwal 2021, eq. 15).

    Raises ValueError for a model that learned none.
    """
    for i, t, t_next, is_last in _transitions(schedule, sample_steps, x):
        x0, fraction, _ = denoise(x, t)
        if fraction is None:
            raise ValueError(
                "sampler: found learned_ddpm for a model that learned no variance, expected one of "
                "the others; a decoder learns it with --base.learned-variance"
            )
        if is_last:
            return x0
        mean, variance, beta = schedule.posterior(x0, x, t, t_next)
        x = mean + (learned_log_variance(fraction, variance, beta) / 2).exp() * noise(i)
    return x


def heun(
    denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, sample_steps: int, noise: Noise
) -> Tensor:
    """Sample with Heun's method, order 2, two evaluations per step (Karras et al. 2022, algorithm
    1).

    In the angle a with cos a = signal and sin a = sigma, where the flow is dx/da = v and neither
    end is singular; EDM's variable, sigma / signal, is infinite at the noisy end. The last step,
    to a = 0, is DDIM's.
    """

    def angle(t: Tensor) -> Tensor:
        signal, sigma = schedule.coefficients(t, x)
        return torch.atan2(sigma, signal)

    def velocity(x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return schedule.target("v", x0, t, schedule.to_eps(x0, x, t))

    for _, t, t_next, is_last in _transitions(schedule, sample_steps, x):
        x0 = denoise(x, t).x0
        if is_last:
            return x0
        slope = velocity(x0, x, t)
        turn = angle(t_next) - angle(t)
        euler = x + turn * slope
        slope_next = velocity(denoise(euler, t_next).x0, euler, t_next)
        x = x + turn * (slope + slope_next) / 2
    return x


def dpmpp_2m(
    denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, sample_steps: int, noise: Noise
) -> Tensor:
    """Sample with DPM-Solver++ 2M, order 2, one evaluation per step (Lu et al. 2022, algorithm 2).

    lambda = log(signal / sigma); the last step, to lambda = infinity, is of first order, x = x0.
    """
    x0_last, h_last = None, None
    for _, t, t_next, is_last in _transitions(schedule, sample_steps, x):
        x0 = denoise(x, t).x0
        signal, sigma = schedule.coefficients(t, x)
        signal_next, sigma_next = schedule.coefficients(t_next, x)
        if is_last:
            return x0
        h = torch.log(signal_next / sigma_next) - torch.log(signal / sigma)
        estimate = x0
        if x0_last is not None and h_last is not None:
            estimate = x0 + (x0 - x0_last) * h / (2 * h_last)
        x = sigma_next / sigma * x - signal_next * torch.expm1(-h) * estimate
        x0_last, h_last = x0, h
    return x


def ddim_invert(
    denoise: Denoiser,
    x0: Tensor,
    schedule: NoiseSchedule,
    sample_steps: int,
    num_refinements: int = 3,
) -> Tensor:
    """Return the x_T [B, ...] from which `ddim()` with as many steps returns to `x0` [B, ...].

    (Dhariwal & Nichol 2021, appendix F.) Each step solves DDIM's own step for its starting point:
    eps is evaluated there, at a guess that is improved `num_refinements` times. Raises ValueError
    for a schedule of zero terminal SNR, whose first step does not depend on x_T.
    """
    if schedule.alpha_bar[-1] == 0:
        raise ValueError(
            "inversion: found a schedule of zero terminal SNR, expected some signal at its end: "
            "take a decoder that was trained without zero_terminal"
        )
    x = x0
    for _, t, t_next, _ in reversed(list(_transitions(schedule, sample_steps, x0))):
        signal, sigma = schedule.coefficients(t, x)
        signal_next, sigma_next = schedule.coefficients(t_next, x)
        guess = x
        for _ in range(1 + num_refinements):
            eps = schedule.to_eps(denoise(guess, t).x0, guess, t)
            guess = signal * (x - sigma_next * eps) / signal_next + sigma * eps
        x = guess
    return x


# -- variances -------------------------------------------------------------------------------------


def learned_log_variance(fraction: Tensor, variance: Tensor, beta: Tensor) -> Tensor:
    """Return log sigma^2 between its bounds, that of q(x_s | x_t, x0) and that of q(x_t | x_s).

    v log beta + (1 - v) log beta~, v = (fraction + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).
    fraction: any shape, about [-1, 1]; variance, beta: positive, broadcast over it.
    """
    v = (fraction + 1) / 2
    return v * beta.log() + (1 - v) * variance.log()


def gaussian_posterior_variance(schedule: NoiseSchedule, variances: Tensor) -> Tensor:
    """Return the mean of Var(x0 | x_t) over dimensions, float64 [T], of Gaussian data.

    v (1 - alpha_bar) / (alpha_bar v + 1 - alpha_bar) for each of `variances` [E], the eigenvalues
    of the data's covariance; data that are not Gaussian have less.
    """
    alpha_bar, v = schedule.alpha_bar[:, None], variances.double().cpu()[None]
    return (v * (1 - alpha_bar) / (alpha_bar * v + 1 - alpha_bar)).mean(1)


# -- samplers by name ------------------------------------------------------------------------------

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim(),
    "ddpm": ddim(eta=1.0),
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "learned_ddpm": learned_ddpm,
    "analytic_ddpm": analytic_ddpm,
}
NEED_VARIANCE = ("learned_ddpm", "analytic_ddpm")  # of the step, or of x0
SECOND_ORDER = ("heun", "dpmpp_2m")


def default_spacing(spacing: SpacingChoice, name: str) -> Spacing:
    """Return `spacing`, or for "auto" the best spacing for the sampler called `name`.

    Samplers of order 2, in few steps, follow the flow of a decoder and an upsampler three times as
    closely with `karras`, which has more timesteps at both ends (`benchmarks/results.md`). Raises
    ValueError for an unknown spacing.
    """
    if spacing != "auto":
        if spacing not in get_args(Spacing):
            known = ", ".join((*get_args(Spacing), "auto"))
            raise ValueError(f"spacing: found {spacing!r}, expected one of {known}")
        return spacing
    return "karras" if name in SECOND_ORDER else "trailing"


# -- wrapped networks and denoisers ----------------------------------------------------------------


def guided(
    conditional: Network,
    unconditional: Network,
    cfg_scale: float,
    *,
    interval: tuple[int, int] | None = None,
    rescale: float = 0.0,
) -> Network:
    """Wrap two networks into uncond + s (cond - uncond) (Ho & Salimans 2022, eq. 6); s = 1 is off.

    The rule is affine in the prediction, so it is the same for x0, eps and v. Channels that the
    conditional has beyond the unconditional's, a learned variance, stay. interval: timesteps
    [low, high] in which to guide, the conditional alone elsewhere (Kynkaanniemi et al. 2024); None:
    all. rescale: share of the result that gets the conditional's standard deviation back (Lin et
    al. 2023, eq. 15 and 16).
    """
    if cfg_scale == 1:
        return conditional

    def predict(x: Tensor, t: Tensor) -> Tensor:
        output = conditional(x, t)
        if interval is not None and not interval[0] <= int(t[0]) <= interval[1]:
            return output
        uncond = unconditional(x, t)
        cond, rest = output.tensor_split([uncond.shape[1]], dim=1)
        result = uncond + cfg_scale * (cond - uncond)
        if rescale:
            dims = tuple(range(1, x.ndim))
            ratio = cond.std(dims, keepdim=True) / result.std(dims, keepdim=True)
            result = result * (rescale * ratio + 1 - rescale)
        return torch.cat([result, rest], dim=1)

    return predict


def inpainted(denoise: Denoiser, known: Tensor, mask: Tensor) -> Denoiser:
    """Wrap `denoise` so that its x0 is `known` [B, C, H, W] where `mask` [B, 1, H, W] is 1."""

    def wrapped(x: Tensor, t: Tensor) -> Denoised:
        output = denoise(x, t)
        return output._replace(x0=torch.where(mask > 0.5, known, output.x0))

    return wrapped


def clipped(denoise: Denoiser, bound: float) -> Denoiser:
    """Wrap `denoise` so that its x0 stays in [-bound, bound], the range of the data."""

    def wrapped(x: Tensor, t: Tensor) -> Denoised:
        output = denoise(x, t)
        return output._replace(x0=output.x0.clamp(-bound, bound))

    return wrapped
