"""Per-sample training losses: each returns [B], so that the loop can give padded samples weight
0."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.configs import Prediction, Weighting
from models.diffusion import keyed_random
from models.diffusion.samplers import learned_log_variance
from models.diffusion.schedule import NoiseSchedule
from models.networks.transformer import without_autocast

MIN_SNR_GAMMA = 5.0
EARLY_FLOOR = 0.25
V_LIMIT = 400.0  # Li & He 2025 keep the noise's deviation from falling below 0.05 in the loss
LARGEST_WEIGHT = 1e6
EDM_SIGMA_DATA = 0.5  # of pixels in [-1, 1]


def draw_timesteps(schedule: NoiseSchedule, keys: Tensor, noise_bias: float = 0.0) -> Tensor:
    """Draw t int64 [B] for sample `keys` int64 [B], uniform, or toward high noise as `noise_bias`
    grows.

    t / T = u^(1 / (1 + noise_bias)), u uniform: density (1 + b) (t/T)^b.
    """
    time = keyed_random.uniform(keys, "t") ** (1 / (1 + noise_bias))
    return (time * schedule.num_timesteps).long().clamp(max=schedule.num_timesteps - 1)


def timestep_weight(
    schedule: NoiseSchedule, weighting: Weighting, prediction: Prediction, t: Tensor
) -> Tensor:
    """Return the weight float32 [B], at t int64 [B], of the squared error in the network's units.

        simple     1 in whatever the network predicts
        v          min(SNR + 1, 400), a squared error of v (Li & He 2025)
        min_snr    min(SNR, 5)                            (Hang et al. 2023, eq. 5)
        p2         SNR / (1 + SNR)                        (Choi et al. 2022, eq. 8, k = gamma = 1)
        edm        (sigma^2 + s^2) / (sigma s)^2          (Karras et al. 2022; sigma^2 = 1 / SNR)
        early      1 / max(t / T, .25): raises the clean end, where small networks lose their edges

    All but `simple` are in units of an x0 error, and divided by the factor that turns it into one
    of eps (SNR) or of v (SNR + 1).
    """
    snr = schedule.snr(t)
    if weighting == "simple":
        return torch.ones_like(snr)
    if weighting == "v":
        weight = (snr + 1).clamp(max=V_LIMIT)
    elif weighting == "min_snr":
        weight = snr.clamp(max=MIN_SNR_GAMMA)
    elif weighting == "p2":
        weight = snr / (1 + snr)
    elif weighting == "edm":
        weight = snr + EDM_SIGMA_DATA**-2
    else:
        assert weighting == "early", weighting
        weight = 1 / ((t.float() + 1) / schedule.num_timesteps).clamp(min=EARLY_FLOOR)
    if prediction == "x0":
        return weight
    return weight / (snr if prediction == "eps" else snr + 1)


def require_weights(schedule: NoiseSchedule, weighting: Weighting, prediction: Prediction) -> None:
    """Raise ValueError for a weighting that leaves a timestep, or all the others, without weight.

    At the end without signal, `min_snr` and `p2` are 0: the network would not learn what samplers
    start from. `edm` and `early` in units of eps are over 1e8 where the cosine schedule ends. This
    is checked before training; finished weights can be sampled whatever their weighting was.
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
    """Return the terms L_t [B] of the variational bound for a learned variance, in bits per
    dimension.

    KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for t > 0; at t = 0 -log p(x0 | x_0) of pixels of
    256 levels in [-1, 1] (Ho et al. 2020, eq. 5 and 13). x0, x_t, x0_pred, fraction: [B, ...]; t:
    int64 [B]; fraction: see `learned_log_variance`. Computed in float32, and only `fraction` gets
    a gradient (Nichol & Dhariwal 2021, section 3.1).
    """
    inputs = (x.float() for x in (x0, x_t, x0_pred.detach(), fraction))
    with without_autocast(x0):
        x0, x_t, x0_pred, fraction = inputs
        true_mean, variance, beta = schedule.posterior(x0, x_t, t, t - 1)
        mean = schedule.posterior(x0_pred, x_t, t, t - 1)[0]
        first = (t == 0).reshape(beta.shape)
        # q(x_0 | x_1, x0) has no variance: that of the step after it bounds the first one's
        after = schedule.posterior(x0, x_t, t.clamp(min=1), t.clamp(min=1) - 1)[1]
        variance = torch.where(first, after, variance)
        log_variance = learned_log_variance(fraction, variance, beta)

        # t > 0: the KL divergence of two Gaussians
        kl = variance.log() - log_variance
        kl = ((variance + (true_mean - mean) ** 2) / log_variance.exp() - 1 - kl) / 2

        # t = 0: a Gaussian's mass within half a level around x0, all of it beyond the ends
        half, deviation = 1 / 255, (log_variance / 2).exp()
        above = torch.special.ndtr((x0 + half - mean) / deviation)
        below = torch.special.ndtr((x0 - half - mean) / deviation)
        above, below = torch.where(x0 > 0.999, 1.0, above), torch.where(x0 < -0.999, 0.0, below)
        nll = -(above - below).clamp(min=1e-12).log()
        return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)


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

    A plain clamp has no gradient there, and a parameter that one step took beyond would stay for
    ever. Clamping the parameter after the step, as open_clip does, would have to find it among
    ZeRO's partitions.
    """
    result = _Bounded.apply(x, bound)
    assert isinstance(result, Tensor)
    return result


def contrastive(
    image_embed: Tensor,
    text_embed: Tensor,
    logit_scale: Tensor,
    negative: Tensor,
    local: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Return CLIP's symmetric cross-entropy [b] and top-1 accuracy [b] (Radford et al. 2021,
    figure 3) of the `local` rows among all G.

    image_embed, text_embed: [G, E] unit norm, row i of both one pair; logit_scale: scalar, 1 /
    temperature; negative: bool [b, G], True where a local pair and another are negatives of each
    other, image to text and text to image; the entry of a pair and itself is ignored. Each worker
    computes its own rows: all workers together compute the G x G logits once, and none stores them.
    """
    labels = torch.arange(len(image_embed), device=image_embed.device)  # [G]
    compared = negative | (labels[local, None] == labels)  # [b, G]

    def cross_entropy(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        with without_autocast(rows):  # bf16 cannot represent the differences of logits near 100
            logits = logit_scale * rows[local].float() @ columns.float().T  # [b, G]
        logits = logits.masked_fill(~compared, float("-inf"))
        return F.cross_entropy(logits, labels[local], reduction="none"), logits.argmax(1)

    image_loss, nearest = cross_entropy(image_embed, text_embed)  # [b] each
    text_loss, _ = cross_entropy(text_embed, image_embed)
    return (image_loss + text_loss) / 2, (nearest == labels[local]).float()
