"""Which embeddings nearly repeat an earlier one, for sets too large to compare all with all.

Buckets come from k-means on the sphere, as in SemDeDup (Abbas et al. 2023): near neighbours mostly
share one, and only within a bucket are all compared. A pair that a border parts is missed.
"""

from collections.abc import Callable, Iterator

import numpy as np

BUCKET_SIZE = 1024  # aimed at; the work grows with the number of embeddings times this
MAX_BUCKETS = 4096
LEARN_FROM = 65_536  # embeddings that the centres are learned from
NUM_ITERATIONS = 10
BLOCK_ROWS = 4096

Blocks = Callable[[], Iterator[np.ndarray]]


def near_duplicates(blocks: Blocks, count: int, threshold: float, seed: int = 0) -> np.ndarray:
    """Return bool [count], True where an earlier embedding that stays has cosine >= `threshold`.

    blocks: gives all embeddings anew at each call, float16 or float32 [n, E] of unit norm, in
    order; zero vectors are nobody's duplicates. threshold: 0 to 1.
    """
    again = np.zeros(count, bool)
    if count == 0:
        return again
    centres = _centres(blocks, count, seed)
    codes = np.concatenate([_nearest(block, centres) for block in blocks()])
    for first in range(0, len(centres), _buckets_at_once(codes, len(centres))):
        last = first + _buckets_at_once(codes, len(centres))
        places = np.flatnonzero((codes >= first) & (codes < last))
        vectors = _gather(blocks, places)
        for code in range(first, min(last, len(centres))):
            mine = np.flatnonzero(codes[places] == code)
            again[places[mine]] = _repeats(vectors[mine], threshold)
    return again


def _buckets_at_once(codes: np.ndarray, num_buckets: int) -> int:
    """Return how many buckets are gathered in one pass: some million embeddings."""
    return max(1, int(num_buckets * 1_000_000 / max(1, len(codes))))


def _centres(blocks: Blocks, count: int, seed: int) -> np.ndarray:
    """Learn float32 [k, E] of unit norm."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(count)[:LEARN_FROM])
    known = _gather(blocks, chosen)
    number = int(np.clip(count // BUCKET_SIZE, 1, MAX_BUCKETS))
    centres = known[np.sort(rng.permutation(len(known))[:number])]
    for _ in range(NUM_ITERATIONS if number > 1 else 0):
        codes = _nearest(known, centres)
        sums = np.zeros_like(centres)
        np.add.at(sums, codes, known)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(norms > 0, sums / np.maximum(norms, 1e-12), centres)
    return centres


def _gather(blocks: Blocks, places: np.ndarray) -> np.ndarray:
    """Return the embeddings at rising `places`, float32 [n, E]."""
    found, start = [], 0
    for block in blocks():
        low, high = np.searchsorted(places, [start, start + len(block)])
        found.append(np.asarray(block[places[low:high] - start], np.float32))
        start += len(block)
    return np.concatenate(found)


def _nearest(block: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the centre nearest to each row, int32 [n]."""
    codes = [np.zeros(0, np.int32)]
    for start in range(0, len(block), BLOCK_ROWS):
        rows = np.asarray(block[start : start + BLOCK_ROWS], np.float32)
        codes.append((rows @ centres.T).argmax(1).astype(np.int32))
    return np.concatenate(codes)


def _repeats(vectors: np.ndarray, threshold: float) -> np.ndarray:
    """Return bool [n] for one bucket, in order: a row that goes takes none with it."""
    gone = np.zeros(len(vectors), bool)
    for start in range(0, len(vectors), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(vectors))
        close = vectors[start:stop] @ vectors[:stop].T >= threshold
        close &= np.arange(stop) < np.arange(start, stop)[:, None]
        for row in np.flatnonzero(close.any(1)):
            gone[start + row] = bool((close[row] & ~gone[:stop]).any())
    return gone
