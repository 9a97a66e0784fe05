"""The variational bound against torch.distributions, its limits and its gradient; the learned
variance against diffusers' sampler."""

import math
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from models.configs import DecoderConfig, DiffusionPriorConfig, UNetConfig
from models.decoder import Decoder
from models.diffusion.losses import bounded, require_weights, variational_bound
from models.diffusion.samplers import Denoised, learned_ddpm, learned_log_variance
from models.diffusion.schedule import NoiseSchedule
from training.config import DecoderRunConfig, PriorRunConfig
from training.tasks.networks import decoder_model, prior_model

SCHEDULE = NoiseSchedule.build("cosine", 1000)
SHAPE = (4, 3, 8, 8)
UNET = UNetConfig(channels=16, channel_mult=(1,), num_res_blocks=1, attn_resolutions=())


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def times(*t: int) -> Tensor:
    return torch.tensor(t, dtype=torch.int64)


@pytest.mark.parametrize(("t", "t_next"), [(999, 998), (500, 250), (17, 16), (1, 0)])
def test_the_posterior_is_bayes_rule(t: int, t_next: int):
    """q(x_s | x0) is the prior, q(x_t | x_s) the likelihood, both Gaussian in x_s."""
    x0, x_t = noise(0).double(), noise(1).double()
    t_s, s_s = times(*[t] * 4), times(*[t_next] * 4)
    mean, variance, beta = SCHEDULE.posterior(x0, x_t, t_s, s_s)
    (a_t, _), (a_s, sigma_s) = (SCHEDULE.coefficients(each, x0) for each in (t_s, s_s))
    step = a_t / a_s
    precision = 1 / sigma_s**2 + step**2 / beta
    torch.testing.assert_close(beta, 1 - step**2)
    torch.testing.assert_close(variance, 1 / precision)
    torch.testing.assert_close(mean, (a_s * x0 / sigma_s**2 + step * x_t / beta) / precision)


def test_the_bound_is_the_divergence_of_two_gaussians():
    t = times(1, 30, 500, 999)
    x0, x_t, guess, fraction = noise(0).clamp(-1, 1), noise(1), noise(2), noise(3).clamp(-1, 1)
    found = variational_bound(SCHEDULE, x0, x_t, t, guess, fraction)
    x0, x_t, guess, fraction = (part.double() for part in (x0, x_t, guess, fraction))
    mean, variance, beta = SCHEDULE.posterior(x0, x_t, t, t - 1)
    deviation = (learned_log_variance(fraction, variance, beta) / 2).exp()
    model = Normal(SCHEDULE.posterior(guess, x_t, t, t - 1)[0], deviation)
    expected = kl_divergence(Normal(mean, variance.sqrt().expand(SHAPE)), model)
    expected = expected.mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_network_that_knows_both_pays_nothing():
    t, x0, x_t = times(1, 30, 500, 999), noise(0), noise(1)
    found = variational_bound(SCHEDULE, x0, x_t, t, x0, torch.full(SHAPE, -1.0))
    torch.testing.assert_close(found, torch.zeros(4), rtol=0, atol=1e-6)


def test_the_first_step_is_a_distribution_over_the_levels_of_a_pixel():
    """2^-bits, summed over all 256 values that a pixel may have, is 1."""
    levels = torch.arange(256.0)[:, None] / 127.5 - 1  # one pixel of each value
    t = torch.zeros(256, dtype=torch.int64)
    for guess in (-0.9, 0.0, 0.98):
        x0_pred, fraction = torch.full_like(levels, guess), torch.full_like(levels, 0.3)
        bits = variational_bound(SCHEDULE, levels, x0_pred, t, x0_pred, fraction)
        total = torch.exp2(-bits).sum()
        assert total == pytest.approx(1, abs=1e-4)
        assert abs(levels[bits.argmin()].item() - guess) < 1 / 127.5


def test_only_the_variance_learns_from_it():
    guess, fraction = noise(2).requires_grad_(), noise(3).requires_grad_()
    t = times(0, 1, 500, 999)
    variational_bound(SCHEDULE, noise(0), noise(1), t, guess, fraction).sum().backward()
    assert guess.grad is None and fraction.grad is not None
    assert torch.isfinite(fraction.grad).all() and (fraction.grad.abs().sum((1, 2, 3)) > 0).all()


def test_sampling_with_a_learned_variance_is_diffusers():
    guess, fraction = noise(2), -torch.rand(SHAPE, generator=torch.Generator().manual_seed(3))

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        return Denoised(guess + 0.1 * x, fraction)

    theirs = DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="sample",
        variance_type="learned_range", clip_sample=False, timestep_spacing="trailing",
    )  # fmt: skip
    theirs.set_timesteps(10)
    expected = noise(1)
    for i, t in enumerate(theirs.timesteps):
        output: Any = torch.cat([guess + 0.1 * expected, fraction], dim=1)
        rng = torch.Generator().manual_seed(100 + i)
        step: Any = theirs.step(output, int(t), expected, generator=rng)
        expected = step.prev_sample
    found = learned_ddpm(denoise, noise(1), SCHEDULE, 10, lambda step: noise(100 + step))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_temperature_beyond_its_bound_comes_back_and_goes_no_further():
    """SGD from above: gradients that point down move it, those that point up do not."""
    for start, slope, end in ((5.0, 1.0, 4.9), (5.0, -1.0, 5.0), (3.0, 1.0, 2.9), (3.0, -1.0, 3.1)):
        x = torch.tensor([start], requires_grad=True)
        y = bounded(x, 4.6)
        assert y.item() == pytest.approx(min(start, 4.6))
        (slope * y).sum().backward()
        assert x.grad is not None
        assert (x - 0.1 * x.grad).item() == pytest.approx(end)


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
@pytest.mark.parametrize("weighting", ["simple", "min_snr", "p2", "edm", "early"])
def test_weights_that_cancel_or_overwhelm_are_refused_and_no_others(
    weighting: Any, prediction: Any, zero_terminal: bool
):
    """Without signal at the end, whatever is proportional to it there is 0; in units of eps, what
    is not is divided by it."""
    if zero_terminal and prediction == "eps":
        return  # there is no such schedule
    schedule = NoiseSchedule.build("cosine", 1000, zero_terminal=zero_terminal)
    cancels = zero_terminal and weighting in ("min_snr", "p2")
    overwhelms = prediction == "eps" and weighting in ("edm", "early")
    if cancels or overwhelms:
        with pytest.raises(ValueError, match=f"weighting: found {weighting}, which weighs"):
            require_weights(schedule, weighting, prediction)
    else:
        require_weights(schedule, weighting, prediction)


def test_training_asks_for_weights_and_drawing_does_not():
    """A run that was trained with others, before they were refused, is still drawn from."""
    base = DecoderConfig(unet=UNET, prediction="v", zero_terminal=True, weighting="min_snr")
    sizes = {"embed_dim": 8, "text_width": 8}
    Decoder(base, image_size=8, **sizes)
    config = DecoderRunConfig(base=base, image_size=8)
    with pytest.raises(ValueError, match="weighting: found min_snr"):
        decoder_model(config, {**sizes, "context_length": 8})
    prior = DiffusionPriorConfig(width=16, num_heads=2, depth=1, zero_terminal=True, weighting="p2")
    with pytest.raises(ValueError, match="weighting: found p2"):
        prior_model(PriorRunConfig(diffusion=prior), {**sizes, "context_length": 8})
