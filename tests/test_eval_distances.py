"""Laws of distances between features, and their agreement with torch-fidelity, pytorch-fid, scipy
and prdc on the same features."""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from prdc import compute_prdc
from pytorch_fid.fid_score import calculate_frechet_distance
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from eval.distances import intervals
from eval.distances.frechet import Moments, Reference, frechet_distance
from eval.distances.intervals import bootstrap_error, cmmd, fd_infinity, interval, kernel_distance
from eval.distances.neighbours import manifold_scores, nearest_rows
from eval.features.blocks import Features

WIDTH = 48


def draws(n: int, seed: int, shift: float = 0.0, scale: float = 1.0, width: int = WIDTH) -> Any:
    """Features as networks make them: float32, correlated, not negative for the most part."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) / width**0.5
    return (scale * rng.normal(size=(n, width)) @ mixing + 1 + shift).astype(np.float32)


@pytest.fixture(scope="module")
def fake() -> np.ndarray:
    return draws(600, seed=1, shift=0.2, scale=1.1)


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    return draws(500, seed=2)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# -- the Frechet distance --------------------------------------------------------------------------


def test_the_frechet_distance_is_the_oracles(fake: np.ndarray, real: np.ndarray):
    """And symmetric; scipy's square root of the product for fewer images than features, too."""
    ours = frechet_distance(Features.of(fake).moments(), Features.of(real).moments())
    wide = [x.astype(np.float64) for x in (fake, real)]
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in wide]
    theirs = fid_statistics_to_metric(statistics[0], statistics[1], False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-8)
    means, covariances = [x.mean(0) for x in wide], [np.cov(x, rowvar=False) for x in wide]
    pytorch_fid = calculate_frechet_distance(means[0], covariances[0], means[1], covariances[1])
    assert ours == pytest.approx(pytorch_fid, rel=1e-4)
    turned = frechet_distance(Features.of(real).moments(), Features.of(fake).moments())
    assert turned == pytest.approx(ours, rel=1e-10)
    few = [x[:20] for x in wide]
    root = scipy.linalg.sqrtm(np.cov(few[0], rowvar=False) @ np.cov(few[1], rowvar=False))
    moments = [Moments.of(x) for x in few]
    spread = sum(np.trace(each.covariance) for each in moments) - 2 * np.trace(root).real
    expected = ((few[0].mean(0) - few[1].mean(0)) ** 2).sum() + spread
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-5)


def gaussian(mean: np.ndarray, variance: np.ndarray) -> Moments:
    return Moments(count=101, mean=mean, scatter=np.diag(variance) * 100)


@pytest.mark.parametrize("n", [200, 10])  # more and fewer images than features
def test_a_set_is_at_no_distance_from_itself(n: int):
    x = Moments.of(draws(n, 0, width=16))
    assert frechet_distance(x, x) < 1e-10 * np.trace(x.covariance)


def test_diagonal_gaussians_have_the_closed_form():
    rng = np.random.default_rng(0)
    mean_a, mean_b = rng.normal(size=(2, 12))
    variance_a, variance_b = rng.uniform(0.1, 3, size=(2, 12))
    closed = ((mean_a - mean_b) ** 2 + (variance_a**0.5 - variance_b**0.5) ** 2).sum()
    distance = frechet_distance(gaussian(mean_a, variance_a), gaussian(mean_b, variance_b))
    assert distance == pytest.approx(closed, rel=1e-12)


def test_batches_give_the_moments_of_the_whole():
    x = draws(101, 0, shift=1e4, width=8)  # a large mean is where naive sums lose their digits
    x = x.astype(np.float64)
    streamed = Moments.of(x[:7])
    for start in range(7, 101, 13):
        streamed = streamed.plus(Moments.of(x[start : start + 13]))
    assert streamed.count == 101
    np.testing.assert_allclose(streamed.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance, np.cov(x, rowvar=False), rtol=1e-8)


def test_merging_is_exact_in_one_order_and_equal_in_every_order():
    parts = [Moments.of(part) for part in np.array_split(draws(90, 0, width=8), 7)]
    merged, again = Moments.merge(parts), Moments.merge(parts)
    assert merged.scatter.tobytes() == again.scatter.tobytes()
    backwards = Moments.merge(reversed(parts))
    np.testing.assert_allclose(merged.mean, backwards.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.scatter, backwards.scatter, rtol=1e-10)


def test_an_empty_part_changes_nothing():
    x = Moments.of(draws(9, 0, width=4))
    empty = Moments.of(np.zeros((0, 4)))
    for total in (x.plus(empty), empty.plus(x)):
        np.testing.assert_array_equal(total.mean, x.mean)
        np.testing.assert_array_equal(total.scatter, x.scatter)


def test_float16_features_are_summed_in_float64():
    x = draws(500, 0, width=4).astype(np.float16)
    moments = Moments.of(x)
    assert moments.mean.dtype == moments.scatter.dtype == np.float64
    np.testing.assert_allclose(moments.mean, x.astype(np.float64).mean(0), rtol=1e-14)


def test_users_mistakes_are_named():
    one, two = Moments.of(np.zeros((1, 4))), Moments.of(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="found 1 features, expected at least 2"):
        frechet_distance(two, one)
    with pytest.raises(ValueError, match="widths 4 and 5"):
        frechet_distance(two, Moments.of(np.zeros((2, 5))))
    with pytest.raises(ValueError, match="1 of 2 features not finite"):
        Moments.of([[0.0, 1.0], [0.0, float("nan")]])
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        Moments.of(np.zeros(3))
    with pytest.raises(ValueError, match="no set"):
        Moments.merge([])


def test_sums_do_not_depend_on_the_blocks(fake: np.ndarray):
    """Not on their size either, but for the last bits."""
    whole = Features.of(fake, block_size=600).moments()
    for size in (1, 7, 256):
        part = Features.of(fake, block_size=size).moments()
        np.testing.assert_allclose(part.scatter, whole.scatter, rtol=1e-9, atol=1e-9)
    again = Features.of(fake, block_size=7).moments()
    assert again.scatter.tobytes() == Features.of(fake, block_size=7).moments().scatter.tobytes()


def test_counted_rows_are_repeated_rows(fake: np.ndarray):
    counts = np.random.default_rng(0).integers(0, 4, len(fake))
    counted = Features.of(fake).moments(counts)
    repeated = Moments.of(np.repeat(fake, counts, axis=0))
    assert counted.count == counts.sum()
    np.testing.assert_allclose(counted.mean, repeated.mean, rtol=1e-10)
    np.testing.assert_allclose(counted.scatter, repeated.scatter, rtol=1e-8, atol=1e-8)


def test_rows_are_taken_across_blocks(fake: np.ndarray):
    rows = np.array([599, 3, 256, 3, 255])
    np.testing.assert_array_equal(Features.of(fake).take(rows), fake[rows].astype(np.float64))


# -- uncertainty ---------------------------------------------------------------------------


def test_the_limit_is_nearer_to_the_truth():
    """Two samples of one distribution: the truth is 0, and small samples say more than 0."""
    real = Reference.of(Features.of(draws(20_000, seed=5)).moments())
    fake = Features.of(draws(600, seed=6))
    limit, points = fd_infinity(fake, real) or (np.nan, 0)
    assert abs(limit) < 0.3 * real.distance(fake.moments()) and points == 15
    assert fd_infinity(Features.of(draws(11, seed=6)), real) is None


def test_the_bootstrap_finds_the_spread_of_samples(real: np.ndarray):
    known = Reference.of(Features.of(real).moments())
    found = [
        known.distance(Features.of(draws(400, seed=100 + i, shift=0.2)).moments())
        for i in range(60)
    ]
    error = bootstrap_error(Features.of(draws(400, seed=7, shift=0.2)), known, 60)
    assert 0.6 < error / np.std(found) < 1.6
    assert error == bootstrap_error(Features.of(draws(400, seed=7, shift=0.2)), known, 60)
    assert interval(1.0, 0.1) == pytest.approx((0.804, 1.196), abs=1e-3)
    assert interval(0.1, 1.0)[0] == 0


# -- kernels ---------------------------------------------------------------------------------------


def test_the_kernel_distance_is_torch_fidelitys(monkeypatch: pytest.MonkeyPatch):
    assert intervals.KID_SUBSET_SIZE == 1000
    monkeypatch.setattr(intervals, "KID_SUBSET_SIZE", 200)
    x, y = draws(300, seed=1, shift=0.2), draws(250, seed=2)
    theirs = kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subsets=100, kid_subset_size=200,
        kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1, rng_seed=2020, verbose=False,
    )  # fmt: skip
    ours = kernel_distance(Features.of(x), Features.of(y))
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert ours["kid_std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)
    assert (ours["kid_subsets"], ours["kid_subset_size"]) == (100, 200)


@pytest.mark.parametrize(("n_fake", "n_real", "subsets"), [(60, 60, 1), (60, 80, 100)])
def test_a_side_that_every_subset_holds_whole_has_no_deviation(n_fake, n_real, subsets):
    fake, real = Features.of(draws(n_fake, seed=1)), Features.of(draws(n_real, seed=2))
    found = kernel_distance(fake, real)
    assert "kid_std" not in found and found["kid_subsets"] == subsets
    assert found["kid_subset_size"] == 60


def test_cmmd_is_its_formula():
    x, y = (unit(draws(n, seed=n, shift=s)).astype(np.float64) for n, s in ((90, 0.5), (70, 0.0)))

    def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
        squares = ((a[:, None] - b[None]) ** 2).sum(-1)
        return float(np.exp(-squares / (2 * 10.0**2)).mean())

    plain = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(Features.of(x, 16), Features.of(y, 16)) == pytest.approx(plain, rel=1e-9)
    assert abs(cmmd(Features.of(x), Features.of(x))) < 1e-9


# -- neighbours ------------------------------------------------------------------------------------


def test_precision_and_recall_are_torch_fidelitys(fake: np.ndarray, real: np.ndarray):
    theirs = prc_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=3, prc_batch_size=10_000,
        save_cpu_ram=False, verbose=False,
    )  # fmt: skip
    ours = manifold_scores(Features.of(fake, 16), Features.of(real, 16))
    assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-3)
    assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-3)
    assert 0.1 < ours["precision"] < 1 and 0.1 < ours["recall"] < 1, "the comparison says something"


def test_density_and_coverage_are_prdcs(fake: np.ndarray, real: np.ndarray):
    theirs = compute_prdc(real.astype(np.float64), fake.astype(np.float64), nearest_k=5)
    ours = manifold_scores(Features.of(fake, 16), Features.of(real, 16))
    assert ours["density"] == pytest.approx(theirs["density"], rel=1e-6)
    assert ours["coverage"] == pytest.approx(theirs["coverage"], rel=1e-6)


def test_a_set_covers_itself_also_where_images_repeat(real: np.ndarray):
    twice = np.concatenate([real[:40], real[:40]])
    for some in (real, twice):
        found = manifold_scores(Features.of(some, 16), Features.of(some, 16))
        assert found["precision"] == found["recall"] == found["coverage"] == 1
    with pytest.raises(ValueError, match="--fake: found 5 images, expected more than k = 5"):
        manifold_scores(Features.of(real[:5]), Features.of(real))


def test_the_nearest_are_found_across_blocks(fake: np.ndarray, real: np.ndarray):
    planted = real.copy()
    planted[333] = fake[5]
    distances, which = nearest_rows(Features.of(fake[:50], 16), Features.of(planted, 16))
    plain = np.linalg.norm(fake[:50, None].astype(np.float64) - planted[None], axis=-1)
    np.testing.assert_array_equal(which, plain.argmin(1))
    np.testing.assert_allclose(distances, plain.min(1), rtol=1e-6, atol=1e-9)
    assert which[5] == 333 and distances[5] == 0
