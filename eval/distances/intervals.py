"""Distances between two sets of features, and how sure one can be of them.

Every draw is seeded: the same features give the same number, always.
"""

import numpy as np

from eval.distances.frechet import Reference
from eval.features.blocks import Features

SEED = 0
KID_SEED = 2020  # torch-fidelity's, whose subsets these are: RandomState's stream never changes
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, section 4
INFINITY_POINTS = 15  # Chong and Forsyth 2020
INFINITY_LEAST = 1 / 6  # of the set, at the first point: 5,000 of 30,000, as theirs
NORMAL_95 = 1.959964  # standard errors to either side of 95 % of a normal distribution


def real_halves(features: Features) -> float:
    """Return the Frechet distance of two random halves of a set: the floor of any distance to it,
    but for its smaller n."""
    order = np.random.default_rng(SEED).permutation(len(features))
    first, second = np.array_split(order, 2)
    halves = [features.moments(_counts(rows, len(features))) for rows in (first, second)]
    return Reference.of(halves[0]).distance(halves[1])


def _counts(rows: np.ndarray, n: int) -> np.ndarray:
    return np.bincount(rows, minlength=n)


def fd_infinity(fake: Features, real: Reference) -> tuple[float, int] | None:
    """Return the distance at n -> infinity and the number of points that it was read off; None for
    a set of fewer than 12.

    The estimate falls like a line in 1/n: the intercept of that line, fitted to distances of random
    subsets from a sixth of the generated set to all of it, is free of that bias (Chong and Forsyth
    2020, section 3). What bias the real set brings stays.
    """
    n = len(fake)
    if n < 12:
        return None
    rng = np.random.default_rng(SEED)
    sizes = np.unique(np.linspace(max(2, n * INFINITY_LEAST), n, INFINITY_POINTS).astype(int))
    found = []
    for size in sizes:
        counts = _counts(rng.choice(n, size, replace=False), n)
        found.append(real.distance(fake.moments(counts)))
    slope, intercept = np.polyfit(1 / sizes, found, 1)
    return float(intercept), len(sizes)


def bootstrap_error(fake: Features, real: Reference, num_resamples: int) -> float:
    """Return the standard error of the distance, over resamples of the generated set.

    Resampled sets repeat images, by which their distances are biased upwards: their spread is
    wanted, not their place.
    """
    rng, n = np.random.default_rng(SEED + 1), len(fake)
    found = [
        real.distance(fake.moments(_counts(rng.integers(0, n, n), n))) for _ in range(num_resamples)
    ]
    return float(np.std(found, ddof=1))


def kernel_distance(fake: Features, real: Features) -> dict[str, float | int]:
    """Return KID: mean and deviation, over subsets, of the unbiased MMD^2 under (x.y / D + 1)^3.

    Binkowski et al. 2018, section 4. Subsets are torch-fidelity's: 100 of 1,000 images a side, or
    of the smaller side where that has fewer. A side that is in each subset whole adds nothing to
    the deviation: there is none then; and one subset is enough where both are.
    """
    size = min(KID_SUBSET_SIZE, len(fake), len(real))
    whole = [size == len(side) for side in (fake, real)]
    rng = np.random.RandomState(KID_SEED)
    found = []
    for _ in range(1 if all(whole) else KID_SUBSETS):
        x = fake.take(rng.choice(len(fake), size, replace=False))
        y = real.take(rng.choice(len(real), size, replace=False))
        found.append(_cubic_mmd2(x, y))
    deviation = {} if any(whole) else {"kid_std": float(np.std(found))}
    return {
        "kid": float(np.mean(found)), **deviation, "kid_subsets": len(found),
        "kid_subset_size": size,
    }  # fmt: skip


def _cubic_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased MMD^2 of x, y [M, D] under the cubic kernel."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    m = len(x)
    within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
    return float(within / (m * (m - 1)) - 2 * kernel(x, y).mean())


def cmmd(fake: Features, real: Features) -> float:
    """Return 1,000 times the MMD^2 of unit-norm CLIP embeddings under an RBF kernel of sigma 10.

    Jayasumana et al. 2024, equation 3, with the diagonal, as their code has it: not unbiased, but
    never negative.
    """
    xx, yy, xy = (_mean_rbf(a, b) for a, b in ((fake, fake), (real, real), (fake, real)))
    return CMMD_SCALE * (xx + yy - 2 * xy)


def _mean_rbf(a: Features, b: Features) -> float:
    """Return the mean of exp(-|x - y|^2 / (2 sigma^2)) over all pairs, a chunk of each at a time.

    1 - k is summed: kernels of unit vectors all lie near 1, and their differences are the score.
    """
    total = 0.0
    for _, x in a.chunks():
        for _, y in b.chunks():
            squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * (x @ y.T)
            total += float(np.expm1(-squares.clip(min=0) / (2 * CMMD_SIGMA**2)).sum())
    return total / (len(a) * len(b))


def interval(distance: float, error: float) -> tuple[float, float]:
    """Return the 95 % normal interval around a distance, not below 0."""
    return max(0.0, distance - NORMAL_95 * error), distance + NORMAL_95 * error
