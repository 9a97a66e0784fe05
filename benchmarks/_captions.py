"""How long captions of the web are, in tokens of CLIP: 10,000 rows of a list in LAION's columns."""

import numpy as np

# captions of 0, 1, ..., 77 tokens, start and end included: tests/test_training_benchmarks.py counts
# them again, where ../shared/data is
COUNTS = (
    0, 0, 0, 2, 101, 337, 471, 613, 665, 731, 688, 657, 609, 526, 506, 486, 435, 375, 328, 263, 242,
    239, 168, 169, 131, 110, 112, 87, 106, 73, 67, 60, 58, 51, 47, 42, 44, 26, 34, 27, 18, 15, 14,
    13, 14, 8, 12, 13, 11, 8, 5, 11, 0, 8, 5, 6, 9, 3, 11, 10, 4, 6, 5, 5, 6, 3, 5, 4, 3, 5, 3, 0,
    2, 2, 2, 5, 3, 57,
)  # fmt: skip


def caption_lengths(count: int, longest: int = 77) -> np.ndarray:
    """Draw the lengths, int64 [count], of captions that are cut at `longest` tokens."""
    share = np.array(COUNTS) / sum(COUNTS)
    drawn = np.random.default_rng(0).choice(len(COUNTS), size=count, p=share)
    return np.minimum(drawn, longest)
