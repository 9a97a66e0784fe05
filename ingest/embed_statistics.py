"""Moments of a snapshot's image embeddings, which the priors' scaling and PCA are made of.

<embeds>/_statistics.npz    mean, std, eigenvalues, basis, count, snapshot, cosines
"""

import os
from dataclasses import dataclass

import numpy as np

from ingest.commits import local_root
from ingest.shards import EmbedShard
from ingest.snapshots import Snapshot

COSINE_EDGES = np.linspace(-1, 1, 201)
ARRAYS = ("mean", "std", "eigenvalues", "basis", "cosines")


@dataclass(frozen=True, kw_only=True)
class EmbedStatistics:
    """Moments of a snapshot's image embeddings, in float64.

    mean, std: [E]; eigenvalues: [E] of the covariance, falling; basis: [E, E], column k belongs
    to eigenvalue k; snapshot: digest of the embeddings they were taken over; cosines: int64
    [200], samples whose caption and image have a cosine between two of `COSINE_EDGES`.
    """

    mean: np.ndarray
    std: np.ndarray
    eigenvalues: np.ndarray
    basis: np.ndarray
    count: int
    snapshot: str
    cosines: np.ndarray

    @classmethod
    def compute(cls, snapshot: Snapshot) -> "EmbedStatistics":
        """Take the moments in one pass over the shards of `snapshot`, which must hold samples."""
        if snapshot.num_samples == 0:
            raise ValueError(f"{snapshot.root}: the snapshot has no samples to take moments of")
        total, products, cosines = 0.0, 0.0, np.zeros(len(COSINE_EDGES) - 1, np.int64)
        for entry in snapshot.shards:
            shard = EmbedShard(snapshot.root, entry.name, digest=entry.digest)
            rows = entry.rows(np.arange(entry.num_kept))
            block = np.asarray(shard.image_embed[rows], dtype=np.float64)
            text = np.asarray(shard.text_embed[rows], dtype=np.float64)
            cosine = (block * text).sum(1).clip(-1, 1)  # float16 vectors exceed it a little
            cosines += np.histogram(cosine, COSINE_EDGES)[0]
            total, products = total + block.sum(0), products + block.T @ block
        mean = np.asarray(total) / snapshot.num_samples
        covariance = np.asarray(products) / snapshot.num_samples - np.outer(mean, mean)
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
        # An eigenvector's sign is arbitrary: its largest component is made positive.
        peaks = vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])]
        return cls(
            mean=mean,
            std=np.sqrt(covariance.diagonal().clip(min=0)),
            eigenvalues=values,
            basis=vectors * np.where(peaks < 0, -1.0, 1.0),
            count=snapshot.num_samples,
            snapshot=snapshot.digest,
            cosines=cosines,
        )

    def write(self, root: str | os.PathLike[str]) -> None:
        """Write `<root>/_statistics.npz`, whole or not at all."""
        path = local_root(root) / "_statistics.npz"
        temporary = path.with_name(f"._statistics.{os.getpid()}.npz")
        np.savez(temporary, allow_pickle=False, **vars(self))
        os.replace(temporary, path)

    @classmethod
    def read(cls, root: str | os.PathLike[str]) -> "EmbedStatistics":
        """Read `<root>/_statistics.npz`; ValueError with the remedy when it is missing."""
        path = local_root(root) / "_statistics.npz"
        if not path.exists():
            raise ValueError(f"{path}: missing; rerun ingest/embed.py until it finishes")
        with np.load(path, allow_pickle=False) as found:
            arrays = {n: found[n] for n in ARRAYS}
            return cls(**arrays, count=int(found["count"]), snapshot=str(found["snapshot"]))
