"""Embedding: CPU time an image beside a bare open_clip loop, and what resuming after a kill costs.

    python benchmarks/embed.py        # some eight minutes on two cores

Both read the same shards at the same batch size and threads, both towers, random weights. Each is
run over few and over many shards: the difference is the work, the rest is the start-up, which is
reported apart. Ours is the whole command with its private Ray.

The resume: the command is killed when half of the shards are committed and run again. Its cost is
what that takes beyond a run over the missing shards alone, as a share of the whole run's work.
"""

import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import BenchmarkConfig, run_benchmark
from _cpu_time import cpu_seconds_of, method
from download import _draw

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the comparison."""

    clip: str = "ViT-S-32-alt"
    """architecture of open_clip, of random weights"""
    few: int = 1
    """shards of the short runs"""
    many: int = 5
    """shards of the long runs"""
    samples_per_shard: int = 256
    """samples a shard"""
    batch_size: int = 128
    """samples a forward pass"""
    num_threads: int = 2
    """threads of either's encoder"""
    repeats: int = 2
    """runs of each, alternating"""
    bare: str = ""
    """internal: be the bare loop over the shards of this folder"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    if config.bare:
        return _bare_loop(config)
    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder / "images", config)
        for count in (config.few, config.many, config.many - config.many // 2):
            _part(folder, config, count)
        figures = _compare(folder, config)
        figures |= _resume(folder, config, figures) | {"cpu_seconds_of": method()}
    table = Table("loop", "CPU-seconds an image", "start-up, CPU-seconds")
    for loop in ("bare", "ours"):
        per_image, start = figures[f"{loop}_seconds_an_image"], figures[f"{loop}_start_seconds"]
        table.add_row(loop, f"{per_image:.4f}", f"{start:.1f}")
    Console().print(table)
    overhead, cost = figures["overhead"], figures["resume_cost"]
    print(
        f"overhead {overhead:.3f}; a resume costs {cost:.1%} of the whole beyond the missing half"
    )
    print(json.dumps({"ratio": 1 / overhead, **figures}))
    return 0


def _write(root: Path, config: Config) -> None:
    """Write shards of 256 px pictures."""
    from ingest.fetching.decode import Resizer
    from ingest.shards import (
        Attempt,
        Sample,
        publish_snapshot,
        shard_name,
        write_image_shard,
        write_manifest,
    )  # fmt: skip

    resize = Resizer(image_size=256, resize_mode="keep_ratio")
    with tempfile.TemporaryDirectory() as name:
        _draw(Path(name))
        drawn = [resize(path.read_bytes()).data for path in sorted(Path(name).iterdir())]
    write_manifest(root, "images", {})
    for number in range(config.many):
        name, count = shard_name(number), config.samples_per_shard
        samples = [
            Sample(
                key=f"{name}{row:04d}",
                image_bytes=drawn[row % len(drawn)],
                caption=f"picture number {row} of shard {number}, with some words to read",
                json={},
            )
            for row in range(count)
        ]
        rows = [{"key": sample.key, "status": "success"} for sample in samples]
        with Attempt(root, name) as attempt:
            write_image_shard(attempt.path, name, samples, rows)
            attempt.commit(num_samples=count, counts={"stored": count}, config_hash="")
    publish_snapshot(root)


def _part(folder: Path, config: Config, count: int) -> None:
    """Make a folder of the last `count` shards."""
    from ingest.shards import committed, publish_snapshot, withdraw

    partial = folder / f"part{count}"
    shutil.copytree(folder / "images", partial)
    for commit in list(committed(partial).values())[: config.many - count]:
        withdraw(partial, commit)
    publish_snapshot(partial)


def _compare(folder: Path, config: Config) -> dict[str, Any]:
    """Run both loops over few and over many shards, in turn."""
    commands: dict[str, Callable[[int], list[str]]] = {
        "bare": lambda count: _bare_command(folder / f"part{count}", config),
        "ours": lambda count: _our_command(folder / f"part{count}", folder / "out", config),
    }
    taken: dict[tuple[str, int], list[float]] = {}
    for _ in range(config.repeats):
        for count in (config.few, config.many):
            for loop, command in commands.items():
                shutil.rmtree(folder / "out", ignore_errors=True)
                taken.setdefault((loop, count), []).append(cpu_seconds_of(command(count)))
    figures: dict[str, Any] = {}
    images = (config.many - config.few) * config.samples_per_shard
    for loop in commands:
        few, many = np.median(taken[loop, config.few]), np.median(taken[loop, config.many])
        figures[f"{loop}_seconds_an_image"] = float(many - few) / images
        share = config.few * config.samples_per_shard
        figures[f"{loop}_start_seconds"] = float(few - share * (many - few) / images)
    overhead = figures["ours_seconds_an_image"] / figures["bare_seconds_an_image"]
    runs = {f"{loop}, {count} shards": seconds for (loop, count), seconds in taken.items()}
    return {**figures, "overhead": float(overhead), "cpu_seconds": runs}


def _resume(folder: Path, config: Config, figures: dict[str, Any]) -> dict[str, Any]:
    """Kill runs at half-way; return what resuming costs beyond the missing half."""
    half = config.many // 2
    whole = config.many * config.samples_per_shard * figures["ours_seconds_an_image"]
    beyond = []
    for _ in range(config.repeats):
        shutil.rmtree(folder / "out", ignore_errors=True)
        command = _our_command(folder / f"part{config.many}", folder / "out", config)
        killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list((folder / "out").glob("_commits/[!.]*"))) < half:
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        time.sleep(5)  # what it started ends by itself
        done = len(list((folder / "out").glob("_commits/[!.]*")))
        resumed = cpu_seconds_of(command)
        shutil.rmtree(folder / "out")
        missing = folder / f"part{config.many - half}"
        alone = cpu_seconds_of(_our_command(missing, folder / "out", config))
        spared = (done - half) * config.samples_per_shard * figures["ours_seconds_an_image"]
        beyond.append((resumed + spared - alone) / whole)
    return {"resume_cost": float(np.median(beyond)), "resume_costs": beyond}


def _our_command(images: Path, out: Path, config: Config) -> list[str]:
    return [
        sys.executable, str(ROOT / "ingest" / "embed.py"), "--images", str(images),
        "--clip", f"{config.clip}:random", "--out", str(out), "--num-threads",
        str(config.num_threads),
        "--batch-size", str(config.batch_size),
    ]  # fmt: skip


def _bare_command(images: Path, config: Config) -> list[str]:
    return [
        sys.executable, __file__, "--bare", str(images), "--clip", config.clip,
        "--batch-size", str(config.batch_size), "--num-threads", str(config.num_threads),
    ]  # fmt: skip


def _bare_loop(config: Config) -> int:
    """What one would write in a notebook: open_clip's model, transform and tokenizer over tars."""
    import open_clip
    import torch
    import webdataset
    from PIL import Image

    torch.set_num_threads(config.num_threads)
    found_model: Any = open_clip.create_model_and_transforms(config.clip)
    model, _, transform = found_model
    tokenize = open_clip.get_tokenizer(config.clip)
    tars = [str(path) for path in sorted(Path(config.bare).glob("*.tar"))]
    batches = []

    def encode(pictures: list[Any], captions: list[str]) -> None:
        with torch.no_grad():
            image = model.eval().encode_image(torch.stack(pictures), normalize=True)
            text = model.encode_text(tokenize(captions), normalize=True)
        batches.append((image.half().numpy(), text.half().numpy()))

    pictures, captions = [], []
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        pictures.append(transform(Image.open(io.BytesIO(sample["jpg"]))))
        captions.append(sample["txt"].decode())
        if len(pictures) == config.batch_size:
            encode(pictures, captions)
            pictures, captions = [], []
    if pictures:
        encode(pictures, captions)
    with tempfile.TemporaryDirectory() as name:
        for number, arrays in enumerate(zip(*batches, strict=True)):
            np.save(Path(name) / f"{number}.npy", np.concatenate(arrays))
    return 0


if __name__ == "__main__":
    run_benchmark(Config, main, many=3, samples_per_shard=16, batch_size=8, repeats=1)
