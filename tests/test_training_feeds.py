"""Ray Data feeds what the native feed does: the same samples in the same order, bit for bit."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from models.configs import ClipConfig, DiffusionPriorConfig
from training.config import ClipRunConfig, DataConfig, PriorRunConfig, RunConfig, TrainConfig
from training.data import dataloader
from training.data.dataloader import make_loader
from training.runs.worker import launch
from training.tasks.clip import build_clip_task
from training.tasks.prior import build_prior

pytestmark = pytest.mark.slow

TRAIN = TrainConfig.of(
    num_steps=12, checkpoint_every=6, global_batch_size=8, num_workers=0, num_threads=1,
    precision="fp32", report_every=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Iterator[Path]:
    """Two shards of drawn images and their embeddings; one private Ray for the whole module."""
    import ray

    root = write_data(tmp_path_factory.mktemp("data"), num_shards=2, samples_per_shard=20)
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=512 << 20)
    yield root
    ray.shutdown()


def clip(data: Path, run: Path) -> ClipRunConfig:
    model = ClipConfig(embed_dim=16, vision_width=32, vision_depth=1, text_width=32, text_depth=1,
                       patch_size=16, vocab_size=512)  # fmt: skip
    images = (str(data / "images"),) * 2
    mixed = DataConfig(weights=(1, 2))
    return ClipRunConfig(images=images, run=str(run), model=model, train=TRAIN, data=mixed)


def prior(data: Path, run: Path) -> PriorRunConfig:
    model = DiffusionPriorConfig(width=16, depth=1, num_heads=2)
    return PriorRunConfig(
        embeds=(str(data / "embeds"),), run=str(run), diffusion=model, train=TRAIN
    )


def by_ray(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, ingest="ray")


@pytest.mark.parametrize("span", [4, 1000])
def test_ray_gives_the_batches_of_the_plan(
    data: Path, tmp_path: Path, span: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dataloader, "STEPS_A_SPAN", span)
    monkeypatch.setattr(dataloader, "STEPS_A_BLOCK", 2)
    config = clip(data, tmp_path)
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


def test_a_run_fed_by_ray_is_the_run_fed_natively(data: Path, tmp_path: Path):
    native, rays = (prior(data, tmp_path / name) for name in ("native", "ray"))
    assert launch(native, native.run, build_prior, "prior") == 0
    assert launch(by_ray(rays), rays.run, build_prior, "prior") == 0
    for name in ("model.safetensors", "ema.safetensors"):
        files = [Path(one.run) / "step_00000012" / name for one in (native, rays)]
        assert files[0].read_bytes() == files[1].read_bytes()
