"""Which rows of a list repeat an earlier row's URL, for lists whose URLs do not fit in memory."""

import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

BUCKET_ROWS = 4_000_000  # compared at once: some 200 MB
CHUNK_ROWS = 1_000_000


def repeated_urls(columns: "Iterable[pa.ChunkedArray]", num_rows: int) -> np.ndarray:
    """Return bool [num_rows], True where a URL came before; null and blank ones never count.

    columns: the list's URLs in order. Their 64-bit hashes go to a temporary file, 8 bytes a row,
    and are compared a bucket at a time; that two of a hundred million different URLs meet has a
    chance of 3 in 10,000.
    """
    repeated = np.zeros(num_rows, bool)
    buckets = max(1, -(-num_rows // BUCKET_ROWS))
    with tempfile.TemporaryFile() as file:
        for column in columns:
            _hashes(column).tofile(file)
        for bucket in range(buckets):
            found = [
                (hashes[mine], start + np.flatnonzero(mine))
                for start, hashes in _chunks(file)
                for mine in [(hashes != 0) & (hashes % buckets == bucket)]
            ]
            if found:
                hashes, places = (np.concatenate(parts) for parts in zip(*found, strict=True))
                _, first = np.unique(hashes, return_index=True)
                repeated[np.delete(places, first)] = True
    return repeated


def _hashes(column: "pa.ChunkedArray") -> np.ndarray:
    """Return uint64 [N]; 0 for what is no URL."""
    import pandas.util

    urls = [(url or "").strip() for url in column.to_pylist()]
    hash_array: Any = pandas.util.hash_array  # its annotations leave arrays of objects out
    hashes = hash_array(np.array(urls, object), categorize=False)
    blank = np.array([not url for url in urls], bool)
    return np.where(blank, 0, np.maximum(hashes, 1)).astype(np.uint64)


def _chunks(file: IO[bytes]) -> Iterator[tuple[int, np.ndarray]]:
    file.seek(0)
    start = 0
    while len(hashes := np.fromfile(file, np.uint64, CHUNK_ROWS)):
        yield start, hashes
        start += len(hashes)
