"""Laws of the demo: what it serves, when it is incomplete, and what it does not do again."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import demo
from cluster.demo import DemoConfig, Stage
from cluster.demo_data import drawn_pairs
from cluster.timings import Timings
from ingest.shards import load_snapshot

NUM_TRAIN, NUM_TEST = 16, 2


def fail_to_write(*_: object) -> None:
    raise OSError("no space left on device")


def downloaded(run: Path) -> int:
    """Draw a few pairs and download them; returns the exit code."""
    pairs = drawn_pairs(run / "source", NUM_TRAIN, NUM_TEST, seed=0)
    sets = {name: found.read() for name, found in pairs.items()}
    return demo._download(run, sets, Timings(run / "timings.json"), None)


@pytest.fixture
def taken(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Return a function that takes a port for the rest of the test."""

    def take(port: int) -> None:
        other = socket.create_server(("127.0.0.1", port))
        request.addfinalizer(other.close)

    return take


def test_an_incomplete_download_ends_the_demo_with_1_and_a_rerun_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("ingest.shard_task.make_shard", fail_to_write)
        assert demo.main(DemoConfig(run=str(run), num_train=NUM_TRAIN, num_test=NUM_TEST)) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{run}: the download of train is incomplete; rerun the same command"
    assert downloaded(run) == 0
    assert load_snapshot(run / "data" / "train" / "images").num_samples == NUM_TRAIN


def test_a_whole_download_needs_its_old_port_no_more(
    tmp_path: Path, taken: Callable, capsys: pytest.CaptureFixture
):
    assert downloaded(tmp_path) == 0
    before = (tmp_path / "timings.json").read_bytes()
    taken(int((tmp_path / "source" / "port").read_text()))
    capsys.readouterr()
    assert downloaded(tmp_path) == 0
    assert capsys.readouterr().out.count("done already") == 2, "the shards are looked at again"
    assert (tmp_path / "timings.json").read_bytes() == before


def test_pending_rows_need_the_old_port(tmp_path: Path, taken: Callable):
    assert downloaded(tmp_path) == 0
    next((tmp_path / "data" / "test" / "images").glob("*.tar")).unlink()
    port = int((tmp_path / "source" / "port").read_text())
    taken(port)
    with pytest.raises(ValueError, match=f"port {port}: found it taken"):
        downloaded(tmp_path)


def test_an_output_is_made_anew_when_what_it_is_made_of_is_newer(tmp_path: Path):
    output, inputs = tmp_path / "scores.json", (tmp_path / "samples.jsonl", tmp_path / "final.json")
    stage = Stage(
        name="evaluate", script="", arguments=(), num_images=0, output=output, inputs=inputs
    )

    def write(path: Path, seconds: int) -> None:
        path.touch()
        os.utime(path, (seconds, seconds))

    for path in inputs:
        write(path, 100)
    assert not demo._is_current(stage), "there is none"
    for seconds, current in ((99, False), (100, False), (101, True)):
        write(output, seconds)
        assert demo._is_current(stage) == current, seconds
    write(inputs[1], 102)
    assert not demo._is_current(stage), "one input is newer"
