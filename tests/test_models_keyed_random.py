"""Laws of the keyed generator: moments, independence, and that only the key matters."""

import math

import pytest
import torch

from models.diffusion import keyed_random

KEYS = torch.arange(200_000)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


def test_uniform_has_the_moments_and_the_flat_histogram_of_its_law():
    u = keyed_random.uniform(KEYS, "t").double()
    assert u.min() >= 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(1 / 2, abs=4 / math.sqrt(12 * len(u)))
    assert u.square().mean().item() == pytest.approx(1 / 3, abs=4 * 0.3 / math.sqrt(len(u)))
    counts = torch.histc(u, 100, 0, 1)
    expected = len(u) / 100
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert 50 < chi_squared < 160  # 99 degrees of freedom: mean 99, deviation 14


def test_normal_has_the_moments_and_the_tails_of_its_law():
    n = keyed_random.normal(KEYS, "eps", (4,)).double()
    error = 1 / math.sqrt(n.numel())
    assert n.mean().item() == pytest.approx(0, abs=4 * error)
    assert n.var().item() == pytest.approx(1, abs=4 * error * math.sqrt(2))
    assert n.pow(3).mean().item() == pytest.approx(0, abs=4 * error * math.sqrt(15))
    assert n.pow(4).mean().item() == pytest.approx(3, abs=4 * error * math.sqrt(96))
    beyond = (n.abs() > 3).double().mean().item()
    assert beyond == pytest.approx(math.erfc(3 / math.sqrt(2)), rel=0.15)
    assert n.isfinite().all()


def test_positions_of_one_draw_are_independent():
    n = keyed_random.normal(KEYS[:50_000], "eps", (6,)).double()
    off_diagonal = torch.corrcoef(n.T) - torch.eye(6)
    assert off_diagonal.abs().max() < 5 / math.sqrt(len(n))
    energy = torch.corrcoef(n.square().T) - torch.eye(6)  # Box and Muller share a radius
    assert energy.abs().max() < 5 / math.sqrt(len(n))


@pytest.mark.parametrize("offset", [1, 2, 1 << 20, 1 << 40])
def test_neighbouring_keys_are_uncorrelated(offset: int):
    near = keyed_random.uniform(KEYS, "t"), keyed_random.uniform(KEYS + offset, "t")
    assert abs(correlation(*near)) < 5 / math.sqrt(len(KEYS))


@pytest.mark.parametrize("other", ["eps_", "ep", "t", "text_drop", ""])
def test_purposes_are_independent(other: str):
    pair = [keyed_random.normal(KEYS, purpose, (1,)) for purpose in ("eps", other)]
    assert abs(correlation(*pair)) < 5 / math.sqrt(len(KEYS))


def test_no_two_of_many_words_are_equal():
    """The mixing is a bijection of 64-bit words, so a collision has chance n^2 / 2^65."""
    words = keyed_random.bits(KEYS[:20_000], "eps", 16).flatten()
    assert len(words.unique()) == len(words)


def test_a_draw_depends_on_its_key_alone():
    """Any partition of a batch, in any order, sees the numbers of the whole batch."""
    keys, shape = KEYS[:12] * 7_919, (3, 5)
    whole = keyed_random.normal(keys, "eps", shape)
    alone = torch.cat([keyed_random.normal(keys[i : i + 1], "eps", shape) for i in range(12)])
    strided = torch.empty_like(whole)
    for rank in range(3):
        strided[rank::3] = keyed_random.normal(keys[rank::3], "eps", shape)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(alone, whole) and torch.equal(strided, whole)
    assert torch.equal(keyed_random.normal(keys[order], "eps", shape), whole[order])


def test_the_global_generator_neither_matters_nor_moves():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = keyed_random.normal(KEYS[:4], "eps", (3,))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(keyed_random.normal(KEYS[:4], "eps", (3,)), first)


def test_sample_keys_part_seeds_epochs_and_samples():
    sample = torch.arange(1000)
    keys = [
        keyed_random.sample_keys(seed, torch.full((1000,), epoch), sample)
        for seed in range(4)
        for epoch in range(8)
    ]
    assert len(torch.cat(keys).unique()) == 32_000
    first, second = (keyed_random.uniform(k, "t") for k in keys[:2])
    assert abs(correlation(first, second)) < 5 / math.sqrt(1000)



def test_rows_share_a_hash_where_they_are_equal_and_nowhere_else():
    """All rows of few values: neighbours, permutations and shifts of each other among them."""
    rows = torch.cartesian_prod(*[torch.arange(6)] * 6)
    twice = torch.cat([rows, rows.flip(0)]).int()
    found = keyed_random.row_hashes(twice)
    assert torch.equal(found, found.flip(0)) and len(found.unique()) == len(rows)
    assert torch.equal(found[5:6], keyed_random.row_hashes(twice[5:6]))
