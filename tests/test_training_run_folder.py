"""The folder of a run: whose it is, what may change in it, and who may write to it."""

import dataclasses
import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _runs import debug_prior, done

from cluster import demo
from cluster.base.cli import JOB_VARIABLE, merged, read_yaml
from cluster.base.files import try_lock
from cluster.base.jsonl import read_lines
from cluster.base.run_dir import INCIDENTS_NAME, LAUNCH_LOCK, TRAIN_LOCK
from cluster.demo import DemoConfig
from models.configs import DiffusionPriorConfig
from training import convert
from training import reconstruct_ema as ema
from training.config import PriorRunConfig, TrainConfig
from training.convert import ConvertConfig
from training.loop import Task
from training.reconstruct_ema import EmaConfig
from training.runs.cards import DATA_CARD
from training.runs.run_folder import launch_lock, prepare_run, train_lock
from training.runs.worker import launch

CONFIG = PriorRunConfig(embeds=("/data/embeds",), diffusion=DiffusionPriorConfig(width=32))


def never_built(config: PriorRunConfig) -> Task:
    raise AssertionError("a model was built")


def test_a_run_explains_itself(tmp_path: Path):
    run = prepare_run(CONFIG, str(tmp_path / "a" / "run"))
    stored = merged(PriorRunConfig(), read_yaml(run / "config.yaml"), "config.yaml")
    assert stored == CONFIG and run.is_absolute()


def test_a_run_is_reopened_by_its_own_configuration(tmp_path: Path):
    run = prepare_run(CONFIG, str(tmp_path))
    (run / "metrics.jsonl").write_text("{}\n")
    moved = TrainConfig.of(num_workers=2, zero_stage=1, keep_checkpoints=5, checkpoint_every=7)
    assert prepare_run(dataclasses.replace(CONFIG, train=moved), str(tmp_path)) == run
    assert (run / "metrics.jsonl").is_file()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"embeds": ("/other",)}, "embeds: found .'/data/embeds'. in the run, expected .'/other'"),
        ({"diffusion": DiffusionPriorConfig(width=64)}, "diffusion.width: found 32 in the run, "
         "expected 64"),
        ({"train": TrainConfig.of(learning_rate=0.5)}, "train.learning_rate: found 0.001"),
        ({"train": TrainConfig.of(global_batch_size=128)}, "train.global_batch_size: found 64"),
        ({"train": TrainConfig.of(seed=1)}, "train.seed: found 0 in the run, expected 1"),
    ],
)  # fmt: skip
def test_another_configuration_is_refused_by_the_name_of_its_field(
    changes: dict, field: str, tmp_path: Path
):
    prepare_run(CONFIG, str(tmp_path))
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match=field) as caught:
        prepare_run(dataclasses.replace(CONFIG, **changes), str(tmp_path))
    assert "--fresh" in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "config.yaml").read_text() == before


def test_starting_over_deletes_a_run_of_ours(tmp_path: Path):
    run = prepare_run(CONFIG, str(tmp_path / "run"))
    (run / "step_00000001").mkdir()
    other = dataclasses.replace(CONFIG, embeds=("/data/other",), fresh=True)
    prepare_run(other, str(run))
    assert {path.name for path in run.iterdir()} == {"config.yaml", TRAIN_LOCK}


def test_starting_over_waits_for_a_worker_that_outlives_its_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("training.runs.run_folder.TRAIN_SECONDS", 0)
    run = prepare_run(CONFIG, str(tmp_path / "run"))
    (run / "step_00000001").mkdir()
    fresh = dataclasses.replace(CONFIG, fresh=True)
    with (run / TRAIN_LOCK).open("w") as file:
        assert try_lock(file)
        with pytest.raises(OSError, match="a worker of an earlier launch still trains here"):
            prepare_run(fresh, str(run))
        assert (run / "step_00000001").is_dir()
    prepare_run(fresh, str(run))
    assert not (run / "step_00000001").exists()


def test_a_runs_own_configuration_continues_it_also_where_it_began_fresh(tmp_path: Path):
    config = dataclasses.replace(CONFIG, fresh=True)
    run = prepare_run(config, str(tmp_path / "run"))
    (run / "step_00000001").mkdir()
    again = merged(PriorRunConfig(), read_yaml(run / "config.yaml"), "config.yaml")
    prepare_run(again, str(run))
    assert (run / "step_00000001").is_dir()


def test_a_run_older_than_an_option_goes_on_with_its_default(tmp_path: Path):
    run = prepare_run(CONFIG, str(tmp_path))
    text = (run / "config.yaml").read_text()
    assert "  compile: null\n" in text and "  qk_norm: true\n" in text
    (run / "config.yaml").write_text(text.replace("  qk_norm: true\n", "", 1))
    assert prepare_run(CONFIG, str(tmp_path)) == run
    other = dataclasses.replace(CONFIG.diffusion, qk_norm=False)
    (run / "config.yaml").write_text(text.replace("  qk_norm: true\n", "", 1))
    with pytest.raises(ValueError, match="qk_norm: found True in the run, expected False"):
        prepare_run(dataclasses.replace(CONFIG, diffusion=other), str(tmp_path))


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_is_not_ours_is_left_alone(fresh: bool, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="found a folder without config.yaml"):
        prepare_run(dataclasses.replace(CONFIG, fresh=fresh), str(tmp_path))
    with pytest.raises(ValueError, match="found a file .*thesis.tex, expected a folder"):
        prepare_run(dataclasses.replace(CONFIG, fresh=fresh), str(tmp_path / "thesis.tex"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_inside_a_ray_job_a_relative_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    with pytest.raises(ValueError, match="found the relative path runs/prior, expected an absolut"):
        prepare_run(CONFIG, "runs/prior")
    assert prepare_run(CONFIG, str(tmp_path / "run")) == tmp_path / "run"
    monkeypatch.delenv(JOB_VARIABLE)
    assert prepare_run(CONFIG, "runs/prior") == tmp_path / "runs" / "prior"


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = prepare_run(CONFIG, str(tmp_path))
    (run / "final.json").write_text('{"step": "step_00000001"}')
    (run / "step_00000001").mkdir()
    (run / "step_00000001" / DATA_CARD).write_text("as it was")

    assert launch(CONFIG, str(tmp_path), never_built, "prior") == 0
    assert "finished already; --fresh starts over" in capsys.readouterr().out
    assert (run / "step_00000001" / DATA_CARD).read_text() == "as it was"


def test_a_run_under_way_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither another launch nor --fresh touches it, and each is counted; once it has ended,
    --fresh clears it."""
    monkeypatch.setattr("training.runs.run_folder.LAUNCH_SECONDS", 0)
    prepare_run(CONFIG, str(tmp_path))
    (tmp_path / "step_00000001").mkdir()

    before = sorted(path.name for path in tmp_path.iterdir())
    with launch_lock(tmp_path):
        for fresh in (False, True):
            config = dataclasses.replace(CONFIG, fresh=fresh)
            with pytest.raises(ValueError, match="another process trains here"):
                launch(config, str(tmp_path), never_built, "prior")
    after = {path.name for path in tmp_path.iterdir()}
    assert sorted(after - {LAUNCH_LOCK, INCIDENTS_NAME}) == before
    kinds = [line["kind"] for line in read_lines(tmp_path / INCIDENTS_NAME)]
    assert kinds == ["refused", "refused"]
    prepare_run(dataclasses.replace(CONFIG, fresh=True), str(tmp_path))
    assert not (tmp_path / "step_00000001").exists()


def test_a_launch_waits_for_who_only_looks_at_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / LAUNCH_LOCK).touch()
    with (tmp_path / LAUNCH_LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as cluster/run_store.py asks who holds it
        waits = list[float]()

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            fcntl.flock(file, fcntl.LOCK_UN)

        monkeypatch.setattr("training.runs.run_folder.time.sleep", sleep)
        with launch_lock(tmp_path):
            assert len(waits) == 1
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_a_folder_of_somebody_else_gets_nothing(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("theirs: true")
    with pytest.raises(ValueError, match="expected a run or nothing"):
        launch(dataclasses.replace(CONFIG, fresh=True), str(tmp_path), never_built, "prior")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_where_no_url_can_be_no_folder_is_made_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It would be <here>/s3:/bucket/run, and in a Ray job go away with it."""
    monkeypatch.chdir(tmp_path)
    url = "s3://bucket/run"
    for start in (
        lambda: prepare_run(CONFIG, url),
        lambda: convert.main(ConvertConfig(diffusers="karlo", run=url)),
        lambda: ema.main(EmaConfig(run=url)),
        lambda: demo.main(DemoConfig(run=url)),
    ):
        with pytest.raises(ValueError, match=rf"--\w+: found {url}, expected a local or a shared"):
            start()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("start", [lambda: demo.main(DemoConfig()), lambda: ema.main(EmaConfig())])
def test_a_default_folder_is_refused_in_a_job(
    start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    with pytest.raises(ValueError, match="found the relative path runs/"):
        start()
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_train_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.runs.run_folder.TRAIN_SECONDS", 0)
    with (
        train_lock(tmp_path),
        pytest.raises(OSError, match="still trains here"),
        train_lock(tmp_path),
    ):
        raise AssertionError("both hold the lock")
    with (tmp_path / ".lock").open("w") as file:
        assert try_lock(file)


WITHOUT = """
import runpy, sys
sys.modules.update(ray=None, deepspeed=None)  # an import of either raises
script, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_one_process_trains_where_ray_and_deepspeed_are_not_installed(
    tmp_path: Path, write_data: Callable
):
    data = write_data(tmp_path, num_shards=1, samples_per_shard=16)
    python, *command = debug_prior(data, tmp_path / "run", 4)
    ended = done([python, "-c", WITHOUT, *command])
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (tmp_path / "run" / "final.json").is_file()


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_built(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: nothing to refuse")
    train = TrainConfig.of(num_workers=0, device="cuda", precision="fp32")
    config = dataclasses.replace(CONFIG, train=train)
    with pytest.raises(ValueError, match="train.device: found cuda without a GPU, expected cpu"):
        launch(config, str(tmp_path / "run"), never_built, "prior")


@pytest.mark.parametrize(
    ("script", "flags", "problem"),
    [
        ("clip", ("--model.vision", "convolutions", "--model.image-size", "24"), "vision: found"),
        ("prior", ("--diffusion.width", "33", "--diffusion.num-heads", "2"), "width: found 33"),
        ("decoder", ("--base.network", "dit", "--base.dit.num-heads", "5"), "width: found"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_there_is_a_run(
    script: str, flags: tuple[str, ...], problem: str, tmp_path: Path, write_data, run_here
):
    data, run = write_data(tmp_path, num_shards=1, samples_per_shard=4), tmp_path / "run"
    roots = [] if script == "clip" else ["--embeds", str(data / "embeds")]
    roots += [] if script == "prior" else ["--images", str(data / "images")]
    arguments = ("--preset", "debug", *roots, "--run", str(run), *flags)
    code, _, errors = run_here(f"training/{script}.py", *arguments)
    assert code == 2 and problem in errors and "Traceback" not in errors
    assert not run.exists()
