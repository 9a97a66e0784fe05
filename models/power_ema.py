"""Power-function averages and their reconstruction (Karras et al. 2024, "Analyzing and Improving
the Training Dynamics of Diffusion Models", section 3).

After t updates the average weighs the weights of time tau by f(tau) = (gamma + 1) tau^gamma /
t^(gamma + 1) on [0, t]: a profile that grows with the run. Its width is stated as sigma_rel, the
standard deviation of f over t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIGMA_REL_MAX = 12**-0.5  # of gamma = 0, the plain mean; wider ones would weigh the start most


@dataclass(frozen=True)
class Profile:
    """The average of exponent `gamma` after `t` updates."""

    gamma: float
    t: float


def sigma_rel_of(gamma: float) -> float:
    """Return sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))): the deviation of f over t."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of a relative width; ValueError for one that no exponent >= 0 has.

    By bisection: sigma_rel falls as gamma grows from 0, and is below 1 / (gamma + 2) throughout, so
    that gamma lies in [0, 1 / sigma_rel].
    """
    if not 0 < sigma_rel <= SIGMA_REL_MAX:
        raise ValueError(
            f"sigma_rel: found {sigma_rel}, expected more than 0 and at most {SIGMA_REL_MAX:.4f}"
        )
    low, high = 0.0, 1 / sigma_rel
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if sigma_rel_of(middle) > sigma_rel else (low, middle)
    return high if low else 0.0


def new_share(gamma: float, t: int) -> float:
    """Return 1 - beta_t = 1 - (1 - 1/t)^(gamma + 1): the share of the newest weights at update t.

    At the first update, t = 1, the share is 1, so the random start is not in the average.
    """
    return 1.0 if t <= 1 else -math.expm1((gamma + 1) * math.log1p(-1 / t))


def inner_product(a: Profile, b: Profile) -> float:
    """Return the integral of the product of two profiles.

    (a + 1)(b + 1) min(t_a, t_b)^(a + b + 1) / ((a + b + 1) t_a^(a + 1) t_b^(b + 1)) for exponents a
    and b, written with the ratio of the times, which cannot overflow.
    """
    early, late = (a, b) if a.t <= b.t else (b, a)
    scale = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1)
    return scale / late.t * (early.t / late.t) ** late.gamma


def coefficients(stored: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Return the combination of `stored` nearest to `wanted`: coefficients [N], relative error.

    Least squares in float64, of coefficients that sum to one: the paper leaves their sum free,
    which with few snapshots shrinks or grows weights that do not move. The error is the norm of the
    profile's residual over the norm of the profile. Profiles are scaled to norm one, so that early
    snapshots, whose norms are large, do not spoil the conditioning; equal ones share their weight.
    """
    gram = np.array([[inner_product(a, b) for b in stored] for a in stored])
    target = np.array([inner_product(a, wanted) for a in stored])
    norm = inner_product(wanted, wanted)
    scale = 1 / np.sqrt(np.diag(gram))
    sides = np.stack([target * scale, scale], 1)
    free, towards_unit_sum = np.linalg.lstsq(gram * scale * scale[:, None], sides, rcond=None)[0].T
    result = (free + (1 - scale @ free) / (scale @ towards_unit_sum) * towards_unit_sum) * scale
    residual = norm - 2 * result @ target + result @ gram @ result
    return result, math.sqrt(max(0.0, residual) / norm)
