"""A CLIP under whose projection a published network stays as it is: it trains, resumes, loads and
embeds, and neither its checkpoints nor its identity hide what it is made of."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _runs import HERE, clip_run
from PIL import Image
from safetensors.torch import load_file

from eval.evaluation import NETWORK_RELATIONS, Evaluation
from eval.request import EvalRequest
from eval.sampling.image_source import open_images
from ingest.shards import load_snapshot
from models.clip import FrozenClip
from models.convert import efficientnet
from models.convert.runs import load_clip
from models.weights import CONFIG_NAME, EMA_NAME, exported
from training.config import TrainConfig
from training.data.datasets import ImageDataset
from training.runs.worker import launch
from training.tasks.clip import build_clip_task, clip_dataset

COUNT, TOWER = 8, "efficientnet_lite0"
TRAIN = TrainConfig.of(
    **HERE, num_steps=200, checkpoint_every=100, global_batch_size=COUNT, precision="fp32",
    ema_decay=0.5, learning_rate=1e-2,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable[..., Path]) -> Path:
    return write_data(tmp_path_factory.mktemp("tower"), num_shards=1, samples_per_shard=COUNT)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = clip_run(data, tmp_path_factory.mktemp("run") / "clip", TRAIN, image_tower=TOWER)
    assert launch(config, config.run, build_clip_task, "clip") == 0
    return Path(config.run)


@pytest.fixture(scope="module")
def encoder(run: Path) -> FrozenClip:
    return load_clip(str(run))


def test_it_overfits_eight_pairs(data: Path, encoder: FrozenClip):
    images = ImageDataset(load_snapshot(data / "images"), encoder.image_size, 0, encoder.tokenize)
    read = images.read(np.arange(COUNT))
    image = encoder.encode_image(torch.from_numpy(read["image"]))
    text, _ = encoder.encode_text(torch.from_numpy(read["tokens"]))
    assert (text @ image.T).argmax(1).tolist() == list(range(COUNT))


def test_training_sees_what_the_encoder_sees(data: Path, run: Path, encoder: FrozenClip):
    """The cached features under the projection are the embeddings of the pixels; the network is
    run once an image."""
    config = clip_run(data, run, TRAIN, image_tower=TOWER)
    dataset = clip_dataset(config, encoder.image_size, encoder.context_length)
    features = dataset.read(np.arange(COUNT))["image"]
    assert features.shape == (COUNT, efficientnet.DIM)
    pixels = ImageDataset(load_snapshot(data / "images"), encoder.image_size).read(np.arange(COUNT))
    with torch.no_grad():
        found = F.normalize(encoder.clip.visual(torch.from_numpy(features)), dim=1)
    expected = encoder.encode_image(torch.from_numpy(pixels["image"]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_network_is_run_once_an_image(
    data: Path, run: Path, encoder: FrozenClip, monkeypatch: pytest.MonkeyPatch
):
    config = clip_run(data, run, TRAIN, image_tower=TOWER)
    dataset = clip_dataset(config, encoder.image_size, encoder.context_length)
    first = dataset.read(np.arange(COUNT))["image"]
    name = "models.convert.efficientnet.EfficientNetLite0.forward"
    monkeypatch.setattr(name, lambda *_: pytest.fail("computed again"))
    np.testing.assert_array_equal(dataset.read(np.arange(COUNT))["image"], first)


def test_a_checkpoint_has_the_projection_and_the_digest_but_not_the_network(
    run: Path, encoder: FrozenClip
):
    step = exported(run)
    weights = load_file(step / EMA_NAME)
    visual = {name: tuple(w.shape) for name, w in weights.items() if name.startswith("visual.")}
    width = encoder.embed_dim
    assert visual == {"visual.proj.weight": (width, 1280), "visual.proj.bias": (width,)}
    config = json.loads((step / CONFIG_NAME).read_text())
    assert config["image_tower_identity"] == efficientnet.IDENTITY
    assert efficientnet.IDENTITY in encoder.encoder_id


def test_an_encoder_of_other_frozen_weights_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(efficientnet, "IDENTITY", "efficientnet_lite0@000000000000")
    with pytest.raises(ValueError, match="found efficientnet_lite0@579344248a93, expected"):
        load_clip(str(run))


def test_a_tower_starts_from_another_towers_projection(data: Path, run: Path, tmp_path: Path):
    task = build_clip_task(clip_run(data, tmp_path, TRAIN, image_tower=TOWER, init=str(run)))
    expected = load_file(exported(run) / EMA_NAME)["visual.proj.weight"]
    assert torch.equal(task.model.state_dict()["visual.proj.weight"], expected)
    with pytest.raises(ValueError, match="init: "):
        build_clip_task(clip_run(data, tmp_path, TRAIN, init=str(run)))


def test_the_judge_says_that_the_model_was_trained_on_it(encoder: FrozenClip, tmp_path: Path):
    for seed, name in enumerate(("real", "fake")):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = np.random.default_rng(10 * seed + i).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i:06d}.png")
    settings: dict[str, Any] = {}

    def relation() -> str:
        request = EvalRequest(
            real=str(tmp_path / "real"), fake=str(tmp_path / "fake"), features=(TOWER,),
            num_resamples=0, out=str(tmp_path / "eval.json"), num_threads=1,
        )  # fmt: skip
        evaluation = Evaluation(request, request.check())
        fake = open_images(str(tmp_path / "fake"))
        fake.settings.update(settings)
        object.__setattr__(evaluation.fake, "images", fake)
        return evaluation.scores()["features"][TOWER]["judge_relation"]

    assert relation() == NETWORK_RELATIONS[False]
    settings["encoder_id"] = encoder.encoder_id
    assert relation() == NETWORK_RELATIONS[True]
