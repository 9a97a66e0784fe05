"""What eval/sample.py refuses, and what it leaves of a folder then."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from eval import sample
from eval.sample import SampleConfig
from eval.sampling.image_source import open_images
from models.clip import load_clip

CAPTIONS = ("a red cube", "a blue cone")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_chain: Callable) -> SampleConfig:
    runs = write_chain(tmp_path_factory.mktemp("runs"), load_clip("tiny:random"), 32)
    return SampleConfig(
        prior=str(runs["prior"]), decoder=str(runs["decoder"]), upsampler=(str(runs["upsampler"]),),
        prompts=CAPTIONS, prior_steps=2, decoder_steps=2, upsampler_steps=2, precision="fp32",
    )  # fmt: skip


def drawn(config: SampleConfig, out: Path, **changes) -> int:
    """Sample into `out`; returns how many images lie there."""
    assert sample.main(dataclasses.replace(config, out=str(out), **changes)) == 0
    return len(open_images(str(out)))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"sampler": "ddin"}, "sampler: found 'ddin'"),
        ({"decoder_steps": 0}, "decoder_steps: found 0, expected 1 or more"),
        ({"seed": 10**20}, "seed: found 100000000000000000000, expected a number of 64 bits"),
        ({"best_of": 0}, "best_of: found 0, expected 1 or more"),
        ({"top_share": 5.0}, "top_share: found 5.0, expected more than 0"),
        ({"temperature": -1.0}, "temperature: found -1.0, expected 0 or more"),
        ({"cfg_scale": float("nan")}, "cfg_scale: found nan, expected a finite number"),
    ],
)
def test_a_wrong_option_leaves_the_folder_to_the_right_one(
    wrong: dict, told: str, config: SampleConfig, tmp_path: Path
):
    with pytest.raises(ValueError, match=told):
        drawn(config, tmp_path / "out", **wrong)
    assert drawn(config, tmp_path / "out") == len(CAPTIONS)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"batch_size": 0}, "--batch-size: found 0, expected 1 or more"),
        ({"limit": -1}, "--limit: found -1, expected 0 or more"),
        ({"num_threads": 0}, "--num-threads: found 0, expected 1 or more"),
        ({"guide": "runs/weak", "cfg_scale": 1.0}, "--guide: found runs/weak with --cfg-scale 1"),
        ({"upsampler": (), "upsampler_tile": 7}, "--upsampler-tile: found it without"),
    ],
)
def test_wrong_numbers_and_options_of_no_use_are_refused(
    wrong: dict, told: str, config: SampleConfig
):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(config, **wrong)


def test_only_a_folder_of_samples_is_deleted(config: SampleConfig, tmp_path: Path):
    """Other tools write a settings.json, too."""
    (tmp_path / "settings.json").write_text('{"editor.fontSize": 12}')
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(ValueError, match="expected samples or nothing"):
        drawn(config, tmp_path, fresh=True)
    assert (tmp_path / "thesis.txt").is_file()


def test_a_folder_that_was_left_before_its_first_image_is_taken_up(
    config: SampleConfig, tmp_path: Path
):
    (tmp_path / "settings.part").write_text('{"see')
    assert drawn(config, tmp_path) == len(CAPTIONS)
    left = [path.name for path in tmp_path.iterdir() if path.suffix == ".part"]
    assert not left
