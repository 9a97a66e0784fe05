"""A small convolutional image tower for a CLIP, in the place of a vision transformer.

A transformer over patches has to learn from the data which pixels are neighbours; a convolution
does not. On a few thousand small pictures it therefore learns shapes in a fraction of the steps
(benchmarks/results.md). The last layer reads the whole map of 4 x 4 places, which keeps positions.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAST_SIDE = 4  # places a side of the last map
_GROUPS = 8


def mean_parts(maps: Tensor, side: int) -> Tensor:
    """Return the means of side x side parts of maps [B, C, h, w]: [B, C, side, side].

    Raises ValueError for more parts than there are places.
    """
    if side > min(maps.shape[2:]):
        places = " x ".join(map(str, maps.shape[2:]))
        raise ValueError(
            f"image_tokens: found {side**2}, expected at most the places of the image tower's last "
            f"map, {places}"
        )
    return F.adaptive_avg_pool2d(maps, side)


class ConvTower(nn.Module):
    """Standardised pixels float [B, 3, S, S] to embeddings [B, E].

    Each stage halves the side, until that is 4, and doubles the channels, of which the last has
    `width`; every stage but the first has `depth` residual convolutions. Raises ValueError for a
    side that is no power of two times 4, and a width that does not divide.
    """

    def __init__(self, image_size: int, width: int, depth: int, embed_dim: int) -> None:
        super().__init__()
        num_stages = (image_size // LAST_SIDE).bit_length() - 1
        channels = [width >> i for i in reversed(range(num_stages))]
        divisor = _GROUPS << max(num_stages - 2, 0)  # every stage but the first has group norms
        if not channels or image_size != LAST_SIDE << num_stages or width % divisor:
            raise ValueError(
                f"clip.vision: found image_size {image_size} with vision_width {width}, expected "
                f"8, 16, 32, ... px and a multiple of {divisor}"
            )
        self.image_size, self.output_dim = image_size, embed_dim
        self.conv1 = nn.Conv2d(3, channels[0], 4, 2, 1)
        self.down = nn.ModuleList(
            _conv(old, new, 2) for old, new in pairwise(channels)
        )
        self.residual = nn.ModuleList(
            nn.Sequential(*(_Residual(_conv(new, new, 1)) for _ in range(depth)))
            for new in channels[1:]
        )
        self.proj = nn.Linear(width * LAST_SIDE**2, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings, not normalised; shapes are given at the class."""
        return self.proj(self._map(x).flatten(1))

    def _map(self, x: Tensor) -> Tensor:
        """Return the last map [B, C, 4, 4]."""
        x = F.gelu(self.conv1(x))  # [B, C, S/2, S/2]
        for down, blocks in zip(self.down, self.residual, strict=True):
            x = blocks(down(x))
        return x

    def with_tokens(self, x: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Return the embeddings [B, E], and of which places they are the sum: tokens
        [B, E, side, side], each the mean of some places' parts."""
        x = self._map(x)
        weight = self.proj.weight.unflatten(1, x.shape[1:])  # [E, C, 4, 4]
        parts = torch.einsum("bchw,echw->behw", x, weight.to(x.dtype))  # [B, E, 4, 4]
        return self.proj(x.flatten(1)), mean_parts(parts, side)


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _conv(old: int, new: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(old, new, 3, stride, 1), nn.GroupNorm(_GROUPS, new), nn.GELU())
