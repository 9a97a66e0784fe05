"""Laws of the noise schedules, and the closed forms they must agree with."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from models.configs import Prediction, ScheduleName
from models.diffusion.losses import MIN_SNR_GAMMA, draw_timesteps, timestep_weight
from models.diffusion.schedule import NoiseSchedule

NAMES, PREDICTIONS = get_args(ScheduleName), get_args(Prediction)


def noisy(schedule: NoiseSchedule, size: int = 6) -> tuple[torch.Tensor, ...]:
    """x0, t, eps and x_t in float64, over the whole range of t."""
    rng = torch.Generator().manual_seed(0)
    t = torch.linspace(0, schedule.num_timesteps - 1, size).long()
    x0, eps = (torch.randn(size, 3, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    return x0, t, eps, schedule.q_sample(x0, t, eps)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_timesteps", [100, 1000])
def test_alpha_bar_falls_from_nearly_one_to_nearly_zero(name: ScheduleName, num_timesteps: int):
    alpha_bar = NoiseSchedule.build(name, num_timesteps).alpha_bar
    assert alpha_bar.dtype == torch.float64 and len(alpha_bar) == num_timesteps
    assert (alpha_bar.diff() < 0).all() and (alpha_bar > 0).all() and (alpha_bar < 1).all()
    assert alpha_bar[0] > 0.98 and alpha_bar[-1] < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_no_signal_is_left_at_a_zero_terminal(name: ScheduleName):
    plain = NoiseSchedule.build(name, 1000)
    zero = NoiseSchedule.build(name, 1000, zero_terminal=True)
    assert zero.alpha_bar[-1] == 0 and zero.alpha_bar[0] == pytest.approx(plain.alpha_bar[0])
    signal, plain_signal = zero.alpha_bar.sqrt(), plain.alpha_bar.sqrt()
    ratio = (signal.diff() / plain_signal.diff())[1:]  # shifted and scaled: all steps alike
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)
    theirs = rescale_zero_terminal_snr(
        1 - torch.cat([plain.alpha_bar[:1], plain.alpha_bar[1:] / plain.alpha_bar[:-1]])
    )
    torch.testing.assert_close(torch.cumprod(1 - theirs, 0), zero.alpha_bar, rtol=1e-6, atol=1e-12)


def test_the_cosine_schedule_is_its_closed_form():
    """Nichol & Dhariwal 2021, eq. 17, straight from f(t) / f(0); the last beta is clipped."""
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    found = NoiseSchedule.build("cosine", 1000).alpha_bar.numpy()
    np.testing.assert_allclose(found[:-1], f[1:-1] / f[0], rtol=1e-9)
    assert found[-1] == pytest.approx(found[-2] * 0.001)


@pytest.mark.parametrize(
    ("name", "beta"),
    [
        ("linear", [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]),
        (
            "scaled_linear",
            [
                (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999) ** 2
                for i in range(1000)
            ],
        ),
    ],
)
def test_the_linear_schedules_are_their_closed_forms(name: ScheduleName, beta: list[float]):
    expected, product = [], 1.0
    for b in beta:
        product *= 1 - b
        expected.append(product)
    found = NoiseSchedule.build(name, 1000).alpha_bar.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-10)



def test_published_end_points():
    """The figures that DDPM and Stable Diffusion report for T = 1000."""
    assert NoiseSchedule.build("linear").alpha_bar[-1].item() == pytest.approx(4.04e-5, rel=1e-2)
    last = NoiseSchedule.build("scaled_linear").alpha_bar[-1].item()
    assert last == pytest.approx(0.00466, rel=1e-2)


@pytest.mark.parametrize(("name", "num_timesteps"), [("linear", 10), ("cosine", 1), ("cosine", 0)])
def test_too_few_timesteps_are_refused(name: ScheduleName, num_timesteps: int):
    with pytest.raises(ValueError, match=f"schedule {name}: {num_timesteps} timesteps"):
        NoiseSchedule.build(name, num_timesteps)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_leads_back_to_x0_and_eps(name: ScheduleName, prediction: Prediction):
    schedule = NoiseSchedule.build(name)
    x0, t, eps, x_t = noisy(schedule)
    target = schedule.target(prediction, x0, t, eps)
    torch.testing.assert_close(schedule.to_x0(prediction, target, x_t, t), x0, atol=1e-8, rtol=0)
    torch.testing.assert_close(schedule.to_eps(x0, x_t, t), eps, atol=1e-8, rtol=0)


def test_v_is_the_quarter_turn_of_x_t():
    """With x_t = cos(phi) x0 + sin(phi) eps, v = d x_t / d phi (Salimans & Ho 2022)."""
    schedule = NoiseSchedule.build("cosine")
    x0, t, eps, _ = noisy(schedule)
    phi = torch.acos(schedule.alpha_bar[t].sqrt())[:, None, None].requires_grad_()
    (torch.cos(phi) * x0 + torch.sin(phi) * eps).sum().backward()
    expected = schedule.target("v", x0, t, eps).sum((1, 2))
    assert phi.grad is not None
    torch.testing.assert_close(phi.grad.flatten(), expected, atol=1e-7, rtol=0)


def test_q_sample_keeps_unit_variance():
    schedule, n = NoiseSchedule.build("cosine"), 100_000
    x0, eps = torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    for t in (0, 250, 500, 999):
        x_t = schedule.q_sample(x0, torch.full((n,), t), eps)
        assert x_t.var().item() == pytest.approx(1, abs=0.03)


def test_minus_one_stands_for_the_clean_end():
    signal, noise = NoiseSchedule.build("cosine").coefficients(
        torch.tensor([-1]), torch.zeros(1, 2, dtype=torch.float64)
    )
    assert signal.item() == 1 and noise.item() == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_x0_error_alike_whatever_the_network_predicts(prediction: Prediction):
    """Hang et al. 2023: an error of delta in x0 costs min(SNR, gamma) delta^2 in any units."""
    schedule = NoiseSchedule.build("cosine")
    x0, t, _, x_t = noisy(schedule)
    wrong = x0 + 0.1
    outputs = [schedule.target(prediction, x, t, schedule.to_eps(x, x_t, t)) for x in (x0, wrong)]
    error = (outputs[1] - outputs[0]).square().mean((1, 2))
    weight = timestep_weight(schedule, "min_snr", prediction, t)
    snr = schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])
    torch.testing.assert_close(
        (weight * error).double(), snr.clamp(max=MIN_SNR_GAMMA) * 0.01, rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_timesteps_cover_the_range_with_the_density_they_state(bias: float):
    schedule = NoiseSchedule.build("cosine", 100)
    t = draw_timesteps(schedule, torch.arange(100_000), bias)
    assert t.min() >= 0 and t.max() == 99
    mean = ((t.double() + 0.5) / 100).mean().item()
    assert mean == pytest.approx((1 + bias) / (2 + bias), abs=0.005)
