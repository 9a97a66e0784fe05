"""Moments of a snapshot's image embeddings; the priors' scaling and PCA are computed from them.

<embeds>/_statistics.npz    mean, std, eigenvalues, basis, count, snapshot, cosines, and of image
                            tokens token_mean, token_covariance
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ingest.shards import EmbedShard
from ingest.store.snapshots import Snapshot
from ingest.store.storage import join_root, storage_of

NAME = "_statistics.npz"
ROWS = 512  # samples whose tokens are summed at once
COSINE_EDGES = np.linspace(-1, 1, 201)
ARRAYS = ("mean", "std", "eigenvalues", "basis", "cosines")
TOKEN_ARRAYS = ("token_mean", "token_covariance")  # of embeddings of today alone


@dataclass(frozen=True, kw_only=True)
class EmbedStatistics:
    """Moments of a snapshot's image embeddings, in float64.

    mean, std: [E]; eigenvalues: [E] of the covariance, descending; basis: [E, E], column k belongs
    to eigenvalue k; snapshot: digest of the embeddings they were taken over; cosines: int64
    [200], samples whose caption and image have a cosine between two of `COSINE_EDGES`. token_mean:
    [E] over all image tokens, [0] where there are none; token_covariance: [E, E], or [0, 0].
    """

    mean: np.ndarray
    std: np.ndarray
    eigenvalues: np.ndarray
    basis: np.ndarray
    count: int
    snapshot: str
    cosines: np.ndarray
    token_mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    token_covariance: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    @classmethod
    def compute(cls, snapshot: Snapshot) -> "EmbedStatistics":
        """Compute the moments in one pass over a snapshot; ValueError if it has no samples."""
        if snapshot.num_samples == 0:
            raise ValueError(f"{snapshot.root}: the snapshot has no samples to compute moments of")
        total, products, cosines = 0.0, 0.0, np.zeros(len(COSINE_EDGES) - 1, np.int64)
        num_tokens, token_sum, token_products = 0, 0.0, 0.0
        for entry in snapshot.shards:
            shard = EmbedShard(snapshot.root, entry.name, digest=entry.digest, image_tokens=True)
            rows = entry.rows(np.arange(entry.num_kept))
            num_tokens = shard.image_tokens.shape[1]
            for start in range(0, len(rows) if num_tokens else 0, ROWS):
                part = shard.image_tokens[rows[start : start + ROWS]]  # [n, k, E]
                tokens = part.reshape(-1, part.shape[-1]).astype(np.float64)
                token_sum = token_sum + tokens.sum(0)
                token_products = token_products + tokens.T @ tokens
            block = np.asarray(shard.image_embed[rows], dtype=np.float64)
            text = np.asarray(shard.text_embed[rows], dtype=np.float64)
            cosine = (block * text).sum(1).clip(-1, 1)  # float16 vectors exceed it a little
            cosines += np.histogram(cosine, COSINE_EDGES)[0]
            total, products = total + block.sum(0), products + block.T @ block
        count = snapshot.num_samples
        mean = np.asarray(total) / count
        covariance = np.asarray(products) / count - np.outer(mean, mean)
        moments = cls._of_moments(mean, covariance, count, snapshot.digest, cosines)
        if not num_tokens:
            return moments
        count *= num_tokens
        return moments._with_tokens(np.asarray(token_sum) / count, token_products / count)

    def _with_tokens(self, mean: np.ndarray, products: np.ndarray) -> "EmbedStatistics":
        """Return a copy with the moments of tokens, of their E[x] [E] and E[x x^T] [E, E]."""
        covariance = products - np.outer(mean, mean)
        return replace(self, token_mean=mean, token_covariance=covariance)

    @classmethod
    def _of_moments(
        cls,
        mean: np.ndarray,
        covariance: np.ndarray,
        count: int,
        snapshot: str,
        cosines: np.ndarray,
    ) -> "EmbedStatistics":
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
        # An eigenvector's sign is arbitrary: its largest component is made positive.
        peaks = vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])]
        return cls(
            mean=mean,
            std=np.sqrt(covariance.diagonal().clip(min=0)),
            eigenvalues=values,
            basis=vectors * np.where(peaks < 0, -1.0, 1.0),
            count=count,
            snapshot=snapshot,
            cosines=cosines,
        )

    @classmethod
    def merge(
        cls, data_sets: Sequence["EmbedStatistics"], weights: Sequence[float] = ()
    ) -> "EmbedStatistics":
        """Return the moments of several data sets together: E[x] and E[x x^T] of the mixture.

        weights: share of each in the samples, of any sum; empty: in proportion to their counts, as
        if the data sets were one.
        """
        if len(data_sets) == 1:
            return data_sets[0]
        shares = np.array(weights or [each.count for each in data_sets], np.float64)
        shares /= shares.sum()
        mean, products = np.zeros_like(data_sets[0].mean), np.zeros_like(data_sets[0].basis)
        all_have_tokens = all(len(each.token_mean) for each in data_sets)
        size = len(mean) if all_have_tokens else 0
        token_mean, token_products = np.zeros(size), np.zeros((size, size))
        for each, share in zip(data_sets, shares, strict=True):
            mean += share * each.mean
            products += share * (each.covariance + np.outer(each.mean, each.mean))
            if all_have_tokens:
                token_mean += share * each.token_mean
                outer = np.outer(each.token_mean, each.token_mean)
                token_products += share * (each.token_covariance + outer)
        merged = cls._of_moments(
            mean,
            products - np.outer(mean, mean),
            sum(each.count for each in data_sets),
            "+".join(each.snapshot for each in data_sets),
            np.sum([each.cosines for each in data_sets], axis=0),
        )
        return merged._with_tokens(token_mean, token_products)

    @property
    def covariance(self) -> np.ndarray:
        """[E, E]."""
        return (self.basis * self.eigenvalues) @ self.basis.T

    @property
    def token_std(self) -> np.ndarray:
        """[E], or [0] without tokens."""
        return np.sqrt(self.token_covariance.diagonal().clip(min=0))

    def num_components(self, energy: float) -> int:
        """Return how many principal components hold this share of the variance."""
        share = np.cumsum(self.eigenvalues) / self.eigenvalues.sum()
        return int(np.searchsorted(share, energy - 1e-12)) + 1

    def write(self, root: str | os.PathLike[str]) -> None:
        """Write `<root>/_statistics.npz` atomically."""
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **vars(self))
        storage_of(root).replace(NAME, file.getvalue())

    @classmethod
    def read(cls, root: str | os.PathLike[str]) -> "EmbedStatistics":
        """Read `<root>/_statistics.npz`; ValueError with the remedy when it is missing or old."""
        remedy = "rerun ingest/embed.py until it finishes"
        try:
            stored = storage_of(root).read(NAME)
        except FileNotFoundError:
            raise ValueError(f"{join_root(root, NAME)}: missing; {remedy}") from None
        with np.load(io.BytesIO(stored), allow_pickle=False) as file:
            if "token_std" in file:  # of image tokens, as once written
                raise ValueError(f"{join_root(root, NAME)}: found no token_covariance; {remedy}")
            arrays = {name: file[name] for name in (*ARRAYS, *TOKEN_ARRAYS) if name in file}
            return cls(**arrays, count=int(file["count"]), snapshot=str(file["snapshot"]))
