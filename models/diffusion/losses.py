"""Per-sample training losses: each returns [B], so that the loop can weight padded samples to
nothing."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.configs import Prediction, Weighting
from models.diffusion import keyed_random
from models.diffusion.samplers import learned_log_variance
from models.diffusion.schedule import NoiseSchedule
from models.networks.autocast import without_autocast

MIN_SNR_GAMMA = 5.0
EARLY_FLOOR = 0.25
LARGEST_WEIGHT = 1e6
EDM_SIGMA_DATA = 0.5  # of pixels in [-1, 1]


def _simple(snr: Tensor, time: Tensor) -> Tensor:
    return torch.ones_like(snr)


def _min_snr(snr: Tensor, time: Tensor) -> Tensor:
    """min(SNR, gamma) in x0 units (Hang et al. 2023, eq. 5)."""
    return snr.clamp(max=MIN_SNR_GAMMA)


def _p2(snr: Tensor, time: Tensor) -> Tensor:
    """SNR / (1 + SNR) in x0 units, 1 / (1 + SNR) in eps units (Choi et al. 2022, eq. 8, k = gamma =
    1)."""
    return snr / (1 + snr)


def _edm(snr: Tensor, time: Tensor) -> Tensor:
    """(sigma^2 + s^2) / (sigma s)^2 in x0 units, sigma^2 = 1 / SNR (Karras et al. 2022)."""
    return snr + EDM_SIGMA_DATA**-2


def _early(snr: Tensor, time: Tensor) -> Tensor:
    """1 / max(time, .25), time in [0, 1]: raises the clean end, where small networks lose their
    edges."""
    return 1 / time.clamp(min=EARLY_FLOOR)


_X0_WEIGHTS: dict[Weighting, Callable[[Tensor, Tensor], Tensor]] = {
    "simple": _simple,
    "min_snr": _min_snr,
    "p2": _p2,
    "edm": _edm,
    "early": _early,
}


def timestep_weight(
    schedule: NoiseSchedule, weighting: Weighting, prediction: Prediction, t: Tensor
) -> Tensor:
    """Return the weight [B] of the squared error in the network's own units.

    `simple` is 1 in whatever the network predicts. The others are stated for the x0 error and
    divided by the factor that turns an x0 error into one of eps (SNR) or of v (SNR + 1).
    """
    snr = schedule.snr(t)
    weight = _X0_WEIGHTS[weighting](snr, (t.float() + 1) / schedule.num_timesteps)
    if weighting == "simple" or prediction == "x0":
        return weight
    return weight / (snr if prediction == "eps" else snr + 1)


def require_weights(
    schedule: NoiseSchedule, weighting: Weighting, prediction: Prediction
) -> None:
    """Raise ValueError where a timestep has no weight, or one that leaves the others none: asked
    before training, since finished weights may be drawn from whatever they learned by.

    At the end without signal, `min_snr` and `p2` are 0: what samplers start from would not be
    learned. `edm` and `early` in units of eps are over 1e8 where the cosine schedule ends.
    """
    t = torch.arange(schedule.num_timesteps, device=schedule.alpha_bar.device)
    weight = timestep_weight(schedule, weighting, prediction, t)
    if weight.min() <= 0 or weight.max() > LARGEST_WEIGHT:
        raise ValueError(
            f"weighting: found {weighting}, which weighs timesteps from {weight.min():.2g} to "
            f"{weight.max():.2g} with prediction {prediction} and this schedule, expected weights "
            "that are all positive and none overwhelming: take simple, or prediction v"
        )


def variational_bound(
    schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor, x0_pred: Tensor, fraction: Tensor
) -> Tensor:
    """Return the terms L_t [B] of the variational bound for a learned variance, in bits a
    dimension.

    KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for t > 0; at t = 0 -log p(x0 | x_0) of pixels of
    256 levels in [-1, 1] (Ho et al. 2020, eq. 5 and 13). x0, x_t, x0_pred, fraction: [B, ...];
    fraction as `learned_log_variance` reads it. Computed in float32, and only `fraction` gets a
    gradient (Nichol & Dhariwal 2021, section 3.1).
    """
    parts = (part.float() for part in (x0, x_t, x0_pred.detach(), fraction))
    with without_autocast(x0):
        x0, x_t, x0_pred, fraction = parts
        true_mean, variance, beta = schedule.posterior(x0, x_t, t, t - 1)
        mean = schedule.posterior(x0_pred, x_t, t, t - 1)[0]
        first = (t == 0).reshape(beta.shape)
        # q(x_0 | x_1, x0) has no variance: that of the step after it bounds the first one's
        after = schedule.posterior(x0, x_t, t.clamp(min=1), t.clamp(min=1) - 1)[1]
        variance = torch.where(first, after, variance)
        log_variance = learned_log_variance(fraction, variance, beta)
        kl = variance.log() - log_variance
        kl = ((variance + (true_mean - mean) ** 2) / log_variance.exp() - 1 - kl) / 2
        nll = -_log_likelihood_of_pixels(x0, mean, (log_variance / 2).exp())
        return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)


def _log_likelihood_of_pixels(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Return the log of a Gaussian's mass within half a level around x, all of it beyond the
    ends."""
    half = 1 / 255
    above = torch.where(x > 0.999, 1.0, torch.special.ndtr((x + half - mean) / deviation))
    below = torch.where(x < -0.999, 0.0, torch.special.ndtr((x - half - mean) / deviation))
    return (above - below).clamp(min=1e-12).log()


def draw_timesteps(schedule: NoiseSchedule, keys: Tensor, noise_bias: float = 0.0) -> Tensor:
    """Draw t int64 [B] for sample `keys` [B], uniform, or toward high noise as `noise_bias` grows.

    t / T = u^(1 / (1 + noise_bias)), u uniform: density (1 + b) (t/T)^b.
    """
    time = keyed_random.uniform(keys, "t") ** (1 / (1 + noise_bias))
    return (time * schedule.num_timesteps).long().clamp(max=schedule.num_timesteps - 1)


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(max=bound)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,), (grad,) = ctx.saved_tensors, grads
        return torch.where((x <= ctx.bound) | (grad > 0), grad, 0.0), None


def bounded(x: Tensor, bound: float) -> Tensor:
    """Return x, at most `bound`; above it only gradients that lead back down reach x.

    A plain clamp has none there, and a parameter that one step took beyond would stay for ever.
    Putting it back after the step, as open_clip does, would have to find it among partitions.
    """
    found = _Bounded.apply(x, bound)
    assert isinstance(found, Tensor)
    return found


def contrastive(
    image_embed: Tensor,
    text_embed: Tensor,
    logit_scale: Tensor,
    negative: Tensor,
    mine: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Return CLIP's symmetric cross-entropy [b] and top-1 accuracy [b] (Radford et al. 2021,
    figure 3) of the rows `mine` among all G.

    image_embed, text_embed: [G, E] unit norm, row i of both one pair; logit_scale: scalar, 1 /
    temperature; negative: bool [b, G], True where a pair of `mine` and another are to be told
    apart, image from text and text from image; whether a pair is its own is not read. Each worker
    asks for its own rows: all workers together compute the G x G logits once, and none holds them.
    """
    labels = torch.arange(len(image_embed), device=image_embed.device)
    itself = labels[mine, None] == labels
    apart = negative | itself

    def told(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        with without_autocast(rows):  # bf16 cannot tell logits near 100 apart
            logits = logit_scale * rows[mine].float() @ columns.float().T
        logits = logits.masked_fill(~apart, float("-inf"))
        return F.cross_entropy(logits, labels[mine], reduction="none"), logits.argmax(1)

    to_text, found = told(image_embed, text_embed)
    to_image, _ = told(text_embed, image_embed)
    return (to_text + to_image) / 2, (found == labels[mine]).float()
