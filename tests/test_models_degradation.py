"""The paper's blur against its closed form, the cascade's low resolution, and blind
super-resolution's corruptions: JPEG against Pillow's, the rest by their laws."""

import io
import itertools
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from models.degradation import (
    BLUR_SHARE,
    BLUR_SIGMA,
    BSR_KERNEL_SIZE,
    JPEG_SHARE,
    NOISE_SHARE,
    PROGRAM,
    SPECKLE_SHARE,
    _anisotropic,
    _blurred,
    _compressed,
    _isotropic,
    _noise,
    _reduced,
    _some,
    _speckle,
    bsr,
    gaussian_blur,
    gaussian_kernels,
    jpeg,
    shrink,
)
from models.diffusion import keyed_random


def test_the_kernel_is_the_papers_gaussian():
    """Size 3, sigma 0.6: weights 1 and exp(-1 / .72) a side, normalised, in both directions."""
    image = torch.zeros(1, 2, 5, 5)
    image[:, :, 2, 2] = 1.0
    side = math.exp(-1 / (2 * 0.6**2))
    row = torch.tensor([0.0, side, 1.0, side, 0.0]) / (1 + 2 * side)
    torch.testing.assert_close(gaussian_blur(image), torch.outer(row, row).expand(1, 2, 5, 5))


def test_the_blur_agrees_with_scipy():
    """Also at the edges, and in each channel of each sample alone."""
    image = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0)).double()
    expected = scipy.ndimage.gaussian_filter(
        image.numpy(), BLUR_SIGMA, mode="mirror", radius=1, axes=(2, 3)
    )
    found = gaussian_blur(image.float()).double()
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-6, rtol=0)



def test_shrinking_averages_cells():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert shrink(image, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


# -- blind super-resolution ------------------------------------------------------------------------


def pictures(count: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """Smooth pictures [B, 3, H, W] in [0, 1] with some edges."""
    rng = torch.Generator().manual_seed(2)
    noise = torch.rand(count, 3, height // 8, width // 8, generator=rng)
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    smooth[:, :, 10:30, 20:40] = smooth[:, :, 10:30, 20:40].round()
    return smooth


@pytest.mark.parametrize("quality", [30, 50, 75, 95])
@pytest.mark.parametrize("size", [(48, 64), (45, 61)])
def test_jpeg_loses_what_pillows_jpeg_loses(quality: int, size: tuple[int, int]):
    image = (pictures(2, *size) * 255).round()
    found = jpeg(image / 255, torch.tensor([quality, 10]))[0] * 255
    file = io.BytesIO()
    array = image[0].byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(file, "JPEG", quality=quality, subsampling=0)
    theirs = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float()
    # libjpeg rounds colours and cosines to integers on the way, and we do not
    assert (found - theirs).abs().mean() < 1.5
    assert (found - theirs).square().mean() < 0.1 * (theirs - image[0]).square().mean() + 1.5


def test_kernels_are_rotated_gaussians():
    along, across = torch.tensor([2.0, 2.0]), torch.tensor([0.5, 2.0])
    kernels = gaussian_kernels(along, across, torch.tensor([math.pi / 2, 0.3]))
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(2))
    span = torch.arange(BSR_KERNEL_SIZE) - BSR_KERNEL_SIZE // 2
    spread_y = (kernels[0].sum(1) * span**2).sum().sqrt()
    spread_x = (kernels[0].sum(0) * span**2).sum().sqrt()
    assert spread_y == pytest.approx(2.0, abs=0.05) and spread_x == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(kernels[1], kernels[1].T)  # round: no angle


@pytest.mark.parametrize("factor", [2, 4])
def test_bsr_is_a_function_of_the_key_alone(factor: int):
    image, keys = pictures(12) * 2 - 1, torch.arange(12) * 977
    found = bsr(image, keys, factor)
    assert found.shape == (12, 3, 48 // factor, 64 // factor) and found.abs().max() <= 1
    assert torch.equal(bsr(image, keys, factor), found)
    part = [7, 2, 5]  # another batch, another order
    torch.testing.assert_close(bsr(image[part], keys[part], factor), found[part], atol=1e-5, rtol=0)
    other = bsr(image, keys + 1, factor)
    assert ((other - found).abs().mean((1, 2, 3)) > 1e-3).all()
    torch.testing.assert_close(image, pictures(12) * 2 - 1)  # what it was given stays


def test_bsr_differs_between_samples_and_from_the_mean_over_cells():
    """All orders, filters and corruptions occur: one picture under many keys is many pictures."""
    image = (pictures(1) * 2 - 1).expand(200, -1, -1, -1)
    found, clean = bsr(image, torch.arange(200), 4), shrink(image, 4)
    error = (found - clean).square().mean((1, 2, 3)).sqrt() / 2
    assert len(found.flatten(1).unique(dim=0)) == 200
    assert error.min() < 0.02 < 0.06 < error.max()
    assert (found - clean).mean().abs() < 0.01  # it darkens and brightens nothing


def corrupted_alone(image: torch.Tensor, key: torch.Tensor, factor: int) -> torch.Tensor:
    """One sample's degradation, step by step in its order, image [1, 3, H, W] in [0, 1]."""
    scale, image = 1.0, image.clone()
    for step in keyed_random.uniform(key, "bsr_order", (6,))[0].argsort().tolist():
        if step < 2:
            kernel = (_isotropic, _anisotropic)[step](key, scale)
            blurs = _some(key, f"bsr_{('iso', 'aniso')[step]}_share", BLUR_SHARE)
            image = _blurred(image, kernel) if blurs.item() else image
        elif step < 4:
            shape = image.shape[1:]
            image = image + _noise(key, shape) if step == 2 else image * _speckle(key, shape)
        elif step == 4:
            image = _compressed(image, key)
        else:
            image, scale = _reduced(image, key, factor), 1 / factor
        image = image.clamp(0, 1)
    return image


def test_a_batch_is_corrupted_as_each_sample_alone_in_its_order():
    image, keys = pictures(24), torch.arange(24) * 31
    expected = [corrupted_alone(image[i : i + 1], keys[i : i + 1], 4) for i in range(24)]
    found = (bsr(image * 2 - 1, keys, 4) + 1) / 2
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)


def test_every_order_of_the_corruptions_is_in_the_program():
    for order in itertools.permutations("bbjns"):
        program = iter(PROGRAM)
        assert all(step in program for step in order), order


def test_corruptions_are_drawn_as_often_as_they_say():
    image, keys = pictures(1)[:, :, :8, :8].expand(2000, -1, -1, -1), torch.arange(2000)
    shape = image.shape[1:]
    shares = (
        (image + _noise(keys, shape), NOISE_SHARE), (image * _speckle(keys, shape), SPECKLE_SHARE),
        (_compressed(image, keys), JPEG_SHARE),
    )  # fmt: skip
    for found, share in shares:
        touched = (found != image).flatten(1).any(1).float().mean()
        assert touched.item() == pytest.approx(share, abs=0.03), share
