"""ZeRO and FSDP2 are the plain engine: same curve, same weights, checkpoints for any of them.

Ranks are processes of this file, without Ray, which the tests of distributed training have. Stage 3
keeps parameters whole below a size; here none, so that all are partitioned, or the smallest ones.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import rank_main, run_ranks
from _runs import SIX_STEPS, TOLERANCE, WHOLE, assert_same, killed_half_way, prior_run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.base.cli import with_options
from cluster.base.jsonl import read_lines
from cluster.base.run_dir import step_folder
from models.configs import DiffusionPriorConfig
from training.bucket.mirror import Mirror
from training.config import PriorRunConfig, TrainConfig
from training.engine import engines as zero
from training.engine.fsdp import FsdpEngine
from training.loop import Task
from training.runs.run_folder import prepare_run
from training.runs.worker import train_rank
from training.tasks.prior import build_prior

pytestmark = pytest.mark.slow





# name of a run: changes to SIX_STEPS, and the size up to which stage 3 keeps parameters whole
TWO: dict[str, tuple[dict, int]] = {
    "stage_0": ({"zero_stage": 0}, 0),
    "stage_1": ({"zero_stage": 1}, 0),
    "stage_2": ({"zero_stage": 2}, 0),
    "stage_3": ({"zero_stage": 3}, 0),
    "stage_3_small_whole": ({"zero_stage": 3}, 400),
    "stage_3_offloaded": ({"zero_stage": 3, "offload": "cpu"}, 0),
    "stage_2_offloaded": ({"zero_stage": 2, "offload": "cpu"}, 0),
    "fsdp2": ({"engine": "fsdp2"}, 0),
}
# stage, None for FSDP2; offload, ranks, precision
STAGES = [(0, "none"), (1, "none"), (2, "none"), (2, "cpu"), (3, "none"), (3, "cpu"),
          (None, "none")]  # fmt: skip
ENGINES: list[Any] = [(*stage, ranks, precision) for precision in ("fp32", "bf16")
                      for ranks in (1, 2) for stage in STAGES]  # fmt: skip


def engine_class(config: TrainConfig) -> Any:
    return FsdpEngine if config.workers.engine == "fsdp2" else zero.ZeroEngine


def config_of(root: Path, name: str, changes: dict) -> PriorRunConfig:
    model = DiffusionPriorConfig(width=16, depth=1, num_heads=2, checkpointing=True)
    return prior_run(root, root / name, with_options(SIX_STEPS, **changes), diffusion=model)


def build(config: PriorRunConfig) -> Task:
    """The loss of the last rank's first micro-batch of step 2 is infinite; a resumed run, which is
    past it, says so by its checkpoint.

    Two parameters more leave partitions with padding, and a rank with nothing; no layer's forward
    pass uses them, as with CLIP's temperature.
    """
    job, calls = build_prior(config), iter(range(1000))
    resumed = (Path(config.run) / "step_00000003").is_dir()
    bad_call = -1 if resumed else 2 * config.train.grad_accum_steps
    last = os.environ.get("RANK", "0") == str(max(0, config.train.workers.num_workers - 1))
    for name, size in (("five", 5), ("one", 1)):
        job.model.register_parameter(name, nn.Parameter(torch.ones(size)))

    def objective(model, batch):
        loss = job.objective(model, batch)["loss"] * model.five.square().mean() * model.one
        bad = next(calls) == bad_call and last
        return {"loss": loss * (torch.inf if bad else 1.0)}

    return dataclasses.replace(job, objective=objective)


# -- what a rank does ------------------------------------------------------------------------------


class Sometimes(nn.Module):
    """Two layers, of which every other micro-batch uses one alone; parameters of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes = nn.ModuleList([nn.Linear(5, 7)]), nn.Linear(7, 3)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        h = self.always[0](x)
        return self.sometimes(h) if both else h


def sometimes_loss(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """bad: "gradient": a finite loss whose gradient is not; "loss": the other way round."""
    x, both, bad = batch
    loss = model(x, both).square().mean()
    spoilt = {"": loss, "gradient": loss + (0 * loss).sqrt(), "loss": loss + torch.inf}
    return {"loss": spoilt[bad]}


def all_used_loss(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The same, for an oracle: what is not used has a gradient of zero all the same."""
    loss = sometimes_loss(model, batch)["loss"]
    return {"loss": loss + 0 * sum(p.sum() for p in model.parameters())}


def stepped(engine: zero.Engine) -> tuple[dict[str, Tensor], list[bool]]:
    """The parts of the parameters that a rank owns, after six steps of two micro-batches: one
    step's gradient is not finite, another's loss. And which steps moved something."""
    found, moved = {}, []
    for step in range(6):
        before = [f.master.clone() for f in engine.fragments()]
        for micro in range(2):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(2 * step + micro))
            both = (step % 2 == 0) == bool(micro)
            batch: Any = (x, both, {(2, 1): "gradient", (4, 0): "loss"}.get((step, micro), ""))
            engine.backward(engine.losses(batch)["loss"])
        assert math.isfinite(engine.step(1.0)) == (step not in (2, 4))
        after = [f.master for f in engine.fragments()]
        moved.append(not all(torch.equal(a, b) for a, b in zip(after, before, strict=True)))
    for fragment in engine.fragments():
        found[f"{fragment.name}/{fragment.offset}"] = fragment.master.clone()
    return found, moved


def engine_config(
    stage: int | None, offload: Any, num_workers: int, precision: Any
) -> TrainConfig:
    return with_options(
        SIX_STEPS, global_batch_size=2 * max(1, num_workers), micro_batch_size=1, zero_stage=stage,
        offload=offload, num_workers=num_workers, precision=precision,
        engine="fsdp2" if stage is None else None,
    )  # fmt: skip


def test_the_plain_engine_steps_along_a_gradient_of_zero_where_there_is_none():
    config = engine_config(0, "none", 0, "fp32")
    found, expected = (
        stepped(zero.PlainEngine(Sometimes(), loss, config, torch.device("cpu")))[0]
        for loss in (sometimes_loss, all_used_loss)
    )
    torch.testing.assert_close(found, expected)


def save_stepped(folder: Path) -> None:
    """Gradients that are not finite, and parameters that a step does not use."""
    for case in ENGINES:
        if case[2] != dist.get_world_size():
            continue
        config = engine_config(*case)
        engine: zero.Engine = engine_class(config)(
            Sometimes(), sometimes_loss, config, torch.device("cpu")
        )
        found, moved = stepped(engine)
        assert moved == [True, True, False, True, False, True], moved
        save_file(found, str(folder / stepped_name(case, engine.rank)))


def stepped_name(case: tuple, rank: int) -> str:
    return f"stepped_{'_'.join(map(str, case))}_{rank}.safetensors"


def save_gathered(root: Path, name: str) -> None:
    """Restore the last checkpoint of a run of stage 3 and save what its layers compute with."""
    import deepspeed

    from training.checkpoints.checkpointer import Checkpointer
    from training.engine.ema import Ema

    config = config_of(root, name, {"num_workers": 2, "zero_stage": 3})
    job = build(config)
    for parameter in job.model.parameters():
        nn.init.constant_(parameter, 7.0)
    engine = zero.ZeroEngine(job.model, job.objective, config.train, torch.device("cpu"))
    averages = Ema(engine.fragments(), 0.9, ())
    Checkpointer(Mirror(root / name), engine, averages, {}, config.train).restore(WHOLE)
    context: Any = deepspeed.zero.GatheredParameters(list(job.model.parameters()))
    with context:
        gathered = {n: p.detach().clone() for n, p in job.model.named_parameters()}
    if engine.rank == 0:
        save_file(gathered, str(root / f"gathered_{name}.safetensors"))


def act(root: Path, calls: list) -> None:
    """Do in this rank what the test asks for: runs by name, or one of the above."""
    rank = int(os.environ["RANK"])
    for kind, name, changes, whole_up_to in calls:
        zero.WHOLE_UP_TO = whole_up_to
        if kind == "train":
            config = config_of(root, name, changes)
            ranks = {"rank": rank, "world_size": dist.get_world_size()}
            train_rank(config, Mirror(Path(config.run)), build, engine_class(config.train), **ranks)
        elif kind == "gather":
            save_gathered(root, name)
        else:
            save_stepped(root)


def ranks(root: Path, world_size: int, calls: list) -> None:
    """Let `world_size` processes do `calls`, each the one after the other."""
    for kind, name, changes, _ in calls:
        if kind == "train":
            prepare_run(config_of(root, name, changes), str(root / name))
    run_ranks(__file__, root, world_size, calls)


# -- what must hold --------------------------------------------------------------------------------


def last(root: Path, name: str) -> Path:
    return step_folder(root / name, WHOLE)


def half_of(root: Path, name: str, copy: str) -> str:
    """Name a copy of a run as a kill before its second checkpoint would have left it."""
    return killed_half_way(root / name, root / copy).name


def lines(root: Path, name: str) -> list[dict]:
    return read_lines(root / name / "metrics.jsonl")



@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Path:
    """All the runs: whole ones of one and two ranks, then those that continue their first half."""
    root = write_data(tmp_path_factory.mktemp("zero"), num_shards=2, samples_per_shard=20)
    plain = config_of(root, "plain", {})
    mirror = Mirror(prepare_run(plain, plain.run))
    train_rank(plain, mirror, build, zero.PlainEngine, rank=0, world_size=1)
    two = [["train", name, {"num_workers": 2, **changes}, whole]
           for name, (changes, whole) in TWO.items()]  # fmt: skip
    gathers = [["gather", "stage_3", {}, 0], ["gather", "stage_3_small_whole", {}, 400]]
    ranks(root, 2, [*two, *gathers, ["step", "", {}, 0]])

    stages = {"one_of_stage_0": 0, "one_of_stage_1": 1, "one_of_stage_3": 3}
    one = [["train", half_of(root, "stage_3", name),
            {"num_workers": 1, "zero_stage": stage}, 0]
           for name, stage in stages.items()]  # fmt: skip
    alone = [["train", f"alone_{stage}", {"num_workers": 1, "zero_stage": stage}, 0]
             for stage in (1, 3)]  # fmt: skip
    ranks(root, 1, [*one, *alone, ["step", "", {}, 0]])

    again = [["train", half_of(root, name, f"{name}_again"), changes, whole]
             for _, name, changes, whole in two]  # fmt: skip
    back = [["train", half_of(root, name, f"two_of_{name}"),
             {"num_workers": 2, "zero_stage": 3}, 400]
            for name in ("plain", "alone_1", "stage_2_offloaded", "fsdp2")]  # fmt: skip
    back += [["train", half_of(root, name, f"fsdp2_of_{name}"),
              {"num_workers": 2, "engine": "fsdp2"}, 0]
             for name in ("plain", "stage_1", "stage_3")]  # fmt: skip
    down = [["train", half_of(root, name, f"stage_{stage}_of_{name}"),
             {"num_workers": 2, "zero_stage": stage}, 0]
            for name, stage in (("plain", 0), ("plain", 1), ("fsdp2", 1))]  # fmt: skip
    ranks(root, 2, [*again, *back, *down])

    # of four workers one is lost: 16 samples are 6, 5 and 5, in micro-batches of 3
    ranks(root, 3, [["train", half_of(root, "plain", f"three_of_plain_{name}"),
                     {"num_workers": 4, "min_workers": 2, **engine}, 0]
                    for name, engine in THREE.items()])  # fmt: skip

    # in one process, which another engine began
    plain = config_of(root, half_of(root, "fsdp2", "plain_of_fsdp2"), {})
    folder = prepare_run(plain, plain.run)
    train_rank(plain, Mirror(folder), build, zero.PlainEngine, rank=0, world_size=1)
    return root


THREE: dict[str, dict] = {"stage_1": {"zero_stage": 1}, "fsdp2": {"engine": "fsdp2"}}



ONE = ["one_of_stage_0", "one_of_stage_1", "one_of_stage_3", "alone_1", "alone_3"]
BACK = ["two_of_plain", "two_of_alone_1", "two_of_stage_2_offloaded", "two_of_fsdp2",
        "stage_0_of_plain", "stage_1_of_plain", "stage_1_of_fsdp2", "plain_of_fsdp2",
        "fsdp2_of_plain", "fsdp2_of_stage_1", "fsdp2_of_stage_3",
        *(f"three_of_plain_{name}" for name in THREE)]  # fmt: skip


@pytest.mark.parametrize("name", [*TWO, *ONE, *BACK])
def test_a_run_is_the_plain_engines(name: str, root: Path):
    """Curve, gradient norms, weights and averages, with a step that must be skipped; also where
    the second half has another stage, number of ranks or place of the state than the first."""
    found, expected = lines(root, name), lines(root, "plain")
    assert [line["nonfinite_steps"] for line in found] == [0, 0, 1, 1, 1, 1]
    for key in ("loss", "grad_norm"):
        mine, theirs = ([line.get(key, -1.0) for line in each] for each in (found, expected))
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    for file in ("model.safetensors", "ema.safetensors"):
        mine, theirs = (load_file(str(last(root, n) / file)) for n in (name, "plain"))
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, atol=TOLERANCE, rtol=1e-3)


@pytest.mark.parametrize("name", TWO)
def test_a_killed_run_continues_bit_for_bit(name: str, root: Path):
    """Weights, moments and averages of both ranks."""
    for rank in (0, 1):
        file = f"fragments/rank_{rank:04d}.safetensors"
        found, expected = (load_file(str(last(root, n) / file)) for n in (f"{name}_again", name))
        assert_same(found, expected)
    losses = [[line["loss"] for line in lines(root, n) if "loss" in line]
              for n in (f"{name}_again", name)]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", TWO)
def test_fragments_are_every_parameter_once(name: str, root: Path):
    """Also those with fewer elements than ranks, and none of the padding; each with its moments."""
    exported = load_file(str(last(root, name) / "model.safetensors"))
    parts: dict[str, dict[int, int]] = {}
    for path in (last(root, name) / "fragments").glob("*.safetensors"):
        for key, value in load_file(str(path)).items():
            parameter, _, offset = key.rpartition("/")
            assert int(offset) not in parts.setdefault(parameter, {}), key
            parts[parameter][int(offset)] = len(value)
    masters = {key.partition("/")[2] for key in parts if key.startswith("master/")}
    buffers = {key.partition("/")[2] for key in parts if key.startswith("buffer/")}
    assert masters == exported.keys() - buffers
    assert {"five", "one"} <= masters  # there is padding to leave out
    for key in masters:
        for section in ("master", "ema", "exp_avg", "exp_avg_sq"):
            end = 0
            for offset, length in sorted(parts[f"{section}/{key}"].items()):
                assert offset == end, f"{section}/{key}"
                end += length
            assert end == exported[key].numel(), f"{section}/{key}"


@pytest.mark.parametrize("name", ["stage_3", "stage_3_small_whole"])
def test_what_is_exported_is_what_layers_compute_with_after_a_restore(name: str, root: Path):
    gathered = load_file(str(root / f"gathered_{name}.safetensors"))
    exported = load_file(str(last(root, name) / "model.safetensors"))
    assert gathered.keys() <= exported.keys()
    assert [key for key, value in gathered.items() if not torch.equal(value, exported[key])] == []


@pytest.mark.parametrize("case", ENGINES, ids=str)
def test_dropped_gradients_and_unused_parameters_leave_nothing_behind(case: tuple, root: Path):
    """What moves after them is what moves in the plain engine, in fp32 and under autocast."""
    config = engine_config(0, "none", 0, case[3])
    plain = zero.PlainEngine(Sometimes(), all_used_loss, config, torch.device("cpu"))
    expected, moved = stepped(plain)
    assert moved == [True, True, False, True, False, True]
    parts: dict[str, Tensor] = {}
    for rank in range(case[2]):
        parts |= load_file(str(root / stepped_name(case, rank)))
    for key, value in expected.items():
        name = key.partition("/")[0]
        mine = sorted((int(k.partition("/")[2]), v) for k, v in parts.items()
                      if k.partition("/")[0] == name)  # fmt: skip
        found = torch.cat([part for _, part in mine])
        atol = 1e-5 if case[3] == "fp32" else 1e-4  # ranks send each other gradients in bf16
        torch.testing.assert_close(found, value, atol=atol, rtol=0)


if __name__ == "__main__":
    rank_main(act)
