"""The chain on encoders of open_clip's classes: embeddings, a prior, a decoder, samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from _encoders import CHAINS, write_architectures
from _runs import base_run, prior_run

from eval import sample
from eval.sample import SampleConfig
from eval.sampling.image_source import open_images
from ingest import embed
from ingest.embed import EmbedConfig
from ingest.shards import EmbedShard, load_snapshot
from models.convert.runs import load_clip
from models.tokenizers import token_mask
from training.config import TrainConfig
from training.data import demo_data
from training.runs.worker import launch
from training.tasks.decoder import build_decoder
from training.tasks.prior import build_prior

TRAIN = TrainConfig.of(
    num_workers=0, num_threads=1, num_steps=2, global_batch_size=4, checkpoint_every=2,
    report_every=1, precision="fp32", device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_architectures(root)
    demo_data.draw_images(root / "images", num_shards=1, samples_per_shard=8)
    return root / "images"


@pytest.mark.parametrize("name", CHAINS)
def test_an_encoder_embeds_and_its_prior_and_decoder_train_and_sample(
    name: str, images: Path, tmp_path: Path
):
    """16 px, two steps, in this process."""
    spec, embeds = f"{name}:random", tmp_path / "embeds"
    config = EmbedConfig(
        images=str(images), clip=spec, out=str(embeds), num_actors=0, num_threads=1
    )
    assert embed.main(config) == 0
    encoder, (entry,) = load_clip(spec), load_snapshot(embeds).shards
    shard = EmbedShard(embeds, entry.name)
    assert shard.image_embed.shape == (8, encoder.embed_dim)
    keep = token_mask(torch.from_numpy(np.array(shard.tokens)))
    assert keep.any(1).all() and not keep.all()

    runs = {part: tmp_path / part for part in ("prior", "decoder")}
    (tmp_path / "images").symlink_to(images)
    prior = prior_run(tmp_path, runs["prior"], TRAIN)
    assert launch(prior, prior.run, build_prior, "prior") == 0
    decoder = base_run(tmp_path, runs["decoder"], TRAIN)
    assert launch(decoder, decoder.run, build_decoder, "decoder") == 0
    drawing = SampleConfig(
        prior=str(runs["prior"]), decoder=str(runs["decoder"]), prompts=("a red cube", ""),
        out=str(tmp_path / "samples"), prior_steps=2, decoder_steps=2, precision="fp32",
        num_threads=1,
    )  # fmt: skip
    assert sample.main(drawing) == 0
    drawn = list(open_images(drawing.out))
    assert [image.size for image in drawn] == [(16, 16)] * 2
