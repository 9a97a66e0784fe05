"""Laws of the loop, on a model small enough to know every answer: y = w x + b."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _line import CONFIG, NUM_SAMPLES, Line, Objective, network, run, squared_error
from torch import Tensor, nn

from cluster.base.cli import with_options
from cluster.base.jsonl import read_lines
from training.checkpoints.records import Progress
from training.config import TrainConfig
from training.data.dataloader import Batch
from training.engine.ema import Ema
from training.engine.engines import PlainEngine
from training.engine.optimizer import learning_rate_ratio
from training.loop import (
    MAX_NONFINITE_IN_A_ROW,
    Account,
    Flags,
    all_reduce_scores,
    seed_dropout,
)
from training.runs.profiling import window


@pytest.fixture(autouse=True, params=["at once", "a step late"])
def when_results_are_read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every law hold as on a CPU, and as on a GPU, whose results the host reads a step late."""
    if request.param == "a step late":
        monkeypatch.setattr("training.loop.QUEUED", ("cpu",))


def by_hand(config: TrainConfig) -> tuple[nn.Module, list[float], list[Tensor]]:
    """The same run without loop, engine or feed: returns model, losses and every step's weight."""
    from training.data.sampler import Plan

    model, losses, weights = network(), [], []
    batch_size, settings = config.batch.global_batch_size, config.optimizer
    plan = Plan(data_sets=((NUM_SAMPLES,),), global_batch_size=batch_size, seed=config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, settings.beta2), weight_decay=0.0, lr=1.0
    )
    for step in range(config.schedule.num_steps):
        part = plan.slice(step)
        points = Line().read(part.index[part.weight > 0])
        x, y = (torch.from_numpy(points[name]) for name in ("x", "y"))
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * learning_rate_ratio(config, step)
        optimizer.step()
        losses.append(loss.item())
        weights.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
    return model, losses, weights


def test_the_loop_is_gradient_descent_on_the_mean_over_real_samples(tmp_path: Path):
    """Padding of the ragged last batch changes neither the loss nor the step."""
    model, progress = run(tmp_path)
    expected, losses, _ = by_hand(CONFIG)
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    found = [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert found == pytest.approx(losses, rel=1e-4)
    assert progress == Progress(step=7, samples_seen=4 + 4 + 2 + 4 + 4 + 2 + 4)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_micro_batches_change_nothing(micro_batch_size: int, tmp_path: Path):
    whole, _ = run(tmp_path / "whole")
    parts, _ = run(
        tmp_path / "parts", with_options(CONFIG, micro_batch_size=micro_batch_size)
    )
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_the_average_is_the_one_computed_directly(tmp_path: Path):
    from safetensors.torch import load_file

    run(tmp_path)
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    expected = start.clone()
    for step, weights in enumerate(by_hand(CONFIG)[2]):
        decay = min(CONFIG.averages.ema_decay, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights
    ema = load_file(str(tmp_path / "step_00000007" / "ema.safetensors"))
    found = torch.cat([ema[name].flatten() for name in ("weight", "bias")])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_run_starts_from_its_seed_and_repeats_itself(tmp_path: Path):
    first, _ = run(tmp_path / "first")
    again, _ = run(tmp_path / "again")
    other, _ = run(tmp_path / "other", with_options(CONFIG, seed=1))
    assert torch.equal(first.get_parameter("weight"), again.get_parameter("weight"))
    assert not torch.equal(first.get_parameter("weight"), other.get_parameter("weight"))


# -- losses and gradients that are not finite ------------------------------------------------------


def spoilt(kind: str, *steps: int) -> Objective:
    """An objective whose loss, or whose gradient alone, is not finite at `steps`."""
    calls = iter(range(1000))

    def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        scores = squared_error(model, batch)
        if next(calls) not in steps:
            return scores
        if kind == "loss":
            return {"loss": scores["loss"] * torch.inf}
        weight = model.get_parameter("weight")
        return {"loss": scores["loss"] + (weight - weight.detach()).abs().sqrt().sum()}

    return objective


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing_and_is_counted(kind: str, tmp_path: Path):
    """Spoiling the last step leaves the weights and averages of the steps before it."""
    from safetensors.torch import load_file

    two = with_options(CONFIG, num_steps=3, decay="constant", warmup=0.0)
    one = with_options(two, num_steps=2)
    _, expected = run(tmp_path / "one", one)
    _, found = run(tmp_path / "two", two, spoilt(kind, 2))
    assert (found.nonfinite_steps, expected.nonfinite_steps) == (1, 0)
    for name in ("model.safetensors", "ema.safetensors"):
        a = load_file(str(tmp_path / "one" / "step_00000002" / name))
        b = load_file(str(tmp_path / "two" / "step_00000003" / name))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_training_goes_on_after_a_step_that_is_not_finite(kind: str, tmp_path: Path):
    model, progress = run(tmp_path, CONFIG, spoilt(kind, 2, 4))
    assert progress.nonfinite_steps == 2 and progress.step == 7
    assert all(p.isfinite().all() for p in model.parameters())
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert lines[-1]["nonfinite_steps"] == 2
    found = [line[name] for line in lines for name in ("loss", "grad_norm") if name in line]
    assert len(found) >= 4 and all(map(math.isfinite, found))


def test_power_averages_count_updates_through_skipped_steps_and_resumes(tmp_path: Path):
    from safetensors.torch import load_file

    from models.power_ema import gamma_of

    config = with_options(CONFIG, power_ema=(0.1,), snapshot_every=1, checkpoint_every=4)
    skipped, seen = (0, 2, 5), []

    def watched(first: int) -> Objective:
        inner = spoilt("loss", *(step - first for step in skipped))

        def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            seen.append(model.get_parameter("weight").detach().item())
            return inner(model, batch)

        return objective

    def found(step: int) -> dict[str, Tensor]:
        folder = tmp_path / f"step_{step:08d}" / "fragments"
        return load_file(str(folder / "rank_0000.safetensors"))

    model, progress = run(tmp_path, config, watched(0))
    assert (progress.updates, progress.nonfinite_steps) == (4, 3)
    weights = [*seen[1:], model.get_parameter("weight").item()]
    kept = [weights[step] for step in range(7) if step not in skipped]
    tau = np.arange(5) / 4
    expected = np.diff(tau ** (gamma_of(0.1) + 1)) @ np.array(kept)
    undisturbed = {name: tensor.clone() for name, tensor in found(7).items()}
    assert undisturbed["power_0.1/weight/0"].item() == pytest.approx(expected, abs=1e-6)
    snapshots = sorted((tmp_path / "ema_snapshots").iterdir())
    assert [int(path.name[5:]) for path in snapshots] == [2, 3, 4, 5, 6, 7]  # 1: no update yet
    shutil.rmtree(tmp_path / "step_00000007")
    run(tmp_path, config, watched(4))
    assert all(torch.equal(tensor, found(7)[name]) for name, tensor in undisturbed.items())


def test_a_date_is_a_seed_too():
    seed_dropout(20_261_123, step=100_000, rank=7)
    first = torch.rand(4)
    seed_dropout(20_261_123, step=100_001, rank=7)
    assert not torch.equal(first, torch.rand(4))


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_ten_steps_in_a_row_that_are_not_finite_end_the_run(kind: str, tmp_path: Path):
    config = with_options(CONFIG, num_steps=40)
    in_a_row = range(5, 5 + MAX_NONFINITE_IN_A_ROW)
    message = "not finite 10 steps in a row; start over with --fresh"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path / "ten", config, spoilt(kind, *in_a_row))
    _, progress = run(tmp_path / "nine", config, spoilt(kind, *in_a_row[1:]))
    assert progress.nonfinite_steps == MAX_NONFINITE_IN_A_ROW - 1
    assert not (tmp_path / "ten" / "final.json").exists()


def test_a_step_is_settled_before_the_next_one_moves_the_weights(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a GPU only once the gradient of the next step is in the queue, but for the last one."""
    events: list[str] = []

    def noted(name: str, function: Any) -> Any:
        return lambda *arguments: (events.append(name), function(*arguments))[1]

    for name in ("backward", "step"):
        monkeypatch.setattr(PlainEngine, name, noted(name, getattr(PlainEngine, name)))
    monkeypatch.setattr(Ema, "update", noted("average", Ema.update))
    run(tmp_path, with_options(CONFIG, num_steps=3))
    late = "a step late" in request.node.name
    once, twice = ["backward", "step", "average"], ["backward", "average", "step"]
    assert events == (["backward", "step", *twice, *twice, "average"] if late else once * 3)


@pytest.mark.parametrize("long", [True, False])
def test_a_long_step_is_reported_at_once(
    long: bool, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And its flags are read then: nobody waits two long steps for the end of a run."""
    monkeypatch.setattr("training.loop.LONG_STEP", 0.0 if long else math.inf)
    found: list[int] = []

    def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        found.append(len(read_lines(tmp_path / "metrics.jsonl")))
        return squared_error(model, batch)

    run(tmp_path, objective=objective)
    late = "a step late" in request.node.name and not long
    assert found == ([0, 0, 1, 2, 3, 4, 5] if late else [0, 1, 2, 3, 4, 5, 6])
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(1, 8))


def test_what_other_ranks_want_holds_from_the_step_in_which_it_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same for all of them: each adds its flags to the sum of the ranks, and reads the sum
    before its next optimizer step. A step that has been settled brings none."""
    monkeypatch.setattr("training.loop.QUEUED", ("cpu",))
    theirs = torch.zeros(4)
    monkeypatch.setattr("training.loop.dist.all_reduce", lambda packed: packed.add_(theirs))
    ema: Any = SimpleNamespace(update=lambda step, nonfinite: None)
    reporter: Any = SimpleNamespace(trained=lambda *_: None, step=lambda *_: None)
    engine: Any = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    account = Account(engine, ema, reporter, tmp_path, Progress())
    batches: Any = [SimpleNamespace(num_real=4)]

    def add() -> None:
        loss, norm = {"loss": torch.tensor(1.0)}, torch.tensor(2.0)
        account.add(batches, 1.0, loss, norm, stop=False, written=True)

    theirs[:] = torch.tensor([3.0, 1.0, 1.0, 1.0])  # loss; wants to stop; still writes; was slow
    add()
    assert account.flags == Flags() and not account.waits
    account.settle()
    assert account.flags == Flags(stop=True, slow=True) and account.waits
    account.settle()
    assert account.flags == Flags(slow=True) and account.progress.samples_seen == 4
    theirs[:] = 0.0
    add()
    account.settle()
    assert account.flags == Flags(written=True) and not account.waits


# -- reports and ends ------------------------------------------------------------------------------


def test_a_report_is_the_mean_since_the_last_one(tmp_path: Path):
    _, losses, _ = by_hand(CONFIG)
    run(tmp_path, with_options(CONFIG, report_every=3))
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 7]
    means = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
    assert [line["loss"] for line in lines] == pytest.approx(means, rel=1e-4)
    assert sum(line["reported_samples"] for line in lines) == lines[-1]["samples_seen"]
    expected = [learning_rate_ratio(CONFIG, step) for step in (2, 5, 6)]
    assert [line["learning_rate_ratio"] for line in lines] == expected


def test_every_line_has_the_gradients_norm_and_shares_between_0_and_1(tmp_path: Path):
    run(tmp_path)
    for line in read_lines(tmp_path / "metrics.jsonl"):
        assert line["grad_norm"] > 0 and 0 <= line["data_wait_ratio"] <= 1
        assert line["samples_per_second"] > 0 and line["num_steps"] == 7


def test_the_last_step_leaves_a_checkpoint_and_the_mark_of_the_end(tmp_path: Path):
    run(tmp_path, with_options(CONFIG, checkpoint_every=2, keep_checkpoints=2))
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000006", "step_00000007"]
    assert json.loads((tmp_path / "final.json").read_text()) == {"step": "step_00000007"}
    assert json.loads((tmp_path / "step_00000007" / "config.json").read_text()) == {"kind": "line"}


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
    other = torch.tensor([3.0, theirs, theirs, theirs])
    monkeypatch.setattr("training.loop.dist.all_reduce", lambda packed: packed.add_(other))
    scores = {"loss": torch.tensor(1.0)}
    found = all_reduce_scores(engine, scores, Flags(written=True))
    assert found.tolist() == [2.0, theirs, theirs, theirs]
    found = all_reduce_scores(engine, scores, Flags(stop=True))
    assert found.tolist() == [2.0, 1 + theirs, 1 + theirs, theirs]
