"""Power-function averages in training: the recursion, checkpoints, snapshots and resumes."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _records import write_by_three_ranks

from cluster.base.run_dir import EMA_SNAPSHOTS_FOLDER, step_folder
from models.power_ema import gamma_of
from training.bucket.mirror import Mirror
from training.checkpoints import checkpointer
from training.checkpoints.checkpointer import Checkpointer
from training.checkpoints.records import FORMAT, FragmentReader, Progress, Record, valid_records
from training.config import TrainConfig
from training.engine.ema import EMA, Ema
from training.engine.engines import Fragment

SIGMAS = (0.05, 0.1)


def random_walk(num_steps: int, size: int = 7) -> torch.Tensor:
    """Weights [T, size] that wander from a start that is not zero."""
    steps = torch.randn(num_steps, size, generator=torch.Generator().manual_seed(0))
    return 1 + steps.cumsum(0) / num_steps**0.5


@pytest.mark.parametrize("sigma_rel", SIGMAS)
def test_the_average_is_the_weighted_sum_over_all_updates(sigma_rel: float):
    """Against the sum of w_tau theta_tau, w_tau the product of shares, in float64 loops."""
    walk = random_walk(60)
    fragment = Fragment(name="w", offset=0, master=torch.zeros(7), state={})
    averages = Ema([fragment], 0.9, (sigma_rel,))
    for t in range(1, 61):
        fragment.master.copy_(walk[t - 1])
        averages.update(t - 1, 0)
    exponent, expected = gamma_of(sigma_rel) + 1, torch.zeros(7, dtype=torch.float64)
    for tau in range(1, 61):
        share = 1 - (1 - 1 / tau) ** exponent
        for t in range(tau + 1, 61):
            share *= (1 - 1 / t) ** exponent
        expected += share * walk[tau - 1].double()
    (shadow,) = averages.shadows[f"power_{sigma_rel}"]
    torch.testing.assert_close(shadow.double(), expected, atol=1e-6, rtol=0)
    assert shadow.dtype == torch.float32



# -- ranks -----------------------------------------------------------------------------------------


def fake_engine(rank: int, world_size: int, whole: torch.Tensor) -> Any:
    """A rank that owns its share of parameter `w`, without a peer to wait for."""
    cuts = [len(whole) * r // world_size for r in range(world_size + 1)]
    mine = whole[cuts[rank] : cuts[rank + 1]].clone()
    fragment = Fragment(name="w", offset=cuts[rank], master=mine, state={})
    return SimpleNamespace(
        rank=rank, world_size=world_size, fragments=lambda: [fragment], sync_params=lambda: None,
        optimizer=SimpleNamespace(num_steps=3), shapes={"w": whole.shape},
        model=SimpleNamespace(named_buffers=lambda: []),
    )  # fmt: skip


def trained(engine: Any, num_steps: int = 3) -> Ema:
    """The averages of a rank whose weights took a walk."""
    walk, fragment = random_walk(num_steps), engine.fragments()[0]
    averages = Ema(engine.fragments(), 0.9, SIGMAS)
    for step in range(num_steps):
        fragment.master.copy_(walk[step][fragment.offset :][: len(fragment.master)])
        averages.update(step, 0)
    return averages


def write_by_two(run: Path) -> None:
    """A checkpoint and a snapshot of two ranks at step 3."""
    for rank in range(2):
        engine = fake_engine(rank, 2, torch.zeros(7))
        averages = trained(engine)
        record = Record(
            format=FORMAT, rank=rank, world_size=2, sha256="", optimizer_step=3,
            progress=asdict(Progress(step=3)),
        )  # fmt: skip
        for parent, tensors in (
            (run, checkpointer.checkpoint_tensors(engine, averages)),
            (run / EMA_SNAPSHOTS_FOLDER, checkpointer.checkpoint_tensors(engine, averages)),
        ):
            only = "power" if parent != run else ""
            named = {name: tensor for name, tensor in tensors if name.startswith(only)}
            checkpointer.write_fragments(step_folder(parent, 3), named, record, Mirror(parent))


def every_shadow(averages: Ema) -> list[torch.Tensor]:
    return [shadow for shadows in averages.by_fragment() for shadow in shadows.values()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_continues_the_averages_of_two(world_size: int, tmp_path: Path):
    write_by_two(tmp_path)
    for rank in range(world_size):
        engine = fake_engine(rank, world_size, torch.zeros(7))
        found = Ema(engine.fragments(), 0.9, SIGMAS)
        Checkpointer(Mirror(tmp_path), engine, found, {}, TrainConfig()).restore(3)
        expected = trained(fake_engine(rank, world_size, torch.zeros(7)))
        for a, b in zip(every_shadow(found), every_shadow(expected), strict=True):
            assert torch.equal(a, b)


def test_a_snapshot_of_two_ranks_holds_the_power_averages_and_nothing_else(tmp_path: Path):
    write_by_two(tmp_path)
    folder = step_folder(tmp_path / EMA_SNAPSHOTS_FOLDER, 3)
    found = valid_records(folder)
    assert found is not None and len(found) == 2
    stored = FragmentReader(folder, len(found))
    assert stored.sections() == {"power_0.05": {"w"}, "power_0.1": {"w"}}
    for section, (shadow,) in trained(fake_engine(0, 1, torch.zeros(7))).shadows.items():
        if section == EMA:
            continue
        whole = torch.empty(7)
        stored.read(f"{section}/w", 0, whole)
        assert torch.equal(whole, shadow)


@pytest.mark.parametrize("sigmas", [(), (0.05,), (0.05, 0.2), (0.05, 0.1, 0.2)])
def test_a_checkpoint_of_other_averages_is_refused(sigmas: tuple[float, ...], tmp_path: Path):
    """One that begins in the middle of a run would be of another profile than its name says."""
    write_by_two(tmp_path)
    engine = fake_engine(0, 1, torch.zeros(7))
    averages = Ema(engine.fragments(), 0.9, sigmas)
    with pytest.raises(ValueError, match="train.power_ema: found the averages ema, power_0.05, "):
        Checkpointer(Mirror(tmp_path), engine, averages, {}, TrainConfig()).restore(3)


# -- pruning and configuration ---------------------------------------------------------------------


def test_pruning_keeps_multiples_and_never_a_snapshot(tmp_path: Path):
    for step in (2, 3, 4, 5, 6, 7, 8):
        write_by_three_ranks(step_folder(tmp_path, step), torch.arange(10.0))
        step_folder(tmp_path / EMA_SNAPSHOTS_FOLDER, step).mkdir(parents=True)
    checkpointer.prune(Mirror(tmp_path), 1, step_folder(tmp_path, 7), keep_every=4)  # 8 is broken
    assert [int(p.name[5:]) for p in sorted(tmp_path.glob("step_*"))] == [4, 7]
    assert len(list((tmp_path / EMA_SNAPSHOTS_FOLDER).iterdir())) == 7
    checkpointer.prune(Mirror(tmp_path), 1, step_folder(tmp_path, 7))
    assert [int(p.name[5:]) for p in sorted(tmp_path.glob("step_*"))] == [7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snapshot_every": 5}, "train.snapshot_every: found 5 without.*expected 0 or widths"),
        ({"snapshot_every": -1}, "train.snapshot_every: found -1, expected at least 0"),
        ({"keep_every": -1}, "train.keep_every: found -1, expected at least 0"),
        ({"power_ema": (0.1, 0.1)}, "train.power_ema: found .*, expected different widths"),
        ({"power_ema": (0.1, 0.3)}, "train.power_ema: found 0.3, expected more than 0 and at most"),
        ({"power_ema": (0.0,)}, "train.power_ema: found 0.0, expected more than 0"),
    ],
)
def test_averages_that_cannot_be_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TrainConfig.of(**changes)
