"""Scores by nearest neighbours: precision and recall, density and coverage, memorisation.

Distances are computed block by block in float64, so that memory does not grow with n^2.
"""

from collections.abc import Iterator

import numpy as np

from eval.features.blocks import Features

K_PRECISION = 3  # Kynkaanniemi et al. 2019, section 3
K_DENSITY = 5  # Naeem et al. 2020, section 4
ROUNDING = 1e-12  # of the squared norms: a squared distance below that is none


def manifold_scores(fake: Features, real: Features) -> dict[str, float | int]:
    """Return precision, recall, density and coverage; each with its k.

    precision: the share of generated images that lie in the ball of some real image, whose radius
    is the distance to its k-th neighbour; recall: the reverse (Kynkaanniemi et al. 2019, eq. 2).
    density: how many real balls a generated image lies in, over k; coverage: the share of real
    balls with a generated image inside (Naeem et al. 2020, eqs. 3 and 4). Raises ValueError for
    sets of k images or fewer.
    """
    most = max(K_PRECISION, K_DENSITY)
    for name, features in (("fake", fake), ("real", real)):
        if len(features) <= most:
            raise ValueError(
                f"--{name}: found {len(features)} images, expected more than k = {most} for "
                "precision, recall, density and coverage"
            )
    radii_real, radii_fake = _radii(real), _radii(fake)
    ball, density_ball = radii_real[:, K_PRECISION], radii_real[:, K_DENSITY]
    precise, dense = np.zeros(len(fake), bool), np.zeros(len(fake), np.int64)
    recalled, nearest = np.zeros(len(real), bool), np.full(len(real), np.inf)
    for rows, columns, squares in _squares(real, fake):  # [rows of real, columns of fake]
        precise[columns] |= (squares <= ball[rows, None]).any(0)
        recalled[rows] |= (squares <= radii_fake[columns, K_PRECISION]).any(1)
        dense[columns] += (squares < density_ball[rows, None]).sum(0)
        nearest[rows] = np.minimum(nearest[rows], squares.min(1))
    return {
        "precision": float(precise.mean()),
        "recall": float(recalled.mean()),
        "k_precision": K_PRECISION,
        "density": float(dense.mean() / K_DENSITY),
        "coverage": float((nearest < density_ball).mean()),
        "k_density": K_DENSITY,
    }


def _radii(features: Features) -> np.ndarray:
    """Return [N, k + 1]: squared distances of each to its nearest, itself first, in order."""
    most = max(K_PRECISION, K_DENSITY)
    radii = np.full((len(features), most + 1), np.inf)
    for rows, _, squares in _squares(features, features):
        joined = np.concatenate([radii[rows], squares], axis=1)
        radii[rows] = np.partition(joined, most, axis=1)[:, : most + 1]
    return np.sort(radii, axis=1)


def _squares(a: Features, b: Features) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yield (rows of a, rows of b, their squared distances) for all pairs of chunks.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x.y; of equal features exactly 0, without rounding errors.
    """
    for rows, x in a.chunks():
        x_norms = np.einsum("nd,nd->n", x, x)[:, None]
        for columns, y in b.chunks():
            norms = x_norms + np.einsum("nd,nd->n", y, y)
            squares = norms - 2 * (x @ y.T)
            squares[squares < ROUNDING * norms] = 0
            yield rows, columns, squares


def nearest_rows(queries: Features, among: Features) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance [N] of each query to its nearest row of `among`, and that row [N]."""
    best, nearest = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
    for rows, columns, squares in _squares(queries, among):
        column = squares.argmin(1)
        least = squares[np.arange(len(column)), column]
        better = least < best[rows]
        best[rows] = np.where(better, least, best[rows])
        nearest[rows] = np.where(better, column + columns.start, nearest[rows])
    return np.sqrt(best), nearest
