"""What a run says while it trains: its driver tells each report once, whatever the file goes
through."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
import torch
from _line import CONFIG
from _priors import prior_of

from cluster.base import metrics
from cluster.base.cli import with_options
from cluster.base.jsonl import NewLines, read_lines
from cluster.base.run_dir import METRICS_NAME
from training.checkpoints.records import Progress
from training.data.dataloader import Batch, as_batch
from training.runs.events import record_event, report_incident
from training.runs.follower import Follower, describe
from training.runs.reporting import Reporter
from training.tasks.prior import pack_captions


def line(step: int, **changes) -> dict:
    return {
        "step": step, "num_steps": 100, "samples_seen": 8 * step, "reported_samples": 80,
        "loss": 1 / step, "samples_per_second": 40.0, "data_wait_ratio": 0.125,
        "checkpoint_seconds": 0.0, "nonfinite_steps": 0, "learning_rate_ratio": 1.0, **changes,
    }  # fmt: skip


def write(run: Path, *lines: dict, rest: str = "") -> None:
    text = "".join(json.dumps(given) + "\n" for given in lines)
    (run / METRICS_NAME).write_text(text + rest)


def follow(run: Path, *lines: dict, model: str = "clip", rest: str = "") -> None:
    """Follow a run that writes `lines` meanwhile."""
    with Follower(run, model):
        write(run, *lines, rest=rest)


def test_only_what_a_file_has_got_since_is_new(tmp_path: Path):
    write(tmp_path, line(10), line(20))
    new = NewLines(tmp_path / METRICS_NAME)
    assert [one["step"] for one in new.read()] == [10, 20] and new.read() == []
    write(tmp_path, line(10), line(20), line(30), rest='{"step": 4')
    assert [one["step"] for one in new.read()] == [30]
    assert new.read() == [], "the line that is cut short waits"
    part = tmp_path / "part"
    part.write_text(json.dumps(line(10)) + "\n")
    part.replace(tmp_path / METRICS_NAME)  # a run that goes back to a checkpoint
    assert new.read() == []
    write(tmp_path, line(10), line(20))
    assert [one["step"] for one in new.read()] == [20]


@pytest.fixture(scope="module")
def port() -> int:
    found = metrics.serve(0)
    assert found
    return found


def served(port: int, series: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return float(re.findall(rf"^minidalle2_{re.escape(series)} (\S+)$", text, re.MULTILINE)[0])


def test_the_last_report_is_written_in_words(tmp_path: Path, capsys: pytest.CaptureFixture):
    follow(tmp_path, line(10), line(20))
    assert capsys.readouterr().out == (
        "clip: step 20/100, loss 0.0500, 40 samples/s, waiting for data 12.5%\n"
    )


def test_a_report_of_skipped_steps_alone_has_no_loss_to_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    skipped = line(30, nonfinite_steps=10)
    del skipped["loss"]
    follow(tmp_path, line(20), skipped)
    assert "step 30/100, no finite loss, 40 samples/s" in capsys.readouterr().out


def test_every_report_is_counted_once(tmp_path: Path, port: int):
    """Also by a driver that continues a run, which finds the lines that its predecessor wrote."""
    samples = 'train_samples_total{model="up256"}'
    skipped = 'train_nonfinite_steps_total{model="up256"}'
    before = served(port, samples), served(port, skipped)
    lines = [line(10, nonfinite_steps=1), line(20, nonfinite_steps=3)]
    follow(tmp_path, *lines, model="up256")
    assert served(port, samples) - before[0] == 160
    assert served(port, skipped) - before[1] == 3
    follow(tmp_path, *lines, line(30, nonfinite_steps=4), model="up256")
    assert served(port, samples) - before[0] == 240
    assert served(port, skipped) - before[1] == 4
    assert served(port, 'train_step{model="up256"}') == 30


def test_a_run_that_went_back_to_a_checkpoint_is_followed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    write(tmp_path, line(10), line(20), line(30))
    follow(tmp_path, line(10))
    assert capsys.readouterr().out == ""
    follow(tmp_path, line(10), line(20))
    assert capsys.readouterr().out.startswith("clip: step 20/100")


def test_a_line_cut_short_is_not_read(tmp_path: Path):
    write(tmp_path, line(10), rest='{"step": 2')
    assert [found["step"] for found in read_lines(tmp_path / METRICS_NAME)] == [10]
    assert read_lines(tmp_path / "none") == []


def test_the_driver_tells_where_a_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture):
    record_event(tmp_path, "restored", attempt=0, step=0, num_workers=2)
    with Follower(tmp_path, "prior"):
        report_incident(tmp_path, "lost", 7, "rank 1: ActorDiedError: it died")
        record_event(tmp_path, "restored", attempt=1, step=5, num_workers=1)
        record_event(tmp_path, "restored", attempt=2, step=6, num_workers=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "prior: lost at step 7: rank 1: ActorDiedError: it died",
        "prior: continues from step 5 with 1 worker",
        "prior: continues from step 6 with 2 workers",
    ]


def test_incidents_are_reported_and_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture):
    report_incident(tmp_path, "spike", 3, "of an earlier attempt")
    with Follower(tmp_path, "prior"):
        report_incident(tmp_path, "spike", 7, "loss 9, over a median of 1")
    output = capsys.readouterr().out
    assert output.count("prior: spike at step 7: loss 9, over a median of 1") == 1
    assert "earlier" not in output


def captioned(lengths: list[int]) -> Batch:
    count = torch.tensor(lengths)
    tokens = (torch.arange(77) < count[:, None]).int().numpy()
    batch = as_batch({"tokens": tokens}, torch.arange(len(lengths)))
    return pack_captions(prior_of("autoregressive").pack, False, batch)


def test_a_report_tells_the_time_left_and_the_use_of_the_device(tmp_path: Path):
    config = with_options(CONFIG, num_steps=4, report_every=2)
    reporter = Reporter(tmp_path, config, 0, flops=lambda num_tokens: 100 + num_tokens, peak=1e9)
    for step in (1, 2):
        progress = Progress(step=step, samples_seen=step * config.batch.global_batch_size)
        reporter.trained(progress, [captioned([3, 9, 5 * step])])
        reporter.step(progress, {"loss": 1.0}, 1.0)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    mean = (3 + 9 + 5 + 3 + 9 + 10) / 6  # of the captions' real tokens
    assert line["mfu"] == pytest.approx(line["samples_per_second"] * (100 + mean) / 1e9)
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
