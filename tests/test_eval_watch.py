"""Laws of the watch and the sweep: each checkpoint and each scale is scored once, whatever is
pruned, killed or written meanwhile."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.base.files import digest_file, try_lock
from cluster.base.jsonl import read_lines
from eval import sample_and_score, sweep, watch
from eval.html_report.page import write_report
from eval.sample_and_score import guide_of, run_command
from eval.sweep import SweepConfig
from eval.watch import RunWatchConfig
from models.convert.runs import load_clip
from models.weights import exported

ROOT = Path(__file__).parent.parent


def write_step(run: Path, step: int, kind: str = "decoder") -> Path:
    """Write what a checkpoint leaves for inference; state.json last."""
    folder = run / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (run / "config.yaml").write_text("train: {}\n")
    (folder / "config.json").write_text(json.dumps({"kind": kind}))
    (folder / "ema.safetensors").write_bytes(f"weights {step}".encode())
    (folder / "state.json").write_text(json.dumps({"step": step, "samples_seen": 8 * step}))
    return folder


def run_of(folder: Path, *steps: int) -> Path:
    run = folder / "base"
    for step in steps:
        write_step(run, step)
    return run


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The content of the weights that `sample_and_score` was called with, call by call."""
    contents: list[str] = []

    def fake(config: RunWatchConfig, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        step = exported(Path(config.decoder))
        contents.append((step / "ema.safetensors").read_text())
        (folder / "samples").mkdir()
        for name in ("000000.png", "grid.png"):
            (folder / "samples" / name).write_bytes(b"png")
        return {"images": {"clip_score": len(contents) / 10, "n": 4}}

    monkeypatch.setattr(watch, "sample_and_score", fake)
    monkeypatch.setattr("eval.sampling.chain.run_weights", weights_of_runs.get)
    return contents


weights_of_runs = {"runs/prior": "first", "runs/base": "first"}


def test_results_of_other_settings_are_deleted_and_own_flags_come_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commands: list[list[str]] = []

    def fake(command: list[str]) -> None:
        commands.append(command)
        (tmp_path / "samples").mkdir(exist_ok=True)
        (tmp_path / "eval.json").write_text("{}")

    monkeypatch.setattr(sample_and_score, "run_command", fake)
    config = SweepConfig(clip="tiny:random", sample_options="--cfg-scale 2")
    for limit, kept in ((4, False), (4, True), (8, False)):
        sample_and_score.sample_and_score(config, tmp_path, {"n": limit}, ["--cfg-scale", "3"])
        assert (tmp_path / "samples" / "mark").exists() is kept
        (tmp_path / "samples" / "mark").touch()
    assert commands[0][-4:] == ["--cfg-scale", "2", "--cfg-scale", "3"]  # the last one counts


def test_each_whole_checkpoint_is_scored_once(tmp_path: Path, scored: list):
    run = run_of(tmp_path, 2, 4)
    (run / "step_00000006").mkdir()  # still being written
    (run / "step_00000002.bak").mkdir()
    config = RunWatchConfig(run=str(run), once=True)
    assert watch.main(config) == 0
    lines = read_lines(run / "watch.jsonl")
    assert [(line["step"], line["samples_seen"]) for line in lines] == [(2, 16), (4, 32)]
    assert lines[0]["ema_sha256"] == digest_file(run / "step_00000002" / "ema.safetensors")
    assert lines[1]["scores"]["images"]["clip_score"] == 0.2
    assert scored == ["weights 2", "weights 4"]
    watch.main(config)
    assert len(scored) == 2
    left = sorted(path.name for path in (run / "watch" / "step_00000002").rglob("*"))
    # not the weights, and no image but the grid
    assert left == ["grid.png", "samples"]


def test_a_run_in_a_bucket_is_watched_from_any_machine(
    tmp_path: Path, scored: list, monkeypatch: pytest.MonkeyPatch
):
    import fsspec

    files, url = fsspec.filesystem("memory"), "memory://watched/run"
    files.put(str(run_of(tmp_path, 2, 4)), "/watched/run", recursive=True)
    for machine in ("first", "second"):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / machine))
        assert watch.main(RunWatchConfig(run=url, once=True)) == 0
    assert scored == ["weights 2", "weights 4"]
    lines = files.cat_file("/watched/run/watch.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    assert files.isfile("/watched/run/watch/step_00000004/samples/grid.png")
    with pytest.raises(ValueError, match="memory://watched/none: found no run"):
        watch.main(RunWatchConfig(run="memory://watched/none", once=True))


def test_a_checkpoint_that_is_pruned_while_another_is_scored_is_scored_still(
    tmp_path: Path, scored: list, monkeypatch: pytest.MonkeyPatch
):
    run = run_of(tmp_path, 2, 4)
    score = watch.sample_and_score

    def pruning(*arguments: Any) -> dict[str, Any]:
        for step in run.glob("step_*"):
            shutil.rmtree(step)
        return score(*arguments)

    monkeypatch.setattr(watch, "sample_and_score", pruning)
    watch.main(RunWatchConfig(run=str(run), once=True))
    assert scored == ["weights 2", "weights 4"]


def test_a_checkpoint_that_is_pruned_while_it_is_taken_is_left_and_said(
    tmp_path: Path, scored: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run = tmp_path / "base"
    gone, _ = write_step(run, 2), write_step(run, 4)
    link = os.link

    def racing(source: Path, target: Path) -> None:
        if source == gone / "ema.safetensors":
            shutil.rmtree(gone)
        link(source, target)

    monkeypatch.setattr(os, "link", racing)
    assert watch.main(RunWatchConfig(run=str(run), once=True)) == 0
    assert [line["step"] for line in read_lines(run / "watch.jsonl")] == [4]
    assert "step_00000002: pruned before it was taken" in capsys.readouterr().out
    assert not (run / "watch" / "step_00000002").exists()


def test_killed_between_two_checkpoints_it_goes_on_with_the_second(
    tmp_path: Path, scored: list, monkeypatch: pytest.MonkeyPatch
):
    run = run_of(tmp_path, 2, 4)
    score, config = watch.sample_and_score, RunWatchConfig(run=str(run), once=True)

    def dying(config: RunWatchConfig, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        if folder.name == "step_00000004":
            raise KeyboardInterrupt
        return score(config, folder, settings)

    with monkeypatch.context() as patch:
        patch.setattr(watch, "sample_and_score", dying)
        with pytest.raises(KeyboardInterrupt):
            watch.main(config)
    shutil.rmtree(run / "step_00000004")  # training goes on, and prunes
    watch.main(config)
    assert [line["step"] for line in read_lines(run / "watch.jsonl")] == [2, 4]
    assert scored == ["weights 2", "weights 4"]


@pytest.mark.parametrize("change", ["flag", "weights"])
def test_one_curve_holds_no_scores_of_other_settings(
    change: str, tmp_path: Path, scored: list, monkeypatch: pytest.MonkeyPatch
):
    run = run_of(tmp_path, 2)
    config = RunWatchConfig(run=str(run), once=True)
    watch.main(config)
    write_step(run, 4)
    other, before = config, (run / "watch.jsonl").read_text()
    if change == "flag":
        other = replace(config, limit=3)
        message = "limit: found 0 in the scores of step 2, expected 3"
    else:
        monkeypatch.setitem(weights_of_runs, "runs/prior", "second")
        message = "weights of prior: found 'first' in the scores of step 2, expected 'second'"
    with pytest.raises(ValueError, match=message):
        watch.main(other)
    assert (run / "watch.jsonl").read_text() == before
    if change == "flag":
        watch.main(config)
        assert [line["step"] for line in read_lines(run / "watch.jsonl")] == [2, 4]


def test_a_guide_is_found_among_options():
    assert guide_of("--cfg-scale 2 --guide runs/weak --seed 1") == "runs/weak"
    assert guide_of("--guide=a") == "a" and guide_of("--guidance-rescale 0.5") == ""


def test_it_follows_a_run_to_its_end(tmp_path: Path, scored: list, monkeypatch: pytest.MonkeyPatch):
    run = run_of(tmp_path, 2)
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        write_step(run, 2 + 2 * len(naps))
        if len(naps) == 2:
            (run / "final.json").write_text("{}")

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert watch.main(RunWatchConfig(run=str(run), poll_seconds=7)) == 0
    assert [line["step"] for line in read_lines(run / "watch.jsonl")] == [2, 4, 6]
    assert naps == [7, 7]


def test_a_run_takes_the_place_of_its_kind(tmp_path: Path):
    cascade = ("runs/other", "runs/up")
    config = RunWatchConfig(run="runs/up", prior="p", decoder="d", upsampler=cascade)
    view, weights = tmp_path / "view", tmp_path
    expected = {
        "decoder": replace(config, decoder=str(view)),
        "diffusion_prior": replace(config, prior=str(view)),
        "upsampler": replace(config, upsampler=("runs/other", str(view))),
    }
    for kind, wanted in expected.items():
        (weights / "config.json").write_text(json.dumps({"kind": kind}))
        assert watch.with_checkpoint(config, view, weights) == wanted
    with pytest.raises(ValueError, match="expected runs/lone in its place in the cascade"):
        (weights / "config.json").write_text('{"kind": "upsampler"}')
        watch.with_checkpoint(replace(config, run="runs/lone"), view, weights)
    with pytest.raises(ValueError, match=r"eval/clip\.py scores a CLIP"):
        (weights / "config.json").write_text('{"kind": "clip"}')
        watch.with_checkpoint(config, view, weights)


def test_two_watchers_of_one_run_are_refused(tmp_path: Path, scored: list):
    run = run_of(tmp_path, 2)
    (run / "watch").mkdir()
    with (run / "watch" / ".lock").open("w") as lock:
        assert try_lock(lock)
        with pytest.raises(ValueError, match="another process watches it"):
            watch.main(RunWatchConfig(run=str(run), once=True))
    with pytest.raises(ValueError, match="found no run, expected one with config.yaml"):
        watch.main(RunWatchConfig(run=str(tmp_path / "none"), once=True))
    assert scored == []


def test_a_script_s_error_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "wrong.py").write_text("import sys\nprint('error: a: found b', file=sys.stderr)\n"
                                       "sys.exit(int(sys.argv[1]))\n")  # fmt: skip
    monkeypatch.setattr(sample_and_score, "ROOT", tmp_path)
    run_command(["wrong.py", "0"])
    with pytest.raises(ValueError, match=r"wrong\.py: exit code 2: a: found b"):
        run_command(["wrong.py", "2"])
    with pytest.raises(OSError, match=r"wrong\.py: exit code 1: a: found b"):
        run_command(["wrong.py", "1"])


def test_a_scale_is_scored_again_only_where_something_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    weights = {"decoder_weights": {"sha256": "a"}}

    def fake(config: SweepConfig, folder: Path, settings: Any, more: list[str]) -> dict[str, Any]:
        asked.append(more[1])
        return {"images": {"clip_score": float(more[1]), "fd_clip": 1.0, "n": 4}}

    monkeypatch.setattr(sweep, "sample_and_score", fake)
    monkeypatch.setattr("eval.sampling.chain.chain_weights", lambda *_: weights)
    config = SweepConfig(run=str(tmp_path), scales=(1.0, 2.0))
    sweep.main(config)
    sweep.main(replace(config, scales=(1.0, 2.0, 4.0)))
    assert asked == ["1.0", "2.0", "4.0"]
    assert [line["cfg_scale"] for line in read_lines(tmp_path / "sweep.jsonl")] == [1, 2, 4]
    (tmp_path / "eval.json").write_text("{}")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "best 4 at 4" in page and "Scores over guidance" in page
    weights["decoder_weights"] = {"sha256": "b"}  # trained anew: the old curve must not be mixed in
    sweep.main(config)
    assert asked[3:] == ["1.0", "2.0"]
    assert [line["cfg_scale"] for line in read_lines(tmp_path / "sweep.jsonl")] == [1, 2]
    with pytest.raises(ValueError, match="expected different scales"):
        sweep.main(replace(config, scales=(1.0, 1.0)))


@pytest.mark.slow
def test_watch_and_sweep_with_the_real_scripts(
    tmp_path: Path, write_data: Callable[..., Path], write_chain: Callable[..., dict[str, Path]]
):
    data = write_data(tmp_path / "data", num_shards=1, samples_per_shard=6)
    chain = write_chain(tmp_path / "runs", load_clip("tiny:random"), 32)
    run = chain["decoder"]
    (run / "config.yaml").write_text("train: {}\n")
    (exported(run) / "state.json").write_text('{"step": 4, "samples_seen": 64}')
    images = str(data / "images")
    flags = [
        "--prior", str(chain["prior"]), "--captions", images, "--real", images, "--limit", "6",
        "--upsampler", str(chain["upsampler"]), "--sample-options",
        "--decoder-steps 2 --prior-steps 2 --upsampler-steps 1 --num-threads 1",
    ]  # fmt: skip
    command = [sys.executable, str(ROOT / "eval" / "watch.py"), "--run", str(run), "--once", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = read_lines(run / "watch.jsonl")
    assert line["step"] == 4 and line["scores"]["images"]["n"] == 6
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and "$ python" not in again.stdout  # nothing is left to do
    command[1] = str(ROOT / "eval" / "sweep.py")
    own = ["--run", str(tmp_path / "out"), "--decoder", str(run), "--scales", "1", "2"]
    done = subprocess.run([*command[:2], *own, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = read_lines(tmp_path / "out" / "sweep.jsonl")
    assert (first["cfg_scale"], second["cfg_scale"]) == (1, 2)
    assert first["scores"]["images"] != second["scores"]["images"]
    assert (tmp_path / "out" / "sweep" / "scale_2" / "samples" / "grid.png").is_file()
