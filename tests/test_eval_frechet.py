"""Laws of the Frechet distance, and its agreement with scipy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg

from eval.distances.frechet import Moments, frechet_distance


def features(n: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + shift


def gaussian(mean: np.ndarray, variance: np.ndarray) -> Moments:
    return Moments(count=101, mean=mean, scatter=np.diag(variance) * 100)


@pytest.mark.parametrize("n", [200, 10])  # more and fewer images than features
def test_a_set_is_at_no_distance_from_itself(n: int):
    x = Moments.of(features(n, 16, seed=0))
    assert frechet_distance(x, x) < 1e-10 * np.trace(x.covariance)


def test_the_distance_is_symmetric_and_positive():
    a, b = Moments.of(features(200, 16, seed=0)), Moments.of(features(150, 16, seed=1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, b) > 1


def test_a_shift_alone_costs_its_squared_length():
    x = features(300, 8, seed=0)
    shift = np.arange(8.0)
    distance = frechet_distance(Moments.of(x), Moments.of(x + shift))
    assert distance == pytest.approx(shift @ shift, rel=1e-9)


def test_the_distance_is_invariant_to_a_rotation():
    a, b = features(200, 8, seed=0), features(200, 8, seed=1)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))
    turned = frechet_distance(Moments.of(a @ rotation), Moments.of(b @ rotation))
    assert turned == pytest.approx(frechet_distance(Moments.of(a), Moments.of(b)), rel=1e-9)


def test_diagonal_gaussians_have_the_closed_form():
    rng = np.random.default_rng(0)
    mean_a, mean_b = rng.normal(size=(2, 12))
    variance_a, variance_b = rng.uniform(0.1, 3, size=(2, 12))
    closed = ((mean_a - mean_b) ** 2 + (variance_a**0.5 - variance_b**0.5) ** 2).sum()
    distance = frechet_distance(gaussian(mean_a, variance_a), gaussian(mean_b, variance_b))
    assert distance == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize(("n", "relative"), [(400, 1e-9), (20, 1e-5)])
def test_agrees_with_sqrtm(n: int, relative: float):
    """The oracle: scipy's square root of the product itself, for n > D and for a singular S."""
    x, y = features(n, 32, seed=3), features(n, 32, seed=4, shift=0.5)
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t)
    shift = x.mean(0) - y.mean(0)
    oracle = shift @ shift + np.trace(s) + np.trace(t) - 2 * np.trace(root).real
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(oracle, rel=relative)


def test_batches_give_the_moments_of_the_whole():
    x = features(101, 8, seed=0, shift=1e4)  # a large mean is where naive sums lose their digits
    streamed = Moments.of(x[:7])
    for start in range(7, 101, 13):
        streamed = streamed.plus(Moments.of(x[start : start + 13]))
    assert streamed.count == 101
    np.testing.assert_allclose(streamed.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance, np.cov(x, rowvar=False), rtol=1e-8)


def test_merging_is_exact_in_one_order_and_equal_in_every_order():
    parts = [Moments.of(part) for part in np.array_split(features(90, 8, seed=0), 7)]
    merged, again = Moments.merge(parts), Moments.merge(parts)
    assert merged.scatter.tobytes() == again.scatter.tobytes()
    backwards = Moments.merge(reversed(parts))
    np.testing.assert_allclose(merged.mean, backwards.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.scatter, backwards.scatter, rtol=1e-10)


def test_an_empty_part_changes_nothing():
    x = Moments.of(features(9, 4, seed=0))
    empty = Moments.of(np.zeros((0, 4)))
    for total in (x.plus(empty), empty.plus(x)):
        np.testing.assert_array_equal(total.mean, x.mean)
        np.testing.assert_array_equal(total.scatter, x.scatter)


def test_float16_features_are_summed_in_float64():
    x = features(500, 4, seed=0).astype(np.float16)
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
