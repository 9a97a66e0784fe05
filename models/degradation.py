"""Corruptions of an upsampler's conditioning image (Ramesh et al. 2022, appendix C).

    shrink          the mean over cells: the low resolution that a stage starts from
    gaussian_blur   kernel 3, sigma 0.6, of the first upsampler
    bsr             degradation of blind super-resolution, of the second upsampler

`bsr` is the degradation of BSRGAN (Zhang et al. 2021, "Designing a Practical Degradation Model"):
two blurs, a reduction by a random filter, noise and JPEG, in a random order for each sample.
Speckle replaces its camera noise; the reduction is one step, to the final size.
"""

import math
from collections.abc import Sequence

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


# Each sample has its own order of corruptions and reduction. A GPU is not asked for the orders: the
# batch runs through this program before the reduction, and again after it, and a sample takes a
# step where that is its next one. It is the shortest program that holds every order of two blurs, a
# JPEG, a noise and a speckle with 3 blurs and 2 JPEGs, which cost most.
PROGRAM = "nsnbjnsnbnsnjnsbnsn"
ISOTROPIC, ANISOTROPIC, NOISE, SPECKLE, JPEG, REDUCTION, DONE = range(7)  # in an order


def bsr(image: Tensor, keys: Tensor, factor: int) -> Tensor:
    """Corrupt and reduce `image` [B, 3, H, W] in [-1, 1] to [B, 3, H / factor, W / factor].

    All randomness comes from the sample `keys` int64 [B]. Sides: at least 8 factor px.
    """
    order = keyed_random.uniform(keys, "bsr_order", (DONE,)).argsort(dim=1)  # [B, 6]
    order = F.pad(order, (0, 1), value=DONE)  # [B, 7]
    turn = torch.zeros_like(keys)[:, None]  # [B, 1], of each sample in its order
    large, turn = _corrupted((image.float() + 1) / 2, keys, order, turn, 1.0)
    small = _reduced(large, keys, factor).clamp(0, 1)  # [B, 3, h, w]
    small, _ = _corrupted(small, keys, order, turn + 1, 1 / factor)
    return small * 2 - 1


def _corrupted(
    x: Tensor, keys: Tensor, order: Tensor, turn: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Take each sample's steps from its `turn` [B, 1] on, up to its reduction or the end of its
    `order` [B, 7]; returns x [B, 3, H, W] and the turns reached.

    scale: px of this size per px of the large image.
    """
    noise, speckle = _noise(keys, x.shape[1:]), _speckle(keys, x.shape[1:])  # [B, 3, H, W] each
    isotropic, anisotropic = _isotropic(keys, scale), _anisotropic(keys, scale)  # [B, k, k] each
    blurs, blurs_too = (
        _some(keys, f"bsr_{name}_share", BLUR_SHARE) for name in ("iso", "aniso")
    )  # [B, 1, 1, 1] each
    for step in PROGRAM:
        following = order.gather(1, turn)[:, :, None, None]  # [B, 1, 1, 1]
        if step == "b":
            first = following == ISOTROPIC
            taken = first | (following == ANISOTROPIC)
            y = _blurred(x, torch.where(first[:, 0], isotropic, anisotropic))
            y = torch.where(torch.where(first, blurs, blurs_too), y, x)
        elif step == "j":
            taken, y = following == JPEG, _compressed(x, keys)
        elif step == "n":
            taken, y = following == NOISE, x + noise
        else:
            taken, y = following == SPECKLE, x * speckle
        x = torch.where(taken, y.clamp(0, 1), x)
        turn = turn + taken[:, :, 0, 0]
    return x, turn


def _some(keys: Tensor, name: str, share: float) -> Tensor:
    """Return bool [B, 1, 1, 1], True for a share of the samples."""
    return (keyed_random.uniform(keys, name) < share)[:, None, None, None]


def _between(keys: Tensor, name: str, low: float, high: float) -> Tensor:
    return low + (high - low) * keyed_random.uniform(keys, name)


def _isotropic(keys: Tensor, scale: float) -> Tensor:
    sigma = _between(keys, "bsr_iso", *BLUR_RANGE) * scale
    return gaussian_kernels(sigma, sigma, torch.zeros_like(sigma))


def _anisotropic(keys: Tensor, scale: float) -> Tensor:
    along, across = (_between(keys, f"bsr_axis_{i}", *BLUR_RANGE) * scale for i in "ab")
    return gaussian_kernels(along, across, _between(keys, "bsr_angle", 0.0, math.pi))


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


def _noise(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Return what is added to images of `shape`, [B, 3, H, W]: 0 for those without noise."""
    noise = keyed_random.normal(keys, "bsr_noise", shape)
    noise = torch.where(_some(keys, "bsr_grey", GREY_SHARE), noise[:, :1], noise)
    level = _between(keys, "bsr_noise_level", *NOISE_RANGE)[:, None, None, None]
    return level * noise * _some(keys, "bsr_noise_share", NOISE_SHARE)


def _speckle(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the factors of images of `shape`, [B, 3, H, W]: 1 for those without speckle."""
    noise = keyed_random.normal(keys, "bsr_speckle", shape)
    level = _between(keys, "bsr_speckle_level", *NOISE_RANGE)[:, None, None, None]
    return 1 + level * noise * _some(keys, "bsr_speckle_share", SPECKLE_SHARE)


def _compressed(image: Tensor, keys: Tensor) -> Tensor:
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


_CONSTANTS: dict[torch.device, tuple[Tensor, ...]] = {}


def jpeg_constants(device: torch.device) -> tuple[Tensor, ...]:
    """Return JPEG's colours, their inverse, its cosines and tables, on each device once: a copy to
    a GPU would wait for it.

    From RGB [3, 3], to RGB [3, 3], [frequency, position] [8, 8], and [3, 8, 8].
    """
    if device not in _CONSTANTS:
        to_ycc = torch.tensor(_TO_YCC)
        # The orthonormal cosine transform of 8 samples
        k, n = torch.arange(8)[:, None], torch.arange(8)
        cosines = torch.cos((2 * n + 1) * k * math.pi / 16) / 2
        cosines[0] /= math.sqrt(2)
        tables = torch.tensor([_LUMINANCE, _CHROMINANCE, _CHROMINANCE]).float()
        constants = to_ycc, torch.linalg.inv(to_ycc), cosines, tables
        _CONSTANTS[device] = tuple(each.to(device) for each in constants)
    return _CONSTANTS[device]


def jpeg(image: Tensor, quality: Tensor) -> Tensor:
    """Return `image` [B, 3, H, W] in [0, 1] after JPEG of `quality` [B] in [1, 100].

    Blocks of 8 px and quantised cosines as in JPEG, without chroma subsampling. Sides that are no
    multiple of 8 are padded by repeating their ends. (ITU-T T.81)
    """
    height, width = image.shape[2:]
    padded = F.pad(image, (0, -width % 8, 0, -height % 8), mode="replicate")
    to_ycc, to_rgb, cosines, tables = jpeg_constants(image.device)
    # the transform takes levels about 0
    ycc = torch.einsum("cd,bdhw->bchw", to_ycc, padded * 255)
    ycc[:, 0] -= 128
    blocks = ycc.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # [B, 3, h, w, 8, 8]

    # Tables scaled to the quality as the IJG's library scales them, [B, 3, 1, 1, 8, 8]
    percent = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)[:, None, None, None]
    table = ((tables * percent + 50) / 100).floor().clamp(1, 255)[:, :, None, None]

    coded = (cosines @ blocks @ cosines.T / table).round() * table
    blocks = cosines.T @ coded @ cosines
    ycc = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    ycc[:, 0] += 128
    rgb = torch.einsum("cd,bdhw->bchw", to_rgb, ycc)
    return (rgb / 255)[:, :, :height, :width].clamp(0, 1)
