"""More steps for a run: the former ones stay as they were, and the extension resumes exactly."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from _runs import assert_same, forget_the_end, prior_run, tensors_of

from cluster.base.cli import read_yaml
from training.config import PriorRunConfig, TrainConfig
from training.engine.optimizer import learning_rate_ratio
from training.runs import run_folder
from training.runs.worker import launch
from training.tasks.prior import build_prior

OPTIONS = {
    "num_workers": 0, "num_threads": 1, "global_batch_size": 4, "checkpoint_every": 2,
    "keep_checkpoints": 9, "report_every": 1, "precision": "fp32", "device": "cpu", "warmup": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> PriorRunConfig:
    """A finished run of 4 steps."""
    root = write_data(tmp_path_factory.mktemp("data"), num_shards=1, samples_per_shard=16)
    config = prior_run(root, root / "run", TrainConfig.of(**OPTIONS, num_steps=4))
    assert launch(config, config.run, build_prior, "prior") == 0
    return config


def with_steps(config: PriorRunConfig, run: Path, num_steps: int, **more: str) -> PriorRunConfig:
    train = TrainConfig.of(**OPTIONS, num_steps=num_steps, **more)
    return dataclasses.replace(config, run=str(run), train=train)


def trained(config: PriorRunConfig) -> None:
    assert launch(config, config.run, build_prior, "prior") == 0


@pytest.mark.parametrize("how", ["constant", "rewarm"])
def test_an_extended_run_keeps_its_steps_and_resumes_exactly(
    how: str, finished: PriorRunConfig, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run, again = (Path(shutil.copytree(finished.run, tmp_path / name)) for name in "ab")
    before = tensors_of(run / "step_00000004")
    trained(with_steps(finished, run, 8, extend=how))
    assert "extended from 4 to 8 steps, the learning rate" in capsys.readouterr().out
    assert_same(tensors_of(run / "step_00000004"), before)
    assert json.loads((run / "final.json").read_text()) == {"step": "step_00000008"}
    assert read_yaml(run / "config.yaml")["train"]["extended"] == [f"4:{how}"]

    trained(with_steps(finished, again, 8, extend=how))  # and, as if killed after step 6:
    forget_the_end(again)
    trained(with_steps(finished, again, 8, extend=how))
    assert_same(tensors_of(again / "step_00000008"), tensors_of(run / "step_00000008"))
    trained(with_steps(finished, again, 10, extend="rewarm"))
    assert read_yaml(again / "config.yaml")["train"]["extended"] == [f"4:{how}", "8:rewarm"]


def test_a_run_that_was_extended_before_its_end_is_that_of_one_extended_after_it(
    finished: PriorRunConfig, tmp_path: Path
):
    run, other = (Path(shutil.copytree(finished.run, tmp_path / name)) for name in "ab")
    forget_the_end(run)
    for folder in (run, other):
        trained(with_steps(finished, folder, 6))
    assert_same(tensors_of(run / "step_00000006"), tensors_of(other / "step_00000006"))


def test_a_crash_while_a_run_is_extended_leaves_no_end_and_the_same_command_goes_on(
    finished: PriorRunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "write_text", crash)
        trained(with_steps(finished, run, 6))
    assert not (run / "final.json").exists()
    trained(with_steps(finished, run, 6))
    assert json.loads((run / "final.json").read_text()) == {"step": "step_00000006"}


@pytest.mark.parametrize("options", [{"learning_rate": 0.5}, {"num_steps": 3}])
def test_what_changes_nothing_in_a_finished_run_is_said_to_change_nothing(
    options: dict, finished: PriorRunConfig
):
    train = TrainConfig.of(**{**OPTIONS, "num_steps": 4, **options})
    (name,) = options
    expected = f"train.{name}: found .* the run has finished, and another value changes nothing; "
    with pytest.raises(ValueError, match=expected) as caught:
        trained(dataclasses.replace(finished, train=train))
    assert "\n" not in str(caught.value) and (Path(finished.run) / "final.json").is_file()


def test_the_other_way_of_extending_is_refused_once_it_has_begun(
    finished: PriorRunConfig, tmp_path: Path
):
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))
    trained(with_steps(finished, run, 6))
    with pytest.raises(ValueError, match="train.extend: found 'rewarm' in the run, expected 'c"):
        trained(with_steps(finished, run, 6, extend="constant"))


def test_a_run_that_was_never_extended_goes_on_whatever_way_it_would_be(
    finished: PriorRunConfig, tmp_path: Path, capsys
):
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))
    trained(with_steps(finished, run, 4, extend="constant"))
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize("decay", ["cosine", "constant", "inverse_sqrt"])
def test_the_learning_rate_is_the_former_one_up_to_the_former_end(decay: str):
    def ratios(num_steps: int, *extended: str) -> list[float]:
        train = TrainConfig.of(num_steps=num_steps, warmup=0.2, decay=decay, extended=extended)
        return [learning_rate_ratio(train, step) for step in range(num_steps)]

    former = ratios(20)
    constant, rewarmed = ratios(40, "20:constant"), ratios(40, "20:rewarm")
    assert constant == former + former[-1:] * 20 and rewarmed == former * 2
    assert ratios(50, "20:constant", "40:rewarm") == constant + ratios(10)
    assert ratios(50, "20:rewarm", "40:constant") == rewarmed + rewarmed[-1:] * 10
