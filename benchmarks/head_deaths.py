"""Kill a cluster's head again and again under each stage, and count what is lost.

    python benchmarks/head_deaths.py                           # some forty minutes on two cores
    python benchmarks/head_deaths.py --stages prior --kills 2

A head of one machine, its state in a Redis with TLS and a password, runs each stage as a job of
cluster/supervise.py. All of its processes are killed at once, the driver's among them, after a
random number of new units, and cluster/start.py is given again. Counted from the kill to the first
unit that is new: a committed shard, a step, a block of features. Each stage must end with the
result of an undisturbed run, else the exit code is 1. Only processes of its own head are killed.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from _common import BenchmarkConfig, run_benchmark
from _faults import write_embeds
from _heads import (
    Deaths,
    Stage,
    download_stage,
    embed_stage,
    fid_stage,
    kill_head,
    prior_stage,
    redis_server,
    slow_site,
    started_head,
)

from cluster.base.cli import DONE, INCOMPLETE

NAMES = ("download", "embed", "prior", "fid")
UNITS_A_KILL = {"download": 8, "embed": 8, "prior": 18, "fid": 5}


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Stages and kills."""

    stages: tuple[str, ...] = NAMES
    """download, embed, prior, fid"""
    kills: int = 10
    """of each stage"""
    seed: int = 0
    """of the moments"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    if shutil.which("redis-server") is None:
        raise ValueError("redis-server: found none, expected Debian's package redis-server")
    if unknown := set(config.stages) - set(NAMES):
        raise ValueError(f"--stages: found {', '.join(unknown)}, expected {', '.join(NAMES)}")
    found: dict[str, Deaths] = {}
    with (
        tempfile.TemporaryDirectory(prefix="head_deaths") as name,
        redis_server(Path(name) / "redis") as redis,
        slow_site(0.05) as address,
        started_head(redis) as head,
    ):
        print(f"{'stage':10} kills  lost  doubled  same  seconds to the first new unit")
        for stage_name in config.stages:
            stage = _stage(stage_name, Path(name), address, config.kills + 1)
            deaths = kill_head(head, stage, Path(name), config.kills, config.seed)
            found[stage_name] = deaths
            seconds = " ".join(f"{each:.0f}" for each in sorted(deaths.seconds))
            print(f"{stage_name:10} {deaths.kills:5} {deaths.lost:5} {deaths.doubled:8}  "
                  f"{'yes' if deaths.is_same else 'NO':4}  {seconds}", flush=True)  # fmt: skip
    times = [each for deaths in found.values() for each in deaths.seconds]
    is_right = all(d.is_same and not d.lost and not d.doubled for d in found.values())
    summary = {
        "kills": sum(d.kills for d in found.values()),
        "lost": sum(d.lost for d in found.values()),
        "doubled": sum(d.doubled for d in found.values()),
        "same": is_right,
        "seconds_median": round(median(times), 1),
        "seconds_max": round(max(times), 1),
        "stages": {
            name: {"median": round(median(d.seconds), 1), "max": round(max(d.seconds), 1)}
            for name, d in found.items()
        },
    }
    print(json.dumps(summary))
    return DONE if is_right else INCOMPLETE


def _stage(name: str, folder: Path, address: str, num_lives: int) -> Stage:
    """Make a stage's data, enough for so many lives of the head."""
    from training.data.demo_data import draw_images

    num_units = UNITS_A_KILL[name] * num_lives
    if name == "download":
        urls = folder / "urls.txt"
        urls.write_text("".join(f"http://{address}/{i}.png\n" for i in range(16 * num_units)))
        return download_stage(urls, address)
    if name == "prior":
        return prior_stage(write_embeds(folder), num_units)
    images, fake = folder / f"{name}_images", folder / f"{name}_fake"
    if name == "embed":
        draw_images(images, num_shards=num_units, samples_per_shard=48)
        return embed_stage(images)
    draw_images(images, num_shards=num_units // 2, samples_per_shard=256)
    draw_images(fake, seed=1, num_shards=num_units // 2, samples_per_shard=256)
    return fid_stage(images, fake)


if __name__ == "__main__":
    run_benchmark(Config, main, kills=1)
