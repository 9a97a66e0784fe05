"""Samplers against the exact denoiser of a Gaussian, for which every answer is known."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models import keyed_random
from models.samplers import SAMPLERS, Sampler, clipped, ddim, guided, sampler_named, timesteps
from models.schedule import NoiseSchedule

MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.6, 0.3], [0.3, 0.4]], dtype=torch.float64)
SCHEDULE = NoiseSchedule.build("cosine", 1000)


def exact(x: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x_t] for x0 ~ N(MEAN, COVARIANCE), by Gaussian conditioning."""
    alpha_bar = SCHEDULE.alpha_bar[t[0]]
    joint = alpha_bar * COVARIANCE + (1 - alpha_bar) * torch.eye(2, dtype=torch.float64)
    gain = alpha_bar.sqrt() * COVARIANCE @ torch.linalg.inv(joint)
    return MEAN + (x - alpha_bar.sqrt() * MEAN) @ gain.T


def start(count: int) -> Tensor:
    return keyed_random.normal(torch.arange(count), "start", (2,)).double()


def fresh(count: int) -> Callable[[int], Tensor]:
    return lambda step: keyed_random.normal(torch.arange(count), f"step_{step}", (2,)).double()


def no_noise(step: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


@pytest.mark.parametrize(
    ("name", "sample_steps", "tolerance"), [("ddim", 200, 0.03), ("ddpm", 200, 0.03),
                                            ("dpmpp_2m", 25, 0.03)],
)  # fmt: skip
def test_samples_have_the_mean_and_covariance_of_the_data(
    name: str, sample_steps: int, tolerance: float
):
    count = 20_000
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

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        last.append(x)
        signal = alpha_bar[t][:, None]
        return x * signal.sqrt() * variance / (signal * variance + 1 - signal)

    def scale(at: Tensor) -> Tensor:
        return (at * variance + 1 - at).sqrt()  # the flow keeps x_t / sd(x_t)

    x = torch.ones(1, 1, dtype=torch.float64)
    sampler(denoise, x, schedule, steps + 1, no_noise)
    return (last[-1] - x * scale(alpha_bar[0]) / scale(alpha_bar[-1])).abs().item()


def test_ddim_is_of_first_order_and_dpmpp_2m_of_second():
    assert order_of(SAMPLERS["ddim"]) == pytest.approx(1, abs=0.15)
    assert order_of(SAMPLERS["dpmpp_2m"]) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_deterministic_samplers_ask_for_no_noise_and_repeat_themselves(name: str):
    first, second = (SAMPLERS[name](exact, start(8), SCHEDULE, 10, no_noise) for _ in range(2))
    assert torch.equal(first, second)


def test_eta_moves_the_noise_and_not_the_law():
    other = ddim(eta=0.5)(exact, start(20_000), SCHEDULE, 200, fresh(20_000))
    torch.testing.assert_close(torch.cov(other.T), COVARIANCE, atol=0.03, rtol=0)
    plain = ddim()(exact, start(20_000), SCHEDULE, 200, no_noise)
    assert not torch.allclose(other, plain, atol=0.1)


def test_ddpm_draws_from_the_posterior():
    """One transition of q(x_s | x_t, x0): its mean and variance (Ho et al. 2020, eq. 7)."""
    t, s, count = 999, 499, 50_000
    x0 = torch.tensor([[0.3]], dtype=torch.float64).expand(count, 1)
    x_t = torch.tensor([[1.1]], dtype=torch.float64).expand(count, 1)
    seen: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return x0

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
    expected = exact(x, torch.full((4,), 999))
    torch.testing.assert_close(SAMPLERS[name](exact, x, SCHEDULE, 1, fresh(4)), expected)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sample_does_not_depend_on_its_neighbours(name: str):
    whole = SAMPLERS[name](exact, start(6), SCHEDULE, 8, fresh(6))
    first = SAMPLERS[name](exact, start(6)[:2], SCHEDULE, 8, lambda step: fresh(6)(step)[:2])
    torch.testing.assert_close(first, whole[:2], atol=1e-12, rtol=0)


def test_timesteps_fall_from_the_end_without_repeats():
    for count in (1, 2, 7, 50, 999, 1000):
        found = timesteps(1000, count)
        assert len(found) == count and found[0] == 999 and found[-1] >= 0
        assert found == sorted(set(found), reverse=True)
    for count in (0, 1001):
        with pytest.raises(ValueError, match=f"sample_steps: found {count}, expected 1 to 1000"):
            timesteps(1000, count)


def test_guidance_is_off_at_one_and_affine_elsewhere():
    def unconditional(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x)

    x, t = start(5), torch.full((5,), 500)
    cond, uncond = exact(x, t), unconditional(x, t)
    assert guided(exact, unconditional, 1.0) is exact
    for scale in (0.0, 0.5, 3.0):
        found = guided(exact, unconditional, scale)(x, t)
        torch.testing.assert_close(found, (1 - scale) * uncond + scale * cond)


def test_clipping_bounds_x0():
    x = clipped(lambda x, t: 10 * x, 1.0)(start(50), torch.zeros(50, dtype=torch.long))
    assert x.abs().max() == 1


def test_an_unknown_sampler_lists_the_known_ones():
    with pytest.raises(ValueError, match="found 'euler', expected one of ddim, ddpm, dpmpp_2m"):
        sampler_named("euler")
