"""What keeps its numbers as they are, wherever training or sampling runs under autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> AbstractContextManager:
    """Return the block in which tensors on `like`'s device keep their types.

    For products that bf16's 8 bits would spoil: codes move to their neighbours, and logits near 100
    are not told apart. The meta device, where costs are counted, knows no autocast.
    """
    if like.is_meta:
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
