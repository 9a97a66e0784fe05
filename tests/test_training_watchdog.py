"""Ranks that hang are named and ended; what only takes long is waited for."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster.base.jsonl import read_lines
from cluster.base.run_dir import HEARTBEATS_FOLDER
from training.runs.watchdog import Watchdog

HANGING = """
import sys, time
from pathlib import Path
from training.runs.watchdog import Watchdog
run, rank, hangs = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with Watchdog(run, rank, 2, seconds=1.0) as watchdog:
    for step in range(40):
        watchdog.beat(step, "fetch")
        if hangs == "fetch" and step == 3:
            time.sleep(60)
        watchdog.beat(step, "forward")
        if hangs == "forward" and step == 3:
            time.sleep(60)
        if hangs == "validation" and step == 3:
            watchdog.beat(step, "validation")
            time.sleep(3)
            watchdog.beat(step, "fetch")
            time.sleep(0.5)
        if hangs == "waiting" and step == 3:
            time.sleep(3.5)
        time.sleep(0.02 if hangs != "slow" else 0.5)
print("done")
"""


def watched(folder: Path, *hangs: str) -> list[subprocess.Popen]:
    command = [sys.executable, "-c", HANGING, str(folder)]
    return [
        subprocess.Popen(
            [*command, str(rank), where], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent,
        )
        for rank, where in enumerate(hangs)
    ]  # fmt: skip


def await_heartbeat(folder: Path, rank: int) -> None:
    deadline = time.monotonic() + 60
    while not (folder / HEARTBEATS_FOLDER / f"rank_{rank:04d}.json").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_rank_that_hangs_ends_all_and_is_named(tmp_path: Path):
    """Rank 0 waits in a collective for rank 1, which never comes out of its storage."""
    waiting, hanging = watched(tmp_path, "forward", "fetch")
    for process in (waiting, hanging):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "hung: rank 1 (" in errors and "at step 3, in fetch for" in errors
        assert "rank 0" not in errors.split("\n")[0], "who waits is not to blame"
        assert 'File "<string>", line' in errors, "with where it stood"
    (line,) = read_lines(tmp_path / "incidents.jsonl")
    assert line["kind"] == "hang" and f"process {hanging.pid}" in line["message"]


def test_a_process_that_stands_still_is_named_by_its_peer(tmp_path: Path):
    waiting, frozen = watched(tmp_path, "forward", "slow")
    try:
        await_heartbeat(tmp_path, 1)
        frozen.send_signal(signal.SIGSTOP)
        _, errors = waiting.communicate(timeout=60)
        assert waiting.returncode == 1, errors
        first = errors.splitlines()[0]
        assert f"process {frozen.pid}" in first and f"process {waiting.pid}" not in first
    finally:
        frozen.kill()
        frozen.wait()
    assert len(read_lines(tmp_path / "incidents.jsonl")) == 1


def test_a_long_validation_is_waited_for(tmp_path: Path):
    """Who waits for it in a collective is not ended either, nor once the next step has begun."""
    for process in watched(tmp_path, "validation", "waiting"):
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and output == "done\n", errors


def test_a_suspended_machine_hangs_nobody(tmp_path: Path):
    """Ctrl-Z for longer than the limit, and on."""
    (process,) = watched(tmp_path, "slow")
    await_heartbeat(tmp_path, 0)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=2.0)
    process.kill()
    process.communicate()
    assert not (tmp_path / "incidents.jsonl").exists()


def test_without_a_limit_nothing_is_watched(tmp_path: Path):
    with Watchdog(tmp_path, 0, 1, 0.0) as watchdog:
        watchdog.beat(1, "fetch")
        assert not [t for t in threading.enumerate() if t.name == "watchdog"]
    assert not (tmp_path / HEARTBEATS_FOLDER).exists()
