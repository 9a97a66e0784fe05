"""What must not be rounded to bf16, wherever training or sampling runs under autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def in_fp32(like: Tensor) -> AbstractContextManager:
    """Return the block in which products of fp32 tensors on `like`'s device stay in fp32.

    bf16 has 8 bits of precision: it moves codes to their neighbours and tells no logits near 100
    apart. The meta device, where costs are counted, knows no autocast.
    """
    if like.is_meta:
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
