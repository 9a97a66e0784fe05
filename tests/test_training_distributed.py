"""Two workers under Ray and DeepSpeed are one process: same curve, same weights, same checkpoints.

The oracle is the plain engine, which the other tests pin to formulas. Dropout is off: its masks
belong to a rank.
"""

import dataclasses
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from _networks import DIT
from _runs import (
    HALF,
    SIX_STEPS,
    TOLERANCE,
    assert_same,
    base_run,
    clip_run,
    killed_half_way,
    named,
    prior_run,
    tensors_of,
)
from safetensors.torch import load_file

from cluster.base.cli import with_options
from cluster.base.jsonl import read_lines
from models.configs import DecoderConfig
from models.weights import exported
from training.config import ClipRunConfig, DecoderRunConfig, PriorRunConfig, RunConfig
from training.loop import Task
from training.runs.events import read_timeline
from training.runs.worker import launch
from training.tasks.clip import build_clip_task
from training.tasks.decoder import build_decoder
from training.tasks.prior import build_prior

pytestmark = pytest.mark.slow

@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Iterator[Path]:
    """Two shards of drawn images and their embeddings; one private Ray for the whole module."""
    import ray

    from cluster.base.ray_session import ensure_ray

    folder = tmp_path_factory.mktemp("data")
    root = write_data(folder, num_shards=2, samples_per_shard=20, image_tokens=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers import what builds a task
        ensure_ray()
    yield root
    ray.shutdown()



def prior(data: Path, run: Path, **changes) -> PriorRunConfig:
    return prior_run(data, run, with_options(SIX_STEPS, **changes))


def trained(config: PriorRunConfig | ClipRunConfig | DecoderRunConfig, build: Callable) -> Path:
    assert launch(config, config.run, named(build), "prior") == 0
    return Path(config.run)


def two(stage: int) -> dict:
    return {"num_workers": 2, "zero_stage": stage}



def lines(run: Path) -> list[dict]:
    return read_lines(run / "metrics.jsonl")


def fragments(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, by rank: weights, moments and averages."""
    return tensors_of(exported(run) / "fragments")


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
        mine, theirs = (load_file(str(exported(run) / file)) for run in (found, expected))
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            if name.endswith(but):
                continue
            torch.testing.assert_close(
                mine[name], tensor, atol=TOLERANCE, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )


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


@pytest.mark.parametrize("stage", [0, 3])  # test_training_engine_zero.py has them all
def test_two_workers_are_one_process(
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
    train = with_options(SIX_STEPS, micro_batch_size=0)
    one = clip_run(data, tmp_path / "one", train)
    shared = clip_run(data, tmp_path / "two", with_options(train, **two(0)))
    found, expected = trained(shared, build_clip_task), trained(one, build_clip_task)
    assert_close(found, expected, but="attn.in_proj_bias")


def test_a_transformer_over_patches_is_partitioned_as_others(data: Path, tmp_path: Path):
    base = DecoderConfig(
        network="dit", dit=DIT, context_width=8, prediction="x0", weighting="v", image_tokens=4
    )
    expected, found = (
        trained(base_run(data, tmp_path / name, train, base=base), build_decoder)
        for name, train in (("one", SIX_STEPS), ("two", with_options(SIX_STEPS, **two(3))))
    )
    assert_close(found, expected)


ERRORS = {  # by the name of the run
    "full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "full"),
    "gone": ConnectionError("the storage does not answer"),
    "damaged": ValueError("shard 000001 is damaged"),
}


def build_with_an_error(config: PriorRunConfig) -> Task:
    """The last rank cannot read what it should, in every attempt; another waits in the middle of a
    step."""
    from training.tasks.prior import build_prior

    job = build_prior(config)

    def objective(model, batch):
        if int(os.environ["RANK"]) == config.train.workers.num_workers - 1:
            raise ERRORS[Path(config.run).name]
        return job.objective(model, batch)

    return dataclasses.replace(job, objective=objective)


def fail(config: PriorRunConfig) -> None:
    launch(config, config.run, named(build_with_an_error), "prior")


def test_a_full_disk_of_one_rank_ends_the_run_at_once_and_is_reported(data: Path, tmp_path: Path):
    """Other errors of a storage are tried again; this one would be the same in every attempt."""
    run = tmp_path / "full"
    with pytest.raises(OSError, match="No space left on device: .*"):
        fail(prior(data, run, **two(0)))
    events = [line["event"] for line in read_timeline(run)]
    assert events.count("placed") == 1, "no second attempt"


def test_workers_that_fail_too_often_are_one_line(data: Path, tmp_path: Path):
    run = tmp_path / "gone"
    with pytest.raises(OSError) as caught:
        fail(prior(data, run, num_workers=1))
    said = str(caught.value)
    assert said.startswith(f"{run}: lost workers more often than train.max_failures 1; last: ")
    assert said.endswith("ConnectionError: the storage does not answer")
    incidents = read_lines(run / "incidents.jsonl")
    assert [line["kind"] for line in incidents] == ["lost", "lost"]


def test_what_one_rank_alone_meets_ends_the_run_and_is_reported(data: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="^shard 000001 is damaged$"):
        fail(prior(data, tmp_path / "damaged", **two(0)))


# -- one checkpoint --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(prior(data, tmp_path_factory.mktemp("sharded"), **two(1)), build_prior)


def test_ranks_share_out_weights_moments_and_averages(sharded: Path):
    """ZeRO's fragments of two ranks are disjoint, and together are every parameter."""
    tensors = fragments(sharded)
    weights = load_file(str(exported(sharded) / "model.safetensors"))
    sizes = [sum(t.numel() for k, t in tensors.items() if f"rank_000{r}.safetensors: master/" in k)
             for r in (0, 1)]  # fmt: skip
    buffers = ("scale.", "null_length")
    assert sum(sizes) == sum(t.numel() for k, t in weights.items() if not k.startswith(buffers))
    assert min(sizes) > 0.4 * sum(sizes)
    for section in ("ema", "exp_avg", "exp_avg_sq"):
        owned = {k.replace(section, "master", 1) for k in tensors if f" {section}/" in k}
        assert owned == {k for k in tensors if " master/" in k}


def test_a_killed_sharded_run_continues_bit_for_bit(data: Path, sharded: Path, tmp_path: Path):
    run = killed_half_way(sharded, tmp_path / "run")
    trained(prior(data, run, **two(1)), build_prior)
    assert_same(fragments(run), fragments(sharded))
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
    assert_same(fragments(run), fragments(sharded))


def test_one_process_continues_what_two_workers_began(data: Path, sharded: Path, tmp_path: Path):
    run = killed_half_way(sharded, tmp_path / "run")
    assert_close(trained(prior(data, run), build_prior), sharded)


def test_two_workers_continue_what_one_process_began(data: Path, sharded: Path, tmp_path: Path):
    one = trained(prior(data, tmp_path / "one"), build_prior)
    run = killed_half_way(one, tmp_path / "run")
    assert_close(trained(prior(data, run, **two(3)), build_prior), sharded)
