"""What watches over a run: stops on demand, spikes of the loss, ranks that hang, its speed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _line import CONFIG, run, squared_error
from _records import newest_valid
from _runs import debug_prior, environment
from torch import Tensor, nn

from cluster.base.cli import with_options
from cluster.base.jsonl import read_lines
from cluster.base.run_dir import HEARTBEATS_FOLDER
from training.checkpoints.records import Progress
from training.data.dataloader import Batch
from training.loop import all_reduce_scores
from training.runs.events import SPIKE_MINIMUM, SpikeDetector, report_incident
from training.runs.follower import Follower, describe
from training.runs.profiling import peak_tflops, window
from training.runs.reporting import Reporter
from training.runs.signals import forget_stop, stop_wanted, stopping_on_sigterm
from training.runs.watchdog import Watchdog

# -- stopping --------------------------------------------------------------------------------------


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
    assert not stop_wanted(tmp_path, 0)
    (tmp_path / "stop").touch()
    assert stop_wanted(tmp_path, 0) and not stop_wanted(tmp_path, 1)


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
@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_sigterm_ends_a_training_script_with_a_checkpoint(
    num_workers: str, tmp_path: Path, write_data: Callable
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
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "SIGTERM: a checkpoint at the next step" in output
    assert "stopped on request, at a checkpoint; rerun the same command" in output
    found = newest_valid(tmp_path / "run")
    assert found is not None and found[1].step == read_lines(metrics)[-1]["step"]
    assert not (tmp_path / "run" / "stop").exists()


# -- spikes ----------------------------------------------------------------------------------------


def test_a_spike_is_reported_and_noise_is_not():
    rng = np.random.default_rng(0)
    detector = SpikeDetector(8.0)
    assert all(not detector.check(loss) for loss in rng.normal(1.0, 0.1, 500))
    assert "loss 3, over a median of" in detector.check(3.0)
    assert not detector.check(1.1), "a spike does not widen what is normal"
    assert detector.check(2.5)


def test_the_long_tail_of_a_small_batch_is_no_spike():
    """The mean of 2 losses that depend on a timestep as a diffusion's do, over three decades."""
    rng = np.random.default_rng(0)
    detector = SpikeDetector(CONFIG.faults.spike_deviations)
    losses = np.exp(rng.uniform(np.log(1e-3), 0, (3000, 2))).mean(1)
    assert all(not detector.check(loss) for loss in losses)
    assert detector.check(1e3)


def test_a_loss_of_nothing_is_no_error():
    detector = SpikeDetector(6.0)
    assert all(not detector.check(0.0) for _ in range(2 * SPIKE_MINIMUM))
    assert detector.check(1.0)


def test_no_spike_before_there_is_enough_to_judge_by_nor_without_a_limit():
    detector, never = SpikeDetector(8.0), SpikeDetector(0.0)
    for loss in [1.0 + 0.01 * (i % 3) for i in range(SPIKE_MINIMUM - 1)]:
        assert not detector.check(loss) and not never.check(loss)
    assert not detector.check(100.0) and not never.check(100.0)
    assert detector.check(100.0) and not never.check(100.0)


def test_incidents_are_reported_and_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture):
    report_incident(tmp_path, "spike", 3, "of an earlier attempt")
    with Follower(tmp_path, "prior"):
        report_incident(tmp_path, "spike", 7, "loss 9, over a median of 1")
    output = capsys.readouterr().out
    assert output.count("prior: spike at step 7: loss 9, over a median of 1") == 1
    assert "earlier" not in output


def test_a_spike_of_a_run_becomes_an_incident(tmp_path: Path):
    config = with_options(CONFIG, num_steps=SPIKE_MINIMUM + 4, learning_rate=0.0)
    calls = iter(range(1000))

    def spiking(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        factor = 1e3 if next(calls) == SPIKE_MINIMUM + 1 else 1.0
        return {"loss": factor * squared_error(model, batch)["loss"]}

    run(tmp_path, config, spiking)
    (line,) = read_lines(tmp_path / "incidents.jsonl")
    assert line["kind"] == "spike" and line["step"] == SPIKE_MINIMUM + 2


# -- hangs -----------------------------------------------------------------------------------------

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


# -- speed -----------------------------------------------------------------------------------------


def test_a_report_tells_the_time_left_and_the_use_of_the_device(tmp_path: Path):
    config = with_options(CONFIG, num_steps=4, report_every=2)
    reporter = Reporter(tmp_path, config, 0, peak_samples_per_second=1e6)
    for step in (1, 2):
        progress = Progress(step=step, samples_seen=step * config.batch.global_batch_size)
        reporter.step(progress, {"loss": torch.tensor(1.0)}, 1.0)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line["mfu"] == pytest.approx(line["samples_per_second"] / 1e6)
    left = 2 * config.batch.global_batch_size / line["samples_per_second"]
    assert line["eta_seconds"] == pytest.approx(left)
    assert describe({**line, "mfu": 0.415, "eta_seconds": 3 * 86400 + 7200.0}).endswith(
        "MFU 41.5%, waiting for data 0.0%, 3 d 2 h left"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(50.4, "50 s"), (125.0, "2 min"), (5000.0, "1 h 23 min")]
)
def test_times_are_written_as_people_do(seconds: float, text: str):
    line = {"step": 1, "num_steps": 2, "loss": 1.0, "samples_per_second": 3.0,
            "data_wait_ratio": 0.0, "eta_seconds": seconds}  # fmt: skip
    assert describe(line).endswith(f", {text} left")


def test_an_unknown_device_has_no_peak():
    assert peak_tflops(torch.device("cpu")) == 0.0



def test_a_window_of_steps_is_profiled(tmp_path: Path):
    run(tmp_path, with_options(CONFIG, profile="2:2"))
    trace = json.loads((tmp_path / "profile" / "rank_0000.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert names.count("Optimizer.step#Optimizer.step") == 2
    assert list(window("2:2")) == [2, 3] and list(window("")) == []
    for wrong in ("3", "a:b", "-1:2", "1:0"):
        with pytest.raises(ValueError, match='train.profile: found .*, expected "first:count"'):
            window(wrong)


def test_a_profile_that_reaches_past_the_end_is_written(tmp_path: Path):
    run(tmp_path, with_options(CONFIG, profile="6:5"))
    assert (tmp_path / "profile" / "rank_0000.json").is_file()


@pytest.mark.parametrize("theirs", [0.0, 1.0])
def test_one_ranks_wish_is_all_ranks_and_scores_are_means(
    theirs: float, monkeypatch: pytest.MonkeyPatch
):
    """The other rank brings a loss of 3, its wish to stop and word of its write to the sum, as a
    second process would: one that wants to stop stops all, and all wait for every write."""
    engine: Any = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    other = torch.tensor([3.0, theirs, theirs])
    monkeypatch.setattr("training.loop.dist.all_reduce", lambda packed: packed.add_(other))
    scores = {"loss": torch.tensor(1.0)}
    means, flags = all_reduce_scores(engine, scores, stop=False, written=True)
    assert means["loss"].item() == 2.0 and flags.tolist() == [bool(theirs), not theirs]
    _, flags = all_reduce_scores(engine, scores, stop=False, written=False)
    assert flags.tolist() == [bool(theirs), False]
