"""The paper's blur against its closed form, and the cascade's low resolution."""

import math

import numpy as np
import scipy.ndimage
import torch

from models.degrade import BLUR_SIGMA, gaussian_blur, shrink


def test_the_kernel_is_the_papers_gaussian():
    """Size 3, sigma 0.6: weights 1 and exp(-1 / .72) a side, normalised, in both directions."""
    image = torch.zeros(1, 2, 5, 5)
    image[:, :, 2, 2] = 1.0
    side = math.exp(-1 / (2 * 0.6**2))
    row = torch.tensor([0.0, side, 1.0, side, 0.0]) / (1 + 2 * side)
    torch.testing.assert_close(gaussian_blur(image), torch.outer(row, row).expand(1, 2, 5, 5))


def test_the_blur_agrees_with_scipy():
    image = torch.rand(1, 1, 9, 7, generator=torch.Generator().manual_seed(0))
    expected = scipy.ndimage.gaussian_filter(
        image[0, 0].numpy().astype(np.float64), BLUR_SIGMA, mode="mirror", radius=1
    )
    torch.testing.assert_close(
        gaussian_blur(image)[0, 0].double(), torch.from_numpy(expected), atol=1e-6, rtol=0
    )


def test_a_flat_image_stays_flat_to_its_edges():
    torch.testing.assert_close(gaussian_blur(torch.full((1, 3, 4, 4), 0.3)),
                               torch.full((1, 3, 4, 4), 0.3))  # fmt: skip


def test_channels_and_samples_do_not_mix():
    image = torch.zeros(2, 3, 6, 6)
    image[0, 1] = torch.rand(6, 6)
    blurred = gaussian_blur(image)
    assert not blurred[1].any() and not blurred[0, [0, 2]].any()


def test_shrinking_averages_cells():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert shrink(image, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
