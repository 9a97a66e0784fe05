"""What readers leave out: pairs that do not fit, images that come again, images that are none."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ingest import download
from ingest.download import DownloadConfig
from ingest.embedding import near_duplicates as nd
from ingest.embedding.near_duplicates import near_duplicates
from ingest.embedding.publish import Rules, publish_embeds
from ingest.embedding.statistics import COSINE_EDGES, EmbedStatistics
from ingest.shards import Attempt, EmbedShard, load_snapshot, write_embed_shard, write_manifest
from ingest.store.maintenance import record_failed
from training.data.datasets import EmbedDataset, PairDataset
from training.data.sampler import Plan


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def near(vector: np.ndarray, cosine: float, rng: np.random.Generator) -> np.ndarray:
    """Return a unit vector of that cosine to a unit vector."""
    other = rng.normal(size=vector.shape)
    other = unit(other - (other @ vector) * vector)
    return (cosine * vector + np.sqrt(1 - cosine**2) * other).astype(np.float32)


def by_hand(vectors: np.ndarray, threshold: float) -> np.ndarray:
    """All with all, one after the other."""
    gone = np.zeros(len(vectors), bool)
    for row in range(1, len(vectors)):
        gone[row] = ((vectors[:row] @ vectors[row] >= threshold) & ~gone[:row]).any()
    return gone


def test_one_bucket_compares_all_with_all():
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(600, 4)))
    found = near_duplicates(lambda: iter(np.split(vectors, [100, 100, 350])), 600, 0.97)
    assert np.array_equal(found, by_hand(vectors, 0.97)) and 50 < found.sum() < 550


def test_what_goes_takes_none_with_it():
    """b is near a, c near b but not near a: b goes, c stays."""
    rng = np.random.default_rng(1)
    a = unit(rng.normal(size=64))
    b = near(a, 0.96, rng)
    c = unit(2 * 0.96 * b - a)  # on b's other side
    assert c @ b > 0.95 > c @ a
    found = near_duplicates(lambda: iter([np.stack([a, b, c])]), 3, 0.95)
    assert found.tolist() == [False, True, False]


def test_buckets_find_nearly_all_pairs_and_no_other(monkeypatch):
    monkeypatch.setattr(nd, "BUCKET_SIZE", 50)
    monkeypatch.setattr(nd, "_buckets_at_once", lambda codes, number: 7)
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(40, 32))  # as real embeddings: in clouds, not everywhere
    vectors = unit(centres[rng.integers(0, 40, 3000)] + 0.5 * rng.normal(size=(3000, 32)))
    planted = rng.permutation(np.arange(1500, 3000))[:200]
    for place in planted:
        vectors[place] = near(vectors[place - 1500], 0.99, rng)
    found = near_duplicates(lambda: iter(np.split(vectors, 10)), 3000, 0.98)
    exact = by_hand(vectors, 0.98)
    assert not (found & ~exact).any() and found[planted].mean() > 0.95


def test_no_vector_repeats_none():
    zeros = np.zeros((5, 8), np.float16)
    assert not near_duplicates(lambda: iter([zeros]), 5, 0.5).any()
    assert len(near_duplicates(lambda: iter([]), 0, 0.5)) == 0


@pytest.fixture
def embeds(tmp_path) -> Path:
    """Three shards of 20: in each, row 3 has no image, row 5 an opposite caption; row 7 of the
    second repeats row 2 of the first, and row 9 of the third nearly does."""
    rng = np.random.default_rng(3)
    image = unit(rng.normal(size=(3, 20, 32)))
    text = np.stack([[near(v, 0.6, rng) for v in shard] for shard in image])
    image[1, 7], image[2, 9] = image[0, 2], near(image[0, 2], 0.99, rng)
    text[1, 7], text[2, 9] = (near(v, 0.6, rng) for v in (image[1, 7], image[2, 9]))
    text[:, 5] = -text[:, 5]
    image[:, 3] = 0
    write_manifest(tmp_path, "embeds", {})
    for number in range(3):
        name = f"{number:06d}"
        keys = [f"{name}{row:03d}" for row in range(20)]
        with Attempt(tmp_path, name) as attempt:
            write_embed_shard(
                attempt.path, name, image_embed=image[number], text_embed=text[number],
                tokens=np.full((20, 4), number, np.int32), keys=keys, captions=keys,
            )  # fmt: skip
            attempt.commit(num_samples=20, counts={}, config_hash="c")
    return tmp_path


def test_the_snapshot_bears_what_readers_leave_out(embeds):
    plain, left_out = publish_embeds(embeds)
    assert left_out == {"undecodable": 3} and plain.num_samples == 57
    strict, left_out = publish_embeds(embeds, Rules(min_similarity=0.3, dedup=0.95))
    assert left_out == {"undecodable": 3, "low_similarity": 3, "near_duplicate": 2}
    assert [entry.excluded for entry in strict.shards] == [(3, 5), (3, 5, 7), (3, 5, 9)]
    assert strict.digest != plain.digest and load_snapshot(embeds) == strict
    assert load_snapshot(embeds, plain.digest) == plain
    again, _ = publish_embeds(embeds)  # by the rules of the last time
    assert again == strict
    table = pq.ParquetFile(embeds / "_excluded.parquet").read().to_pydict()
    assert list(zip(table["shard"], table["row"], table["reason"], strict=True))[2:5] == [
        ("000001", 3, "undecodable"),
        ("000001", 5, "low_similarity"),
        ("000001", 7, "near_duplicate"),
    ]
    assert table["similarity"][1] == pytest.approx(-0.6, abs=0.01)


def test_verify_sets_embeddings_aside_and_what_is_left_out_stays_out(embeds, capsys):
    rules = Rules(min_similarity=0.3, dedup=0.95)
    strict, _ = publish_embeds(embeds, rules)
    check = DownloadConfig(out=str(embeds), verify=True)
    assert download.main(check) == 0 and load_snapshot(embeds) == strict
    damaged = embeds / "000001.text_embed.npy"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    capsys.readouterr()
    assert download.main(check) == 1
    assert "rerun ingest/embed.py to make them again" in capsys.readouterr().out
    left = load_snapshot(embeds)
    assert [(entry.name, entry.excluded) for entry in left.shards] == [
        ("000000", (3, 5)), ("000002", (3, 5, 9)),
    ]  # fmt: skip
    assert EmbedStatistics.read(embeds).snapshot == left.digest
    aside = list((embeds / "_quarantine").iterdir())
    record_failed(embeds, {})  # as the rerun does with its own records there
    assert [path.name[:6] for path in aside] == ["000001"] and aside[0].is_dir()


def test_readers_read_all_the_rest_once_an_epoch(embeds):
    snapshot, _ = publish_embeds(embeds, Rules(min_similarity=0.3, dedup=0.95))
    reader = EmbedDataset(snapshot)
    plan = Plan(data_sets=reader.data_sets, global_batch_size=8, seed=0)
    read = [plan.slice(step) for step in range(plan.steps_per_epoch)]
    index = np.concatenate([part.index[part.weight > 0] for part in read])
    assert sorted(index) == list(range(snapshot.num_samples))
    found = reader.read(np.sort(index))["image_embed"]
    shards = [EmbedShard(embeds, entry.name).image_embed for entry in snapshot.shards]
    kept = [np.delete(shards[n], entry.excluded, 0) for n, entry in enumerate(snapshot.shards)]
    assert np.array_equal(found, np.concatenate(kept))


def test_statistics_are_those_of_what_is_read(embeds):
    snapshot, _ = publish_embeds(embeds, Rules(min_similarity=0.3))
    found = EmbedStatistics.read(embeds)
    assert found.snapshot == snapshot.digest and found.count == 54
    read = EmbedDataset(snapshot).read(np.arange(54))
    image, text = (read[f"{part}_embed"].astype(np.float64) for part in ("image", "text"))
    assert np.allclose(found.mean, image.mean(0)) and np.allclose(found.std, image.std(0))
    assert np.array_equal(found.cosines, np.histogram((image * text).sum(1), COSINE_EDGES)[0])
    assert found.cosines.sum() == 54


def test_a_joined_row_is_one_sample_where_some_are_left_out(write_data, tmp_path):
    root = write_data(tmp_path, num_shards=2, samples_per_shard=6)
    images = load_snapshot(root / "images")
    whole = PairDataset(images, load_snapshot(root / "embeds"), 16)
    cosines = np.concatenate([
        (np.float32(shard.image_embed) * np.float32(shard.text_embed)).sum(1)
        for shard in (EmbedShard(root / "embeds", f"{n:06d}") for n in range(2))
    ])  # fmt: skip
    rules = Rules(min_similarity=float(np.median(cosines)))
    part, left_out = publish_embeds(root / "embeds", rules)
    kept = np.flatnonzero(cosines >= rules.min_similarity)
    assert left_out["low_similarity"] == 6 == part.num_samples == len(kept)
    found = PairDataset(images, part, 16).read(np.arange(6))
    expected = whole.read(kept)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
