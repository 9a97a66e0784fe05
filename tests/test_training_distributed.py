"""Two workers under Ray and DeepSpeed are one process: same curve, same weights, same checkpoints.

The oracle is the plain engine, which the other tests pin to formulas. Dropout is off: its masks
belong to a rank.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.base.cli import with_options
from cluster.base.jsonl import read_lines
from models.configs import ClipConfig, DiffusionPriorConfig
from training.config import ClipRunConfig, PriorRunConfig, RunConfig, TrainConfig
from training.loop import Task
from training.runs.events import read_timeline
from training.runs.worker import launch
from training.tasks.clip import build_clip_task
from training.tasks.prior import build_prior

pytestmark = pytest.mark.slow

HALF, WHOLE = 3, 6
PLAIN = TrainConfig.of(
    num_steps=WHOLE, checkpoint_every=HALF, global_batch_size=16, micro_batch_size=4,
    num_workers=0, num_threads=1, precision="fp32", report_every=1, ema_decay=0.9,
    learning_rate=3e-3, grad_clip=0.5, weight_decay=0.1, max_failures=1,
)  # fmt: skip
TOLERANCE = 5e-5  # of weights that moved by about 1e-2; a step of Adam is 3e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Iterator[Path]:
    """Two shards of drawn images and their embeddings; one private Ray for the whole module."""
    import ray
    import ray.cloudpickle

    from cluster.base.ray_session import ensure_ray

    root = write_data(tmp_path_factory.mktemp("data"), num_shards=2, samples_per_shard=20)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    ensure_ray()
    yield root
    ray.shutdown()


def prior(data: Path, run: Path, **changes) -> PriorRunConfig:
    train = with_options(PLAIN, **changes)
    model = DiffusionPriorConfig(width=16, depth=1, num_heads=2)
    return PriorRunConfig(
        embeds=(str(data / "embeds"),), run=str(run), diffusion=model, train=train
    )


def trained(config: PriorRunConfig | ClipRunConfig, build: Callable) -> Path:
    assert launch(config, config.run, build, "prior") == 0
    return Path(config.run)


def two(stage: int) -> dict:
    return {"num_workers": 2, "zero_stage": stage}


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_close(found: Path, expected: Path, but: str = "none") -> None:
    """Curves, gradient norms, weights and averages agree as far as the order of sums allows.

    but: how the names of parameters end that are left out.
    """
    for name in ("loss", "grad_norm"):
        curves = [
            torch.tensor([line.get(name, torch.nan) for line in lines(run)])
            for run in (found, expected)
        ]
        torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-5, equal_nan=True)
    for file in ("model.safetensors", "ema.safetensors"):
        mine, theirs = (load_file(str(run / last(run) / file)) for run in (found, expected))
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            if name.endswith(but):
                continue
            torch.testing.assert_close(
                mine[name], tensor, atol=TOLERANCE, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )


def last(run: Path) -> str:
    return json.loads((run / "final.json").read_text())["step"]


def fragments(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, by rank: weights, moments and averages."""
    found = {}
    for path in sorted((run / last(run) / "fragments").glob("*.safetensors")):
        found.update({f"{path.stem} {k}": v.clone() for k, v in load_file(str(path)).items()})
    return found


def killed_half_way(run: Path, copy: Path) -> Path:
    """A copy of `run` as a kill before its second checkpoint would have left it."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("_ray"))
    shutil.rmtree(copy / last(copy))
    (copy / "final.json").unlink()
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(run), str(copy)))
    return copy


# -- one curve -------------------------------------------------------------------------------------


def build_with_a_bad_micro_batch(config: PriorRunConfig) -> Task:
    """The loss of one rank's first micro-batch of step 2 is infinite."""
    from training.tasks.prior import build_prior

    job, calls = build_prior(config), iter(range(1000))
    bad_call = 2 * config.train.grad_accum_steps
    rank = int(os.environ.get("RANK", 1))

    def objective(model, batch):
        scores = job.objective(model, batch)
        bad = next(calls) == bad_call and rank == 1
        return {"loss": scores["loss"] * (torch.inf if bad else 1.0)}

    return dataclasses.replace(job, objective=objective)


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(prior(data, tmp_path_factory.mktemp("plain")), build_with_a_bad_micro_batch)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_workers_are_one_process_at_every_zero_stage(
    stage: int, data: Path, plain: Path, tmp_path: Path
):
    """With clipping, weight decay, two micro-batches a step, and a step that must be skipped."""
    found = trained(prior(data, tmp_path, **two(stage)), build_with_a_bad_micro_batch)
    assert [line["nonfinite_steps"] for line in lines(plain)] == [0, 0, 1, 1, 1, 1]
    assert [line["nonfinite_steps"] for line in lines(found)] == [0, 0, 1, 1, 1, 1]
    assert_close(found, plain)


def test_clip_contrasts_the_samples_of_all_workers(data: Path, tmp_path: Path):
    """The loss of a pair has every worker's samples as negatives, and gradients reach them all.

    A bias of attention's keys cancels in the softmax: its gradient is rounding alone, which Adam
    blows up to whole steps, so biases of attention's input are left out.
    """
    model = ClipConfig(embed_dim=16, vision_width=32, vision_depth=1, text_width=32, text_depth=1,
                       patch_size=16, vocab_size=512)  # fmt: skip
    train = with_options(PLAIN, micro_batch_size=0)
    config = ClipRunConfig(
        images=(str(data / "images"),), run=str(tmp_path / "one"), model=model, train=train
    )
    shared = dataclasses.replace(
        config, run=str(tmp_path / "two"), train=with_options(train, **two(0))
    )
    found, expected = trained(shared, build_clip_task), trained(config, build_clip_task)
    assert_close(found, expected, but="attn.in_proj_bias")


def build_with_a_fault_of_one_rank(config: PriorRunConfig) -> Task:
    """Rank 1 alone cannot read what it should; rank 0 waits for it in the middle of a step."""
    from training.tasks.prior import build_prior

    job = build_prior(config)

    def objective(model, batch):
        if os.environ["RANK"] == "1":
            raise ValueError("shard 000001 is damaged")
        return job.objective(model, batch)

    return dataclasses.replace(job, objective=objective)


def build_with_a_full_disk_of_one_rank(config: PriorRunConfig) -> Task:
    """What a disk says that is full, once, as the other rank waits in its collective."""
    import errno

    from training.tasks.prior import build_prior

    job = build_prior(config)

    def objective(model, batch):
        if os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), config.run)
        return job.objective(model, batch)

    return dataclasses.replace(job, objective=objective)


def test_a_full_disk_of_one_rank_ends_the_run_at_once_and_is_reported(data: Path, tmp_path: Path):
    """Other errors of a storage are tried again; this one would be the same in every attempt."""
    config = prior(data, tmp_path, **two(0))
    with pytest.raises(OSError, match="No space left on device: .*"):
        launch(config, config.run, build_with_a_full_disk_of_one_rank, "prior")
    events = [line["event"] for line in read_timeline(tmp_path)]
    assert events.count("placed") == 1, "no second attempt"


def build_with_a_storage_that_fails(config: PriorRunConfig) -> Task:
    """Whichever rank reads, in every attempt."""
    from training.tasks.prior import build_prior

    job = build_prior(config)

    def objective(model, batch):
        raise ConnectionError("the storage does not answer")

    return dataclasses.replace(job, objective=objective)


def test_workers_that_fail_too_often_are_one_line(data: Path, tmp_path: Path):
    config = prior(data, tmp_path, num_workers=1, max_failures=1)
    with pytest.raises(OSError) as caught:
        launch(config, config.run, build_with_a_storage_that_fails, "prior")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}: lost workers more often than train.max_failures 1; last: ")
    assert said.endswith("ConnectionError: the storage does not answer")
    incidents = read_lines(tmp_path / "incidents.jsonl")
    assert [line["kind"] for line in incidents] == ["lost", "lost"]


def test_what_one_rank_alone_meets_ends_the_run_and_is_reported(data: Path, tmp_path: Path):
    config = prior(data, tmp_path, **two(0))
    with pytest.raises(ValueError, match="^shard 000001 is damaged$"):
        launch(config, config.run, build_with_a_fault_of_one_rank, "prior")


# -- one checkpoint --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(prior(data, tmp_path_factory.mktemp("sharded"), **two(1)), build_prior)


def test_ranks_share_out_weights_moments_and_averages(sharded: Path):
    """ZeRO's fragments of two ranks are disjoint, and together are every parameter."""
    tensors = fragments(sharded)
    exported = load_file(str(sharded / last(sharded) / "model.safetensors"))
    sizes = [sum(t.numel() for k, t in tensors.items() if f"rank_000{r} master/" in k)
             for r in (0, 1)]  # fmt: skip
    buffers = ("scale.", "null_length")
    assert sum(sizes) == sum(t.numel() for k, t in exported.items() if not k.startswith(buffers))
    assert min(sizes) > 0.4 * sum(sizes)
    for section in ("ema", "exp_avg", "exp_avg_sq"):
        owned = {k.replace(section, "master", 1) for k in tensors if f" {section}/" in k}
        assert owned == {k for k in tensors if " master/" in k}


def test_a_killed_sharded_run_continues_bit_for_bit(data: Path, sharded: Path, tmp_path: Path):
    run = killed_half_way(sharded, tmp_path / "run")
    trained(prior(data, run, **two(1)), build_prior)
    expected, found = fragments(sharded), fragments(run)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(sharded)]


def build_with_a_dying_rank(config: RunConfig) -> Task:
    """Rank 1 dies once, in the step after the first checkpoint."""
    assert isinstance(config, PriorRunConfig)
    from training.tasks.prior import build_prior

    job, calls = build_prior(config), iter(range(1000))
    died = Path(config.run) / "died"

    def objective(model, batch):
        past = next(calls) > config.train.grad_accum_steps * HALF
        if past and os.environ["RANK"] == "1" and not died.exists():
            died.touch()
            os._exit(1)
        return job.objective(model, batch)

    return dataclasses.replace(job, objective=objective)


def test_a_run_that_loses_a_worker_ends_as_if_it_had_not(data: Path, sharded: Path, tmp_path: Path):
    run = trained(prior(data, tmp_path, **two(1)), build_with_a_dying_rank)
    assert (run / "died").exists()
    expected, found = fragments(sharded), fragments(run)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_one_process_continues_what_two_workers_began(data: Path, sharded: Path, tmp_path: Path):
    run = killed_half_way(sharded, tmp_path / "run")
    assert_close(trained(prior(data, run), build_prior), sharded)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_workers_continue_what_one_process_began(
    stage: int, data: Path, sharded: Path, tmp_path: Path
):
    one = trained(prior(data, tmp_path / "one"), build_prior)
    run = killed_half_way(one, tmp_path / "run")
    assert_close(trained(prior(data, run, **two(stage)), build_prior), sharded)
