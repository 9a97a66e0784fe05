"""The Frechet distance between two sets of features, from float64 sums that stream and merge.

FID when the features are Inception's; the CLIP Frechet distance when they are CLIP embeddings.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What a Frechet distance needs to know of N features of width D.

    count: N; mean: [D] float64; scatter: [D, D] float64, the sum of (x - mean)(x - mean)^T.
    Centred sums, since E[xx^T] - mean mean^T loses the digits that matter when the mean is large.
    """

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    @classmethod
    def of(cls, features: ArrayLike) -> Self:
        """Return the moments of `features` [N, D]; ValueError if not finite or not a matrix."""
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"moments: found features of shape {list(x.shape)}, expected [N, D]")
        if not np.isfinite(x).all():
            bad = int((~np.isfinite(x)).any(axis=1).sum())
            raise ValueError(f"moments: found {bad} of {len(x)} features not finite, expected none")
        mean = x.mean(axis=0) if len(x) else np.zeros(x.shape[1])
        centred = x - mean
        return cls(count=len(x), mean=mean, scatter=centred.T @ centred)

    @classmethod
    def merge(cls, parts: Iterable[Self]) -> Self:
        """Return the moments of all parts together, added in the order given.

        The order changes the last bits alone; give the parts in shard order for the same bits every
        time. Raises ValueError if there is no part or their widths differ.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("moments: found no part to merge, expected at least one")
        total = parts[0]
        for part in parts[1:]:
            total = total.plus(part)
        return total

    def add(self, features: ArrayLike) -> Self:
        """Return the moments with the batch `features` [B, D] added."""
        return self.plus(type(self).of(features))

    def plus(self, other: Self) -> Self:
        """Return the moments of both sets together (Chan, Golub and LeVeque 1979).

        With delta = mean_b - mean_a:  S = S_a + S_b + delta delta^T n_a n_b / (n_a + n_b)
        """
        _check_widths(self, other)
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return type(self)(
            count=count,
            mean=self.mean + delta * (other.count / count),
            scatter=self.scatter
            + other.scatter
            + np.outer(delta, delta) * (self.count * other.count / count),
        )

    @property
    def covariance(self) -> NDArray[np.float64]:
        """The unbiased covariance [D, D], over N - 1; ValueError if N < 2."""
        if self.count < 2:
            raise ValueError(f"covariance: found {self.count} features, expected at least 2")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the squared Frechet distance between the Gaussians that have these moments.

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))      (Heusel et al. 2017, eq. 6)

    S_a S_b has the eigenvalues of R S_b R, where R = S_a^(1/2): a symmetric matrix, so that eigh
    serves, nothing turns complex, and a singular covariance (N < D) needs no epsilon. The estimate
    is biased upwards by a term of order 1/N: compare only values of equal N. Raises ValueError if
    either set has fewer than 2 features or the widths differ.
    """
    _check_widths(a, b)
    covariance_a, covariance_b = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ covariance_b @ root)
    overlap = np.sqrt(product.clip(min=0)).sum()
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap
    return max(float(distance), 0.0)


def _check_widths(a: Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        found = f"widths {a.mean.size} and {b.mean.size}"
        raise ValueError(f"moments: found {found}, expected features of one encoder")
