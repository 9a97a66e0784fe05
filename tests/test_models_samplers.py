"""Samplers against the exact denoiser of a Gaussian, for which every answer is known."""

import math
from collections.abc import Callable
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor

from models.configs import Spacing
from models.diffusion import keyed_random
from models.diffusion.samplers import (
    SAMPLERS,
    Denoised,
    Denoiser,
    Sampler,
    analytic_ddpm,
    clipped,
    ddim,
    ddim_invert,
    default_spacing,
    gaussian_posterior_variance,
    guided,
)
from models.diffusion.schedule import NoiseSchedule

MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.6, 0.3], [0.3, 0.4]], dtype=torch.float64)
SCHEDULE = NoiseSchedule.build("cosine", 1000)


def predicted(x: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x_t] for x0 ~ N(MEAN, COVARIANCE), by Gaussian conditioning."""
    alpha_bar = SCHEDULE.alpha_bar[t[0]]
    joint = alpha_bar * COVARIANCE + (1 - alpha_bar) * torch.eye(2, dtype=torch.float64)
    gain = alpha_bar.sqrt() * COVARIANCE @ torch.linalg.inv(joint)
    return MEAN + (x - alpha_bar.sqrt() * MEAN) @ gain.T


X0_VARIANCE = gaussian_posterior_variance(SCHEDULE, torch.linalg.eigvalsh(COVARIANCE))


def known(x0: Tensor, t: Tensor, x0_variance: Tensor = X0_VARIANCE) -> Denoised:
    """x0 with what every sampler asks for; a fraction of -1 is DDPM's own variance."""
    return Denoised(x0, torch.full_like(x0, -1), x0_variance[t])


def exact(x: Tensor, t: Tensor) -> Denoised:
    return known(predicted(x, t), t)


def start(count: int) -> Tensor:
    return keyed_random.normal(torch.arange(count), "start", (2,)).double()


def fresh(count: int) -> Callable[[int], Tensor]:
    return lambda step: keyed_random.normal(torch.arange(count), f"step_{step}", (2,)).double()


def no_noise(step: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


@pytest.mark.parametrize(
    ("name", "sample_steps", "tolerance"), [("ddim", 200, 0.03), ("ddpm", 200, 0.03),
                                            ("dpmpp_2m", 25, 0.03), ("heun", 25, 0.03)],
)  # fmt: skip
def test_samples_have_the_mean_and_covariance_of_the_data(
    name: str, sample_steps: int, tolerance: float
):
    count = 10_000
    x = SAMPLERS[name](exact, start(count), SCHEDULE, sample_steps, fresh(count))
    torch.testing.assert_close(x.mean(0), MEAN, atol=tolerance, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), COVARIANCE, atol=tolerance, rtol=0)


def order_of(sampler: Sampler) -> float:
    """The slope of log error against log step, over lambda-uniform grids of a smooth problem.

    One step too many, the jump to lambda = infinity, is common to all grids and left out by
    comparing at the last timestep before it; hence the fine schedule and its own exact answer.
    """
    errors = [solution_error(sampler, steps) for steps in (16, 32, 64)]
    return math.log2(errors[0] / errors[-1]) / 2


def solution_error(sampler: Sampler, steps: int) -> float:
    """The error of `steps` transitions over lambda in [-2, 2], where x0 ~ N(0, .25) is known."""
    variance = 0.25
    log_snr = torch.linspace(-2, 2, steps + 1, dtype=torch.float64)  # falls to the clean end
    alpha_bar = torch.sigmoid(2 * log_snr).flip(0)  # index t rises with the noise
    schedule = NoiseSchedule(alpha_bar=alpha_bar)
    last: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        last.append(x)
        signal = alpha_bar[t][:, None]
        return Denoised(x * signal.sqrt() * variance / (signal * variance + 1 - signal))

    def scale(at: Tensor) -> Tensor:
        return (at * variance + 1 - at).sqrt()  # the flow keeps x_t / sd(x_t)

    x = torch.ones(1, 1, dtype=torch.float64)
    sampler(denoise, x, schedule, steps + 1, no_noise)
    return (last[-1] - x * scale(alpha_bar[0]) / scale(alpha_bar[-1])).abs().item()


def test_ddim_is_of_first_order_and_the_others_of_second():
    assert order_of(SAMPLERS["ddim"]) == pytest.approx(1, abs=0.15)
    assert order_of(SAMPLERS["dpmpp_2m"]) == pytest.approx(2, abs=0.25)
    assert order_of(SAMPLERS["heun"]) == pytest.approx(2, abs=0.25)


# A mixture of two Gaussians: its denoiser is no linear map any more.
PLACES = torch.tensor([[-1.0, 0.5], [1.2, -0.4]], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)
SPREAD = 0.04  # variance of either, in each dimension


def of_mixture(x: Tensor, t: Tensor) -> Denoised:
    """E[x0 | x_t] for x0 from the mixture: each component's own, by its probability given x_t."""
    alpha_bar = SCHEDULE.alpha_bar[t[0]]
    variance = alpha_bar * SPREAD + 1 - alpha_bar
    away = x[:, None] - alpha_bar.sqrt() * PLACES  # [B, 2, 2]
    share = (SHARES.log() - away.square().sum(-1) / (2 * variance)).softmax(1)
    means = PLACES + alpha_bar.sqrt() * SPREAD / variance * away
    return Denoised((share[..., None] * means).sum(1))


@pytest.mark.parametrize(
    ("name", "sample_steps"), [("ddim", 200), ("ddpm", 200), ("heun", 40), ("dpmpp_2m", 60)]
)
@pytest.mark.parametrize("spacing", get_args(Spacing))
def test_samples_of_a_mixture_have_its_shares_mean_and_covariance(
    name: str, sample_steps: int, spacing: Spacing
):
    count = 10_000
    schedule = SCHEDULE.spaced(spacing)
    x = SAMPLERS[name](of_mixture, start(count), schedule, sample_steps, fresh(count))
    mean = SHARES @ PLACES
    between = (PLACES - mean).T * SHARES @ (PLACES - mean)
    covariance = between + SPREAD * torch.eye(2, dtype=torch.float64)
    first = ((x - PLACES[0]).norm(dim=1) < (x - PLACES[1]).norm(dim=1)).double().mean()
    assert first.item() == pytest.approx(SHARES[0].item(), abs=0.015)
    torch.testing.assert_close(x.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), covariance, atol=0.03, rtol=0)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_schedule_without_terminal_signal_is_sampled_from_pure_noise(name: str):
    schedule, count = NoiseSchedule.build("cosine", 1000, zero_terminal=True), 10_000

    x0_variance = gaussian_posterior_variance(schedule, torch.tensor([0.25]))

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        alpha_bar = schedule.alpha_bar[t[0]]
        gain = alpha_bar.sqrt() * 0.25 / (alpha_bar * 0.25 + 1 - alpha_bar)
        return known(2 + gain * (x - alpha_bar.sqrt() * 2), t, x0_variance)

    x = SAMPLERS[name](denoise, start(count), schedule, 100, fresh(count))
    assert x.mean().item() == pytest.approx(2, abs=0.02)
    assert x.var().item() == pytest.approx(0.25, abs=0.02)


# -- Analytic-DPM ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_steps", [2, 5, 20])
def test_analytic_variances_are_exact_for_an_isotropic_gaussian(sample_steps: int):
    """Whatever the number of steps; DDPM's own variance is too small at few."""
    variance, count = 0.3, 50_000
    unknown = gaussian_posterior_variance(SCHEDULE, torch.tensor([variance]))

    def spread(sampler: Sampler) -> float:
        """The variance before the last step, which gives the mean of x0 alone."""
        seen: list[Tensor] = []

        def denoise(x: Tensor, t: Tensor) -> Denoised:
            seen.append(x)
            alpha_bar = SCHEDULE.alpha_bar[t[0]]
            x0 = x * alpha_bar.sqrt() * variance / (alpha_bar * variance + 1 - alpha_bar)
            return known(x0, t, unknown)

        sampler(denoise, start(count), SCHEDULE, sample_steps, fresh(count))
        return seen[-1].var().item()

    t = SCHEDULE.timesteps(sample_steps)[-1]
    alpha_bar = SCHEDULE.alpha_bar[t].item()
    expected = alpha_bar * variance + 1 - alpha_bar
    assert spread(analytic_ddpm) == pytest.approx(expected, rel=0.02)
    assert spread(ddim(eta=1.0)) < 0.99 * expected


def test_what_is_not_known_of_gaussian_data():
    """Nothing at the clean end's limit, the data's own variance at the noisy one."""
    variances = torch.tensor([0.5, 1.5, 4.0])
    found = gaussian_posterior_variance(SCHEDULE, variances)
    assert found[0] < 1e-3 and found[-1].item() == pytest.approx(2.0, rel=1e-3)
    assert (found.diff() > 0).all()


# -- inversion -------------------------------------------------------------------------------------


def return_error(denoise: Denoiser, sample_steps: int, refinements: int) -> float:
    """The 95th percentile of the round trip's largest error over two dimensions; data spread over
    0.6 to 1. Points between two components, which either may claim, are the rest."""
    x0 = ddim()(denoise, start(500), SCHEDULE, 200, no_noise)
    x_t = ddim_invert(denoise, x0, SCHEDULE, sample_steps, refinements)
    back = ddim()(denoise, x_t, SCHEDULE, sample_steps, no_noise)
    return (back - x0).abs().amax(1).quantile(0.95).item()


@pytest.mark.parametrize("denoise", [exact, of_mixture])
def test_sampling_from_an_inversion_comes_back(denoise: Denoiser):
    """Within .05 at 50 steps, .02 at 100; refining eps where the step starts is what does it."""
    errors = [return_error(denoise, 50, refinements) for refinements in (0, 1, 3)]
    assert errors[2] < 0.05 and errors[2] < errors[1] < errors[0] / 1.5
    assert return_error(denoise, 100, 3) < min(0.02, 0.6 * errors[2])


def test_an_inversion_of_data_is_the_samplers_noise():
    x0 = MEAN + start(10_000) @ torch.linalg.cholesky(COVARIANCE).T
    x_t = ddim_invert(exact, x0, SCHEDULE, 100)
    torch.testing.assert_close(
        torch.cov(x_t.T), torch.eye(2, dtype=torch.float64), atol=0.05, rtol=0
    )


def test_what_forgets_its_start_is_not_inverted():
    schedule = NoiseSchedule.build("cosine", 100, zero_terminal=True)
    with pytest.raises(ValueError, match="found a schedule of zero terminal SNR"):
        ddim_invert(exact, start(2), schedule, 10)


# -- laws of all samplers --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun"])
def test_deterministic_samplers_ask_for_no_noise_and_repeat_themselves(name: str):
    first, second = (SAMPLERS[name](exact, start(8), SCHEDULE, 10, no_noise) for _ in range(2))
    assert torch.equal(first, second)


def test_eta_moves_the_noise_and_not_the_law():
    other = ddim(eta=0.5)(exact, start(10_000), SCHEDULE, 200, fresh(10_000))
    torch.testing.assert_close(torch.cov(other.T), COVARIANCE, atol=0.03, rtol=0)
    plain = ddim()(exact, start(10_000), SCHEDULE, 200, no_noise)
    assert not torch.allclose(other, plain, atol=0.1)


def test_ddpm_draws_from_the_posterior():
    """One transition of q(x_s | x_t, x0): its mean and variance (Ho et al. 2020, eq. 7)."""
    t, s, count = 999, 499, 50_000
    x0 = torch.tensor([[0.3]], dtype=torch.float64).expand(count, 1)
    x_t = torch.tensor([[1.1]], dtype=torch.float64).expand(count, 1)
    seen: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        seen.append(x)
        return Denoised(x0)

    draw = keyed_random.normal(torch.arange(count), "fresh", (1,)).double()
    SAMPLERS["ddpm"](denoise, x_t, SCHEDULE, 2, lambda step: draw)
    alpha_bar, before = SCHEDULE.alpha_bar[t], SCHEDULE.alpha_bar[s]
    alpha = alpha_bar / before  # of the whole transition
    variance = (1 - before) / (1 - alpha_bar) * (1 - alpha)
    mean = (before.sqrt() * (1 - alpha) * 0.3 + alpha.sqrt() * (1 - before) * 1.1) / (1 - alpha_bar)
    assert seen[1].mean().item() == pytest.approx(mean.item(), abs=0.02)
    assert seen[1].var().item() == pytest.approx(variance.item(), rel=0.03)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_one_step_is_the_denoiser_itself(name: str):
    x = start(4)
    expected = predicted(x, torch.full((4,), 999))
    torch.testing.assert_close(SAMPLERS[name](exact, x, SCHEDULE, 1, fresh(4)), expected)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sample_does_not_depend_on_its_neighbours(name: str):
    whole = SAMPLERS[name](exact, start(6), SCHEDULE, 8, fresh(6))
    first = SAMPLERS[name](exact, start(6)[:2], SCHEDULE, 8, lambda step: fresh(6)(step)[:2])
    torch.testing.assert_close(first, whole[:2], atol=1e-12, rtol=0)


def test_timesteps_fall_from_the_end_without_repeats():
    for spacing in get_args(Spacing):
        for count in (1, 2, 7, 50, 999, 1000):
            found = SCHEDULE.spaced(spacing).timesteps(count)
            assert len(found) == count and found[0] == 999 and found[-1] >= 0
            assert found == sorted(set(found), reverse=True)
            last = round(1000 / count) - 1 if spacing == "trailing" else 0
            assert count == 1 or found[-1] == last
    for count in (0, 1001):
        with pytest.raises(ValueError, match=f"sample_steps: found {count}, expected 1 to 1000"):
            SCHEDULE.timesteps(count)


@pytest.mark.parametrize("steps", [5, 20, 60])
def test_karras_timesteps_are_diffusers_own(steps: int):
    """Which rounds the paper's sigmas to timesteps otherwise: by their logarithms."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, use_karras_sigmas=True
    )  # ends in a sigma of 14.6: below the paper's largest, which diffusers does not know
    theirs.set_timesteps(steps)
    ours = NoiseSchedule.build("scaled_linear").spaced("karras").timesteps(steps)
    assert max(abs(a - b) for a, b in zip(ours, theirs.timesteps.tolist(), strict=True)) <= 1


def test_karras_begins_where_no_signal_is_left_and_stays_within_the_paper_s_sigmas():
    schedule = NoiseSchedule.build("cosine", 1000, zero_terminal=True).spaced("karras")
    first, second, *_, last = schedule.timesteps(20)
    sigma = ((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt()
    assert (first, last) == (999, 0) and 40 < sigma[second] < 80


@pytest.mark.parametrize(("name", "spacing"), [("dpmpp_2m", "karras"), ("heun", "karras"),
                                               ("ddim", "trailing"), ("ddpm", "trailing")])
def test_a_sampler_has_the_spacing_that_suits_it_by_default(name: str, spacing: Spacing):
    assert default_spacing("auto", name) == spacing
    assert default_spacing("strided", name) == "strided"
    with pytest.raises(ValueError, match="spacing: found 'Karras', expected one of trailing"):
        default_spacing(cast(Any, "Karras"), name)


def test_guidance_is_off_at_one_and_affine_elsewhere():
    def unconditional(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x)

    x, t = start(5), torch.full((5,), 500)
    cond, uncond = predicted(x, t), unconditional(x, t)
    assert guided(predicted, unconditional, 1.0) is predicted
    for scale in (0.0, 0.5, 3.0):
        found = guided(predicted, unconditional, scale)(x, t)
        torch.testing.assert_close(found, (1 - scale) * uncond + scale * cond)


def test_guidance_acts_in_its_interval_alone():
    calls = []

    def unconditional(x: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t[0]))
        return torch.tanh(x)

    wrapped = guided(predicted, unconditional, 3.0, interval=(200, 600))
    for t in (0, 199, 200, 600, 601):
        x = start(3)
        found = wrapped(x, torch.full((3,), t))
        assert torch.equal(found, predicted(x, torch.full((3,), t))) == (t not in (200, 600))
    assert calls == [200, 600]  # and costs nothing elsewhere


def test_a_rescaled_guidance_has_the_conditionals_deviation():
    x, t = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.full((5,), 300)
    cond, uncond = (lambda x, t: 0.7 * x + 0.1), (lambda x, t: torch.tanh(x))
    plain = guided(cond, uncond, 4.0)(x, t)
    whole = guided(cond, uncond, 4.0, rescale=1.0)(x, t)
    half = guided(cond, uncond, 4.0, rescale=0.5)(x, t)
    torch.testing.assert_close(whole.std((1, 2, 3)), cond(x, t).std((1, 2, 3)))
    torch.testing.assert_close(half, (plain + whole) / 2)


def test_clipping_bounds_x0():
    denoise = clipped(lambda x, t: Denoised(10 * x), 1.0)
    assert denoise(start(50), torch.zeros(50, dtype=torch.long)).x0.abs().max() == 1


@pytest.mark.parametrize("name", ["learned_ddpm", "analytic_ddpm"])
def test_a_sampler_asks_for_the_variance_that_it_needs(name: str):
    with pytest.raises(ValueError, match=f"sampler: found {name} for a model .*, expected one of"):
        SAMPLERS[name](lambda x, t: Denoised(x), start(2), SCHEDULE, 3, fresh(2))
