"""Tokens of an image beside its embedding: made, stored, drawn by the prior, read by the
decoder."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _networks
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from _runs import SIX_STEPS, base_run, prior_run
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from eval.sampling import edits
from eval.sampling.generate import sampling_of
from ingest.embedding.encode import open_embeds
from ingest.embedding.statistics import EmbedStatistics
from ingest.shards import EmbedShard, ImageShard, load_snapshot
from ingest.store.maintenance import forget
from ingest.store.removal import Forgotten
from models import latents
from models.clip import FrozenClip, ImageTower, build_clip
from models.configs import ClipConfig, DecoderConfig, DiffusionPriorConfig
from models.convert.priors import prior_to_diffusers
from models.convert.runs import load_clip
from models.convert.unets import decoder_to_diffusers
from models.costs import training_flops
from models.diffusion.samplers import ddim
from models.latents import Latents, blends, pca_images, pixels_of
from models.priors.base import PackedText, PriorSampling, PriorText
from models.priors.diffusion import DiffusionPrior
from models.unclip import UnClip
from models.weights import EMA_NAME, exported
from training.config import TrainConfig
from training.data.datasets import EmbedDataset
from training.data.inputs import prepare_data
from training.runs.worker import launch
from training.tasks.prior import build_prior

SMALL = ClipConfig(
    embed_dim=16, vision_width=32, vision_depth=1, text_width=32, text_depth=1, vocab_size=512
)


PRIOR_OF_FOUR = DiffusionPriorConfig(width=16, depth=1, num_heads=2, image_tokens=4)


def images(count: int, size: int) -> Tensor:
    shape, rng = (count, 3, size, size), torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# -- made ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", ["transformer", "convolutions"])
def test_the_vector_is_the_same_with_and_without_tokens(vision: Any):
    encoder = FrozenClip(build_clip(dataclasses.replace(SMALL, vision=vision)), "small")
    pixels = images(3, 32)
    found = encoder.encode_image(pixels, 16)
    assert found.shape == (3, 17, 16)
    assert torch.equal(found[:, 0], encoder.encode_image(pixels))
    assert torch.allclose(found.norm(dim=-1), torch.ones(3, 17))


def test_tokens_are_means_of_open_clips_own_places():
    """open_clip returns the states of the patches where `output_tokens` asks for them."""
    clip = build_clip(SMALL)  # 8 x 8 patches
    encoder, pixels = FrozenClip(clip, "small"), images(2, 32)
    found = encoder.encode_image(pixels, 4)[:, 1:]
    tower: Any = clip.visual
    tower.output_tokens = True
    mean, std = torch.tensor(encoder.pixel_mean), torch.tensor(encoder.pixel_std)
    standard = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        states = (tower(standard)[1] @ tower.proj).numpy().reshape(2, 8, 8, -1)
    for image in range(2):
        for number in range(4):
            top, left = 4 * (number // 2), 4 * (number % 2)
            part = states[image, top : top + 4, left : left + 4].mean((0, 1))
            expected = part / np.linalg.norm(part)
            assert np.abs(found[image, number].numpy() - expected).max() < 1e-5


def test_the_parts_of_a_convolutional_tower_add_up_to_its_embedding():
    tower = build_clip(dataclasses.replace(SMALL, vision="convolutions")).visual
    x: Any = torch.randn(2, 3, 32, 32)
    embed, parts = tower.with_tokens(x, 4)  # type: ignore[operator]
    whole = parts.sum((2, 3)) + tower.proj.bias  # type: ignore[operator]
    assert torch.allclose(whole, embed, atol=1e-5)
    assert torch.allclose(tower.with_tokens(x, 2)[1].sum((2, 3)) * 4, parts.sum((2, 3)), atol=1e-5)  # type: ignore[operator]


def test_one_part_of_a_published_tower_is_the_whole_image():
    torch.manual_seed(0)
    tower, x = ImageTower(8), torch.rand(1, 3, 224, 224) - 0.5
    embed, parts = tower.with_tokens(x, 1)
    assert torch.allclose(parts[:, :, 0, 0], embed, atol=1e-4)
    assert torch.allclose(embed, tower(x), atol=1e-6)


def test_other_towers_and_numbers_are_refused():
    encoder = FrozenClip(build_clip(SMALL), "small")
    with pytest.raises(ValueError, match="image_tokens: found 5, expected 1 for z_i alone, or a"):
        encoder.encode_image(images(1, 32), 5)
    with pytest.raises(ValueError, match="found 81, expected at most the places .* 8 x 8"):
        encoder.encode_image(images(1, 32), 81)
    vision = open_clip.CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, image_size=64, head_width=16)  # type: ignore[arg-type]
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    resnet = FrozenClip(open_clip.CLIP(16, vision, text), "resnet")
    with pytest.raises(ValueError, match="found 4 for a ModifiedResNet, expected 1, z_i alone"):
        resnet.encode_image(images(1, 64), 4)
    vision = open_clip.CLIPVisionCfg(timm_model_name="vit_tiny_patch16_224", image_size=224)
    timms = FrozenClip(open_clip.CLIP(16, vision, text), "timm")
    with pytest.raises(ValueError, match="found 4 for a TimmModel, expected 1, z_i alone"):
        timms.encode_image(images(1, 224), 4)


# -- stored ----------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, write_data: Callable) -> Path:
    return write_data(tmp_path, num_shards=2, samples_per_shard=6, image_tokens=4)


def test_tokens_are_stored_beside_the_vectors_and_read_behind_them(data: Path):
    snapshot, encoder = load_snapshot(data / "embeds"), load_clip("tiny:random")
    read = EmbedDataset(snapshot, image_tokens=True).read(np.arange(12)[::-1].copy())
    assert read["image_embed"].shape == (12, 5, encoder.embed_dim)
    assert "image_tokens" not in read
    plain = EmbedDataset(snapshot).read(np.arange(12)[::-1].copy())
    assert np.array_equal(read["image_embed"][:, 0], plain["image_embed"])
    shard = ImageShard(data / "images", "000000")
    from ingest.fetching.decode import stored_picture

    pixels = [encoder.preprocess(stored_picture(shard.image_bytes(row))) for row in range(6)]
    expected = encoder.encode_image(torch.from_numpy(np.stack(pixels)), 4)
    found = torch.from_numpy(read["image_embed"][6:][::-1].astype(np.float32))
    assert (found - expected).abs().max() < 1e-3
    stored = EmbedShard(data / "embeds", "000000")
    assert stored.image_tokens.shape == (6, 0, encoder.embed_dim), "read where they are asked for"


def test_their_moments_are_taken_over_all_of_them_and_merged(data: Path):
    shards = [EmbedShard(data / "embeds", f"00000{n}", image_tokens=True) for n in range(2)]
    tokens = [shard.image_tokens.astype(np.float64).reshape(-1, 64 * 2) for shard in shards]
    tokens = [each.reshape(-1, shards[0].image_embed.shape[1]) for each in tokens]
    statistics = EmbedStatistics.read(data / "embeds")
    assert np.allclose(statistics.token_mean, np.concatenate(tokens).mean(0))
    assert np.allclose(statistics.token_std, np.concatenate(tokens).std(0))
    expected = np.cov(np.concatenate(tokens).T, bias=True)
    assert np.allclose(statistics.token_covariance, expected)
    halves = [
        dataclasses.replace(
            statistics, token_mean=each.mean(0), token_covariance=np.cov(each.T, bias=True)
        )
        for each in tokens
    ]
    merged = EmbedStatistics.merge(halves)
    assert np.allclose(merged.token_mean, statistics.token_mean)
    assert np.allclose(merged.token_covariance, expected)
    np.savez(data / "embeds" / "_statistics.npz", token_std=statistics.token_std)
    with pytest.raises(ValueError, match="found no token_covariance; rerun ingest/embed"):
        EmbedStatistics.read(data / "embeds")


def test_a_mixture_with_a_folder_without_tokens_has_none(data: Path):
    statistics = EmbedStatistics.read(data / "embeds")
    none = {"token_mean": np.zeros(0), "token_covariance": np.zeros((0, 0))}
    without = dataclasses.replace(statistics, **none)
    for pair in ([statistics, without], [without, statistics], [without, without]):
        merged = EmbedStatistics.merge(pair)
        assert merged.token_mean.shape == merged.token_std.shape == (0,)
        assert np.allclose(merged.mean, statistics.mean)


def test_models_of_other_numbers_are_refused_before_training(data: Path, tmp_path: Path):
    prepare_data(prior_run(data, tmp_path / "prior", TrainConfig(), diffusion=PRIOR_OF_FOUR))
    of_nine = dataclasses.replace(PRIOR_OF_FOUR, image_tokens=9)
    with pytest.raises(ValueError, match="diffusion.image_tokens: found 9 over embeddings with 4"):
        prepare_data(prior_run(data, tmp_path / "prior", TrainConfig(), diffusion=of_nine))
    base = DecoderConfig(unet=_networks.UNET, image_tokens=16)
    with pytest.raises(ValueError, match="base.image_tokens: found 16 over embeddings with 4"):
        prepare_data(base_run(data, tmp_path / "base", TrainConfig(), base=base))


def test_a_model_of_tokens_is_fine_tuned_as_itself_alone(data: Path, tmp_path: Path):
    first = prior_run(data, tmp_path / "first", SIX_STEPS, diffusion=PRIOR_OF_FOUR)
    assert launch(prepare_data(first), first.run, build_prior, "prior") == 0
    tuned = dataclasses.replace(first, run=str(tmp_path / "tuned"), init=first.run)
    stored = load_file(exported(first.run) / EMA_NAME)
    started = build_prior(prepare_data(tuned)).model.state_dict()
    assert stored.keys() == started.keys()
    assert all(torch.equal(started[name], value) for name, value in stored.items())
    plain = prior_run(data, tmp_path / "plain", SIX_STEPS, init=first.run)
    with pytest.raises(ValueError, match="init: .*image_tokens: found 4, expected 1; pass"):
        build_prior(prepare_data(plain))


def test_a_folder_keeps_its_number_of_tokens(data: Path):
    images_of, encoder = load_snapshot(data / "images"), load_clip("tiny:random")
    with pytest.raises(ValueError, match="image_tokens = 4, this run has None"):
        open_embeds(data / "embeds", "tiny:random", encoder, images_of)
    with pytest.raises(ValueError, match="image_tokens: found 8"):
        open_embeds(data / "more", "tiny:random", encoder, images_of, image_tokens=8)
    assert not (data / "more").exists()


def test_the_tokens_of_forgotten_images_are_removed(data: Path):
    before = EmbedShard(data / "embeds", "000000", image_tokens=True)
    tokens, keys = before.image_tokens.copy(), before.keys
    stored = ImageShard(data / "images", "000000").image_bytes(2)
    forget(str(data / "images"), Forgotten.of([hashlib.sha256(stored).hexdigest()]))
    after = EmbedShard(data / "embeds", "000000", image_tokens=True)
    assert keys[2] not in after.keys
    assert np.array_equal(after.image_tokens, np.delete(tokens, 2, axis=0))


# -- drawn -----------------------------------------------------------------------------------------


def prior(**changes: Any) -> DiffusionPrior:
    torch.manual_seed(0)
    config = DiffusionPriorConfig(width=32, depth=2, num_heads=4, image_tokens=4, **changes)
    return DiffusionPrior(config, embed_dim=16, text_width=8, context_length=12).eval()


LENGTHS, KEYS = torch.tensor([3, 7, 12, 1, 5]), torch.arange(5)
STATES = torch.randn(5, 12, 8, generator=torch.Generator().manual_seed(3))
TEXT = PriorText(
    text_embed=unit(5, 16, seed=4), text=STATES, token_mask=torch.arange(12) < LENGTHS[:, None]
)


def test_packed_padded_and_cached_priors_of_tokens_agree():
    model, z = prior(), unit(5, 5, 16)
    packing = model.pack(LENGTHS, KEYS)
    rows = STATES[packing.text.sequence, packing.text.position]
    packed = PackedText(text_embed=TEXT.text_embed, text=rows, packing=packing)
    padded, found = model.losses(KEYS, z, TEXT), model.losses(KEYS, z, packed)
    assert set(padded) == {"loss", "embed_loss", "token_loss"}
    for name, value in padded.items():
        assert torch.allclose(value, found[name], atol=1e-5)
    mean = (padded["embed_loss"] + padded["token_loss"]) / 2
    assert torch.allclose(padded["loss"], mean)
    t, drop = torch.full((5,), 500), KEYS % 2 == 0
    with torch.no_grad():
        whole, cached = model(z, t, TEXT, drop), model(z, t, model.prefill(TEXT, drop), drop)
    assert whole.shape == (5, 5, 16) and torch.allclose(whole, cached, atol=1e-5)


def test_the_priors_sequence_token_by_token():
    """[caption | z_t | t | z_i and tokens, noised | a query for each], by a plain transformer."""
    model, x_t = prior(), torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(5))
    z_t, mask = TEXT.text_embed[2:3], TEXT.token_mask[2:3]  # a caption as long as the context
    text = PriorText(text_embed=z_t, text=STATES[2:3], token_mask=mask)
    t = torch.tensor([700])
    with torch.no_grad():
        found = model(x_t, t, text, torch.tensor([False]))[0]
        rows = [model.text_in(STATES[2:3, i])[0] for i in range(12)]
        rows += [model.text_embed_in(model.scale(z_t))[0], model.time_in(t)[0]]
        rows += [model.x_in(x_t[:, 0])[0], *(model.token_in(x_t[0, i]) for i in range(1, 5))]
        rows += list(model.query[0])
        h = torch.stack(rows)[None] + model.position
        causal = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()[None, None]
        for block in model.blocks:
            h = block(h, causal)
        h = model.norm_out(h)[0, -5:]
    assert torch.allclose(found[0], model.out(h[0]), atol=1e-5)
    for i in range(1, 5):
        assert torch.allclose(found[i], model.token_out(h[i]), atol=1e-5)


def test_draws_are_of_unit_norm_and_the_best_by_its_vector():
    model = prior()
    one = PriorSampling(sampler=ddim(1.0), sample_steps=3, best_of=1)
    best = dataclasses.replace(one, best_of=2)
    drawn = model.sample(KEYS, TEXT, best)
    assert drawn.shape == (5, 5, 16)
    assert torch.allclose(drawn.norm(dim=-1), torch.ones(5, 5), atol=1e-5)
    assert torch.allclose(drawn[:2], model.sample(KEYS[:2], TEXT_OF_TWO, best), atol=1e-4)
    first = (model.sample(KEYS, TEXT, one)[:, 0] * TEXT.text_embed).sum(1)
    assert ((drawn[:, 0] * TEXT.text_embed).sum(1) >= first - 1e-5).all()


TEXT_OF_TWO = PriorText(
    text_embed=TEXT.text_embed[:2], text=STATES[:2], token_mask=TEXT.token_mask[:2]
)


def test_a_scale_of_tokens_is_undone():
    model = prior()
    assert model.token_scale is not None
    model.token_scale.set(torch.linspace(-0.1, 0.1, 16), torch.linspace(0.1, 0.4, 16))
    z = unit(3, 5, 16)
    scaled = model._scaled(z)
    assert not torch.allclose(scaled[:, 1:], z[:, 1:] * (scaled[:, :1] / z[:, :1]).mean())
    assert torch.allclose(model._restored(scaled), z, atol=1e-6)


def test_the_paper_samplers_variance_is_the_mean_over_all_that_is_drawn():
    """Of white data: v (1 - a) / (a v + 1 - a), once for z_i and four times for tokens."""
    model = prior()
    assert model.token_scale is not None
    for scale, std in ((model.scale, 0.3), (model.token_scale, 0.1)):
        scale.set(torch.zeros(16), torch.full((16,), std))
        scale.set_spectrum(torch.eye(16) * 0.04)
    a = model.schedule.alpha_bar.double()
    embed, token = (v * (1 - a) / (a * v + 1 - a) for v in (0.04 / 0.3**2, 0.04 / 0.1**2))
    assert torch.allclose(model._x0_variance(), (embed + 4 * token) / 5, rtol=1e-5)


# -- read ------------------------------------------------------------------------------------------


NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {}, "dit": {"network": "dit", "dit": _networks.DIT}
}  # fmt: skip


def decoded(model: Any, z: Tensor, drop: bool = False) -> Tensor:
    condition = dataclasses.replace(_networks.condition(2), image_embed=z)
    t, hidden = torch.tensor([300, 700]), torch.full((2,), drop)
    with torch.no_grad():
        return model(_networks.images(2), t, condition, hidden, torch.zeros(2, dtype=torch.bool))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_decoder_reads_each_token_at_its_place_and_hides_zeros(network: str):
    model = _networks.decoder(image_tokens=4, **NETWORKS[network])
    z = unit(2, 5, _networks.EMBED)
    whole = decoded(model, z)
    for number in range(1, 5):
        other = z.clone()
        other[:, number] = unit(2, _networks.EMBED, seed=9)
        assert not torch.allclose(decoded(model, other), whole, atol=1e-5), number
    swapped = z[:, [0, 2, 1, 3, 4]]
    assert not torch.allclose(decoded(model, swapped), whole, atol=1e-5)
    hidden = z * (torch.arange(5) < 1)[:, None]
    assert torch.equal(decoded(model, hidden), decoded(model, z[:, 0]))
    assert torch.equal(decoded(model, z, drop=True), decoded(model, z[:, 0], drop=True))


def test_a_decoder_without_tokens_takes_the_vector_and_others_are_refused():
    z = unit(2, 5, _networks.EMBED)
    plain = _networks.decoder()
    assert torch.equal(decoded(plain, z), decoded(plain, z[:, 0]))
    with pytest.raises(ValueError, match="decoder: found 4 tokens of each image, expected 9"):
        decoded(_networks.decoder(image_tokens=9), z)
    with pytest.raises(ValueError, match="image_tokens: found 3, expected 1"):
        _networks.decoder(image_tokens=3)
    with pytest.raises(ValueError, match="image_tokens_drop: found 1"):
        _networks.decoder(image_tokens=4, image_tokens_drop=1.0)


def test_chains_of_other_numbers_are_refused_before_a_draw(tmp_path: Path, write_chain: Callable):
    clip = load_clip("tiny:random")
    four = write_chain(tmp_path / "4", clip, 32, image_tokens=(4, 4))
    nine = write_chain(tmp_path / "9", clip, 32, image_tokens=(9, 9))
    with pytest.raises(ValueError, match="prior: found 9 image tokens, expected 4 as .*, or 1"):
        UnClip.load(clip, str(nine["prior"]), str(four["decoder"]))
    with pytest.raises(ValueError, match="guide: image_tokens: found 9, expected 4 or 1"):
        UnClip.load(clip, "", str(four["decoder"]), guide=str(nine["decoder"]))
    plain = write_chain(tmp_path / "1", clip, 32)
    for prior, decoder, guide in ((plain, four, plain), (four, plain, four), (four, four, plain)):
        UnClip.load(clip, str(prior["prior"]), str(decoder["decoder"]), (), str(guide["decoder"]))


def test_edits_that_turn_the_vector_find_the_start_under_it_alone(
    data: Path, tmp_path: Path, write_chain: Callable, monkeypatch: pytest.MonkeyPatch
):
    clip, found = load_clip("tiny:random"), []
    runs = write_chain(tmp_path / "runs", clip, 32, image_tokens=(1, 4))
    chain = UnClip.load(clip, "", str(runs["decoder"]))
    (tmp_path / "a.png").write_bytes(ImageShard(data / "images", "000000").image_bytes(0))
    sampling = sampling_of({"decoder_steps": 2, "precision": "fp32"})
    options: Any = {"images": (str(tmp_path / "a.png"),), "num_threads": 1}
    real = latents.encode

    def encode(*arguments: Any, **more: Any) -> Latents:
        found.append(real(*arguments, **more))
        return found[-1]

    monkeypatch.setattr(latents, "encode", encode)
    for edit, dims in (
        (edits.TextDiff(**options, caption="a hat", count=2), 2),
        (edits.Pca(**options, components=(2,), embeds=str(data / "embeds")), 2),
        (edits.Variations(**options, count=1), 3),
    ):
        edit.draw(chain, sampling)
        assert found[-1].image_embed.ndim == dims
    pixels, z = pixels_of([Image.open(tmp_path / "a.png")], 32), found[0].image_embed
    start = chain.base.invert(pixels, chain.condition(None, z), 2, sampling.decoder.spacing)
    assert torch.equal(found[0].start, start)


def test_training_hides_tokens_of_the_share_that_it_is_given():
    z, keys = unit(1, 5, _networks.EMBED).expand(2000, -1, -1), torch.arange(2000)
    image = torch.zeros(2000, 3, 1, 1)
    for share, noise in ((0.0, 0.0), (0.3, 0.0), (0.3, 0.2)):
        model = _networks.decoder(image_tokens=4, image_tokens_drop=share, embed_noise=noise)
        seen = model._noise(keys, image, z)[3]
        hidden = (seen[:, 1:] == 0).all(-1)
        assert (hidden.all(1) == hidden.any(1)).all(), "all of an image's, or none"
        assert abs(hidden[:, 0].float().mean() - share) < 0.04
        kept = seen[:, 1:][~hidden]
        assert torch.allclose(kept.norm(dim=-1), torch.ones(len(kept)), atol=1e-5)
        assert torch.equal(kept, z[:, 1:][~hidden]) == (noise == 0)


def test_edits_turn_each_token_or_leave_tokens_out():
    start = torch.zeros(1, 3, 4, 4)
    a, b = (Latents(image_embed=unit(1, 5, 8, seed=n), start=start) for n in (1, 2))
    between = blends(a, b, [0.0, 0.5, 1.0], noise=False).image_embed
    assert torch.allclose(between.norm(dim=-1), torch.ones(3, 5), atol=1e-5)
    assert torch.allclose(between[0], a.image_embed[0], atol=1e-6)
    middle = F.normalize(a.image_embed[0] + b.image_embed[0], dim=-1)
    assert torch.allclose(between[1], middle, atol=1e-5)
    assert pca_images(a, torch.zeros(8), torch.eye(8), [8]).image_embed.shape == (1, 8)


def test_costs_count_tokens():
    """By hand: 6 FLOPs of training for each multiply-accumulate of a product."""
    width, words, k, embed = 16, 8, 4, _networks.EMBED
    options: dict[str, Any] = {"network": "dit", "dit": _networks.DIT}
    tokens = (_networks.SIZE // 2) ** 2 + 4 + words  # patches, z_i's and the caption's
    hidden = 8 * width // 3 // 8 * 8
    macs = 2 * k * width * (4 * width + 3 * hidden)  # two blocks
    macs += 2 * 2 * width * ((tokens + k) ** 2 - tokens**2)  # attention
    macs += k * embed * 8 + k * 8 * width  # into the context, and into the network
    with_tokens, without = (
        training_flops(_networks.decoder(image_tokens=count, **options), words)
        for count in (k, 1)
    )
    assert with_tokens - without == pytest.approx(6 * macs, rel=0.005)

    width, embed, tokens = 32, 16, words + 2 + 2 * (1 + k)
    macs = 2 * tokens * 12 * width**2 + 2 * 2 * width * tokens**2  # two blocks
    macs += words * 8 * width + embed * width + 2 * width**2  # caption, z_t, t
    macs += 2 * (1 + k) * embed * width  # what is noised, in and out
    assert training_flops(prior(), words) == pytest.approx(6 * macs, rel=0.005)


def test_diffusers_layout_has_no_tokens(tmp_path: Path):
    with pytest.raises(ValueError, match="image_tokens"):
        decoder_to_diffusers(_networks.decoder(image_tokens=4), tmp_path / "decoder")
    with pytest.raises(ValueError, match="image_tokens"):
        prior_to_diffusers(prior(qk_norm=False), tmp_path / "prior")
