"""The event log of a run: its samples, its timeline, the spikes of its loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
from _line import CONFIG, NUM_SAMPLES, run, squared_error
from _recovery import recovery_after, trained_samples
from torch import Tensor, nn

from cluster.base.cli import with_options
from cluster.base.jsonl import read_lines
from cluster.base.run_dir import SAMPLES_FOLDER, samples_path
from models.diffusion.keyed_random import sample_keys
from training.data.dataloader import Batch
from training.runs.events import (
    SPIKE_MINIMUM,
    SampleLog,
    SpikeDetector,
    num_attempts,
    read_timeline,
)

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


def test_a_spike_of_a_run_becomes_an_incident(tmp_path: Path):
    config = with_options(CONFIG, num_steps=SPIKE_MINIMUM + 4, learning_rate=0.0)
    calls = iter(range(1000))

    def spiking(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        factor = 1e3 if next(calls) == SPIKE_MINIMUM + 1 else 1.0
        return {"loss": factor * squared_error(model, batch)["loss"]}

    run(tmp_path, config, spiking)
    (line,) = read_lines(tmp_path / "incidents.jsonl")
    assert line["kind"] == "spike" and line["step"] == SPIKE_MINIMUM + 2
