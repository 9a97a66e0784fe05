"""From pixels to committed embeddings: open_clip's numbers, whole shards only, bad ones named."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import ray
import torch
from PIL import Image

from cluster.base.ray_session import GROUPS
from ingest import embed
from ingest.embed import EmbedConfig
from ingest.embedding.encode import (
    Assembler,
    Chunk,
    commit_shard,
    encode_chunk,
    encode_shard,
    open_embeds,
    read_chunks,
)
from ingest.embedding.ray_encoders import EncoderPool
from ingest.shards import (
    Attempt,
    EmbedShard,
    ImageShard,
    Sample,
    ShardEntry,
    load_snapshot,
    publish_snapshot,
    write_image_shard,
    write_manifest,
)
from ingest.store.commits import committed
from models.clip import FrozenClip
from models.convert.runs import load_clip
from training.data import demo_data

SIZES = [(300, 200), (224, 224), (97, 400), (640, 480), (225, 224), (50, 60)]


def write_shard(root: Path, pictures: list[bytes], name: str = "000000") -> ShardEntry:
    """Commit a shard of pictures, and publish; return its entry."""
    keys = [f"{name}{i:03d}" for i in range(len(pictures))]
    captions = [f"ein Bär und {i} blue squares" for i in range(len(pictures))]
    pairs = list(zip(keys, pictures, captions, strict=True))
    sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), 8)
    rows = [
        {"key": key, "url": f"u{key}", "caption": caption, "status": "success", "error": None,
         "sha256": key, **sizes}
        for key, _, caption in pairs
    ]  # fmt: skip
    samples = [Sample(key=k, image_bytes=b, caption=c, json={}) for k, b, c in pairs]
    write_manifest(root, "images", {})
    with Attempt(root, name) as attempt:
        stored = write_image_shard(attempt.path, name, samples, rows)
        attempt.commit(num_samples=stored, counts={"stored": stored}, config_hash="c")
    return next(e for e in publish_snapshot(root).shards if e.name == name)


def photographs() -> list[bytes]:
    found = []
    for seed, size in enumerate(SIZES):
        noise = np.random.default_rng(seed).integers(0, 255, (size[1] // 8, size[0] // 8, 3))
        image = Image.fromarray(noise.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=92)
        found.append(file.getvalue())
    return found


@pytest.fixture(scope="module")
def encoder() -> FrozenClip:
    return load_clip("tiny:random")


SMALL = {"embed_dim": 32, "text_cfg": {"context_length": 77, "width": 64, "heads": 2, "layers": 1}}
SMALL_VIT = {**SMALL, "vision_cfg": {"layers": 1, "width": 64, "patch_size": 32}}
SMALL_RESNET = {**SMALL, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "patch_size": None}}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("ViT-B-32", SMALL_VIT), ("RN50", SMALL_RESNET),
     pytest.param("ViT-B-32", {}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_embeddings_are_those_of_open_clip(name: str, sizes: dict, tmp_path: Path):
    """Its model, its preprocessing and its tokenizer on the same files."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs, _, transform = open_clip.create_model_and_transforms(name, **sizes)
    assert isinstance(theirs, open_clip.CLIP)
    encoder = FrozenClip(theirs, name)
    entry = write_shard(tmp_path / "images", photographs())
    images = load_snapshot(tmp_path / "images")
    shard = ImageShard(images.root, entry.name)
    files = [Image.open(io.BytesIO(shard.image_bytes(i))) for i in range(len(shard))]
    captions = [shard.caption(i) for i in range(len(shard))]
    with torch.no_grad():
        pixels = torch.stack([transform(file) for file in files])  # type: ignore[operator]
        tokens = open_clip.get_tokenizer(name)(captions)
        expected = {
            "image_embed": theirs.encode_image(pixels, normalize=True).numpy(),
            "text_embed": theirs.encode_text(tokens, normalize=True).numpy(),
        }
    chunk = next(read_chunks(images.root, entry, encoder.preprocessing, 64))
    assert np.array_equal(chunk.tokens, tokens.numpy())
    found = encode_chunk(encoder, chunk)
    open_embeds(tmp_path / "embeds", name, encoder, images)
    encode_shard(encoder, images, entry, tmp_path / "embeds", 64)
    stored = EmbedShard(tmp_path / "embeds", entry.name)
    for part, right in expected.items():
        assert np.abs(getattr(found, part) - right).max() < 1e-5
        assert np.abs(getattr(stored, part).astype(np.float32) - right).max() < 5e-4
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encode_chunk(encoder, chunk)
    for part, right in expected.items():
        assert np.abs(getattr(rounded, part) - right).max() < 1e-2


def test_an_image_that_cannot_be_decoded_has_no_embedding_and_the_rest_has(encoder, tmp_path):
    pictures = photographs()
    pictures[1], pictures[4] = pictures[1][:100], b"<html>"
    entry = write_shard(tmp_path / "images", pictures)
    images = load_snapshot(tmp_path / "images")
    open_embeds(tmp_path / "embeds", "tiny:random", encoder, images)
    commit = encode_shard(encoder, images, entry, tmp_path / "embeds", 4)
    assert commit.num_samples == 6 and commit.counts == {"embedded": 4, "undecodable": 2}
    shard = EmbedShard(tmp_path / "embeds", entry.name)
    norms = np.linalg.norm(np.asarray(shard.image_embed, np.float32), axis=1)
    assert np.allclose(norms, [1, 0, 1, 1, 0, 1], atol=1e-3)
    assert shard.keys == ImageShard(images.root, entry.name).keys


def encoded(shard: str, start: int, count: int, total: int) -> Chunk:
    rng = np.random.default_rng(start)
    embeds = rng.normal(size=(2, count, 4)).astype(np.float32)
    embeds /= np.linalg.norm(embeds, axis=2, keepdims=True)
    return Chunk(
        shard=shard, start=start, total=total, bad=np.zeros(count, bool),
        tokens=np.full((count, 3), start, np.int32),
        image_embed=embeds[0], text_embed=embeds[1],
    )  # fmt: skip


@pytest.mark.parametrize("image_tokens", [1, 4])
@pytest.mark.parametrize("pictures", [[], [b"no picture", b"none"]])
def test_a_shard_without_a_picture_that_can_be_decoded_is_empty(
    encoder, pictures: list[bytes], image_tokens: int, tmp_path: Path
):
    entry = write_shard(tmp_path / "images", pictures)
    images = load_snapshot(tmp_path / "images")
    root = tmp_path / "embeds"
    open_embeds(root, "tiny:random", encoder, images, image_tokens=image_tokens)
    commit = encode_shard(encoder, images, entry, root, 4, image_tokens=image_tokens)
    assert commit.num_samples == len(pictures)
    assert commit.counts["embedded"] == 0
    assert not EmbedShard(root, entry.name).image_embed.any()


def test_a_shard_is_whole_when_its_last_chunk_came_whatever_their_order():
    assembler = Assembler()
    a, b = encoded("a", 0, 4, 6), encoded("b", 0, 2, 2)
    assert assembler.add(encoded("a", 4, 2, 6)) is None
    assert assembler.add(encoded("a", 4, 2, 6)) is None  # from a task that was tried again
    assert assembler.add(b) == [b]
    whole = assembler.add(a)
    assert whole is not None and [chunk.start for chunk in whole] == [0, 4]
    empty = encoded("c", 0, 0, 0)
    assert assembler.add(empty) == [empty]


@pytest.mark.parametrize(("factor", "part"), [(np.nan, "image"), (1.01, "image"), (0.0, "text")])
def test_embeddings_that_are_not_of_unit_norm_are_not_committed(tmp_path, factor, part):
    entry = write_shard(tmp_path / "images", photographs())
    whole = [encoded("000000", 0, 4, 6), encoded("000000", 4, 2, 6)]
    getattr(whole[1], f"{part}_embed")[1] *= factor
    problem = "finite" if np.isnan(factor) else "of unit norm"
    with pytest.raises(ValueError, match=f"{part} embeddings are not {problem}"):
        commit_shard(tmp_path / "embeds", str(tmp_path / "images"), entry, whole)
    assert committed(tmp_path / "embeds") == {}


def test_a_shard_that_cannot_be_read_is_one_chunk_that_says_why(encoder, tmp_path):
    entry = write_shard(tmp_path / "images", photographs())
    (tmp_path / "images" / "000000.tar").write_bytes(b"short")
    chunks = list(read_chunks(str(tmp_path / "images"), entry, encoder.preprocessing, 4))
    assert len(chunks) == 1 and "000000.tar has 5 bytes" in chunks[0].problem


@pytest.mark.parametrize(
    ("gpus", "groups", "begin", "each"),
    [(0, False, 4, 0), (1, False, 1, 1), (3, False, 3, 1), (4, False, 4, 1), (9, False, 4, 1),
     (0, True, 4, 1), (1, True, 4, 1)],
)  # fmt: skip
def test_an_encoder_has_a_gpu_of_its_own_wherever_there_are_any(
    gpus: int, groups: bool, begin: int, each: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
):  # fmt: skip
    """Groups of nodes start what is asked for; elsewhere as many encoders begin as have a GPU."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {GROUPS: 1.0} if groups else {})
    assert EncoderPool(clip="", batch_size=1, num_actors=4).actors(gpus) == (begin, each)
    output = capsys.readouterr().out
    assert bool(output) is (begin < 4)
    assert not output or f"{gpus} of --num-actors 4 encoders, one for each GPU" in output


@pytest.mark.parametrize("num_actors", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_job_embeds_what_is_pending_names_what_is_broken_and_is_cheap_to_repeat(
    num_actors: int, tmp_path, capsys
):
    """In this process and on Ray: the same bits."""
    images, out = tmp_path / "images", tmp_path / "embeds"
    demo_data.draw_images(images, num_shards=4, samples_per_shard=10)
    with tarfile.open(images / "000003.tar") as tar:
        offset = next(m.offset_data for m in tar if m.name.endswith(".jpg"))
    data = bytearray((images / "000003.tar").read_bytes())
    data[offset : offset + 40] = bytes(40)  # one picture that is none any more
    (images / "000003.tar").write_bytes(data)
    kept = (images / "000001.tar").read_bytes()
    (images / "000001.tar").write_bytes(kept[:-512])
    config = EmbedConfig(
        images=str(images), clip="tiny:random", out=str(out), batch_size=4, num_threads=1,
        num_actors=num_actors,
    )
    assert embed.main(config) == 1
    output = capsys.readouterr().out
    for message in ("failed: ", "000001.tar has", "undecodable: 000000030"):
        assert message in output
    assert list(committed(out)) == ["000000", "000002", "000003"]
    record = json.loads((out / "_quarantine" / "000001.json").read_text())
    assert "000001.tar has" in record["problem"]
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    (images / "000001.tar").write_bytes(kept)
    assert embed.main(config) == 0
    assert "4 shards, 3 done, 1 to go" in capsys.readouterr().out
    assert not list((out / "_quarantine").iterdir())
    assert {path: path.stat().st_mtime_ns for path in before} == before
    demo_data.embed_here(str(images), tmp_path / "here", "tiny:random", batch_size=4)
    ours = {name: commit.digest for name, commit in committed(out).items()}
    assert ours == {name: commit.digest for name, commit in committed(tmp_path / "here").items()}
    manifest = json.loads((out / "_manifest.json").read_text())
    with pytest.raises(ValueError, match="encoder_id|clip"):
        embed.main(replace(config, clip="ViT-B-32:random"))
    assert json.loads((out / "_manifest.json").read_text()) == manifest
