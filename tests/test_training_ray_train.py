"""What is reported of the workers that Ray Train loses; its time limits, and Ctrl-C."""

import signal
import sys
from pathlib import Path

import pytest

from cluster.base.jsonl import read_lines
from cluster.base.run_dir import HEARTBEATS_FOLDER
from training.runs.events import read_timeline
from training.runs.ray_train import RAY_TIMES, interruptible, loss_callback, root_cause


def test_what_is_lost_is_reported_in_one_line():
    """Ray wraps an actor's death in a failed health check, and that in an error of the group."""
    health, group = RuntimeError("A worker health check failed."), RuntimeError("of the group")
    health.__dict__["health_check_failure"] = ConnectionError("it died\n\nlast words")
    group.__dict__["worker_failures"] = {1: health}
    assert root_cause(group) == "ConnectionError: it died"
    assert len(root_cause(ValueError("word " * 1000))) <= 160


def test_rays_own_names_of_times_are_those_that_are_set():
    """A name that Ray does not know would be no setting at all."""
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    assert RAY_TIMES.keys() <= ENV_VARS_TO_PROPAGATE


def test_ctrl_c_is_an_interrupt_though_ray_train_takes_it_over_and_remains_one():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))  # as Ray Train's fit does
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with interruptible():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_loss_is_reported_and_a_heartbeat_cut_short_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    """What Ray's controller calls must not raise: it would end the training."""
    heartbeat = tmp_path / HEARTBEATS_FOLDER / "rank_0000.json"
    heartbeat.parent.mkdir()
    heartbeat.write_text('{"step": 7')
    losses, context = loss_callback(tmp_path), None
    losses.after_exception(context, {0: RuntimeError("its node is gone")})
    assert read_timeline(tmp_path)[-1]["message"] == "rank 0: RuntimeError: its node is gone"
    assert "lost, and not recorded" in capsys.readouterr().out
    heartbeat.write_text('{"step": 7}')
    losses.after_exception(context, {0: RuntimeError("its node is gone")})
    (incident,) = read_lines(tmp_path / "incidents.jsonl")
    assert (incident["kind"], incident["step"]) == ("lost", 7)
