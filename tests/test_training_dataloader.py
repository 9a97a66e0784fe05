"""Laws of the plan (once an epoch, whoever reads) and of the loader (where it continues)."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _runs import HERE, clip_run, images_of, prior_run
from torch import Tensor

from cluster.base.cli import with_options
from models.weights import exported
from training.config import DataConfig, RunConfig, TrainConfig
from training.data import dataloader
from training.data.dataloader import Batch, KeyedDataset, ThreadedLoader, make_loader
from training.data.datasets import ColumnDataset, SampleCache
from training.data.sampler import Plan, PlanSampler
from training.runs.worker import launch
from training.tasks.clip import build_clip_task
from training.tasks.prior import build_prior

SHARDS = [(5,), (12,), (7, 1, 9, 4), (3,) * 9, (20, 1, 1, 1, 20)]


def plan(shard_sizes: tuple[int, ...] = (7, 1, 9, 4), **changes) -> Plan:
    return Plan(**{"data_sets": (shard_sizes,), "global_batch_size": 12, "seed": 0, **changes})


def real(plan: Plan, step: int, rank: int = 0, world_size: int = 1) -> list[int]:
    part = plan.slice(step, rank, world_size)
    return part.index[part.weight > 0].tolist()


def epoch(plan: Plan, number: int) -> list[int]:
    steps = range(number * plan.steps_per_epoch, (number + 1) * plan.steps_per_epoch)
    return [i for step in steps for i in real(plan, step)]


class Numbers(ColumnDataset):
    """A data set whose samples are their own numbers; `broken` ones raise."""

    def __init__(self, data_sets: tuple[tuple[int, ...], ...], broken: int = -1) -> None:
        self.data_sets, self.broken = data_sets, broken

    def read(self, index: np.ndarray, keys: Tensor | None = None) -> dict[str, np.ndarray]:
        if self.broken in index:
            raise ValueError(f"sample {self.broken} is damaged")
        return {"number": index.copy()}


def loader(
    of: Plan, broken: int = -1, parts: int = 1, rank: int = 0, world_size: int = 1
) -> ThreadedLoader:
    samples = Numbers(of.data_sets, broken)
    dataset = KeyedDataset(samples=samples, seed=of.seed, grad_accum_steps=parts)
    sampler = PlanSampler(plan=of, grad_accum_steps=parts, rank=rank, world_size=world_size)
    return ThreadedLoader(dataset=dataset, sampler=sampler)


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shard_sizes", "num_streams"),
    [(sizes, streams) for sizes in SHARDS for streams in (1, 2, 4) if streams <= len(sizes)],
)
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("window", [1, 2, 16])
def test_every_sample_comes_exactly_once_an_epoch(
    shard_sizes: tuple[int, ...], num_streams: int, block_size: int, window: int
):
    of = plan(shard_sizes, num_streams=num_streams, block_size=block_size, window=window)
    for number in range(3):
        assert sorted(epoch(of, number)) == list(range(sum(shard_sizes)))
    for part in (of.slice(step) for step in range(of.steps_per_epoch)):
        assert part.num_real == part.weight.sum() and (part.num_real > 0 or num_streams > 1)
        assert 0 <= part.index.min() <= part.index.max() < sum(shard_sizes), "padding is readable"



@pytest.mark.parametrize("num_streams", [1, 2])
@pytest.mark.parametrize("data_sets", [((7, 1, 9, 4),), ((7, 5, 9, 4), (3, 3))])
def test_the_global_batch_does_not_depend_on_the_number_of_workers(
    num_streams: int, data_sets: tuple[tuple[int, ...], ...]
):
    weights = (3.0, 1.0) if len(data_sets) > 1 else ()
    of = plan(data_sets=data_sets, weights=weights, num_streams=num_streams)
    for step in range(20):
        whole = of.slice(step)
        for world_size in (2, 3, 4):
            parts = [of.slice(step, rank, world_size) for rank in range(world_size)]
            assert {len(p.index) for p in parts} == {12 // world_size}
            assert {p.num_real for p in parts} == {whole.num_real}
            for rank, part in enumerate(parts):
                assert np.array_equal(part.index, whole.index[rank::world_size])
                assert np.array_equal(part.epoch, whole.epoch[rank::world_size])
                assert np.array_equal(part.weight, whole.weight[rank::world_size])


@pytest.mark.parametrize("shard_sizes", [(5, 0), (0, 5)])
def test_a_stream_of_empty_shards_pads_with_what_is_there(shard_sizes: tuple[int, ...]):
    of = plan(shard_sizes, num_streams=2)
    slices = [of.slice(step) for step in range(3 * of.steps_per_epoch)]
    assert all(0 <= index < 5 for part in slices for index in part.index)
    assert sum(part.weight.sum() for part in slices) == 15



def test_seeds_and_epochs_have_their_own_order_and_one_seed_repeats_itself():
    orders = [epoch(plan(seed=seed), number) for seed in range(3) for number in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert epoch(plan(seed=2), 1) == orders[7]


def test_shards_come_in_another_order_every_epoch():
    of = plan((4,) * 12, window=1, global_batch_size=4)
    orders = {tuple(i // 4 for i in epoch(of, number)[::4]) for number in range(4)}
    assert len(orders) == 4


def test_an_order_is_not_the_listed_one():
    order = np.array(epoch(plan((100,)), 0))
    assert abs(np.corrcoef(order, np.arange(100))[0, 1]) < 0.4


def test_blocks_stay_together():
    of = plan((8, 12, 4), block_size=4, global_batch_size=8)
    for step in range(2 * of.steps_per_epoch):
        blocks = np.array(real(of, step)).reshape(-1, 4)
        assert (blocks == blocks[:, :1] + np.arange(4)).all() and (blocks[:, 0] % 4 == 0).all()


# -- several data sets -----------------------------------------------------------------------------


def mixture(*sizes: tuple[int, ...], **changes) -> Plan:
    return plan(**{"data_sets": sizes, "weights": (3.0, 1.0), **changes})


@pytest.mark.parametrize("num_streams", [1, 2])
@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.5, 0.5), (1.0, 9.0)])
def test_data_sets_mix_by_weight_and_each_keeps_its_own_epochs(
    num_streams: int, weights: tuple[float, ...]
):
    sizes = (7, 5, 9, 4), (3, 3)
    of = mixture(*sizes, weights=weights, num_streams=num_streams)
    parts = [of.slice(step) for step in range(100)]
    index = np.concatenate([part.index for part in parts])
    epoch = np.concatenate([part.epoch for part in parts])
    real = np.concatenate([part.weight for part in parts]) > 0
    assert all(part.num_real == part.weight.sum() for part in parts)
    first = index < sum(sizes[0])
    assert abs(first.mean() - weights[0] / sum(weights)) < 0.01
    for mine, numbers in ((first, range(25)), (~first, range(25, 31))):
        for number in range(epoch[mine & real].max()):  # the last one may have been cut
            assert sorted(index[mine & real & (epoch == number)]) == list(numbers)


def test_rounds_of_data_sets_are_spread_evenly():
    """After any number of rounds, each data set has had its share of them, give or take one."""
    shares = np.array([0.6, 0.3, 0.099, 0.001])
    sets = tuple((1000,) for _ in shares)
    of = plan(data_sets=sets, weights=tuple(shares), global_batch_size=1)
    turns = np.concatenate([of.slice(step).index // 1000 for step in range(2 * 1000)])
    had = np.cumsum(turns[:, None] == np.arange(4), axis=0)
    assert np.abs(had - shares * np.arange(1, len(turns) + 1)[:, None]).max() < 1.5



@pytest.mark.parametrize("data_sets", [((5,) * 8,), ((5,) * 8, (5,) * 4)])
def test_a_rank_reads_the_shards_of_its_own_streams_only(data_sets: tuple[tuple[int, ...], ...]):
    weights = (3.0, 1.0) if len(data_sets) > 1 else ()
    of = plan(data_sets=data_sets, weights=weights, num_streams=4)
    for steps in (range(0, 4), range(40, 44)):  # within one epoch of either
        shards = [{i // 5 for s in steps for i in real(of, s, rank, 4)} for rank in range(4)]
        assert sum(len(each) for each in shards) == len(set().union(*shards))


def test_data_sets_without_weights_are_refused_and_so_is_a_weight_of_nothing():
    with pytest.raises(ValueError, match="found 0, expected one for each of 2"):
        mixture((5,), (5,), weights=())
    for weights in ((1.0, 0.0), (-1.0, 2.0), (1.0, 1e-9)):
        with pytest.raises(ValueError, match="expected each to be positive"):
            mixture((5,), (5,), weights=weights)


def test_an_empty_set_and_impossible_streams_are_refused():
    with pytest.raises(ValueError, match="found a snapshot of 0 samples"):
        plan((0, 0))
    for num_streams in (5, 7):
        with pytest.raises(ValueError, match=f"found {num_streams} streams, expected a divisor"):
            plan(num_streams=num_streams)


# -- the loader ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 3, 8])
def test_a_loader_continues_at_any_step(start: int):
    of = loader(plan())
    whole, rest = list(of.steps(0, 9)), list(of.steps(start, 9))
    assert len(rest) == 9 - start
    for (expected,), (found,) in zip(whole[start:], rest, strict=True):
        assert torch.equal(found.keys, expected.keys)
        assert torch.equal(found["number"], expected["number"])
        assert torch.equal(found.weight, expected.weight)



@pytest.mark.parametrize("micro_batch_size", [0, 2, 3, 6])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7, 8])
def test_any_number_of_workers_shares_out_a_batch(world_size: int, micro_batch_size: int):
    """All take as many micro-batches of as many samples, none larger than asked for; what is added
    to make that so weighs nothing, and the rest is the batch of one worker, each with its key."""
    config = TrainConfig.of(
        global_batch_size=48, num_workers=8, min_workers=1, micro_batch_size=micro_batch_size
    )
    of = plan((30, 20), global_batch_size=48, seed=3)
    parts = config.micro_batches(world_size)
    for step in range(4):  # 50 samples: the last batch of an epoch is padded as it is
        (whole,) = loader(of).read(step)
        found, sizes = [], set()
        for rank in range(world_size):
            batches = loader(of, parts=parts, rank=rank, world_size=world_size).read(step)
            assert len(batches) == parts
            sizes |= {len(batch.keys) for batch in batches}
            assert {batch.num_real for batch in batches} == {whole.num_real}
            found += [pair for batch in batches for pair in keyed(batch)]
        assert sizes == {config.samples_a_worker(world_size) // parts}
        assert max(sizes) <= (micro_batch_size or 48)
        assert sorted(found) == sorted(keyed(whole))


def keyed(batch: Batch) -> list[tuple[int, int]]:
    """The real samples of a batch with their keys."""
    there = batch.weight > 0
    return list(zip(batch["number"][there].tolist(), batch.keys[there].tolist(), strict=True))


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


def test_a_sample_has_another_key_in_every_epoch():
    of = plan((12,))
    keys = [loader(of).read(step)[0].keys for step in range(4)]
    assert len(torch.cat(keys).unique()) == 48


def test_an_error_of_the_data_set_reaches_the_consumer():
    of = plan((12,) * 4)
    batches = loader(of, broken=30).steps(0, 8)
    with pytest.raises(ValueError, match="sample 30 is damaged"):
        list(batches)


def test_a_loader_that_is_left_early_stops_reading():
    batches: Any = loader(plan()).steps(0, 10_000)
    next(batches)
    threads = [t for t in threading.enumerate() if t.name == "dataloader"]
    batches.close()
    for thread in threads:
        thread.join(timeout=5)
    assert threads and not any(t.is_alive() for t in threads)


def test_a_cache_reads_once_while_there_is_room_and_again_beyond():
    asked: list[int] = []

    def read_one(i: int) -> np.ndarray:
        asked.append(i)
        return np.full(2, i, dtype=np.int64)

    cached = SampleCache(read_one, limit_bytes=32)  # room for two
    for _ in range(2):
        assert cached.read(np.array([0, 1, 2])).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert asked == [0, 1, 2, 2]


@pytest.mark.parametrize("limit_bytes", [0, 64, 1 << 20])
def test_threads_read_what_one_does(limit_bytes: int):
    order = np.random.default_rng(0).integers(0, 40, (10, 25))
    cached = SampleCache(lambda i: np.full(2, i), limit_bytes=limit_bytes, num_threads=3)
    for index in order:
        assert (cached.read(index) == index[:, None]).all()


def test_an_error_of_one_thread_is_raised():
    def read_one(i: int) -> np.ndarray:
        if i == 7:
            raise ValueError("sample 7 is damaged")
        return np.zeros(1)

    with pytest.raises(ValueError, match="sample 7"):
        SampleCache(read_one, num_threads=2).read(np.arange(10))


# -- Ray Data: the same samples in the same order, bit for bit ------------------------------------


FED = TrainConfig.of(
    **HERE, num_steps=12, checkpoint_every=6, global_batch_size=8, precision="fp32"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Iterator[Path]:
    """Two shards of drawn images and their embeddings; one private Ray for the whole module."""
    import ray

    root = write_data(tmp_path_factory.mktemp("data"), num_shards=2, samples_per_shard=20)
    ray.shutdown()  # one that other modules share, of this machine's cores
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=512 << 20)
    yield root
    ray.shutdown()


def by_ray(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, ingest="ray")


@pytest.mark.slow
@pytest.mark.parametrize("span", [4, 1000])
def test_ray_gives_the_batches_of_the_plan(
    data: Path, tmp_path: Path, span: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dataloader, "STEPS_A_SPAN", span)
    monkeypatch.setattr(dataloader, "STEPS_A_BLOCK", 2)
    mixed = {"images": images_of(data) * 2, "data": DataConfig(weights=(1, 2))}
    config = clip_run(data, tmp_path, FED, **mixed)
    job = build_clip_task(config)
    for rank in range(1 if span == 4 else 2):
        both = [
            make_loader(job.build_dataset, options, rank=rank, world_size=2).steps(3, 12)
            for options in (config, by_ray(config))
        ]
        for (native,), (rays,) in zip(*both, strict=True):
            assert torch.equal(native.keys, rays.keys) and native.num_real == rays.num_real
            assert torch.equal(native.weight, rays.weight)
            assert native.columns.keys() == rays.columns.keys() == {"image", "tokens"}
            for name, column in native.columns.items():
                assert column.dtype == rays[name].dtype and torch.equal(column, rays[name]), name


@pytest.mark.slow
def test_a_run_fed_by_ray_is_the_run_fed_natively(data: Path, tmp_path: Path):
    native, rays = (prior_run(data, tmp_path / name, FED) for name in ("native", "ray"))
    assert launch(native, native.run, build_prior, "prior") == 0
    assert launch(by_ray(rays), rays.run, build_prior, "prior") == 0
    for name in ("model.safetensors", "ema.safetensors"):
        first, second = (exported(Path(each.run)) / name for each in (native, rays))
        assert first.read_bytes() == second.read_bytes()
