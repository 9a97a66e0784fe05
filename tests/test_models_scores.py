"""The scores of embeddings, on sets whose answer is known."""

import pytest
import torch
import torch.nn.functional as F

from models.scores import mean_cosine, prior_scorecard, retrieval_at_k, shuffled_cosine


def random(count: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_the_cosine_of_a_set_with_itself_is_one_and_with_its_negative_minus_one():
    x = random(20)
    assert mean_cosine(x, x) == pytest.approx(1) and mean_cosine(x, -3 * x) == pytest.approx(-1)
    assert mean_cosine(torch.eye(2), torch.eye(2).flip(0)) == pytest.approx(0)


def test_the_shuffled_cosine_is_the_mean_over_all_wrong_pairs():
    a, b = random(7), random(7, seed=1)
    pairs = [mean_cosine(a[i : i + 1], b[j : j + 1]) for i in range(7) for j in range(7) if i != j]
    assert shuffled_cosine(a, b) == pytest.approx(sum(pairs) / len(pairs))
    with pytest.raises(ValueError, match="found 1 rows, expected at least 2"):
        shuffled_cosine(random(1), random(1))



def test_retrieval_counts_the_nearest_row_of_the_right_caption():
    gallery = torch.eye(3)
    assert retrieval_at_k(gallery, gallery, ["a", "b", "c"]) == 1
    assert retrieval_at_k(gallery.flip(0), gallery, ["a", "b", "c"]) == pytest.approx(1 / 3)
    assert retrieval_at_k(gallery.flip(0), gallery, ["a", "b", "a"]) == 1  # either "a" will do



def test_scale_does_not_matter():
    a, b = random(10), random(10, seed=1)
    names = [str(i) for i in range(10)]
    lengths = torch.rand(10, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    for score in (mean_cosine, shuffled_cosine):
        assert score(a * lengths, b) == pytest.approx(score(a, b))
    assert retrieval_at_k(a, b * lengths, names) == retrieval_at_k(a, b, names)


def test_a_right_answer_among_the_nearest_k_counts():
    gallery = torch.eye(4)
    query = gallery + 0.9 * gallery.roll(1, 1)  # the right row first, then the next one
    names = ["a", "b", "c", "d"]
    assert retrieval_at_k(query.roll(-1, 0), gallery, names, 1) == 0
    assert [retrieval_at_k(query.roll(1, 0), gallery, names, k) for k in (1, 2, 9)] == [0, 1, 1]


def test_a_scorecard_of_perfect_draws():
    z, z_t = (F.normalize(random(30, seed=seed), dim=1) for seed in range(2))
    names = [str(i) for i in range(30)]
    found = prior_scorecard(z, z, z_t, names)
    assert found["mse"] == 0 and found["cos"] == pytest.approx(1)
    assert found["retrieval_at_1"] == found["retrieval_at_5"] == 1 and found["n"] == 30
    assert found["cos_text"] == pytest.approx(mean_cosine(z, z_t))
    worse = prior_scorecard(z_t, z, z_t, names)
    assert worse["mse"] == pytest.approx((2 - 2 * worse["cos"]) / 6)


def test_parts_of_the_queries_make_no_difference(monkeypatch: pytest.MonkeyPatch):
    query, gallery = torch.randn(50, 8), torch.randn(50, 8)
    captions = [f"caption {i % 20}" for i in range(50)]
    whole = retrieval_at_k(query, gallery, captions, 3)
    monkeypatch.setattr("models.scores.QUERIES_AT_ONCE", 7)
    assert retrieval_at_k(query, gallery, captions, 3) == whole
