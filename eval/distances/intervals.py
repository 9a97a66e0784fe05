"""Distances between two sets of features, and their uncertainty.

Every draw is seeded: the same features always give the same number.
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
    """Return the Frechet distance of two random halves of a set.

    It is a lower bound of what a distance to the set can reach, up to its smaller n.
    """
    order = np.random.default_rng(SEED).permutation(len(features))
    first, second = (
        features.moments(_counts(rows, len(features))) for rows in np.array_split(order, 2)
    )
    return Reference.of(first).distance(second)


def _counts(rows: np.ndarray, n: int) -> np.ndarray:
    return np.bincount(rows, minlength=n)


def fd_infinity(fake: Features, real: Reference) -> tuple[float, int] | None:
    """Return the distance at n -> infinity and the number of fitted points; None for n < 12.

    The bias of the estimate is linear in 1/n: FD_n = FD_inf + c / n. The line is fitted to the
    distances of random subsets, from a sixth of the generated set to all of it (Chong and Forsyth
    2020, section 3). The bias of the real set remains.
    """
    n = len(fake)
    if n < 12:
        return None
    rng = np.random.default_rng(SEED)
    sizes = np.unique(np.linspace(max(2, n * INFINITY_LEAST), n, INFINITY_POINTS).astype(int))
    subsets = (_counts(rng.choice(n, size, replace=False), n) for size in sizes)
    distances = [real.distance(fake.moments(counts)) for counts in subsets]
    _, intercept = np.polyfit(1 / sizes, distances, 1)
    return float(intercept), len(sizes)


def bootstrap_error(fake: Features, real: Reference, num_resamples: int) -> float:
    """Return the standard error of the distance, over bootstrap resamples of the generated set.

    Resampled sets repeat images, which biases their distances upwards: only the spread is used.
    """
    rng, n = np.random.default_rng(SEED + 1), len(fake)
    resamples = (_counts(rng.integers(0, n, n), n) for _ in range(num_resamples))
    return float(np.std([real.distance(fake.moments(counts)) for counts in resamples], ddof=1))


def kernel_distance(fake: Features, real: Features) -> dict[str, float | int]:
    """Return KID: mean and deviation, over subsets, of the unbiased MMD^2 under (x.y / D + 1)^3.

    Binkowski et al. 2018, section 4. Subsets are torch-fidelity's: 100 of 1,000 images a set, or
    of the smaller set's size. There is no deviation where a subset is a complete set, and only one
    subset where it is both.
    """
    size = min(KID_SUBSET_SIZE, len(fake), len(real))
    complete = [size == len(features) for features in (fake, real)]
    rng = np.random.RandomState(KID_SEED)
    values = []
    for _ in range(1 if all(complete) else KID_SUBSETS):
        x = fake.take(rng.choice(len(fake), size, replace=False))  # [M, D]
        y = real.take(rng.choice(len(real), size, replace=False))
        values.append(_cubic_mmd2(x, y))
    scores: dict[str, float | int] = {"kid": float(np.mean(values))}
    if not any(complete):
        scores["kid_std"] = float(np.std(values))
    return scores | {"kid_subsets": len(values), "kid_subset_size": size}


def _cubic_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased MMD^2 of x, y [M, D] under the cubic kernel."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    m = len(x)
    within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
    return float(within / (m * (m - 1)) - 2 * kernel(x, y).mean())


def cmmd(fake: Features, real: Features) -> float:
    """Return 1,000 times the MMD^2 of unit-norm CLIP embeddings under an RBF kernel of sigma 10.

    CMMD of Jayasumana et al. 2024, equation 3, with the diagonal, as in their code: biased, but
    never negative.
    """
    xx, yy, xy = (_mean_rbf(a, b) for a, b in ((fake, fake), (real, real), (fake, real)))
    return CMMD_SCALE * (xx + yy - 2 * xy)


def _mean_rbf(a: Features, b: Features) -> float:
    """Return the mean of k - 1, k = exp(-|x - y|^2 / (2 sigma^2)), over all pairs.

    The ones cancel in MMD^2. Kernels of unit vectors are all near 1, so k itself would lose digits.
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
