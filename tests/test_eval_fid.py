"""The evaluation job from its command line: what it says, what it refuses, and with which code."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from _inception import write_inception
from PIL import Image

from eval import fid
from eval.evaluation import NETWORK_RELATIONS, SCORER_RELATIONS
from eval.fid import FidConfig
from eval.html_report.score_table import headlines
from eval.sampling.image_source import IncompleteError
from models.convert.runs import load_clip

ROOT = Path(__file__).resolve().parent.parent
COUNT = 9


def photos(folder: Path, seed: int, count: int = COUNT, size: int = 24) -> str:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size, size)).save(folder / f"{i:03d}.png")
    return str(folder)


@pytest.fixture
def config(tmp_path: Path) -> FidConfig:
    return FidConfig(
        real=photos(tmp_path / "real", 0), fake=photos(tmp_path / "fake", 1), clip="tiny:random",
        out=str(tmp_path / "eval.json"), num_threads=1, num_resamples=4,
    )  # fmt: skip


def evaluated(config: FidConfig, **changes) -> dict:
    changed = dataclasses.replace(config, **changes)
    assert fid.main(changed) == 0
    return json.loads(Path(changed.out).read_text())


def test_every_score_names_its_variant_and_counts(config: FidConfig):
    scores = evaluated(config)
    found = scores["features"]["clip"]
    assert (found["n"], found["n_real"], found["n_real_halves"]) == (COUNT, COUNT, COUNT // 2)
    assert found["extractor"].startswith("clip tiny@") and found["resize"] == (
        "bicubic, centre crop to 32 px"
    )
    assert not found["quotable"] and "n = 9 is below 2,049" in found["name"]
    for name in ("fd", "kid", "precision", "recall", "density", "coverage", "cmmd"):
        assert np.isfinite(found[name]), name
    assert found["fd_ci95_low"] <= found["fd"] <= found["fd_ci95_high"]
    assert (found["k_precision"], found["k_density"], found["kid_subset_size"]) == (3, 5, COUNT)
    assert found["digest"] != found["digest_real"]
    images = scores["images"]
    assert images["fd_clip"] == found["fd"] and images["judge_relation"] == SCORER_RELATIONS[None]
    assert scores["provenance"]["num_threads"] == 1


def test_a_rerun_computes_nothing_and_says_the_same(
    config: FidConfig, monkeypatch: pytest.MonkeyPatch
):
    before = evaluated(config)
    name = "eval.features.extractors.clip_features"
    monkeypatch.setattr(name, lambda *_: pytest.fail("computed"))
    assert evaluated(config) == before


def test_statistics_stand_for_either_side(config: FidConfig, tmp_path: Path):
    whole = evaluated(config, save_statistics=str(tmp_path / "statistics"))
    for real in (tmp_path / "statistics", tmp_path / "statistics" / "clip.npz"):
        found = evaluated(config, real=str(real))["features"]["clip"]
        assert found["fd"] == pytest.approx(whole["features"]["clip"]["fd"], rel=1e-12)
        assert found["digest_real"] == whole["features"]["clip"]["digest_real"]
        assert "kid" not in found and "precision" not in found and "fd_resamples" in found
    turned = evaluated(config, real=config.fake, fake=str(tmp_path / "statistics" / "clip.npz"))
    assert turned["features"]["clip"]["fd"] == pytest.approx(found["fd"], rel=1e-6)


def test_unlike_statistics_are_refused_naming_the_field(config: FidConfig, tmp_path: Path):
    evaluated(config, save_statistics=str(tmp_path / "statistics"))
    path = tmp_path / "statistics" / "clip.npz"
    with np.load(path) as file:
        parts = {name: file[name] for name in file.files}
    parts["about"] = np.array(str(parts["about"]).replace("tiny@", "tiny@other"))
    np.savez(path, **parts)
    with pytest.raises(ValueError, match="^extractor: found 'clip tiny@"):
        evaluated(config, real=str(path))
    (tmp_path / "w.pth").write_bytes(b"never read")
    with pytest.raises(ValueError, match="found statistics of clip, expected inception"):
        evaluated(
            config, real=str(path), fake=str(path), features=("inception",), clip="",
            inception_weights=str(tmp_path / "w.pth"), inception_sha256="0" * 64,
        )  # fmt: skip


def test_a_size_that_images_were_brought_to_is_named_in_clip_space_too(
    config: FidConfig, tmp_path: Path
):
    statistics = tmp_path / "statistics"
    small = evaluated(config, image_size=16, save_statistics=str(statistics))
    assert small["features"]["clip"]["resolution"] == "16 x 16 px, centre crop, bicubic to 16 px"
    with pytest.raises(ValueError, match="^resolution: found 'any' for"):
        evaluated(config, real=str(statistics))
    again = evaluated(config, real=str(statistics), image_size=16)
    assert again["features"]["clip"]["fd"] == pytest.approx(small["features"]["clip"]["fd"])


def test_a_scorer_compares_directions_whatever_its_name(config: FidConfig):
    plain, raw = evaluated(config), evaluated(config, clip="tiny:random+raw")
    assert raw["features"]["clip"]["extractor"] == plain["features"]["clip"]["extractor"]
    assert raw["features"]["clip"]["cmmd"] == plain["features"]["clip"]["cmmd"]


def test_a_url_is_refused_for_what_lies_in_folders(config: FidConfig):
    for changes in ({"out": "s3://bucket/eval.json"}, {"features_dir": "s3://bucket/features"}):
        with pytest.raises(ValueError, match="expected a local or a shared folder, no URL"):
            evaluated(config, **changes)
    with pytest.raises(ValueError, match="s3://bucket/real: found a URL"):
        evaluated(config, real="s3://bucket/real")


def test_the_installed_judge_is_the_headline_and_names_its_weights(config: FidConfig):
    scores = evaluated(config, features=("clip", "efficientnet_lite0"))
    found, images = scores["features"]["efficientnet_lite0"], scores["images"]
    assert found["extractor"] == "efficientnet_lite0@579344248a93 pooled, ImageNet"
    assert found["judge_relation"] == NETWORK_RELATIONS[False]
    assert images["fd"] == found["fd"] and images["features"] == found["extractor"]
    assert images["fd_clip"] == scores["features"]["clip"]["fd"] != images["fd"]
    for name in ("kid", "precision", "recall", "density", "coverage", "fd_ci95_low"):
        assert np.isfinite(found[name]), name
    tiles = {tile["name"]: tile for tile in headlines(scores)}
    assert tiles["Fréchet distance, EfficientNet-Lite0"]["scorer"] == NETWORK_RELATIONS[False]


@pytest.mark.slow
def test_random_weights_run_the_whole_path_under_their_own_name(
    config: FidConfig, tmp_path: Path, capsys: pytest.CaptureFixture
):
    weights, digest = write_inception(tmp_path / "w.pth")
    scores = evaluated(
        config, features=("inception", "inception_clean"), num_resamples=0, clip="",
        inception_weights=str(weights), inception_sha256=digest,
    )  # fmt: skip
    assert list(scores["features"]) == ["inception", "inception_clean"]
    for found in scores["features"].values():
        assert digest[:12] in found["extractor"] and "not the published weights" in found["name"]
        assert "FID" not in found["name"] and not found["quotable"] and found["fd"] > 0
        assert found["resolution"] == "24 x 24 px, as they are"
    assert scores["images"]["fd"] == scores["features"]["inception"]["fd"]
    assert "9 images are too few to quote an FID; it takes 2049" in capsys.readouterr().out
    other = photos(tmp_path / "larger", 2, size=32)
    with pytest.raises(ValueError, match="^resolution: found '24 x 24 px, as they are' for"):
        evaluated(
            config, real=other, features=("inception",), clip="", num_resamples=0,
            inception_weights=str(weights), inception_sha256=digest,
        )  # fmt: skip


def test_copies_of_training_images_are_found(config: FidConfig, tmp_path: Path):
    train = photos(tmp_path / "train", 3, count=20)
    Image.open(tmp_path / "train" / "007.png").save(tmp_path / "fake" / "004.png")
    found = evaluated(config, train=train)["memorisation"]
    first = found["nearest"][0]
    assert first["distance"] < 1e-6 and first["train"].endswith("007.png")
    assert first["fake"].endswith("004.png") and found["n_train"] == 20
    assert found["metric"] == "cosine distance" and 0 < found["share_closer"] < 1
    assert (tmp_path / "eval_features" / "neighbours.png").is_file()
    with pytest.raises(ValueError, match="--train: found the very images of --real"):
        evaluated(config, train=config.real)


# -- drawing and measuring in one job --------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_chain: Callable) -> Path:
    """A folder as a model is given: prior, base and up."""
    root = tmp_path_factory.mktemp("model")
    write_chain(root, load_clip("tiny:random"), 32)
    (root / "decoder").rename(root / "base")
    (root / "upsampler").rename(root / "up")
    return root


SAMPLING = {"prior_steps": 1, "decoder_steps": 1, "upsampler_steps": 1, "best_of": 1}


def test_captions_are_drawn_and_measured_in_one_job(
    config: FidConfig, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "captions.txt").write_text("\n".join(f"thing {i}" for i in range(COUNT)))
    (tmp_path / "sampling.json").write_text(json.dumps(SAMPLING))
    drawing = dataclasses.replace(
        config, model=str(model), captions=str(tmp_path / "captions.txt"), seed=5,
        sampling=str(tmp_path / "sampling.json"), fake=str(tmp_path / "drawn"),
    )  # fmt: skip
    scores = evaluated(drawing)
    assert scores["sampling"]["n"] == COUNT and scores["sampling"]["seed"] == 5
    images = scores["images"]
    assert images["judge_relation"] == SCORER_RELATIONS[True] and "clip_score_shuffled" in images
    of_captions = scores["sampling"]["captions_sha256"]
    assert images["captions_sha256"] == scores["features"]["clip"]["captions_sha256"] == of_captions
    settings = json.loads((tmp_path / "drawn" / "settings.json").read_text())
    assert settings["decoder_steps"] == 1 and settings["seed"] == 5
    assert evaluated(drawing) == scores
    assert f"sample: 0 images drawn, {COUNT} were there" in capsys.readouterr().out
    other = evaluated(drawing, scorer="ViT-S-32-alt:random")["images"]
    assert other["judge_relation"] == SCORER_RELATIONS[False] and "ViT-S-32-alt" in other["judge"]


def test_a_protocol_says_what_is_drawn_and_how_many_there_must_be(
    config: FidConfig, model: Path, tmp_path: Path
):
    from eval.protocol import FOLDER

    protocol = {**json.loads((FOLDER / "shapes.json").read_text()), "num_captions": 9}
    (tmp_path / "p.json").write_text(json.dumps(protocol))
    (tmp_path / "sampling.json").write_text(json.dumps(SAMPLING))
    drawing = dataclasses.replace(
        config, model=str(model), protocol=str(tmp_path / "p.json"),
        sampling=str(tmp_path / "sampling.json"), fake=str(tmp_path / "drawn"),
    )  # fmt: skip
    scores = evaluated(drawing)
    assert scores["protocol"]["n"] == 9 and scores["protocol"]["headline"] == "drawn"
    assert set(scores["shapes"]) == {"single", "seen", "held_out"}
    assert len({protocol["captions_sha256"] for protocol in scores["shapes"].values()}) == 3
    with pytest.raises(IncompleteError, match="found 5 images, expected 9"):
        few = dataclasses.replace(drawing, model="", sampling="", clip="tiny:random")
        evaluated(few, fake=photos(tmp_path / "few", 4, count=5))
    (tmp_path / "drawn" / "000003.png").unlink()
    with pytest.raises(IncompleteError, match="found 8 of 9 samples, without 000003.png"):
        evaluated(dataclasses.replace(drawing, model="", sampling=""))


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": "a.txt"}, "--captions: found it without --model"),
        ({"limit": 3}, "--limit: found it without anything to draw"),
        ({"sampling": "x.json"}, "--sampling: found it without anything to draw"),
        ({"protocol": "shapes", "limit": 3}, "--limit: found 3 with --protocol"),
        ({"num_threads": 0}, "--num-threads: found 0, expected 1 or more"),
        ({"protocol_data": "."}, "--protocol-data: found it without --protocol"),
        ({"model": "."}, "--model: found no finished run prior"),
        ({"num_resamples": 1}, "--num-resamples: found 1, expected 0, 2 or more"),
        ({"num_workers": -1}, "--num-workers: found -1"),
        ({"protocol": "coco"}, "--protocol: found 'coco', expected a JSON file or one of"),
        ({"real": "absent"}, "absent: found no such folder"),
        ({"real": "absent.npz"}, "absent.npz: found no statistics"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused(config: FidConfig, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        fid.main(dataclasses.replace(config, **changes))


def script(*arguments: object, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "eval" / "fid.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **more)


@pytest.mark.slow
def test_bad_images_are_one_line_and_exit_2(config: FidConfig, tmp_path: Path):
    picture = tmp_path / "fake" / "003.png"
    picture.write_bytes(picture.read_bytes()[:90])
    done = script(
        "--real", config.real, "--fake", config.fake, "--clip", "tiny:random",
        "--out", config.out, "--num-workers", "2",
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "003.png: found a picture that does not decode" in line
    assert not Path(config.out).exists()


@pytest.mark.slow
def test_missing_samples_exit_1(config: FidConfig, tmp_path: Path):
    lines = [json.dumps({"file": f"{i:03d}.png", "caption": "a"}) for i in range(COUNT + 1)]
    (tmp_path / "fake" / "samples.jsonl").write_text("\n".join(lines))
    (tmp_path / "fake" / "settings.json").write_text("{}")
    done = script("--real", config.real, "--fake", config.fake, "--clip", "tiny:random")
    assert done.returncode == 1 and "found 9 of 10 samples" in done.stderr
