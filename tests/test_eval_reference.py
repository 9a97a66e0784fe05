"""Statistics on disk say what they are of, and unlike ones are not compared."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.distances.frechet import Moments
from eval.distances.reference import ABOUT, Statistics, load_statistics


@pytest.fixture
def known() -> Statistics:
    rng = np.random.default_rng(0)
    return Statistics(
        moments=Moments.of(rng.normal(size=(20, 4))), space="clip", extractor="clip tiny",
        resize="bicubic to 32 px", resolution="any", source="photos", digest="ab" * 32,
    )  # fmt: skip


def test_what_is_saved_is_read_back(known: Statistics, tmp_path: Path):
    path = known.save(tmp_path)
    found = load_statistics(path)
    assert path.name == "clip.npz" and found.moments.count == 20
    assert all(getattr(found, name) == getattr(known, name) for name in ABOUT)
    np.testing.assert_array_equal(found.moments.scatter, known.moments.scatter)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.npz"]


@pytest.mark.parametrize("field", ["space", "extractor", "resize", "resolution"])
def test_unlike_statistics_are_refused_by_the_field(known: Statistics, field: str):
    other = replace(known, **{field: "another"}, source="others")
    with pytest.raises(ValueError, match=f"^{field}: found .* for photos and 'another' for others"):
        known.require_alike(other)
    known.require_alike(replace(known, source="others", digest="cd" * 32))


def test_statistics_of_other_projects_are_refused(tmp_path: Path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match="extractor: found only mu, sigma, expected statistics"):
        load_statistics(tmp_path / "x.npz")


def altered(path: Path, **changes: Any) -> Path:
    with np.load(path) as file:
        parts = {name: file[name] for name in file.files}
    about = json.loads(str(parts["about"]))
    for name, value in changes.items():
        if name in parts:
            parts[name] = value
        else:
            about[name] = value
    parts["about"] = np.array(json.dumps(about))
    np.savez(path, **parts)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format: found 2, expected 1"),
        ({"digest": None}, "digest: found None, expected text"),
        ({"n": 1}, "n: found 1, expected 2 or more"),
        ({"mean": np.zeros(3)}, r"found \[3\] and \[4, 4\]"),
        ({"mean": np.zeros(4, np.float32)}, "mean: found float32, expected finite float64"),
        ({"scatter": np.full((4, 4), np.nan)}, "scatter: found float64, expected finite"),
    ],
)
def test_broken_statistics_are_refused(
    known: Statistics, tmp_path: Path, changes: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        load_statistics(altered(known.save(tmp_path), **changes))


def test_a_file_that_is_no_npz_is_refused(known: Statistics, tmp_path: Path):
    path = known.save(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="found no statistics"):
        load_statistics(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="found no statistics"):
        load_statistics(path)
    with pytest.raises(ValueError, match="found no statistics"):
        load_statistics(tmp_path / "absent.npz")


def test_a_pickle_in_it_is_never_loaded(tmp_path: Path):
    np.savez(tmp_path / "x.npz", about=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        load_statistics(tmp_path / "x.npz")
