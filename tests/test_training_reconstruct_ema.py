"""The command that makes an average of any width: on real runs, and on weights that wander."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _records import newest_valid
from _runs import HERE, assert_same, flip, forget_the_end, prior_run, tensors_of, truncate
from safetensors.torch import load_file

from cluster.base.cli import with_options
from cluster.base.run_dir import EMA_SNAPSHOTS_FOLDER, fragment_path, step_folder
from ingest.store.storage import storage_of
from models.configs import DiffusionPriorConfig
from models.convert.runs import load_model
from models.weights import load_config, save_config, save_weights
from training import reconstruct_ema as ema
from training.bucket.mirror import Mirror
from training.checkpoints.checkpointer import Checkpointer
from training.checkpoints.post_hoc_ema import reconstruct
from training.checkpoints.records import Progress
from training.config import TrainConfig
from training.engine.ema import Ema
from training.engine.engines import Fragment
from training.reconstruct_ema import EmaConfig
from training.runs.run_folder import prepare_run
from training.runs.worker import train_here
from training.tasks import prior as prior_job

NUM_STEPS, EVERY = 12, 3
TRAIN = TrainConfig.of(
    **HERE, num_steps=NUM_STEPS, checkpoint_every=6, keep_every=6, keep_checkpoints=1,
    global_batch_size=8, ema_decay=0.9, warmup=0.2, power_ema=(0.05, 0.1), snapshot_every=EVERY,
)  # fmt: skip


def train(data: Path, run: Path, settings: TrainConfig = TRAIN) -> Path:
    model = DiffusionPriorConfig(width=16, depth=1, num_heads=2, dropout=0.1)
    config = prior_run(data, run, settings, diffusion=model)
    train_here(config, Mirror(prepare_run(config, str(run))), prior_job.build_prior)
    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_shards=2, samples_per_shard=10)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return train(data, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))



# -- training keeps what the command needs ---------------------------------------------------------


def test_a_run_keeps_its_snapshots_and_every_sixth_checkpoint(finished: Path):
    steps = [int(path.name[5:]) for path in sorted((finished / EMA_SNAPSHOTS_FOLDER).iterdir())]
    assert steps == [3, 6, 9, 12]
    assert [int(path.name[5:]) for path in sorted(finished.glob("step_*"))] == [6, 12]


def test_the_last_step_is_a_snapshot_even_if_it_is_no_multiple(data: Path, tmp_path: Path):
    run = train(data, tmp_path / "run", with_options(TRAIN, num_steps=5))
    steps = [int(path.name[5:]) for path in sorted((run / EMA_SNAPSHOTS_FOLDER).iterdir())]
    assert steps == [3, 5]


@pytest.mark.parametrize("lost", [True, False])
def test_a_resumed_run_has_the_same_averages_and_snapshots(lost: bool, run: Path, data: Path):
    """2N steps are N steps resumed for N more, whether or not the later snapshots are there."""
    expected = tensors_of(run)
    forget_the_end(run)
    for step in (9, 12):
        folder = step_folder(run / EMA_SNAPSHOTS_FOLDER, step)
        if lost:
            shutil.rmtree(folder)
        else:  # as a kill leaves it: without the record that makes it count
            (folder / "fragments" / "rank_0000.json").unlink()
    found = newest_valid(run)
    assert found is not None and found[1].step == 6
    with nullcontext() if lost else pytest.warns(UserWarning, match="0 ranks, incomplete"):
        train(data, run)
    found = tensors_of(run)
    assert_same(found, expected)
    powers = [name for name in found if ": power_" in name]
    assert len(powers) > 0 and not torch.equal(
        found[powers[0]], found[powers[0].replace("power_0.05", "power_0.1")]
    )


def test_a_run_is_not_continued_with_other_averages(run: Path, data: Path):
    with pytest.raises(ValueError, match="train.power_ema: found .*0.05, 0.1.* expected"):
        train(data, run, with_options(TRAIN, power_ema=(0.05, 0.2)))


# -- the command -----------------------------------------------------------------------------------


def call(run: Path, **changes: Any) -> int:
    return ema.main(EmaConfig(run=str(run), **changes))


def test_the_command_writes_a_finished_run_of_that_width(run: Path, capsys: pytest.CaptureFixture):
    assert call(run, sigma_rel=0.08) == 0
    out = run.with_name("run_ema008")
    printed = capsys.readouterr().out
    assert "sigma_rel 0.08 at step 12 from 2 averages in 4 snapshots; fit error" in printed
    model, config = load_model(out, "diffusion_prior")
    result = config.pop("post_hoc_ema")
    assert result["sigma_rel"] == 0.08 and 0 < result["error"] < 0.1
    assert config == load_config(step_folder(run, 12))
    raw = load_file(str(step_folder(run, 12) / "model.safetensors"))
    state = model.state_dict()
    assert state.keys() == raw.keys() and all(t.isfinite().all() for t in state.values())
    assert any(not torch.equal(state[name], raw[name]) for name in raw)
    assert not out.with_name("run_ema008.part").exists()


def test_a_run_in_a_bucket_gives_the_same(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MINIDALLE2_CACHE", str(tmp_path / "cache"))
    url = "memory://test_training_reconstruct_ema/run"
    for path in filter(Path.is_file, run.rglob("*")):
        storage_of(url).put(path, path.relative_to(run).as_posix())
    outs = [tmp_path / "folder", tmp_path / "bucket"]
    for place, out in zip((str(run), url), outs, strict=True):
        assert ema.main(EmaConfig(run=place, sigma_rel=0.08, out=str(out))) == 0
    found, expected = (load_file(str(step_folder(out, 12) / "ema.safetensors")) for out in outs)
    assert_same(found, expected)
    with pytest.raises(ValueError, match=r"^--out: found memory://"):
        ema.main(EmaConfig(run=url, sigma_rel=0.08))


@pytest.mark.parametrize(("sigma_rel", "step"), [(0.05, 12), (0.1, 12), (0.1, 6)])
def test_a_stored_average_comes_back_as_it_was(
    sigma_rel: float, step: int, run: Path, tmp_path: Path
):
    call(run, sigma_rel=sigma_rel, step=step, out=str(tmp_path / "out"))
    found = load_file(str(step_folder(tmp_path / "out", step) / "ema.safetensors"))
    fragments = fragment_path(step_folder(run / EMA_SNAPSHOTS_FOLDER, step), 0)
    compared = 0
    for key, flat in load_file(str(fragments)).items():
        section, name, _ = key.split("/")
        if section == f"power_{sigma_rel}":
            torch.testing.assert_close(found[name].flatten(), flat, atol=1e-5, rtol=1e-5)
            compared += 1
    assert compared > 5
    buffers = load_file(str(step_folder(run, 12) / "ema.safetensors"))
    kept = buffers.keys() - {key.split("/")[1] for key in load_file(str(fragments))}
    assert kept and all(torch.equal(found[name], buffers[name]) for name in kept)


def test_a_command_killed_while_it_writes_is_run_again(run: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.checkpoints.post_hoc_ema.save_config", killed)
    with pytest.raises(KeyboardInterrupt):
        call(run)
    monkeypatch.undo()
    assert not run.with_name("run_ema01").exists()
    assert call(run) == 0
    load_model(run.with_name("run_ema01"), "diffusion_prior")



@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_broken_snapshot_is_refused_by_name(damage: Callable, run: Path):
    damage(step_folder(run / EMA_SNAPSHOTS_FOLDER, 6) / "fragments" / "rank_0000.safetensors")
    with pytest.raises(ValueError, match="ema_snapshots/step_00000006: found a broken snapshot"):
        call(run)
    assert not run.with_name("run_ema01").exists()


def test_what_cannot_be_had_is_refused(run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="--step: found 13, expected 1 to 12"):
        call(run, step=13)
    with pytest.raises(ValueError, match="sigma_rel: found 0.4, expected more than 0"):
        call(run, sigma_rel=0.4)
    with pytest.raises(ValueError, match="found a folder with files, expected none"):
        call(run, out=str(run))
    shutil.rmtree(run / EMA_SNAPSHOTS_FOLDER)
    with pytest.raises(ValueError, match="found no snapshots in ema_snapshots/, expected some"):
        call(run)
    (run / "final.json").unlink()
    with pytest.raises(ValueError, match="found an unfinished run"):
        call(run)


# -- weights that wander ---------------------------------------------------------------------------


def wander(run: Path, kept: float, num_steps: int = 400, skipped: int = 0) -> torch.Tensor:
    """A finished run whose weights took a random walk, 8 snapshots; returns the average of width
    `kept` that was kept directly."""
    fragment = Fragment(name="w", offset=0, master=torch.ones(300), state={})
    engine: Any = SimpleNamespace(
        rank=0, world_size=1, fragments=lambda: [fragment], model=torch.nn.Module(),
        optimizer=SimpleNamespace(num_steps=1),
    )  # fmt: skip
    stored = Ema([fragment], 0.9, (0.05, 0.1))
    config = TrainConfig.of(async_checkpoints=False)
    checkpoints = Checkpointer(Mirror(run), engine, stored, {}, config)
    third = Ema([fragment], 0.9, (kept,))
    draw = torch.Generator().manual_seed(0)
    for step in range(num_steps):
        nonfinite = min(step + 1, skipped)
        if step >= skipped:
            fragment.master.add_(torch.randn(300, generator=draw) / num_steps**0.5)
            stored.update(step, nonfinite)
            third.update(step, nonfinite)
        if (step + 1) % (num_steps // 8) == 0:
            progress = Progress(step=step + 1, nonfinite_steps=nonfinite)
            checkpoints.save_averages(progress)
    folder = step_folder(run, num_steps)
    folder.mkdir(parents=True)
    save_weights(folder / "ema.safetensors", {"w": torch.zeros(20, 15), "count": torch.arange(3)})
    save_config(folder, {"kind": "walk"})
    (run / "final.json").write_text(json.dumps({"step": folder.name}))
    return third.shadows[f"power_{kept}"][0]


@pytest.mark.parametrize("skipped", [0, 7])
@pytest.mark.parametrize(("kept", "bound"), [(0.07, 2e-3), (0.08, 2e-3), (0.15, 2e-3)])
def test_an_average_made_afterwards_is_the_one_kept_directly(
    kept: float, bound: float, skipped: int, tmp_path: Path
):
    """The bound is relative to the average's norm."""
    expected = wander(tmp_path / "run", kept, skipped=skipped)
    result = reconstruct(tmp_path / "run", kept, 0, tmp_path / "out")
    found = load_file(str(step_folder(tmp_path / "out", 400) / "ema.safetensors"))
    assert found["w"].shape == (20, 15) and torch.equal(found["count"], torch.arange(3))
    error = (found["w"].flatten() - expected).norm() / expected.norm()
    assert error < bound and result["error"] < 0.05
    for other in (0.05, 0.1):  # which the stored ones are not
        reconstruct(tmp_path / "run", other, 0, tmp_path / str(other))
        near = load_file(str(step_folder(tmp_path / str(other), 400) / "ema.safetensors"))
        assert (near["w"].flatten() - expected).norm() / expected.norm() > 3 * bound
