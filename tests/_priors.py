"""The smallest priors, and what they are given."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.configs import AutoregressivePriorConfig, DiffusionPriorConfig, RegressionPriorConfig
from models.priors.autoregressive import AutoregressivePrior
from models.priors.base import PriorText
from models.priors.diffusion import DiffusionPrior
from models.priors.regression import RegressionPrior

EMBED, TEXT, LENGTH, CODES, BUCKETS = 16, 12, 5, 6, 32
SIZES = {"embed_dim": EMBED, "text_width": TEXT, "context_length": LENGTH, "vocab_size": 50}


def prior_of(kind: str, *, context_length: int = LENGTH, **changes: Any) -> Any:
    """Build a prior of any kind."""
    torch.manual_seed(0)
    sizes = {**SIZES, "context_length": context_length}
    small = {"width": 32, "depth": 2, "num_heads": 2}
    if kind == "autoregressive":
        small |= {"num_prefix": 4, "num_codes": CODES, "codebook_size": BUCKETS}
        return AutoregressivePrior(AutoregressivePriorConfig(**{**small, **changes}), **sizes)
    if kind == "diffusion":
        return DiffusionPrior(DiffusionPriorConfig(**{**small, **changes}), **sizes)
    return RegressionPrior(RegressionPriorConfig(**{**small, **changes}), **sizes)


def captions(count: int = 4, seed: int = 0) -> PriorText:
    """Random captions of 3 tokens of 5."""
    rng = torch.Generator().manual_seed(seed)
    return PriorText(
        text_embed=F.normalize(torch.randn(count, EMBED, generator=rng), dim=1),
        text=torch.randn(count, LENGTH, TEXT, generator=rng),
        token_mask=(torch.arange(LENGTH) < 3).repeat(count, 1),
    )


def rows(text: PriorText, index: Any) -> PriorText:
    """Return some of the captions."""
    return PriorText(**{name: value[index] for name, value in vars(text).items()})


def images(count: int = 4, seed: int = 1) -> Tensor:
    """Return random embeddings of images, of unit norm."""
    rng = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, EMBED, generator=rng), dim=1)
