"""Planning over a snapshot of 200,000 shards of 10,000 samples: seconds to load it, to begin, and
to find any step's samples; and the most memory of the process, which also wrote the snapshot.

python benchmarks/plan.py        # some twenty seconds
"""

import hashlib
import json
import resource
import tempfile
import time
from dataclasses import dataclass

from _common import BenchmarkConfig, run_benchmark

from ingest.shards import ShardEntry, load_snapshot, shard_name, write_manifest
from ingest.store.snapshots import write_snapshot
from training.data.datasets import EmbedDataset
from training.data.sampler import Plan


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the plan."""

    num_shards: int = 200_000
    """shards of the snapshot"""
    samples_per_shard: int = 10_000
    """samples a shard"""
    num_streams: int = 64
    """virtual streams"""
    global_batch_size: int = 4096
    """samples a step"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory() as root:
        _write(root, config)
        started = time.perf_counter()
        snapshot = load_snapshot(root)
        loaded = time.perf_counter() - started
    started = time.perf_counter()
    plan = Plan(
        data_sets=EmbedDataset(snapshot).data_sets,
        global_batch_size=config.global_batch_size,
        seed=0,
        num_streams=config.num_streams,
    )
    last = plan.steps_per_epoch - 1
    table = Table("step", "seconds")
    seconds = {"load": loaded, "begin": time.perf_counter() - started}
    for step in (0, 1, last // 2, last, last + 1):
        begun = time.perf_counter()
        plan.slice(step, rank=3, world_size=8)
        seconds[str(step)] = time.perf_counter() - begun
    for name, taken in seconds.items():
        table.add_row(name, f"{taken:.3f}")
    Console().print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    total = sum(seconds.values())
    print(json.dumps({"seconds": total, "peak_mib": peak, "seconds_by_step": seconds}))
    return 0


def _write(root: str, config: Config) -> None:
    """Write a snapshot of shards that there are not."""
    write_manifest(root, "embeds", {})
    shards = (
        ShardEntry(
            name=shard_name(number),
            num_samples=config.samples_per_shard,
            digest=hashlib.sha256(str(number).encode()).hexdigest(),
        )
        for number in range(config.num_shards)
    )
    write_snapshot(root, tuple(shards))


if __name__ == "__main__":
    run_benchmark(Config, main, num_shards=20_000)
