"""Which embeddings nearly repeat an earlier one, for sets too large to compare all with all.

Buckets come from k-means on the sphere, as in SemDeDup (Abbas et al. 2023): near neighbours mostly
share a bucket, and only within a bucket are all compared. A pair in two buckets is missed.
"""

from collections.abc import Callable, Iterator

import numpy as np

BUCKET_SIZE = 1024  # mean size; the work grows with the number of embeddings times this
MAX_BUCKETS = 4096
LEARN_FROM = 65_536  # embeddings that the centres are learned from
NUM_ITERATIONS = 10
BLOCK_ROWS = 4096

Blocks = Callable[[], Iterator[np.ndarray]]


def near_duplicates(blocks: Blocks, count: int, threshold: float, seed: int = 0) -> np.ndarray:
    """Return bool [count], True where an earlier embedding that stays has cosine >= `threshold`.

    blocks: yields all embeddings at each call, float16 or float32 [n, E] of unit norm, in order;
    a zero vector duplicates no other. threshold: 0 to 1.
    """
    repeats = np.zeros(count, bool)
    if count == 0:
        return repeats
    centres = _learn_centres(blocks, count, seed)
    codes = np.concatenate([_nearest(block, centres) for block in blocks()])
    at_once = _buckets_at_once(codes, len(centres))
    for first in range(0, len(centres), at_once):
        last = first + at_once
        places = np.flatnonzero((codes >= first) & (codes < last))
        vectors = _gather(blocks, places)
        for code in range(first, min(last, len(centres))):
            members = np.flatnonzero(codes[places] == code)
            repeats[places[members]] = _repeats_in_bucket(vectors[members], threshold)
    return repeats


def _buckets_at_once(codes: np.ndarray, num_buckets: int) -> int:
    """Return how many buckets are gathered in one pass: some million embeddings."""
    return max(1, int(num_buckets * 1_000_000 / max(1, len(codes))))


def _learn_centres(blocks: Blocks, count: int, seed: int) -> np.ndarray:
    """Return the centres that k-means learns from a sample, float32 [k, E] of unit norm."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(count)[:LEARN_FROM])
    sample = _gather(blocks, chosen)
    number = int(np.clip(count // BUCKET_SIZE, 1, MAX_BUCKETS))
    centres = sample[np.sort(rng.permutation(len(sample))[:number])]
    for _ in range(NUM_ITERATIONS if number > 1 else 0):
        codes = _nearest(sample, centres)
        sums = np.zeros_like(centres)
        np.add.at(sums, codes, sample)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(norms > 0, sums / np.maximum(norms, 1e-12), centres)
    return centres


def _gather(blocks: Blocks, places: np.ndarray) -> np.ndarray:
    """Return the embeddings at rising `places`, float32 [n, E]."""
    vectors, start = [], 0
    for block in blocks():
        low, high = np.searchsorted(places, [start, start + len(block)])
        vectors.append(np.asarray(block[places[low:high] - start], np.float32))
        start += len(block)
    return np.concatenate(vectors)


def _nearest(block: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the centre nearest to each row, int32 [n]."""
    codes = [np.zeros(0, np.int32)]
    for start in range(0, len(block), BLOCK_ROWS):
        rows = np.asarray(block[start : start + BLOCK_ROWS], np.float32)
        codes.append((rows @ centres.T).argmax(1).astype(np.int32))
    return np.concatenate(codes)


def _repeats_in_bucket(vectors: np.ndarray, threshold: float) -> np.ndarray:
    """Return bool [n]: a row is compared with the earlier rows that are not duplicates."""
    repeats = np.zeros(len(vectors), bool)
    for start in range(0, len(vectors), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(vectors))
        close = vectors[start:stop] @ vectors[:stop].T >= threshold
        close &= np.arange(stop) < np.arange(start, stop)[:, None]
        for row in np.flatnonzero(close.any(1)):
            repeats[start + row] = bool((close[row] & ~repeats[:stop]).any())
    return repeats
