"""A run that is asked to stop leaves a checkpoint, and continues."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _line import CONFIG, run, squared_error
from _records import newest_valid
from _runs import debug_prior, environment
from torch import Tensor, nn

from cluster.base.jsonl import read_lines
from training.data.dataloader import Batch
from training.runs import signals
from training.runs.signals import StopRequest, forget_stop, stopping_on_sigterm

TERMINATED = [
    "SIGTERM: a checkpoint at the next step",
    "stopped on request, at a checkpoint; rerun the same command",
]


@pytest.fixture
def always_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run look for the request at each step, however short."""
    monkeypatch.setattr(signals, "LOOK_EVERY", 0.0)


@pytest.mark.usefixtures("always_looks")
def test_a_run_that_is_stopped_leaves_a_checkpoint_and_goes_on_bit_for_bit(tmp_path: Path):
    whole, _ = run(tmp_path / "whole")
    calls = iter(range(100))

    def stopped_in_its_third_step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if next(calls) == 2:
            (tmp_path / "parts" / "stop").touch()
        return squared_error(model, batch)

    _, progress = run(tmp_path / "parts", objective=stopped_in_its_third_step)
    assert progress.step == 3 and not (tmp_path / "parts" / "final.json").exists()
    found = newest_valid(tmp_path / "parts")
    assert found is not None and found[1] == progress
    forget_stop(tmp_path / "parts")
    parts, progress = run(tmp_path / "parts")
    assert progress.step == CONFIG.schedule.num_steps
    assert torch.equal(whole.get_parameter("weight"), parts.get_parameter("weight"))


def test_only_the_first_rank_looks_for_the_wish(tmp_path: Path):
    first, second = (StopRequest(tmp_path, rank) for rank in (0, 1))
    assert not first.wanted()
    (tmp_path / "stop").touch()
    assert StopRequest(tmp_path, 0).wanted() and not second.wanted()
    assert not first.wanted()  # it has looked a moment ago


def test_the_first_sigterm_is_a_wish_and_the_second_is_not(tmp_path: Path):
    heard: list[int] = []

    def ours(number: int, frame: object) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGTERM, ours)
    try:
        with stopping_on_sigterm(tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            assert (tmp_path / "stop").is_file() and heard == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "number", "messages"),
    [
        ("0", signal.SIGTERM, TERMINATED),
        ("1", signal.SIGTERM, TERMINATED),
        ("1", signal.SIGINT, ["a checkpoint at the next step; Ctrl-C again ends at once"]),
    ],
)
def test_a_signal_ends_a_training_script_with_a_checkpoint(
    num_workers: str, number: int, messages: list[str], tmp_path: Path, write_data: Callable
):
    """The whole way, in one process and under Ray, which has a handler of its own: the script says
    so in a line, exits with 1, and leaves a checkpoint of its last step."""
    data = write_data(tmp_path, num_shards=1, samples_per_shard=16)
    more = ["--train.num-workers", num_workers, "--train.report-every", "1"]
    command = debug_prior(data, tmp_path / "run", 100_000, *more)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment()
    ) as process:
        deadline = time.monotonic() + 240
        while len(read_lines(metrics)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    for message in messages:
        assert message in output
    found = newest_valid(tmp_path / "run")
    assert found is not None and found[1].step == read_lines(metrics)[-1]["step"]
    # A run that is interrupted has no moment to forget the request: the next attempt does
    assert (tmp_path / "run" / "stop").exists() == (number == signal.SIGINT)
