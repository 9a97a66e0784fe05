"""Pure scores of embeddings: no files, no models."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Return the mean cosine between row i of `a` and row i of `b`, both [N, E]."""
    return F.cosine_similarity(a.double(), b.double(), dim=1).mean().item()


def shuffled_cosine(a: Tensor, b: Tensor) -> float:
    """Return the mean cosine over all pairs of different rows of `a` and `b` [N, E]: the exact
    baseline
    of what random re-pairing would give, without the noise of one shuffle."""
    a, b = F.normalize(a.double(), dim=1), F.normalize(b.double(), dim=1)
    n = len(a)
    if n < 2:
        raise ValueError(f"shuffled_cosine: found {n} rows, expected at least 2")
    total = a.sum(0) @ b.sum(0) - (a * b).sum()
    return (total / (n * (n - 1))).item()


def retrieval_at_1(query: Tensor, gallery: Tensor, captions: list[str]) -> float:
    """Return the share of `query` rows whose nearest `gallery` row has the query's caption.

    query, gallery: [N, E], row i of both belongs to captions[i]. Rows that share a caption are
    all right
    answers ("any of the same caption"): the drawn set repeats captions.
    """
    nearest = (F.normalize(query.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T).argmax(
        1
    )
    hits = [captions[i] == captions[j] for i, j in enumerate(nearest.tolist())]
    return torch.tensor(hits, dtype=torch.float64).mean().item()
