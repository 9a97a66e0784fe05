"""Which of its captions a sample is trained on: drawn for each epoch, from the sample's key.

Further captions of a sample are texts in kept columns of its shard: see ingest/shards.py.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from models.diffusion import keyed_random
from training.config import MAIN_CAPTION


class CaptionDraw:
    """Draws one caption of each sample: of its main caption, or of those in further `columns`.

    weights: chance of each column, of any sum; `caption` names the main caption. A column that a
    sample lacks leaves its chance to those that it has; a sample without any of them gets its main
    caption. The captions of one column are equally likely.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.columns = tuple(name for name in weights if name != MAIN_CAPTION)
        self._weights = np.array([weights.get(n, 0.0) for n in (MAIN_CAPTION, *self.columns)])

    def __call__(self, keys: Tensor, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each sample's caption and its number there, both int64 [n].

        Source 0 is the main caption, source k the k-th of `columns`. keys: int64 [n], the samples'
        random keys; counts: int [n, S], how many captions a sample has in each source.
        """
        drawn = keyed_random.uniform(keys, "caption", (2,)).double().numpy()  # [n, 2]
        ends = np.where(counts > 0, self._weights, 0.0).cumsum(1)  # [n, S]
        source = (drawn[:, :1] * ends[:, -1:] >= ends).sum(1)
        source[ends[:, -1] == 0] = 0
        num_captions = counts[np.arange(len(counts)), source]
        return source, (drawn[:, 1] * num_captions).astype(np.int64)
