"""Readers give what the shards hold, in whatever order it is asked for."""

import dataclasses
import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from _runs import prior_run
from PIL import Image
from safetensors.torch import save_file

from ingest.shapes import Pair, make_pairs
from ingest.shards import (
    EmbedShard,
    ImageShard,
    Snapshot,
    load_snapshot,
    publish_snapshot,
    write_manifest,
)
from models.clip import preprocess
from models.diffusion import keyed_random
from models.diffusion.keyed_random import sample_keys
from models.tokenizers import tokenizer
from training.config import DecoderRunConfig, TrainConfig
from training.data import demo_data, inputs
from training.data.dataloader import Batch, KeyedDataset, ThreadedLoader
from training.data.datasets import EmbedDataset, ImageDataset, MixedDataset, PairDataset
from training.data.sampler import Plan, PlanSampler
from training.tasks import decoder as jobs
from training.tasks import prior as prior_job

SIZE, PER_SHARD = 32, 8
INDEX = np.array([17, 0, 7, 8, 0, 23])  # three shards, one row twice


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Path:
    """Three small shards of drawn images, and their embeddings."""
    return write_data(tmp_path_factory.mktemp("data"), num_shards=3, samples_per_shard=PER_SHARD)


def snapshots(data: Path) -> tuple[Snapshot, Snapshot]:
    return load_snapshot(data / "images"), load_snapshot(data / "embeds")


def test_embeddings_come_in_the_order_asked_for(data: Path):
    """As stored from reader and feed, in float32 on the device: the same numbers."""
    reader = EmbedDataset(load_snapshot(data / "embeds"))
    found = reader.read(INDEX)
    shards = [EmbedShard(data / "embeds", f"{n:06d}") for n in range(3)]
    plan = Plan(data_sets=reader.data_sets, global_batch_size=8, seed=0)
    dataset = KeyedDataset(samples=reader, seed=0)
    (batch,) = ThreadedLoader(dataset=dataset, sampler=PlanSampler(plan=plan)).read(0)
    order = np.sort(plan.slice(0).index)  # a batch comes by index
    for name in ("image_embed", "text_embed", "tokens"):
        stored = np.concatenate([getattr(shard, name) for shard in shards])
        assert found[name].dtype == stored.dtype
        assert np.array_equal(found[name], stored[INDEX])
        assert np.array_equal(batch[name].numpy(), stored[order])
    assert batch["image_embed"].dtype == torch.float16
    there = batch.to(torch.device("cpu"))
    assert there["image_embed"].dtype == torch.float32 and there["tokens"].dtype == torch.int32
    assert torch.equal(there["image_embed"], batch["image_embed"].float())


def test_images_are_decoded_and_cropped_as_clip_sees_them(data: Path):
    reader = ImageDataset(load_snapshot(data / "images"), SIZE)
    for _ in range(2):  # decoded, then kept
        found = reader.read(INDEX)["image"]
        assert found.shape == (len(INDEX), 3, SIZE, SIZE) and found.dtype == np.uint8
        for i, image in zip(INDEX, found, strict=True):
            shard = ImageShard(data / "images", f"{i // PER_SHARD:06d}")
            with Image.open(io.BytesIO(shard.image_bytes(i % PER_SHARD))) as expected:
                assert np.array_equal(image, preprocess(expected, SIZE))


def test_captions_are_tokenised_beside_their_images(data: Path):
    tokenize = tokenizer(16, 512)
    reader = ImageDataset(load_snapshot(data / "images"), SIZE, tokenize=tokenize)
    shards = [ImageShard(data / "images", f"{n:06d}") for n in range(3)]
    captions = [shards[i // PER_SHARD].caption(i % PER_SHARD) for i in INDEX]
    found = reader.read(INDEX)
    assert np.array_equal(found["tokens"], tokenize(captions))
    assert np.array_equal(found["image"], ImageDataset(load_snapshot(data / "images"), SIZE).read(
        INDEX)["image"])  # fmt: skip


def test_a_joined_row_is_one_sample(data: Path):
    """Encoding the joined image again gives the joined embedding."""
    import torch

    from models.convert.runs import load_clip

    clip = load_clip("tiny:random")
    found = PairDataset(*snapshots(data), clip.image_size).read(INDEX)
    again = clip.encode_image(torch.from_numpy(found["image"])).numpy()
    np.testing.assert_allclose(found["image_embed"], again, atol=2e-3)
    text = clip.encode_text(torch.from_numpy(found["tokens"]))[0].numpy()
    np.testing.assert_allclose(found["text_embed"], text, atol=2e-3)


def test_embeddings_of_fewer_shards_read_those_alone(data: Path):
    images, embeds = snapshots(data)
    part = dataclasses.replace(embeds, shards=embeds.shards[1:])
    found = PairDataset(images, part, SIZE).read(np.array([0]))
    expected = ImageDataset(images, SIZE).read(np.array([PER_SHARD]))
    assert np.array_equal(found["image"], expected["image"])


def test_embeddings_without_their_images_are_refused(data: Path):
    images, embeds = snapshots(data)
    fewer = dataclasses.replace(images, shards=images.shards[:2])
    with pytest.raises(ValueError, match="shard 000002: found no such shard, expected 8 samples"):
        PairDataset(fewer, embeds, SIZE)
    short = dataclasses.replace(images.shards[2], num_samples=7)
    shorter = dataclasses.replace(images, shards=(*images.shards[:2], short))
    with pytest.raises(ValueError, match="shard 000002: found 7 samples, expected 8"):
        PairDataset(shorter, embeds, SIZE)


def test_shards_of_other_keys_are_refused(data: Path):
    images, embeds = snapshots(data)
    swapped = tuple(
        dataclasses.replace(entry, name=other.name)
        for entry, other in zip(embeds.shards, reversed(embeds.shards), strict=True)
    )
    # entries whose digests belong to another name are refused on opening
    with pytest.raises(ValueError, match="the snapshot says|keys differ"):
        PairDataset(images, dataclasses.replace(embeds, shards=swapped), SIZE)


# -- several data sets, mirrored images ------------------------------------------------------------


def test_a_mixture_reads_each_data_set_by_its_own_numbers(data: Path):
    images, embeds = snapshots(data)
    whole = PairDataset(images, embeds, SIZE)
    part = PairDataset(images, dataclasses.replace(embeds, shards=embeds.shards[1:]), SIZE)
    sizes = whole.data_sets[0], part.data_sets[0]
    assert MixedDataset([whole, part], weighted=True).data_sets == sizes
    both = MixedDataset([whole, part], weighted=False)
    assert both.data_sets == ((*sizes[0], *sizes[1]),)
    index = np.array([3, 24, 23, 39, 0, 24])
    expected = whole.read(np.array([3, 8, 23, 23, 0, 8]))
    for name, column in both.read(index).items():
        assert np.array_equal(column, expected[name]), name


def test_data_sets_of_two_encoders_are_not_mixed(data: Path, tmp_path: Path, write_data: Callable):
    other = tmp_path / "embeds"
    shutil.copytree(data / "embeds", other)
    manifest = other / "_manifest.json"
    manifest.write_text(
        re.sub('"encoder_id": ".*?"', '"encoder_id": "another"', manifest.read_text())
    )
    with pytest.raises(ValueError, match="found embeddings of encoder another"):
        inputs.encoder_of([str(data / "embeds"), str(other)], "")


def test_training_holds_no_vision_tower(data: Path):
    encoder = inputs.encoder_of([str(data / "embeds")], "")
    assert not any("visual" in name for name, _ in encoder.named_parameters())
    assert any("transformer" in name for name, _ in encoder.named_parameters())


def test_weights_are_one_for_each_data_set(data: Path):
    reader = ImageDataset(load_snapshot(data / "images"), SIZE)
    assert inputs.mixed([reader], ()) is reader
    for readers, weights in (([reader], (1.0, 2.0)), ([reader, reader], (1.0,))):
        with pytest.raises(ValueError, match="data.weights: found"):
            inputs.mixed(readers, weights)


@pytest.mark.parametrize("flip", [False, True])
def test_images_are_cropped_before_they_are_sent_as_they_would_be_after(flip: bool):
    """Byte for byte what indices on a device would cut out of the whole images, as pixels."""
    keys = sample_keys(0, torch.zeros(9, dtype=torch.int64), torch.arange(9))
    image = torch.randint(0, 256, (9, 3, 20, 20), dtype=torch.uint8)
    batch = Batch(keys=keys, weight=torch.ones(9), num_real=9, columns={"image": image})
    corner = (keyed_random.uniform(keys, "crop", (2,)) * 5).long()
    assert corner.min() == 0 and corner.max() == 4
    rows, columns = corner[:, :1] + torch.arange(16), corner[:, 1:] + torch.arange(16)
    expected = jobs.pixels(image).permute(0, 2, 3, 1)[
        torch.arange(9)[:, None, None], rows[:, :, None], columns[:, None, :]
    ].permute(0, 3, 1, 2)
    if flip:
        expected = jobs.keyed_flips(expected, keys)
    found = jobs.crop_images(16, flip, batch)["image"]
    assert found.dtype == torch.uint8 and torch.equal(jobs.pixels(found), expected)
    assert found.stride() == expected.stride()  # in which order losses add up


def test_a_sample_is_mirrored_by_its_key_alone():
    keys = sample_keys(0, torch.zeros(400, dtype=torch.int64), torch.arange(400))
    image = torch.rand(400, 3, 2, 5)
    found = jobs.keyed_flips(image, keys)
    mirrored = (found == image.flip(-1)).flatten(1).all(1)
    assert torch.equal(found[~mirrored], image[~mirrored])
    assert 150 < mirrored.sum() < 250
    assert torch.equal(jobs.keyed_flips(image[7:9], keys[7:9]), found[7:9])


def test_what_embeddings_describe_is_not_mirrored(data: Path, tmp_path: Path):
    config = DecoderRunConfig(embeds=(str(data / "embeds"),), run=str(tmp_path), flip=True)
    with pytest.raises(ValueError, match="flip: found true for stage base, expected false"):
        jobs.build_decoder(config)


# -- which snapshot, which part of it --------------------------------------------------------------


def test_a_run_pins_its_snapshot(data: Path, tmp_path: Path):
    run, root = tmp_path / "run", tmp_path / "images"
    run.mkdir()
    demo_data.draw_images(root, num_shards=2, samples_per_shard=PER_SHARD)
    pinned = inputs.pin_snapshots(str(run), "images", [str(root)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.data.demo_data.write_manifest", lambda *args: None)
        demo_data.draw_images(root, num_shards=3, samples_per_shard=PER_SHARD)
    assert load_snapshot(root).digest != pinned[0].digest
    assert inputs.pin_snapshots(str(run), "images", [str(root)]) == pinned


@pytest.mark.parametrize("pin", [
    lambda run, root: inputs.pin_snapshots(run, "images", [root]),
    lambda run, root: inputs.pin_statistics(run, [root], ()),
])  # fmt: skip
def test_a_data_set_without_samples_is_told_as_such(pin: Callable, tmp_path: Path):
    write_manifest(tmp_path, "images", {})
    publish_snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: found a data set without samples"):
        pin(str(tmp_path / "run"), str(tmp_path))


def test_parts_share_out_the_shards(data: Path):
    whole = load_snapshot(data / "images")
    for n in (1, 2, 3):
        parts = [inputs.part_of(whole, f"{k}/{n}").shards for k in range(1, n + 1)]
        assert sum(parts, ()) == whole.shards and all(parts)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1/4", "1", "a/b", "1/2/3"])
def test_a_part_that_is_none_is_refused(data: Path, part: str):
    with pytest.raises(ValueError, match=f"part: found '{part}'"):
        inputs.part_of(load_snapshot(data / "images"), part)


def test_the_statistics_of_the_prior_are_those_of_its_embeddings(data: Path, tmp_path: Path):
    job = prior_job.build_prior(prior_run(data, tmp_path, TrainConfig()))
    stored = job.build_dataset().read(np.arange(24))["image_embed"].astype(np.float32)
    buffers = {name: buffer.numpy() for name, buffer in job.model.named_buffers()}
    np.testing.assert_allclose(buffers["scale.mean"], stored.mean(0), atol=1e-4)
    np.testing.assert_allclose(buffers["scale.std"], stored.std(0), atol=1e-3)


def test_another_encoder_than_that_of_the_embeddings_is_refused(data: Path, tmp_path: Path):
    import torch

    from models.convert.runs import load_clip

    state = {name: t.clone() for name, t in load_clip("tiny:random").clip.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(())
    state["ln_final.bias"] = torch.ones_like(state["ln_final.bias"])
    save_file(state, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="found embeddings of encoder tiny@.*, expected tiny@"):
        inputs.encoder_of([str(data / "embeds")], f"tiny:{tmp_path / 'other.safetensors'}")


# -- images smaller than what is trained -----------------------------------------------------------


def prepared(images: Path, embeds: Path, size: int) -> None:
    inputs.prepare_data(
        DecoderRunConfig(images=(str(images),), embeds=(str(embeds),), image_size=size)
    )


@pytest.fixture
def of_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards of four: 64 x 64, 40 x 64, 64 x 30 and 48 x 48 px, then four of 8 x 8."""

    def resized(*args: object) -> Iterator[Pair]:
        sizes = [(64, 64), (40, 64), (64, 30), (48, 48), *([(8, 8)] * 4)]
        for pair, size in zip(make_pairs(8, 0, "train"), sizes, strict=True):
            file = io.BytesIO()
            Image.open(io.BytesIO(pair.image_bytes)).resize(size).save(file, "JPEG")
            yield dataclasses.replace(pair, image_bytes=file.getvalue())

    monkeypatch.setattr(demo_data, "make_pairs", resized)
    demo_data.draw_images(tmp_path / "images", num_shards=2, samples_per_shard=4)
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (30, ""),
        (48, "2 of the first shard's 4 images are smaller than 48 px, down to 30 px"),
        (64, "3 of the first shard's 4 images are smaller than 64 px, down to 30 px"),
    ],
)
def test_images_that_will_be_enlarged_are_counted_on_one_line(
    size: int, message: str, of_sizes: Path, data: Path, capsys: pytest.CaptureFixture
):
    prepared(of_sizes, data / "embeds", size)
    said = capsys.readouterr().out
    assert message in said and said.count("\n") == bool(message)


def test_a_size_that_no_image_has_is_refused(of_sizes: Path, data: Path):
    with pytest.raises(ValueError, match="image_size: found 65 px over images of at most 64 px"):
        prepared(of_sizes, data / "embeds", 65)
