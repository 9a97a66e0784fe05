"""Several captions a sample: stored and embedded each, drawn by the sample's key alone."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from _runs import HERE, base_run, clip_run, flip, prior_run, up_run

from ingest.embedding.encode import encode_shard, open_embeds
from ingest.embedding.publish import publish_embeds
from ingest.shapes import make_pairs
from ingest.shards import (
    Attempt,
    Commit,
    EmbedShard,
    ImageShard,
    Sample,
    committed,
    load_snapshot,
    publish_snapshot,
    write_image_shard,
    write_manifest,
)
from ingest.store.maintenance import forget, verify
from ingest.store.removal import Forgotten
from models.configs import DecoderConfig
from models.convert.runs import load_clip
from models.diffusion.keyed_random import sample_keys, uniform
from models.tokenizers import tokenizer
from training.config import DataConfig, RunConfig, TrainConfig
from training.data.captions import CaptionDraw
from training.data.dataloader import Batch, make_loader
from training.data.datasets import ColumnDataset
from training.data.inputs import prepare_data
from training.runs.run_folder import prepare_run
from training.tasks.clip import clip_dataset
from training.tasks.decoder import decoder_dataset
from training.tasks.prior import prior_dataset

SHARDS, PER_SHARD = 3, 9
WEIGHTS = {"caption": 0.2, "alt": 0.3, "more": 0.5}
CAPTIONS = ",".join(f"{name}:{weight}" for name, weight in WEIGHTS.items())
COLUMNS = ("alt", "more")
TRAIN = TrainConfig.of(**HERE, num_steps=9, global_batch_size=12, precision="fp32", seed=5)


def texts_of(i: int) -> dict[str, list[str]]:
    """Sample i's captions: it may lack either column, or both."""
    more = [f"number {i}, as {n} of {i % 4} says" for n in range(i % 4)]
    return {"alt": [f"another text of {i}."] if i % 3 else [], "more": more}


def write_images(root: Path) -> None:
    kept = pa.schema([("alt", pa.string()), ("n", pa.int64()), ("more", pa.list_(pa.string()))])
    write_manifest(root, "images", {})
    pairs = list(make_pairs(SHARDS * PER_SHARD, 0, "train"))
    sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), 64)
    for shard in range(SHARDS):
        rows, samples = [], []
        for i in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
            key, image, texts = f"{i:09d}", pairs[i].image_bytes, texts_of(i)
            samples.append(Sample(key=key, image_bytes=image, caption=f"main {i}", json={}))
            rows.append({
                "key": key, "url": f"http://a/{i}", "caption": f"main {i}", "status": "success",
                "error": None, "sha256": hashlib.sha256(image).hexdigest(), **sizes, "n": i,
                "alt": next(iter(texts["alt"]), None if i % 2 else ""),
                "more": [None, "", *texts["more"]] if i % 4 else None,
            })  # fmt: skip
            failed = {"key": f"{i:09d}x", "status": "failed", "error": "timeout", "alt": "of none"}
            rows.append({**dict.fromkeys(rows[0]), **failed})
        with Attempt(root, f"{shard:06d}") as attempt:
            stored = write_image_shard(attempt.path, f"{shard:06d}", samples, rows, kept=kept)
            attempt.commit(num_samples=stored, counts={"stored": stored}, config_hash="c")
    publish_snapshot(root)


def embed(root: Path, name: str, captions: tuple[str, ...]) -> None:
    encoder, images = load_clip("tiny:random"), load_snapshot(root / "images")
    open_embeds(root / name, "tiny:random", encoder, images, captions)
    for entry in images.shards:
        encode_shard(encoder, images, entry, root / name, 4, captions)
    publish_embeds(root / name)


def write_captioned(root: Path) -> Path:
    write_images(root / "images")
    embed(root, "embeds", COLUMNS)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose samples have further captions, and the embeddings of all."""
    return write_captioned(tmp_path_factory.mktemp("data"))


# -- what is stored --------------------------------------------------------------------------------


def test_each_further_caption_has_the_embedding_that_it_has_alone(data: Path):
    encoder = load_clip("tiny:random")
    for number, column in [(number, column) for number in range(SHARDS) for column in COLUMNS]:
        images = ImageShard(data / "images", f"{number:06d}")
        shard = EmbedShard(data / "embeds", f"{number:06d}", captions=COLUMNS)
        assert images.caption_columns == ["alt", "more"]
        further = shard.further(column)
        texts = [texts_of(number * PER_SHARD + row)[column] for row in range(PER_SHARD)]
        assert images.further_captions(column) == shard.further_captions(column) == texts
        assert further.counts.tolist() == [len(each) for each in texts]
        starts = zip(further.starts, texts, strict=True)
        for place, text in [(s + n, text) for s, each in starts for n, text in enumerate(each)]:
            tokens = encoder.tokenize([text])
            alone = encoder.encode_text(torch.from_numpy(tokens))[0][0].numpy()
            assert np.array_equal(further.tokens[place], tokens[0])
            assert np.abs(further.text_embed[place].astype(np.float32) - alone).max() < 1e-3
        assert images.further_captions("absent") == [[]] * PER_SHARD
        assert shard.further_captions("absent") == [[]] * PER_SHARD
        assert not shard.further("absent").counts.any()


def test_embeddings_of_the_main_caption_alone_are_the_files_they_were(data: Path, tmp_path: Path):
    """The same bytes with and without further captions, and none of their files."""
    (tmp_path / "images").symlink_to(data / "images")
    embed(tmp_path, "embeds", ())
    plain, both = (committed(root / "embeds") for root in (tmp_path, data))
    for name, commit in plain.items():
        assert set(commit.files) == {
            f"{name}.{end}" for end in ("image_embed.npy", "text_embed.npy", "tokens.npy",
                                        "keys.parquet")
        }  # fmt: skip
        for file, entry in commit.files.items():
            assert file.endswith(".parquet") or entry == both[name].files[file]
        table = pq.read_table(tmp_path / "embeds" / f"{name}.keys.parquet")
        assert table.column_names == ["row", "key", "caption"]
    manifest = json.loads((tmp_path / "embeds" / "_manifest.json").read_text())
    assert "captions" not in manifest
    with pytest.raises(ValueError, match="captions = None, this run has"):
        embed(tmp_path, "embeds", ("alt",))


@pytest.mark.parametrize("columns", [("alt", "long"), ("n",), ("caption",), ("alt", "alt")])
def test_a_column_without_captions_is_not_embedded(
    data: Path, tmp_path: Path, columns: tuple[str, ...], run_here: Callable
):
    code, _, errors = run_here(
        "ingest/embed.py", "--images", str(data / "images"), "--clip", "tiny:random",
        "--out", str(tmp_path / "embeds"), "--captions", *columns,
    )  # fmt: skip
    assert code == 2 and f"--captions: found {columns[-1]!r}, expected columns of texts" in errors
    assert errors.count("\n") == 1 and "alt, more" in errors and not (tmp_path / "embeds").exists()


def test_captions_go_with_their_sample(tmp_path: Path):
    """Of a removed sample neither a text nor an embedding is left; the others keep theirs."""
    root, gone = write_captioned(tmp_path), [1, 2, 7, 8, 13]
    pinned = load_snapshot(root / "embeds")
    before = EmbedShard(root / "embeds", "000000", captions=COLUMNS)
    old = {c: (before.further(c), before.further_captions(c)) for c in COLUMNS}
    forget(str(root / "images"), Forgotten.of([f"http://a/{i}" for i in gone]))
    files = b"".join(path.read_bytes() for path in root.rglob("*.parquet"))
    assert not any(f"another text of {i}.".encode() in files for i in gone)
    assert b"another text of 4." in files
    now = EmbedShard(root / "embeds", "000000", captions=COLUMNS)
    then = EmbedShard(root / "embeds", "000000", digest=pinned.shards[0].digest, captions=COLUMNS)
    kept = [0, 3, 4, 5, 6]
    replaced = [0, 3, 3, 3, 4, 5, 6, 0, 0]  # by the next that remains, for who pinned the old one
    for column, (further, texts) in old.items():
        for shard, rows in ((now, kept), (then, replaced)):
            assert shard.further_captions(column) == [texts[row] for row in rows]
            found = shard.further(column)
            for i, row in enumerate(rows):
                ours = slice(found.starts[i], found.starts[i] + found.counts[i])
                theirs = slice(further.starts[row], further.starts[row] + further.counts[row])
                assert np.array_equal(found.text_embed[ours], further.text_embed[theirs])
                assert np.array_equal(found.tokens[ours], further.tokens[theirs])
        assert len(now.further(column).tokens) == sum(len(texts[row]) for row in kept)


def test_a_damaged_file_of_captions_is_damage(tmp_path: Path):
    root = write_captioned(tmp_path)
    flip(root / "embeds" / "000001.more.text_embed.npy")
    assert "000001.more.text_embed.npy differs" in verify(str(root / "embeds"))["000001"]
    assert list(committed(root / "embeds")) == ["000000", "000002"]
    assert not list((root / "embeds").glob("000001.*"))


# -- which caption is drawn ------------------------------------------------------------------------


def expected(key: int, captions: dict[str, list[str]], weights: dict[str, float]) -> str:
    """Draw a caption in plain Python."""
    first, second = uniform(torch.tensor([key]), "caption", (2,))[0].tolist()
    there = {name: weights[name] for name in weights if captions[name]}
    place = first * sum(there.values())
    for name in sorted(there, key=lambda name: name != "caption"):
        if place < there[name]:
            return captions[name][int(second * len(captions[name]))]
        place -= there[name]
    return captions["caption"][0]


def captions_of(i: int) -> dict[str, list[str]]:
    return {"caption": [f"main {i}"], **texts_of(i)}


@pytest.mark.parametrize(
    ("counts", "shares"),
    [
        ((1, 1, 3), (0.2, 0.3, 0.5 / 3)),
        ((1, 0, 2), (0.2 / 0.7, 0, 0.5 / 0.7 / 2)),
        ((1, 1, 0), (0.4, 0.6, 0)),
        ((1, 0, 0), (1, 0, 0)),
    ],
)
def test_captions_come_as_often_as_their_weights_say(counts: tuple, shares: tuple):
    """Chi-square of 20,000 samples, of which at most 5 captions: below 26 but once in 10,000."""
    number = 20_000
    keys = sample_keys(0, torch.zeros(number, dtype=torch.int64), torch.arange(number))
    source, nth = CaptionDraw(WEIGHTS)(keys, np.tile(counts, (number, 1)))
    chi_square = 0.0
    for k, (count, share) in enumerate(zip(counts, shares, strict=True)):
        found = np.bincount(nth[source == k], minlength=count)
        assert len(found) == count
        chi_square += (((found - share * number) ** 2) / (share * number)).sum() if count else 0
    assert chi_square < 26


def test_without_any_of_its_columns_a_sample_has_its_main_caption():
    keys = sample_keys(0, torch.zeros(99, dtype=torch.int64), torch.arange(99))
    draw = CaptionDraw({"alt": 0.3, "more": 0.7})
    counts = np.tile((1, 0, 0), (99, 1))
    assert not any(numbers.any() for numbers in draw(keys, counts))
    counts[:, 2] = 1
    assert (draw(keys, counts)[0] == 2).all()


def with_captions(config: Any, captions: str = CAPTIONS) -> Any:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, captions=captions))


def texts_run(data: Path, run: Path, kind: str, **fields: Any) -> tuple[Any, Callable, str]:
    """A run of each kind of reader: its configuration, what opens it, its column of tokens."""
    run.mkdir(exist_ok=True)
    if kind == "clip":
        config = clip_run(data, run, TRAIN, **fields)
        return config, partial(clip_dataset, image_size=32, context_length=16), "tokens"
    if kind == "decoder":
        base = DecoderConfig(text_tokens=20)
        return base_run(data, run, TRAIN, base=base, **fields), decoder_dataset, "caption_tokens"
    return prior_run(data, run, TRAIN, **fields), prior_dataset, "tokens"


def batches(config: Any, open_data: Callable[..., ColumnDataset], steps: range, world_size: int = 1
            ) -> Iterator[Batch]:  # fmt: skip
    for rank in range(world_size):
        loader = make_loader(partial(open_data, config), config, rank=rank, world_size=world_size)
        for step in loader.steps(steps.start, steps.stop):
            yield from step


def drawn(parts: Iterator[Batch], *columns: str) -> dict[int, list[np.ndarray]]:
    """The columns of each real sample, by its key."""
    found = {}
    for batch in parts:
        for row in np.flatnonzero(batch.weight.numpy()):
            found[int(batch.keys[row])] = [batch[name][row].numpy() for name in columns]
    return found


@pytest.mark.parametrize("kind", ["clip", "prior", "decoder"])
def test_the_caption_of_a_sample_and_epoch_is_its_own(data: Path, tmp_path: Path, kind: str):
    """Whoever reads it, in whatever slices, from whichever step on: the plain draw's."""
    config, open_data, column = texts_run(data, tmp_path, kind)
    config = with_captions(config)
    steps = 9  # of 12 samples: three epochs of 27, whose last batch has 3
    whole = drawn(batches(config, open_data, range(steps)), column)
    of_key = {
        int(sample_keys(5, torch.tensor([epoch]), torch.tensor([i]))): i
        for epoch in range(3) for i in range(SHARDS * PER_SHARD)
    }  # fmt: skip
    length = next(iter(whole.values()))[0].shape[0]
    tokenize = tokenizer(length, config.model.vocab_size) if kind == "clip" else tokenizer(length)
    seen: dict[int, set[bytes]] = {}
    for key, (tokens,) in whole.items():
        text = expected(key, captions_of(of_key[key]), WEIGHTS)
        assert np.array_equal(tokens, tokenize([text])[0]), text
        seen.setdefault(of_key[key], set()).add(tokens.tobytes())
    assert len(seen) == 27 and len(whole) == 81 and max(map(len, seen.values())) > 2

    def same(other: dict[int, list[np.ndarray]]) -> None:
        for key, values in other.items():
            assert all(map(np.array_equal, values, whole[key]))

    resumed = drawn(batches(config, open_data, range(4, steps)), column)
    assert len(resumed) == 81 - 27 - 12
    same(resumed)
    of_three = drawn(batches(config, open_data, range(steps), world_size=3), column)
    assert of_three.keys() == whole.keys()
    same(of_three)
    sliced = dataclasses.replace(
        config,
        train=TrainConfig.of(**{**HERE, "num_threads": 2}, num_steps=9, global_batch_size=12,
                             micro_batch_size=4, precision="fp32", seed=5),
        data=dataclasses.replace(config.data, prefetch=1, num_threads=2),
    ) if kind != "clip" else config  # fmt: skip
    same(drawn(batches(sliced, open_data, range(steps)), column))


@pytest.mark.parametrize("kind", ["prior", "decoder"])
def test_embedding_tokens_and_text_are_of_one_caption(data: Path, tmp_path: Path, kind: str):
    config, open_data, _ = texts_run(data, tmp_path, "decoder")
    if kind == "prior":
        config = prior_run(data, tmp_path, TRAIN)
        open_data = prior_dataset
    encoder = load_clip("tiny:random")
    for batch in batches(with_captions(config), open_data, range(3)):
        embed = encoder.encode_text(encoder.trimmed(batch["tokens"]))[0]
        assert (batch["text_embed"].float() - embed).abs().max() < 1e-3
        if kind == "decoder":
            length = batch["caption_tokens"].shape[1] - 1  # all but an end that was cut
            assert torch.equal(batch["tokens"][:, :length], batch["caption_tokens"][:, :length])


def test_data_sets_with_and_without_a_column_mix(data: Path, tmp_path: Path, write_data: Callable):
    write_data(tmp_path / "plain", num_shards=1, samples_per_shard=8)
    embeds = (str(tmp_path / "plain" / "embeds"), str(data / "embeds"))
    run = tmp_path / "run"
    run.mkdir()
    config = with_captions(prior_run(data, run, TRAIN, embeds=embeds), "more:1")
    prepare_data(config)
    reader = prior_dataset(config)
    index = np.arange(8 + 27)
    keys = sample_keys(0, torch.zeros(35, dtype=torch.int64), torch.from_numpy(index))
    main, found = reader.read(index)["tokens"], reader.read(index, keys)["tokens"]
    further = np.array([0] * 8 + [len(texts_of(i)["more"]) for i in range(27)])
    assert ((main != found).any(1) == (further > 0)).all()


@pytest.mark.parametrize("kind", ["clip", "prior", "decoder"])
def test_one_caption_costs_what_it_did(
    data: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """By default no file of further captions is opened, no table read for them, nothing drawn."""
    from ingest import shards

    opened: list[str] = []
    local_file = shards.local_file

    def recorded(root: str, commit: Commit, name: str) -> Path:
        opened.append(name)
        return local_file(root, commit, name)

    monkeypatch.setattr(shards, "local_file", recorded)
    monkeypatch.setattr(CaptionDraw, "__call__", lambda *_: 1 / 0)
    for read in (ImageShard, EmbedShard):
        monkeypatch.setattr(read, "further_captions", lambda *_: 1 / 0)
    config, open_data, column = texts_run(data, tmp_path, kind)
    found = drawn(batches(config, open_data, range(2)), column)
    assert len(found) == 24 and opened
    assert not [name for name in opened if any(f".{column}." in name for column in COLUMNS)]
    reader = open_data(with_captions(config))  # without keys, as validation reads: the main caption
    plain = open_data(config).read(np.arange(27))
    assert all(np.array_equal(v, plain[name]) for name, v in reader.read(np.arange(27)).items())


# -- requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "captions", ["alt", "alt:", ":1", "alt:0", "alt:-1", "alt:nan", "alt:inf", "alt:1,alt:2",
                 "alt:1,,more:2"],
)  # fmt: skip
def test_captions_without_a_weight_are_refused(captions: str):
    with pytest.raises(ValueError, match="data.captions: found .* expected each column once"):
        DataConfig(captions=captions)


@pytest.mark.parametrize("kind", ["clip", "prior", "decoder"])
def test_a_column_that_there_is_not_is_refused_naming_those_there_are(
    data: Path, tmp_path: Path, kind: str
):
    config, _, _ = texts_run(data, tmp_path, kind)
    config = dataclasses.replace(config, **({"image_size": 32} if kind == "decoder" else {}))
    prepare_data(with_captions(config))
    with pytest.raises(ValueError, match="data.captions: found 'lng', .*: caption, alt, more"):
        prepare_data(with_captions(config, "caption:0.5,lng:0.5"))


def test_a_stage_that_reads_no_captions_is_given_none(data: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="for a stage without captions, expected none"):
        prepare_data(with_captions(up_run(data, tmp_path, TRAIN)))


def test_captions_are_those_that_the_run_began_with(data: Path, tmp_path: Path):
    """A run of before the option is one without it."""
    config = prior_run(data, tmp_path / "run", TRAIN)
    prepare_run(config, config.run)
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("  captions: ''\n", ""))
    assert "captions:" not in path.read_text()
    with pytest.raises(ValueError, match="data.captions: found '' in the run, expected 'alt:1'"):
        prepare_run(with_captions(config, "alt:1"), config.run)
    prepare_run(config, config.run)
    assert "captions: ''" in path.read_text()


@pytest.mark.slow
def test_ray_draws_the_same_captions(data: Path, tmp_path: Path):
    import ray

    def by_ray(config: RunConfig) -> RunConfig:
        return dataclasses.replace(config, ingest="ray")

    ray.shutdown()
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=512 << 20)
    config, open_data, column = texts_run(data, tmp_path, "clip")
    config = with_captions(config)
    found = [drawn(batches(c, open_data, range(2, 6)), column) for c in (config, by_ray(config))]
    ray.shutdown()
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][key][0], found[1][key][0]) for key in found[0])
