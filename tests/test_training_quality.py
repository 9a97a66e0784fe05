"""How the race of benchmarks/quality_an_hour.py counts seconds."""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _runs import done, script

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def race() -> dict[str, Any]:
    """Return what the script defines."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return runpy.run_path(str(ROOT / "benchmarks" / "quality_an_hour.py"))
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_a_curve_is_a_line_in_the_logarithm_of_the_seconds(race: Any):
    curve = [(10.0, 200.0), (40.0, 100.0), (160.0, 50.0)]
    assert race["seconds_until"](curve, 150) == pytest.approx(20)
    assert race["seconds_until"](curve, 100) == 40
    assert race["seconds_until"](curve, 75) == pytest.approx(80)
    assert race["seconds_until"](curve, 300) == 10, "there from the start"
    assert race["seconds_until"](curve, 49) is None
    assert race["seconds_until"]([(10.0, 100.0), (20.0, 130.0), (40.0, 100.0)], 99) is None


def test_the_ratio_is_of_the_seconds_to_one_distance(race: Any):
    curve = [(10.0, 200.0), (40.0, 100.0), (160.0, 50.0)]
    slow = [(4 * seconds, distance) for seconds, distance in curve]
    assert race["speed_up"](curve, slow) == pytest.approx(4)
    assert race["speed_up"](slow, curve) == pytest.approx(1 / 4)
    assert race["speed_up"](curve, curve) == pytest.approx(1)
    rising = [(10.0, 90.0), (40.0, 60.0), (160.0, 95.0)]
    assert race["speed_up"](curve, rising) == pytest.approx(40 / race["seconds_until"](curve, 60))


def test_heats_are_compared_by_their_mean_with_the_peers_or_among_ours(race: Any):
    ours = {"U-Net": [90.0, 110.0], "transformer": [150.0, 150.0]}
    peers = {"diffusers": {"v": [400.0, 400.0], "eps": [300.0, 400.0]}}
    assert race["heat_ratio"]({"ours": ours}) == pytest.approx(1.5)
    assert race["heat_ratio"]({**peers, "ours": ours}) == pytest.approx(3.5)


def test_embeddings_are_judged_beside_the_true_ones(race: Any, tmp_path: Path):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(200, 8)).astype(np.float32)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text = image[:, ::-1]
    (tmp_path / "test_captions.json").write_text(json.dumps([f"{n}" for n in range(200)]))
    np.save(tmp_path / "test_image_embed.npy", image)
    np.save(tmp_path / "test_text_embed.npy", text)
    same = race["embedding_scores"](tmp_path, image, 3)
    assert same["fd"] == pytest.approx(0, abs=1e-6) and same["cos"] == pytest.approx(1)
    assert same["retrieval_at_1"] == 1
    turned = race["embedding_scores"](tmp_path, -image, 3)
    mean = image.astype(np.float64).mean(0)
    assert turned["cos"] == pytest.approx(-1) and turned["fd"] > 4 * np.square(mean).sum()
    # the same embeddings, but of other captions
    mixed = race["embedding_scores"](tmp_path, np.roll(image, 1, axis=0), 3)
    assert mixed["fd"] > 1e-3 and mixed["retrieval_at_1"] < 0.1


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / ".venv-bench").exists(), reason="needs the peers of `make bench-setup`"
)
@pytest.mark.parametrize("leg", ["decoder", "prior"])
def test_the_race_runs_to_its_end_and_continues(leg: str, tmp_path: Path):
    command = ("benchmarks/quality_an_hour.py", "--quick", "--work", str(tmp_path / "work"),
               "--out", str(tmp_path / "grid"), "--leg", leg)  # fmt: skip
    ended = done(script(*command), 900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    sides = found["shapes"]["sides"]
    assert set(sides) == {"ours", "diffusers", "dalle2-pytorch"} and found["ratio"] > 0
    assert (tmp_path / "grid_shapes.png").exists() == (leg == "decoder")
    for side, entry in sides.items():
        lap = entry["laps"][-1]
        assert lap["fd_low"] <= lap["fd"] <= lap["fd_high"]
        folder = tmp_path / "work" / "shapes" / "round_0" / side / entry["setting"]
        drawn = np.load(folder / "drawn_3.npy")
        if leg == "decoder":
            assert drawn.shape == (40, 3, 32, 32) and drawn.std() > 1
        else:
            assert len(np.unique(drawn.round(3), axis=0)) == 40
            assert np.allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-4)
    before = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "work").rglob("*.npy")}
    again = done(script(*command), 300)
    assert json.loads(again.stdout.splitlines()[-1]) == found
    assert before == {path: os.stat(path).st_mtime_ns for path in before}
