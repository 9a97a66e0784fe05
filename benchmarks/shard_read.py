"""Reading shards: samples a second and core, beside webdataset, tarfile and Ray Data.

    python benchmarks/shard_read.py        # some four minutes on two cores

All read the same shards of JPEGs from a warm page cache, in turn, each in one process with one
thread (Ray Data: one worker). Raw: the bytes of image and caption. Decoded: the image as uint8 of
64 px, short side resized and centre cropped; webdataset decodes by its own `decode("pil")`. Ours
comes in a shuffled order, the others' in that of the tars. Batches of the prior hold two embeddings
of 768 and 77 tokens a sample, as the tensors that go to the device, of the samples that the plan
names; "opened anew" opens and maps every shard in each pass, as where they are many.
"""

import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import BenchmarkConfig, run_benchmark
from download import _draw

from training.engine.allocator import keep_freed_memory

SIZE = 64  # px, of decoded images
LEAST_SECONDS = 1.0  # of a measurement, which takes as many passes as that needs
EMBED_DIM, CONTEXT_LENGTH = 768, 77


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the comparison."""

    num_shards: int = 2
    """shards"""
    samples_per_shard: int = 4000
    """samples a shard"""
    embeds_per_shard: int = 10_000
    """rows of an embedding shard"""
    image_size: int = 256
    """shorter side of the stored images, px"""
    repeats: int = 5
    """passes of each reader, in turn"""
    batch_size: int = 1024
    """of the prior's batches"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    from rich.console import Console
    from rich.table import Table

    os.environ["OMP_NUM_THREADS"] = "1"
    keep_freed_memory()  # as training does; all readers' gain
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        _write(root, config)
        size = sum(path.stat().st_size for path in (root / "images").glob("*.tar"))
        size //= config.num_shards * config.samples_per_shard
        rates = _measure(root, config)
    table = Table("reader", "samples/s", "spread")
    for name, of_reader in rates.items():
        table.add_row(name, f"{np.median(of_reader):,.0f}", f"{np.ptp(of_reader):,.0f}")
    Console().print(table)
    middle = {name: float(np.median(of_reader)) for name, of_reader in rates.items()}
    figures = {
        "bytes_a_sample": size,
        "ratio_raw": middle["ours, raw"] / middle["webdataset, raw"],
        "ratio_decoded": middle["ours, decoded"] / middle["webdataset, decoded"],
        "embeddings_per_second": 2 * middle["ours, batches of the prior"],
        "embeddings_per_second_opened_anew": 2 * middle["ours, batches of the prior, opened anew"],
        "rates": rates,
    }
    best = max(rate for name, rate in middle.items() if "decoded" in name and "ours" not in name)
    print(json.dumps({"ratio": middle["ours, decoded"] / best, **figures}))
    return 0


def _write(root: Path, config: Config) -> None:
    """Write image shards of 40 pictures under many keys, and embedding shards of noise."""
    from PIL import Image, ImageFilter

    from ingest.fetching.decode import Resizer
    from ingest.shards import (
        Attempt,
        Sample,
        publish_snapshot,
        shard_name,
        write_embed_shard,
        write_image_shard,
        write_manifest,
    )  # fmt: skip

    rng = np.random.default_rng(0)
    _draw(root)
    resize = Resizer(image_size=config.image_size, resize_mode="keep_ratio")
    pictures = []
    for path in sorted(root.glob("*.jpg")):
        image = Image.open(io.BytesIO(resize(path.read_bytes()).data))
        file = io.BytesIO()  # as many bytes as real pictures have at this size: 33 kB at 256 px
        image.filter(ImageFilter.GaussianBlur(1.2)).save(file, "JPEG", quality=95)
        pictures.append(file.getvalue())
    for kind in ("images", "embeds"):
        write_manifest(root / kind, kind, {})
    for number in range(config.num_shards):
        name, count = shard_name(number), config.samples_per_shard
        keys = [f"{name}{row:05d}" for row in range(count)]
        samples = [
            Sample(
                key=key,
                image_bytes=pictures[row % len(pictures)],
                caption=f"picture {row}",
                json={},
            )
            for row, key in enumerate(keys)
        ]
        rows = [{"key": key, "status": "success"} for key in keys]
        with Attempt(root / "images", name) as attempt:
            write_image_shard(attempt.path, name, samples, rows)
            commit = attempt.commit(num_samples=count, counts={}, config_hash="")
        count = config.embeds_per_shard
        keys = [f"{name}{row:05d}" for row in range(count)]
        embeds = rng.normal(size=(2, count, EMBED_DIM)).astype(np.float16)
        tokens = rng.integers(0, 49408, (count, CONTEXT_LENGTH))
        with Attempt(root / "embeds", name) as attempt:
            write_embed_shard(
                attempt.path, name, image_embed=embeds[0], text_embed=embeds[1], tokens=tokens,
                keys=keys, captions=keys,
            )  # fmt: skip
            attempt.commit(num_samples=count, counts={}, config_hash=commit.digest)
    for kind in ("images", "embeds"):
        publish_snapshot(root / kind)


def _measure(root: Path, config: Config) -> dict[str, list[float]]:
    """Return samples/s of every pass of every reader, in turn."""
    tars = sorted((root / "images").glob("*.tar"))
    kept = _opened(root)  # as training keeps them, from epoch to epoch
    feed = _feed(root, config)
    readers: dict[str, Callable[[], Iterable[Any]]] = {
        "ours, raw": lambda: _ours_raw(kept),
        "ours, raw, opened anew": lambda: _ours_raw(_opened(root)),
        "webdataset, raw": lambda: _webdataset(tars, decode=False),
        "tarfile, raw": lambda: _tarfile(tars, decode=False),
        "ours, decoded": lambda: _ours_decoded(root, config),
        "webdataset, decoded": lambda: _webdataset(tars, decode=True),
        "tarfile, decoded": lambda: _tarfile(tars, decode=True),
        "ours, batches of the prior": lambda: _ours_embeds(feed),
        "ours, batches of the prior, opened anew": lambda: _ours_embeds(_feed(root, config)),
        "ray.data.read_webdataset, raw": lambda: _ray(tars),
    }
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for repeat in range(config.repeats + 1):  # the first pass warms caches, pools and imports
        for name, read in readers.items():
            rows = config.embeds_per_shard if "prior" in name else config.samples_per_shard
            rate = _rate(name, read, config.num_shards * rows)
            if repeat:
                rates[name].append(rate)
    return rates


def _rate(name: str, read: Callable[[], Iterable[Any]], total: int) -> float:
    """Return samples/s of as many passes of a reader over `total` samples as take long enough."""
    passes, started = 0, time.perf_counter()
    while time.perf_counter() - started < LEAST_SECONDS:
        count, passes = sum(read()), passes + 1
        if count != total:
            raise RuntimeError(f"{name}: read {count} of {total} samples")
    return passes * total / (time.perf_counter() - started)


# Each reader yields numbers of samples whose bytes, or pixels, it has had in hand.


def _opened(root: Path) -> list[Any]:
    from ingest.shards import ImageShard, load_snapshot

    snapshot = load_snapshot(root / "images")
    entries = snapshot.shards
    return [ImageShard(snapshot.root, entry.name, digest=entry.digest) for entry in entries]


def _ours_raw(shards: list[Any]) -> Iterator[int]:
    for shard in shards:
        for row in range(len(shard)):
            _ = shard.image_bytes(row), shard.caption(row)
        yield len(shard)


def _ours_decoded(root: Path, config: Config) -> Iterator[int]:
    from ingest.shards import load_snapshot
    from training.data.datasets import ImageDataset

    snapshot = load_snapshot(root / "images")
    reader = ImageDataset(snapshot, SIZE)  # what training reads by, in its order
    order = np.random.default_rng(0).permutation(snapshot.num_samples)
    for start in range(0, len(order), 64):
        yield len(reader.read(order[start : start + 64])["image"])


def _feed(root: Path, config: Config) -> Any:
    import torch

    from ingest.shards import load_snapshot
    from training.data.dataloader import KeyedDataset, ThreadedLoader
    from training.data.datasets import EmbedDataset
    from training.data.sampler import Plan, PlanSampler

    torch.set_num_threads(1)
    reader = EmbedDataset(load_snapshot(root / "embeds"))
    plan = Plan(data_sets=reader.data_sets, global_batch_size=config.batch_size, seed=0)
    dataset = KeyedDataset(samples=reader, seed=0)  # as stored: the device widens them to float32
    return ThreadedLoader(dataset=dataset, sampler=PlanSampler(plan=plan))


def _ours_embeds(feed: Any) -> Iterator[int]:
    for step in range(feed.sampler.plan.steps_per_epoch):
        (batch,) = feed.read(step)
        assert len(batch["image_embed"]) == len(batch["text_embed"])
        yield batch.num_real


def _square(image: Any) -> np.ndarray:
    """Resize the short side, and crop the centre, of a picture that the peer has decoded."""
    from PIL import Image

    scale = SIZE / min(image.size)
    width, height = (max(SIZE, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))


def _webdataset(tars: list[Path], *, decode: bool) -> Iterator[int]:
    import webdataset

    samples = webdataset.WebDataset([str(path) for path in tars], shardshuffle=False)
    if decode:
        samples = samples.decode("pil")
    for sample in samples:
        yield bool(len(_square(sample["jpg"]) if decode else sample["jpg"]) and sample["txt"])


def _tarfile(tars: list[Path], *, decode: bool) -> Iterator[int]:
    from PIL import Image

    for path in tars:
        for name, data in _members(path):
            if name.endswith(".jpg"):
                yield bool(len(_square(Image.open(io.BytesIO(data))) if decode else data))


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            file = tar.extractfile(member)
            yield member.name, file.read() if file is not None else b""


def _ray(tars: list[Path]) -> Iterator[int]:
    import ray
    import ray.data

    if not ray.is_initialized():
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
    samples = ray.data.read_webdataset([str(path) for path in tars], decoder=None)
    for batch in samples.iter_batches(batch_size=256):
        yield len(batch["txt"])


if __name__ == "__main__":
    run_benchmark(
        Config, main, num_shards=1, samples_per_shard=400, embeds_per_shard=1000, repeats=1
    )  # fmt: skip
