"""Peak anonymous memory of any process while 100,000 small images are embedded and read.

    python benchmarks/memory.py        # some six minutes on two cores

Anonymous memory is what a process has allocated (RssAnon of Linux); mapped files and Ray's shared
object store, which the kernel counts to every process that maps them, are stated beside it.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from _common import BenchmarkConfig, run_benchmark
from _cpu_time import joining, new_group, remove_group

ROOT = Path(__file__).resolve().parent.parent
INTERVAL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the data."""

    num_shards: int = 10
    """shards"""
    samples_per_shard: int = 10_000
    """samples a shard"""
    clip: str = "ViT-S-32-alt"
    """architecture of open_clip, of random weights, or "tiny" for our own"""
    image_size: int = 64
    """side of the stored images, px"""
    epoch: str = ""
    """internal: read an epoch of this folder's images and embeddings"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    if config.epoch:
        return _read_epoch(Path(config.epoch))
    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        _write(root / "images", config)
        embed = [
            sys.executable, str(ROOT / "ingest" / "embed.py"), "--images", str(root / "images"),
            "--clip", f"{config.clip}:random", "--out", str(root / "embeds"),
        ]  # fmt: skip
        read = [sys.executable, __file__, "--epoch", str(root)]
        peaks = {"embed": _peaks(embed), "read an epoch": _peaks(read)}
    table = Table("what", "process", "anonymous, MiB", "resident, MiB", "seconds")
    for what, (seconds, processes) in peaks.items():
        largest = sorted(processes.items(), key=lambda item: -item[1][0])[:4]
        for process, (anonymous, resident) in largest:
            figures = (f"{anonymous:.0f}", f"{resident:.0f}", f"{seconds:.0f}")
            table.add_row(what, process, *figures)
    Console().print(table)
    most = {what: max(p[0] for p in each.values()) for what, (_, each) in peaks.items()}
    print(json.dumps({"peak_mib": max(most.values()), "by_step": most}))
    return 0


def _write(root: Path, config: Config) -> None:
    """Write shards of drawn pictures, each of which comes many times under keys of its own."""
    from ingest.shapes import make_pairs
    from ingest.shards import (
        Attempt,
        Sample,
        publish_snapshot,
        shard_name,
        write_image_shard,
        write_manifest,
    )  # fmt: skip

    pairs = list(make_pairs(256, 0, "train"))
    write_manifest(root, "images", {})
    for number in range(config.num_shards):
        name, count = shard_name(number), config.samples_per_shard
        keys = [f"{name}{row:05d}" for row in range(count)]
        samples = (
            Sample(key=key, image_bytes=pair.image_bytes, caption=pair.caption, json={})
            for key, pair in zip(keys, pairs * (count // len(pairs) + 1), strict=False)
        )
        rows = [{"key": key, "status": "success"} for key in keys]
        with Attempt(root, name) as attempt:
            write_image_shard(attempt.path, name, samples, rows)
            attempt.commit(num_samples=count, counts={"stored": count}, config_hash="")
    publish_snapshot(root)


def _peaks(command: list[str]) -> tuple[float, dict[str, tuple[float, float]]]:
    """Run a command; return its seconds, and the peaks in MiB of each process that it started."""
    group = new_group()
    if group is None:
        raise ValueError("control groups: found none to make, expected a superuser on Linux")
    peaks: dict[str, tuple[float, float]] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(INTERVAL_SECONDS):
            for pid in (group / "cgroup.procs").read_text().split():
                name, anonymous, resident = _memory(pid)
                before = peaks.get(f"{name} {pid}", (0.0, 0.0))
                peaks[f"{name} {pid}"] = max(before[0], anonymous), max(before[1], resident)

    watching = threading.Thread(target=watch)
    watching.start()
    started = time.perf_counter()
    try:
        subprocess.run(command, check=True, preexec_fn=joining(group), timeout=1800)
    finally:
        seconds = time.perf_counter() - started
        ended.set()
        watching.join()
        remove_group(group)
    return seconds, peaks


def _memory(pid: str) -> tuple[str, float, float]:
    """Return a process's name, anonymous and resident memory in MiB; zeros once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0.0, 0.0
    status = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    sizes = [int(status.get(key, "0").split()[0]) / 1024 for key in ("RssAnon", "VmRSS")]
    return status["Name"].strip(), sizes[0], sizes[1]


def _read_epoch(root: Path) -> int:
    """Read every image and embedding once, as training does."""
    from ingest.shards import load_snapshot
    from training.data.dataloader import KeyedDataset, ThreadedLoader
    from training.data.datasets import PairDataset
    from training.data.sampler import Plan, PlanSampler

    images, embeds = (load_snapshot(root / kind) for kind in ("images", "embeds"))
    reader = PairDataset(images, embeds, 64, num_threads=2)
    plan = Plan(data_sets=reader.data_sets, global_batch_size=256, seed=0)
    count = 0
    dataset = KeyedDataset(samples=reader, seed=0)
    loader = ThreadedLoader(dataset=dataset, sampler=PlanSampler(plan=plan))
    for (batch,) in loader.steps(0, plan.steps_per_epoch):
        count += batch.num_real
    if count != images.num_samples:
        raise RuntimeError(f"read {count} of {images.num_samples} samples")
    return 0


if __name__ == "__main__":
    run_benchmark(Config, main, num_shards=2, samples_per_shard=200)
