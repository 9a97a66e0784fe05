"""The convolutional image tower of a CLIP."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from _networks import CLIP
from _runs import SIX_STEPS, clip_run

from cluster.base.cli import with_options
from ingest.shards import load_snapshot
from models.clip import FrozenClip, build_clip
from models.convert.runs import load_clip
from models.networks.conv_tower import ConvTower
from training.data.datasets import ImageDataset
from training.runs.worker import launch
from training.tasks.clip import build_clip_task

SMALL = dataclasses.replace(
    CLIP, vision="convolutions", image_size=16, vision_width=32, vision_depth=1
)


@pytest.mark.parametrize(("side", "num_stages"), [(8, 1), (16, 2), (32, 3), (64, 4)])
def test_it_halves_the_side_to_four_places_and_every_weight_learns(side: int, num_stages: int):
    tower = ConvTower(side, 128, 1, 24)
    assert len(tower.down) == len(tower.residual) == num_stages - 1
    found = tower(torch.randn(3, 3, side, side))
    assert found.shape == (3, 24)
    found.square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("side", "width"), [(4, 64), (24, 64), (32, 60), (64, 48)])
def test_sides_and_widths_that_do_not_divide_are_refused(side: int, width: int):
    with pytest.raises(ValueError, match=rf"^clip.vision: found image_size {side} with .*{width}"):
        ConvTower(side, width, 1, 8)


def test_an_embedding_depends_on_its_own_image_alone():
    clip = FrozenClip(build_clip(SMALL), "small")
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    alone = torch.cat([clip.encode_image(image[None]) for image in images])
    assert torch.allclose(clip.encode_image(images), alone, atol=1e-6)


def test_a_run_of_it_trains_and_loads(tmp_path: Path, write_data: Callable[..., Path]):
    data = write_data(tmp_path, num_shards=1, samples_per_shard=16)
    train = with_options(SIX_STEPS, micro_batch_size=0)
    config = clip_run(data, tmp_path / "run", train, model=SMALL)
    assert launch(config, config.run, build_clip_task, "clip") == 0
    encoder = load_clip(config.run)
    assert isinstance(encoder.clip.visual, ConvTower) and encoder.image_size == 16
    read = ImageDataset(load_snapshot(data / "images"), 16).read(np.arange(4))["image"]
    assert encoder.encode_image(torch.from_numpy(read)).norm(dim=1).allclose(torch.ones(4))
