"""Encoders whose embeddings keep their length ("+raw"), and captions that are dropped to the empty
one: what published unCLIP pipelines were trained with."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval.sampling.generate import sampling_of
from ingest.shards import EmbedShard, load_snapshot
from models.configs import DecoderConfig, UNetConfig
from models.convert.runs import absolute_spec, load_clip
from models.decoder import Condition, Decoder, dropped_captions
from models.latents import encode, reconstructions
from models.unclip import UnClip
from training.config import DecoderRunConfig, PriorRunConfig
from training.data import demo_data
from training.data.dataloader import Batch, as_batch
from training.loop import Task
from training.tasks import decoder as jobs
from training.tasks import prior as prior_job

SPEC = "tiny:random"
UNET = UNetConfig(channels=8, channel_mult=(1,), num_res_blocks=1, attn_resolutions=(2,),
                  head_channels=8, patch_size=8)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and their embeddings at full length."""
    root = tmp_path_factory.mktemp("raw")
    (root / "run").mkdir()
    demo_data.draw_images(root / "images", num_shards=1, samples_per_shard=40)
    demo_data.embed_here(str(root / "images"), root / "embeds", f"{SPEC}+raw")
    return root


def decoder(data: Path, **options: Any) -> DecoderRunConfig:
    return DecoderRunConfig(
        images=(str(data / "images"),), embeds=(str(data / "embeds"),), run=str(data / "run"),
        image_size=16, base=DecoderConfig(unet=UNET, context_width=8, **options),
    )  # fmt: skip


def batch_of(config: DecoderRunConfig, count: int) -> Batch:
    """The first samples of its data, as training reads them."""
    index = torch.arange(count)
    batch = as_batch(jobs.decoder_dataset(config).read(index.numpy()), index)
    return batch.to(torch.device("cpu"))


def stir(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)


def test_a_raw_encoder_is_another_encoder_of_the_same_directions():
    unit, raw = load_clip(SPEC), load_clip(f"{SPEC}+raw")
    assert raw.encoder_id == f"{unit.encoder_id}+raw"
    tokens = torch.from_numpy(unit.tokenize(["a red cube", "a circle"]))
    found, states = raw.encode_text(tokens)
    expected, same = unit.encode_text(tokens)
    torch.testing.assert_close(F.normalize(found, dim=1), expected)
    assert torch.equal(states, same) and (found.norm(dim=1) - 1).abs().min() > 1e-3


def test_embeddings_at_full_length_are_committed_and_read(data: Path):
    (entry,) = load_snapshot(data / "embeds").shards
    shard = EmbedShard(str(data / "embeds"), entry.name, digest=entry.digest)
    expected = load_clip(f"{SPEC}+raw").encode_text(torch.from_numpy(np.array(shard.tokens)))[0]
    np.testing.assert_allclose(shard.text_embed, expected.numpy(), rtol=2e-3, atol=2e-3)


def test_only_a_prior_that_can_draw_any_length_is_trained_on_them(data: Path):
    config = PriorRunConfig(embeds=(str(data / "embeds"),), run=str(data / "prior"))
    job = prior_job.build_prior(config)
    assert job.export["model"]["unit_norm"] is False
    for kind in ("regression", "autoregressive"):
        with pytest.raises(ValueError, match=f"prior: found {kind} for embeddings that keep"):
            prior_job.build_prior(dataclasses.replace(config, prior=kind))
    with pytest.raises(ValueError, match="base.embed_noise: found 0.3 for embeddings that keep"):
        jobs.build_decoder(decoder(data, embed_noise=0.3))


def test_a_run_s_path_is_made_absolute_before_its_suffix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "clip").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute_spec("clip+raw") == f"{tmp_path}/clip+raw"
    assert absolute_spec("clip") == f"{tmp_path}/clip"
    (tmp_path / "weights.safetensors").touch()
    for raw in ("", "+raw"):
        whole = f"ViT-B-32:{tmp_path}/weights.safetensors{raw}"
        assert absolute_spec(f"ViT-B-32:weights.safetensors{raw}") == whole
    assert absolute_spec("ViT-B-32:openai+raw") == "ViT-B-32:openai+raw" and absolute_spec("") == ""


def test_a_dropped_caption_is_the_empty_one_where_that_is_asked_for(data: Path):
    config = decoder(data, empty_caption=True, text_embed_cond=True)
    encoder = load_clip(f"{SPEC}+raw")
    batch = batch_of(config, 40)
    drop = dropped_captions(config.base, batch.keys)
    assert 8 < int(drop.sum()) < 32
    given = jobs.decoder_condition(encoder, config, batch, drop)
    assert given.text_embed is not None
    embed, states = encoder.encode_text(torch.from_numpy(encoder.tokenize([""])))
    assert given.token_mask is not None and given.text_states is not None
    assert (given.token_mask.sum(1) == 2).equal(drop)  # start and end of text
    count = int(drop.sum())
    read = given.text_states[drop][:, :2]
    torch.testing.assert_close(read, states[:, :2].expand(count, -1, -1))
    torch.testing.assert_close(given.text_embed[drop], embed.expand(count, -1))
    kept = jobs.decoder_condition(encoder, config, batch)
    assert kept.text_embed is not None
    assert torch.equal(given.text_embed[~drop], kept.text_embed[~drop])


@pytest.mark.parametrize("empty_caption", [False, True])
def test_what_is_not_dropped_is_read_and_what_is_dropped_is_not(data: Path, empty_caption: bool):
    """Another caption changes the loss of the samples that keep theirs, and of no other."""
    config = decoder(data, empty_caption=empty_caption, text_embed_cond=True)
    job: Task = jobs.build_decoder(config)
    stir(job.model)
    batch = batch_of(config, 40)
    other = as_batch({name: value.numpy() for name, value in batch.columns.items()}, batch.keys)
    other.columns["tokens"] = batch["tokens"].roll(1, 0)
    other.columns["text_embed"] = batch["text_embed"].roll(1, 0)
    with torch.no_grad():
        losses = [job.objective(job.model, each)["loss"] for each in (batch, other)]
    changed = (losses[0] - losses[1]).abs() > 1e-6
    drop = dropped_captions(config.base, batch.keys)
    assert not changed[drop].any() and changed[~drop].float().mean() > 0.8


@pytest.mark.parametrize("empty_caption", [False, True])
def test_edits_give_a_decoder_what_training_gave_it_where_it_dropped_the_caption(
    data: Path, empty_caption: bool
):
    """Words and z_t of the empty caption, or neither; every latent is under that."""
    config = decoder(data, empty_caption=empty_caption, text_embed_cond=True)
    encoder, model = load_clip(f"{SPEC}+raw"), jobs.decoder_model(config)
    assert isinstance(model, Decoder)
    stir(model)
    batch = batch_of(config, 4)
    x, t, never = torch.randn(4, 3, 16, 16), torch.full((4,), 500), torch.zeros(4).bool()
    trained = jobs.decoder_condition(encoder, config, batch, ~never if empty_caption else None)
    chain = UnClip(clip=encoder, prior=None, decoder=model)
    z = batch["image_embed"]
    with torch.no_grad():
        expected = model(x, t, trained, never, never if empty_caption else ~never)
        found = model(x, t, chain.condition(None, z), never, never)
        pooled = model.encode_condition(chain.condition(None, z[:1])).pooled
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    seen: list[Any] = []
    model.register_forward_hook(lambda module, args, output: seen.append(args[2].pooled))
    how = sampling_of({"decoder_steps": 2, "precision": "fp32", "upsampler_steps": 1})
    latents = encode(chain, [Image.new("RGB", (20, 20), "red")], how)
    count = len(seen)
    reconstructions(chain, torch.arange(1), latents, how)
    assert len(seen) > count > 0
    if empty_caption:
        assert pooled is not None and all(each.allclose(pooled, atol=1e-6) for each in seen)
        with pytest.raises(ValueError, match="decoder: found no caption for a decoder that was"):
            model.encode_condition(Condition(image_embed=z, without_text=True))
    else:
        assert pooled is None and seen == [None] * len(seen)
