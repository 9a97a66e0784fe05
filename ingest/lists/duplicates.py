"""Which rows repeat an earlier one, for lists of which not even the URLs fit in memory."""

import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

BUCKET_ROWS = 4_000_000  # compared at once: some 200 MB
CHUNK_ROWS = 1_000_000


def repeated_urls(columns: "Iterable[pa.ChunkedArray]", num_rows: int) -> np.ndarray:
    """Return bool [num_rows], True where a URL came before; null and blank ones never count.

    columns: the list's URLs in order. Two of a hundred million different URLs meet in a 64-bit
    hash with a chance of 3 in 10,000.
    """
    return repeated((_hashes(column) for column in columns), num_rows)


def repeated(chunks: Iterable[np.ndarray], num_rows: int) -> np.ndarray:
    """Return bool [num_rows], True where a hash came before; 0 never counts.

    chunks: uint64 [n] each, in order. They go to a temporary file, 8 bytes a row, and are compared
    a bucket at a time.
    """
    is_repeated = np.zeros(num_rows, bool)
    buckets = max(1, -(-num_rows // BUCKET_ROWS))
    with tempfile.TemporaryFile() as file:
        for chunk in chunks:
            chunk.tofile(file)
        for bucket in range(buckets):
            members: list[tuple[np.ndarray, np.ndarray]] = []  # hashes, and their rows
            start = file.seek(0)
            while len(hashes := np.fromfile(file, np.uint64, CHUNK_ROWS)):
                is_member = (hashes != 0) & (hashes % buckets == bucket)
                members.append((hashes[is_member], start + np.flatnonzero(is_member)))
                start += len(hashes)
            if members:
                hashes, places = (np.concatenate(arrays) for arrays in zip(*members, strict=True))
                _, first = np.unique(hashes, return_index=True)
                is_repeated[np.delete(places, first)] = True
    return is_repeated


def _hashes(column: "pa.ChunkedArray") -> np.ndarray:
    """Return uint64 [N]; 0 for what is no URL."""
    import pandas.util

    urls = [(url or "").strip() for url in column.to_pylist()]
    hash_array: Any = pandas.util.hash_array  # its annotations leave arrays of objects out
    hashes = hash_array(np.array(urls, object), categorize=False)
    blank = np.array([not url for url in urls], bool)
    return np.where(blank, 0, np.maximum(hashes, 1)).astype(np.uint64)
