"""Corruptions of an upsampler's conditioning image (Ramesh et al. 2022, appendix C).

    shrink          the mean over cells: the low resolution that a stage starts from
    gaussian_blur   kernel 3, sigma 0.6, of the first upsampler
    bsr             degradation of blind super-resolution, of the second upsampler

`bsr` is the degradation of BSRGAN (Zhang et al. 2021, "Designing a Practical Degradation Model"):
two blurs, a reduction by a random filter, noise and JPEG, in a random order for each sample.
Speckle replaces its camera noise; the reduction is one step, to the final size.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.diffusion import keyed_random

BLUR_KERNEL_SIZE = 3
BLUR_SIGMA = 0.6

BSR_KERNEL_SIZE = 13
BLUR_RANGE = (0.1, 2.4)  # px of the large image, along each axis of the kernel
BLUR_SHARE = 0.8  # of the samples, for either blur
NOISE_RANGE = (1 / 255, 25 / 255)
NOISE_SHARE, GREY_SHARE, SPECKLE_SHARE = 0.6, 0.4, 0.3
QUALITY_RANGE, JPEG_SHARE = (30.0, 95.0), 0.9
FILTERS = ("bilinear", "bicubic")  # antialiased; otherwise the mean over cells


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


# -- blind super-resolution ------------------------------------------------------------------------


def bsr(image: Tensor, keys: Tensor, factor: int) -> Tensor:
    """Corrupt and reduce `image` [B, 3, H, W] in [-1, 1] to [B, 3, H / factor, W / factor].

    All randomness comes from the sample `keys` int64 [B]. Sides: at least 8 factor px.
    """
    large = (image.float() + 1) / 2
    small = F.avg_pool2d(large, factor)  # [B, 3, h, w]; a row is set when it is reduced
    is_small = torch.zeros(len(keys), dtype=torch.bool, device=image.device)
    corruptions: list[Callable[[Tensor, Tensor, float], Tensor]] = [
        _isotropic, _anisotropic, _noisy, _speckled, _compressed,
    ]  # fmt: skip
    order = keyed_random.uniform(keys, "bsr_order", (len(corruptions) + 1,)).argsort(dim=1)
    for turn in order.unbind(1):
        for number, corrupt in enumerate(corruptions):
            # `scale`: px of this size per px of the large image
            for image_now, scale, mask in ((large, 1.0, ~is_small), (small, 1 / factor, is_small)):
                rows = ((turn == number) & mask).nonzero()[:, 0]
                _apply(corrupt, image_now, rows, keys, scale)
        rows = (turn == len(corruptions)).nonzero()[:, 0]
        if len(rows):
            small[rows] = _reduced(large[rows], keys[rows], factor).clamp(0, 1)
            is_small[rows] = True
    return small * 2 - 1


def _apply(
    corrupt: Callable[[Tensor, Tensor, float], Tensor], image: Tensor, rows: Tensor, keys: Tensor,
    scale: float,
) -> None:  # fmt: skip
    """Corrupt the `rows` of `image` in place, where there are any."""
    if len(rows):
        image[rows] = corrupt(image[rows], keys[rows], scale).clamp(0, 1)


def _some(keys: Tensor, name: str, share: float) -> Tensor:
    """Return bool [B, 1, 1, 1], True for a share of the samples."""
    return (keyed_random.uniform(keys, name) < share)[:, None, None, None]


def _between(keys: Tensor, name: str, low: float, high: float) -> Tensor:
    return low + (high - low) * keyed_random.uniform(keys, name)


def _isotropic(image: Tensor, keys: Tensor, scale: float) -> Tensor:
    sigma = _between(keys, "bsr_iso", *BLUR_RANGE) * scale
    blurred = _blurred(image, gaussian_kernels(sigma, sigma, torch.zeros_like(sigma)))
    return torch.where(_some(keys, "bsr_iso_share", BLUR_SHARE), blurred, image)


def _anisotropic(image: Tensor, keys: Tensor, scale: float) -> Tensor:
    along, across = (_between(keys, f"bsr_axis_{i}", *BLUR_RANGE) * scale for i in "ab")
    angle = _between(keys, "bsr_angle", 0.0, math.pi)
    blurred = _blurred(image, gaussian_kernels(along, across, angle))
    return torch.where(_some(keys, "bsr_aniso_share", BLUR_SHARE), blurred, image)


def gaussian_kernels(along: Tensor, across: Tensor, angle: Tensor) -> Tensor:
    """Return Gaussian kernels [B, k, k] of sum 1, k = `BSR_KERNEL_SIZE`.

    along, across: standard deviations [B] in px on the kernel's own axes; angle [B], of the first
    of them to the horizontal, in radians.
    """
    span = torch.arange(BSR_KERNEL_SIZE, device=angle.device) - BSR_KERNEL_SIZE // 2
    y, x = span[None, :, None], span[None, None, :]
    cos, sin = (each[:, None, None] for each in (angle.cos(), angle.sin()))
    u, v = x * cos + y * sin, y * cos - x * sin
    power = (u / along[:, None, None]) ** 2 + (v / across[:, None, None]) ** 2
    weight = torch.exp(-power / 2)
    return weight / weight.sum((1, 2), keepdim=True)


def _blurred(image: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each image [B, C, H, W] with its own kernel [B, k, k], edges repeated."""
    batch, channels, height, width = image.shape
    padded = F.pad(image, [BSR_KERNEL_SIZE // 2] * 4, mode="replicate")
    weight = kernels[:, None].expand(-1, channels, -1, -1).reshape(-1, 1, *kernels.shape[1:])
    flat = padded.reshape(1, batch * channels, *padded.shape[2:])
    return F.conv2d(flat, weight, groups=batch * channels).view(batch, channels, height, width)


def _noisy(image: Tensor, keys: Tensor, scale: float) -> Tensor:
    noise = keyed_random.normal(keys, "bsr_noise", image.shape[1:])
    noise = torch.where(_some(keys, "bsr_grey", GREY_SHARE), noise[:, :1], noise)
    level = _between(keys, "bsr_noise_level", *NOISE_RANGE)[:, None, None, None]
    return image + level * noise * _some(keys, "bsr_noise_share", NOISE_SHARE)


def _speckled(image: Tensor, keys: Tensor, scale: float) -> Tensor:
    noise = keyed_random.normal(keys, "bsr_speckle", image.shape[1:])
    level = _between(keys, "bsr_speckle_level", *NOISE_RANGE)[:, None, None, None]
    return image * (1 + level * noise * _some(keys, "bsr_speckle_share", SPECKLE_SHARE))


def _compressed(image: Tensor, keys: Tensor, scale: float) -> Tensor:
    quality = _between(keys, "bsr_quality", *QUALITY_RANGE)
    return torch.where(_some(keys, "bsr_jpeg_share", JPEG_SHARE), jpeg(image, quality), image)


def _reduced(image: Tensor, keys: Tensor, factor: int) -> Tensor:
    """Reduce by a random filter: the mean over cells, or an antialiased one."""
    size = [side // factor for side in image.shape[2:]]
    choice = (keyed_random.uniform(keys, "bsr_filter") * (1 + len(FILTERS))).long()
    choice = choice[:, None, None, None]
    reduced = F.avg_pool2d(image, factor)
    for number, mode in enumerate(FILTERS, start=1):
        filtered = F.interpolate(image, size, mode=mode, antialias=True)
        reduced = torch.where(choice == number, filtered, reduced)
    return reduced


# -- JPEG ------------------------------------------------------------------------------------------

# ITU-T T.81, annex K: the tables of luminance and chrominance that libraries scale by quality
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56), (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99), (47, 66, 99, 99, 99, 99, 99, 99),
    *(((99,) * 8,) * 4),
)  # fmt: skip
# ITU-T T.871: from RGB to luminance and two differences, all in [0, 255] about 0, 128, 128
_TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.299 / 1.772, -0.587 / 1.772, 0.886 / 1.772),
    (0.701 / 1.402, -0.587 / 1.402, -0.114 / 1.402),
)


def jpeg(image: Tensor, quality: Tensor) -> Tensor:
    """Return `image` [B, 3, H, W] in [0, 1] after JPEG of `quality` [B] in [1, 100].

    Blocks of 8 px and quantised cosines as in JPEG, without chroma subsampling. Sides that are no
    multiple of 8 are padded by repeating their ends. (ITU-T T.81)
    """
    height, width = image.shape[2:]
    padded = F.pad(image, (0, -width % 8, 0, -height % 8), mode="replicate")
    to_ycc = torch.tensor(_TO_YCC, device=image.device)
    # the transform takes levels about 0
    ycc = torch.einsum("cd,bdhw->bchw", to_ycc, padded * 255)
    ycc[:, 0] -= 128
    blocks = ycc.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # [B, 3, h, w, 8, 8]

    # The orthonormal cosine transform of 8 samples, [frequency, position]
    k, n = torch.arange(8, device=image.device)[:, None], torch.arange(8, device=image.device)
    cosines = torch.cos((2 * n + 1) * k * math.pi / 16) / 2
    cosines[0] /= math.sqrt(2)

    # Tables scaled to the quality as the IJG's library scales them, [B, 3, 1, 1, 8, 8]
    tables = torch.tensor([_LUMINANCE, _CHROMINANCE, _CHROMINANCE], device=image.device).float()
    percent = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)[:, None, None, None]
    table = ((tables * percent + 50) / 100).floor().clamp(1, 255)[:, :, None, None]

    coded = (cosines @ blocks @ cosines.T / table).round() * table
    blocks = cosines.T @ coded @ cosines
    ycc = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    ycc[:, 0] += 128
    rgb = torch.einsum("cd,bdhw->bchw", torch.linalg.inv(to_ycc), ycc)
    return (rgb / 255)[:, :, :height, :width].clamp(0, 1)
