"""The Frechet distance between two sets of features, from float64 sums that stream and merge.

It is called FID for Inception's features, and FD-CLIP for CLIP embeddings.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean and scatter of N features of width D, for a Frechet distance.

    count: N; mean: [D] float64; scatter: [D, D] float64, the sum of (x - mean)(x - mean)^T.
    The sums are centred: E[xx^T] - mean mean^T loses significant digits where the mean is large.
    """

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    @classmethod
    def of(cls, features: ArrayLike, counts: ArrayLike | None = None) -> Self:
        """Return the moments of `features` [N, D]; ValueError if not finite or not a matrix.

        counts: [N] how often each row counts, as in a bootstrap; None: once.
        """
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"moments: found features of shape {list(x.shape)}, expected [N, D]")
        if not np.isfinite(x).all():
            bad = int((~np.isfinite(x)).any(axis=1).sum())
            raise ValueError(f"moments: found {bad} of {len(x)} features not finite, expected none")
        if counts is None:
            mean = x.mean(axis=0) if len(x) else np.zeros(x.shape[1])
            centred = x - mean  # [N, D]
            return cls(count=len(x), mean=mean, scatter=centred.T @ centred)
        weights = np.asarray(counts)
        x, weights = x[weights > 0], weights[weights > 0]
        total = int(weights.sum())
        mean = weights @ x / total if total else np.zeros(x.shape[1])
        scaled = (x - mean) * np.sqrt(weights)[:, None]  # [N, D]
        return cls(count=total, mean=mean, scatter=scaled.T @ scaled)

    @classmethod
    def merge(cls, moments: Iterable[Self]) -> Self:
        """Return the moments of all sets together, added in the order given.

        The order changes only the last bits; add in shard order for the same bits every time.
        Raises ValueError if there is no set or the widths differ.
        """
        total = None
        for each in moments:  # an iterator, so that one is in memory at a time
            total = each if total is None else total.plus(each)
        if total is None:
            raise ValueError("moments: found no set to merge, expected at least one")
        return total

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

    The estimate is biased upwards by a term of order 1/N: compare only values of equal N. Raises
    ValueError if either set has fewer than 2 features or the widths differ.
    """
    return Reference.of(a).distance(b)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Moments that many sets are compared with; factor: [r, D] F with F^T F = S, computed once."""

    moments: Moments
    factor: NDArray[np.float64]

    @classmethod
    def of(cls, moments: Moments) -> Self:
        """Factor the covariance; ValueError for fewer than 2 features."""
        return cls(moments=moments, factor=_factor(moments.covariance))

    def distance(self, other: Moments) -> float:
        """Return the squared Frechet distance to `other`: see `frechet_distance`.

        S_a S_b has the eigenvalues of F S_b F^T, where S_a = F^T F: a symmetric matrix, so that
        eigh serves, nothing turns complex, and a singular covariance (N < D) needs no epsilon.
        """
        _check_widths(self.moments, other)
        covariance = other.covariance
        product = np.linalg.eigvalsh(self.factor @ covariance @ self.factor.T)  # [r]
        overlap = np.sqrt(product.clip(min=0)).sum()
        shift = self.moments.mean - other.mean
        traces = np.trace(self.moments.covariance) + np.trace(covariance)
        return max(float(shift @ shift + traces - 2 * overlap), 0.0)


def _factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return [r, D] F with F^T F = `covariance`, r its rank.

    Cholesky's factor for a regular matrix, in a tenth of the time of the eigenvectors. A singular
    one (N <= D, or constant features) needs these: rounding in its null space would count as
    overlap.
    """
    least = len(covariance) * np.finfo(np.float64).eps
    with suppress(np.linalg.LinAlgError):
        lower = np.linalg.cholesky(covariance)
        pivots = np.diag(lower) ** 2
        if pivots.min() > least * pivots.max():
            return np.asarray(lower.T, np.float64)
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * least
    return np.asarray((vectors[:, kept] * np.sqrt(values[kept])).T, np.float64)


def _check_widths(a: Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        widths = f"widths {a.mean.size} and {b.mean.size}"
        raise ValueError(f"moments: found {widths}, expected features of one encoder")
