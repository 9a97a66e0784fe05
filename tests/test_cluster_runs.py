"""What a folder of runs tells, and that removal takes nothing but runs of ours."""

import fcntl
import itertools
import json
import os
import pty
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from cluster.base.cli import to_yaml
from cluster.run_store import RunsFolder, printable
from cluster.runs import command
from training.config import ClipRunConfig, DecoderRunConfig, PriorRunConfig

HOSTILE = "\x1b[31m[bold]<b>\u202e\r\nlost[/bold]"
CONFIGS = {"clip": ClipRunConfig, "prior": PriorRunConfig, "decoder": DecoderRunConfig}


def write_run(path: Path, kind: str = "prior", step: int = 40, *, finished: bool = False) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(CONFIGS[kind]()))
    line = {"step": step, "num_steps": 100, "loss": 0.25, "nonfinite_steps": 0}
    half = '{"step": 41, "lo'
    (path / "metrics.jsonl").write_text(f"{json.dumps(line)}\n{half}")
    (path / "snapshot_embeds.txt").write_text("0123456789abcdef0123\n")
    folder = path / f"step_{step:08d}"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"step": step}))
    os.utime(folder / "state.json", (1, 1))
    (path / "step_00000099").mkdir()  # cut short: it has no state yet
    if finished:
        (path / "final.json").write_text(json.dumps({"step": folder.name}))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs" / "prior")
    write_run(tmp_path / "runs" / "base", "decoder", finished=True)
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "notes" / "config.yaml").write_text("colour: red\n")
    return tmp_path / "runs"


def shown_by(capsys: pytest.CaptureFixture, *argv: str) -> str:
    assert command(list(argv)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_scripts_run_is_recognised(kind: str, tmp_path: Path):
    write_run(tmp_path / "r", kind)
    assert RunsFolder(str(tmp_path)).read("r").kind.split()[0] == kind


def test_the_list_says_what_ran_on_what_how_far_and_how_good(runs: Path, capsys):
    (runs / "base" / "eval.json").write_text(json.dumps({"images": {"fd_clip": 0.1174}}))
    lines = shown_by(capsys, "list", "--runs", str(runs)).splitlines()
    assert " ".join(lines[0].split()) == "run what state step loss scores snapshot checkpoint"
    base = "base decoder base finished 40/100 0.25 images.fd_clip 0.1174 0123456789ab"
    assert " ".join(lines[1].split()).startswith(base) and "d ago" in lines[1]
    assert " ".join(lines[2].split()).startswith("prior prior diffusion stopped 40/100 0.25 0123")
    assert len(lines) == 3  # notes has a config.yaml, but not of ours


def test_a_held_lock_is_a_run_that_runs_and_an_error_one_that_failed(runs: Path):
    folder = RunsFolder(str(runs))
    with (runs / "prior" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert folder.read("prior").state == "running"
        with pytest.raises(ValueError, match="prior: found it running"):
            folder.remove("prior")
    assert folder.read("prior").state == "stopped"
    (runs / "prior" / "error_00000.txt").write_text("ValueError no room")
    assert folder.read("prior").state == "failed"
    assert folder.read("prior").error == "ValueError no room"


def test_a_demos_runs_are_listed_below_it_and_go_with_it(runs: Path, capsys):
    demo = runs / "demo"
    write_run(demo / "clip", "clip")
    (demo / "demo.json").write_text(json.dumps({"num_train": 8}))
    assert RunsFolder(str(runs)).names() == ["base", "demo/clip", "prior"]
    assert command(["rm", "demo/clip", "--yes", "--runs", str(runs)]) == 0
    assert not (demo / "clip").exists() and (demo / "demo.json").exists()
    assert command(["rm", "--yes", "demo", "--runs", str(runs)]) == 0
    assert not demo.exists()


def test_hostile_names_and_texts_are_printed_escaped(runs: Path, capsys):
    run = write_run(runs / HOSTILE.replace("/", "|"))
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"prior": HOSTILE}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "eval.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (run / "snapshot_embeds.txt").write_text(HOSTILE)
    (run / "validation.jsonl").write_text(json.dumps({"step": 1, HOSTILE: HOSTILE}) + "\n")
    (run / "error_00000.txt").write_text(HOSTILE)
    shown = shown_by(capsys, "list", "--runs", str(runs))
    shown += shown_by(capsys, "show", run.name, "--runs", str(runs))
    assert not set(shown) & set("\x1b\u202e\r") and "\\x1b[31m[bold]<b>\\u202e\\r\\nlost" in shown
    assert printable("\udcff") == "\\udcff"


@pytest.mark.parametrize(
    "text", ["", "[]", "train: [", "&a [*a]", "x" * (1 << 21), "\x00", "train:\n- " + "[" * 2000]
)
def test_a_config_of_anything_breaks_nothing(text: str, runs: Path, capsys):
    (runs / "prior" / "config.yaml").write_text(text)
    assert "base" in shown_by(capsys, "list", "--runs", str(runs))


def test_damaged_files_break_nothing(runs: Path, capsys):
    (runs / "prior" / "metrics.jsonl").write_text('{"step": {"a": 1}, "loss": "[red]"}\n' * 3)
    (runs / "prior" / "eval.json").write_text("[" * 100_000)
    (runs / "prior" / "validation.jsonl").write_bytes(b"\xff\xfe\x00{}\n")
    assert "prior" in shown_by(capsys, "list", "--runs", str(runs))
    assert "last loss: [red]" in shown_by(capsys, "show", "prior", "--runs", str(runs))


# -- removal ---------------------------------------------------------------------------------------


def test_removal_takes_the_run_and_nothing_that_it_links_to(runs: Path, tmp_path: Path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (runs / "prior" / "link").symlink_to(precious)
    (runs / "prior" / "step_00000099" / "link").symlink_to(precious / "file")
    assert command(["rm", "prior", "--yes", "--runs", str(runs)]) == 0
    assert not (runs / "prior").exists() and (precious / "file").read_text() == "kept"
    assert (runs / "base" / "final.json").is_file()


@pytest.mark.parametrize("name", ["../outside", "/outside", "base/../../outside", ".", "", "a//b"])
def test_no_name_leads_outside(name: str, runs: Path, tmp_path: Path):
    outside = write_run(tmp_path / "outside")
    for wanted in (name, name.replace("/outside", str(outside), 1) if name[:1] == "/" else name):
        with pytest.raises(ValueError, match="expected the name of a run"):
            command(["rm", wanted, "--yes", "--runs", str(runs)])
    assert (outside / "final.json").parent.is_dir() and (runs / "base").is_dir()


def test_no_link_leads_outside(runs: Path, tmp_path: Path):
    outside = write_run(tmp_path / "outside")
    (runs / "linked").symlink_to(outside)
    (runs / "deep").symlink_to(tmp_path)
    borrowed = runs / "borrowed"
    borrowed.mkdir()
    (borrowed / "config.yaml").symlink_to(outside / "config.yaml")
    assert RunsFolder(str(runs)).names() == ["base", "prior"]
    for name in ("linked", "deep/outside"):
        with pytest.raises(ValueError, match="found a link"):
            command(["rm", name, "--yes", "--runs", str(runs)])
    for name in ("borrowed", "notes"):
        with pytest.raises(ValueError, match=f"{name}: found no mark of ours"):
            command(["rm", name, "--yes", "--runs", str(runs)])
    assert (outside / "config.yaml").is_file() and borrowed.is_dir()


def test_one_stranger_among_the_names_and_nothing_goes(runs: Path):
    with pytest.raises(ValueError, match="notes: found no mark"):
        command(["rm", "prior", "notes", "--yes", "--runs", str(runs)])
    with pytest.raises(ValueError, match="lost: found no such run, expected one of base, prior"):
        command(["rm", "prior", "lost", "--yes", "--runs", str(runs)])
    assert (runs / "prior" / "config.yaml").is_file()


def test_a_removal_cut_short_can_be_repeated(runs: Path, monkeypatch: pytest.MonkeyPatch):
    """The mark goes last, so that what is left is still known as a run."""
    calls, rmtree = itertools.count(), shutil.rmtree

    def interrupted(path: str) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        RunsFolder(str(runs)).remove("prior")
    assert not (runs / "prior" / "step_00000040").exists()
    RunsFolder(str(runs)).remove("prior")
    assert not (runs / "prior").exists()


def test_removal_asks_and_refuses_where_nobody_can_answer(runs: Path, run_here, monkeypatch):
    words = ("cluster/runs.py", "rm", "prior", "--runs", str(runs))
    with open(os.devnull) as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        code, _, errors = run_here(*words)
    assert code == 2 and "no terminal" in errors and errors.count("\n") == 1
    for answer, expected in (("n\n", 1), ("\n", 1), ("y\n", 0)):
        assert (runs / "prior").exists()
        ours, theirs = pty.openpty()
        os.write(ours, answer.encode())
        with open(theirs) as terminal:
            monkeypatch.setattr(sys, "stdin", terminal)
            code, output, errors = run_here(*words)
        os.close(ours)
        assert code == expected and "prior" in output + errors
    assert not (runs / "prior").exists()


def test_runs_on_a_remote_storage_are_listed_and_removed(runs: Path, capsys):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(runs), "/bucket/runs", recursive=True)
    where = ("--runs", "memory://bucket/runs")
    shown = shown_by(capsys, "list", *where)
    assert "prior diffusion" in shown and "decoder base" in shown and "notes" not in shown
    assert "40/100" in shown_by(capsys, "show", "base", *where)
    with pytest.raises(ValueError, match="notes: found no mark"):
        command(["rm", "notes", "--yes", *where])
    with pytest.raises(ValueError, match="prior: found it running"):  # it wrote a moment ago
        command(["rm", "prior", "--yes", *where])
    assert command(["rm", "base", "--yes", *where]) == 0
    assert not memory.exists("/bucket/runs/base")
    assert memory.exists("/bucket/runs/notes/config.yaml")
