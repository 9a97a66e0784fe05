"""Power-function averages: widths, weights and the combination of snapshots."""

import numpy as np
import pytest

from models.power_ema import (
    SIGMA_REL_MAX,
    Profile,
    coefficients,
    gamma_of,
    inner_product,
    new_share,
    sigma_rel_of,
)

STORED = (0.05, 0.10)


def density(profile: Profile, tau: np.ndarray) -> np.ndarray:
    """f(tau) of the paper, evaluated plainly."""
    rising = (profile.gamma + 1) * tau**profile.gamma / profile.t ** (profile.gamma + 1)
    return np.where(tau <= profile.t, rising, 0.0)


@pytest.mark.parametrize("sigma_rel", [1e-4, 0.01, 0.05, 0.1, 0.2, 0.28, SIGMA_REL_MAX])
def test_a_width_and_its_exponent_are_each_others(sigma_rel: float):
    gamma = gamma_of(sigma_rel)
    assert gamma >= 0 and sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-12)
    assert gamma_of(sigma_rel_of(3.7)) == pytest.approx(3.7, rel=1e-12)


def test_the_papers_exponents():
    """gamma of 6.94 and 16.97: widths 0.10 and 0.05 (section 3.1)."""
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.25])
def test_a_width_is_that_of_the_profile_integrated_numerically(sigma_rel: float):
    tau = (np.arange(200_000) + 0.5) / 200_000
    weights = density(Profile(gamma_of(sigma_rel), 1.0), tau) / len(tau)
    mean = (weights * tau).sum()
    assert weights.sum() == pytest.approx(1, abs=1e-6)
    assert np.sqrt((weights * (tau - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, float("nan")])
def test_a_width_that_no_rising_profile_has_is_refused(sigma_rel: float):
    with pytest.raises(ValueError, match="sigma_rel: found .*, expected more than 0 and at most"):
        gamma_of(sigma_rel)


def test_updates_give_the_integrals_of_the_profile():
    """The weight of update tau after t is f's integral from tau - 1 to tau."""
    gamma, weights = gamma_of(0.1), np.zeros(50)
    for t in range(1, 51):
        weights *= 1 - new_share(gamma, t)
        weights[t - 1] = new_share(gamma, t)
    tau = np.arange(51) / 50
    np.testing.assert_allclose(weights, np.diff(tau ** (gamma + 1)), rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("times", [(1.0, 1.0), (0.4, 1.0), (1.0, 0.7)])
def test_inner_products_are_the_integrals(times: tuple[float, float]):
    a, b = Profile(gamma_of(0.05), times[0]), Profile(gamma_of(0.2), times[1])
    tau = (np.arange(200_000) + 0.5) / 200_000
    expected = (density(a, tau) * density(b, tau)).mean()
    assert inner_product(a, b) == pytest.approx(expected, rel=1e-4)
    assert inner_product(a, b) == inner_product(b, a)


def stored(num_snapshots: int, every: int) -> list[Profile]:
    return [Profile(gamma_of(s), n * every) for s in STORED for n in range(1, num_snapshots + 1)]


@pytest.mark.parametrize("num_snapshots", [1, 8, 200])
def test_a_stored_profile_is_itself(num_snapshots: int):
    profiles = stored(num_snapshots, 100)
    for number in {0, num_snapshots - 1, len(profiles) - 1}:
        found, error = coefficients(profiles, profiles[number])
        np.testing.assert_allclose(found, np.eye(len(profiles))[number], atol=1e-6)
        assert error < 1e-7


@pytest.mark.parametrize("wanted", [0.03, 0.08, 0.2])
def test_the_error_is_that_of_the_profile_and_nothing_near_does_better(wanted: float):
    profiles, target = stored(8, 100), Profile(gamma_of(wanted), 800.0)
    found, error = coefficients(profiles, target)
    tau = (np.arange(100_000) + 0.5) / 100_000 * 800
    basis, goal = np.stack([density(p, tau) for p in profiles]), density(target, tau)
    norm = np.linalg.norm(goal)
    assert error == pytest.approx(np.linalg.norm(found @ basis - goal) / norm, rel=1e-3)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    rng = np.random.default_rng(0)
    for _ in range(20):
        moved = rng.standard_normal(len(profiles)) * 1e-2
        other = found + moved - moved.mean()  # sums to one as well
        assert np.linalg.norm(other @ basis - goal) / norm > error


def test_more_snapshots_fit_better_and_equal_ones_do_no_harm():
    target = Profile(gamma_of(0.08), 6400.0)
    errors = [coefficients(stored(n, 6400 // n), target)[1] for n in (4, 8, 64)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3
    twice = stored(8, 800) * 2  # of a step that was skipped: the same time again
    found, error = coefficients(twice, target)
    assert error == pytest.approx(errors[1], rel=1e-6)
    np.testing.assert_allclose(found[:16], found[16:], atol=1e-9)
