"""Corruptions of an upsampler's conditioning image (Ramesh et al. 2022, appendix C)."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR_KERNEL_SIZE = 3
BLUR_SIGMA = 0.6


def gaussian_blur(image: Tensor) -> Tensor:
    """Blur `image` [B, C, H, W] with the paper's kernel 3, sigma 0.6, edges reflected."""
    offset = (
        torch.arange(BLUR_KERNEL_SIZE, device=image.device, dtype=torch.float64)
        - BLUR_KERNEL_SIZE // 2
    )
    weight = torch.exp(-(offset**2) / (2 * BLUR_SIGMA**2))
    weight = (weight / weight.sum()).to(image.dtype)
    channels = image.shape[1]
    kernel = torch.outer(weight, weight).expand(channels, 1, -1, -1)
    padded = F.pad(image, [BLUR_KERNEL_SIZE // 2] * 4, mode="reflect")
    return F.conv2d(padded, kernel, groups=channels)


def shrink(image: Tensor, factor: int) -> Tensor:
    """Average `image` [B, C, H, W] over factor x factor cells: the low resolution a cascade
    stage starts from."""
    return F.avg_pool2d(image, factor)
