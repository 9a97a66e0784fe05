"""Workers that come and go: the samples of a step stay, and a log and a timeline tell of it."""

import signal
import sys
from pathlib import Path

import pytest
import torch
from _line import CONFIG, NUM_SAMPLES, run, squared_error
from _recovery import recovery_after, trained_samples
from torch import Tensor, nn

from cluster.base.cli import with_options
from cluster.base.jsonl import read_lines
from cluster.base.run_dir import HEARTBEATS_FOLDER, SAMPLES_FOLDER, samples_path
from models.diffusion.keyed_random import sample_keys
from training.config import TrainConfig
from training.data.dataloader import Batch
from training.runs.events import (
    SampleLog,
    num_attempts,
    read_timeline,
    record_event,
    report_incident,
)
from training.runs.follower import Follower
from training.runs.ray_train import RAY_TIMES, interruptible, loss_callback, root_cause

# -- shares of a batch -----------------------------------------------------------------------------



def test_where_workers_divide_the_batch_nothing_is_added():
    for workers in (1, 2, 4):
        config = TrainConfig.of(global_batch_size=24, num_workers=workers, micro_batch_size=3)
        assert config.samples_a_worker(workers) * workers == 24
        assert config.micro_batches(workers) == config.grad_accum_steps


@pytest.mark.parametrize("fewest", [-1, 3])
def test_fewest_workers_are_at_most_all(fewest: int):
    with pytest.raises(ValueError, match=f"train.min_workers: found {fewest}, expected at least 0"):
        TrainConfig.of(num_workers=2, min_workers=fewest)


def test_a_contrast_of_all_samples_needs_them_at_once_with_the_fewest_workers_too():
    config = TrainConfig.of(global_batch_size=24, num_workers=2, micro_batch_size=12)
    assert config.most_micro_batches == 1
    assert with_options(config, min_workers=1).most_micro_batches == 2


# -- log of samples --------------------------------------------------------------------------------


def logged(path: Path, objective=squared_error, **changes) -> Path:
    run(path, with_options(CONFIG, log_samples=True, **changes), objective)
    return path


def keys_of(epoch: int) -> list[int]:
    index = torch.arange(NUM_SAMPLES)
    return sorted(sample_keys(CONFIG.seed, torch.full_like(index, epoch), index).tolist())


def test_every_sample_of_an_epoch_is_logged_once(tmp_path: Path):
    """Three steps of 4, 4 and 2 samples are an epoch."""
    steps = trained_samples(logged(tmp_path), 6)
    assert [len(step) for step in steps] == [4, 4, 2] * 2
    for epoch in (0, 1):
        mine = [key for step in steps[3 * epoch :][:3] for key in step]
        assert sorted(mine) == keys_of(epoch)


def test_what_is_trained_again_counts_once(tmp_path: Path):
    """An error in step 6, past the checkpoint of step 4, whose step 5 is lost and done again."""
    calls = iter(range(100))

    def failing_once(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if next(calls) == 5:
            raise ConnectionError("gone")
        return squared_error(model, batch)

    changes = {"checkpoint_every": 4, "async_checkpoints": False}
    with pytest.raises(ConnectionError):
        logged(tmp_path / "parts", failing_once, **changes)
    parts = logged(tmp_path / "parts", failing_once, **changes)
    lines = read_lines(samples_path(parts, 0))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 5, 6, 7]
    assert [line["attempt"] for line in lines] == [0] * 5 + [1] * 3
    assert trained_samples(parts, 7) == trained_samples(logged(tmp_path / "whole"), 7)
    restored = [line for line in read_timeline(parts) if line["event"] == "restored"]
    assert [(line["step"], line["attempt"]) for line in restored] == [(0, 0), (4, 1)]
    assert num_attempts(parts) == 2


def batch_of(keys: list[int], weights: list[float]) -> Batch:
    return Batch(
        keys=torch.tensor(keys), weight=torch.tensor(weights), num_real=len(keys), columns={}
    )


def test_a_step_of_which_a_rank_says_nothing_is_not_taken_for_whole(tmp_path: Path):
    first, second = (SampleLog(tmp_path, rank, num_workers=2, attempt=0) for rank in (0, 1))
    first.write(1, [batch_of([5, 4], [1, 1]), batch_of([9, 9], [1, 0])])
    with pytest.raises(ValueError, match="found the samples of 1 ranks at step 1, expected 2"):
        trained_samples(tmp_path, 1)
    second.write(1, [batch_of([7], [1])])
    assert trained_samples(tmp_path, 1) == [[4, 5, 7, 9]]
    with pytest.raises(ValueError, match="at step 2, expected 1"):
        trained_samples(tmp_path, 2)


def test_without_the_wish_nothing_is_logged(tmp_path: Path):
    run(tmp_path)
    assert not (tmp_path / SAMPLES_FOLDER).exists()


# -- timeline --------------------------------------------------------------------------------------


def timeline(*events: tuple[float, str]) -> list[dict]:
    return [{"event": event, "time": time} for time, event in events]


def test_a_recovery_is_split_at_what_the_run_has_noted():
    before = timeline((1, "launched"), (2, "placed"), (3, "restored"), (4, "stepped"))
    after = timeline((12, "lost"), (20, "placed"), (23, "restored"), (24.5, "stepped"))
    found = recovery_after([*before, *after], 10.0)
    assert found is not None
    parts = (found.detection, found.restart, found.restore, found.step)
    assert parts == (2, 8, 3, 1.5) and found.total == 14.5
    assert recovery_after([*before, *after[:-1]], 10.0) is None
    assert recovery_after(before, 10.0) is None


def test_an_attempt_that_is_lost_before_its_first_step_is_a_part_of_the_restart():
    lines = timeline((1, "lost"), (3, "placed"), (4, "lost"), (9, "placed"), (11, "restored"),
                 (12, "stepped"), (20, "lost"), (30, "placed"))  # fmt: skip
    found = recovery_after(lines, 0.0)
    assert found is not None
    assert (found.detection, found.restart, found.restore, found.step) == (1, 8, 2, 1)


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


# -- Ray -------------------------------------------------------------------------------------------


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
