"""For how long a checkpoint of a run in a bucket holds the steps up, against one on the disk.

    python benchmarks/bucket.py           # some three minutes on two cores

Trains a prior of 10 million parameters in a process of its own, in a folder and in a bucket of
moto's S3 server on the loopback, by turns. Both are as the run reports them: the steps wait for
`checkpoint_seconds`, the write beside them takes `checkpoint_write_seconds`. `ratio` is the median
wait on the disk over that in the bucket.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from _common import ROOT, BenchmarkConfig, run_benchmark
from _pairs import write_sets

AWS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
CHECKPOINTS = 4  # of each run, of which the first allocates the memory of the copy


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the runs."""

    width: int = 512
    """of the prior"""
    steps_a_checkpoint: int = 30
    """steps between two checkpoints, in which the one before is written"""
    repeats: int = 3
    """runs in each place"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    import s3fs
    from rich.console import Console
    from rich.table import Table

    from training.data.demo_data import embed_here

    seconds: dict[str, list[list[float]]] = {"disk": [], "bucket": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_sets(root, None, 600, 3)
        embed_here(str(root / "train"), root / "embeds", "tiny:random")
        log = root / "moto.log"
        with log.open("w") as file:
            server = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
            process = subprocess.Popen(server, stdout=file, stderr=file)
        try:
            while "Running on http://" not in log.read_text():
                time.sleep(0.05)
            address = log.read_text().partition("Running on ")[2].split()[0]
            os.environ.update({**AWS, "AWS_ENDPOINT_URL": address})
            s3fs.S3FileSystem().mkdir("runs")
            for number in range(config.repeats):
                for place, where in (("disk", root / "runs"), ("bucket", "s3://runs")):
                    run = f"{where}/{number}"
                    train(config, root, run)
                    seconds[place].append(waits(run))
        finally:
            process.terminate()
            process.wait(20)

    table = Table("checkpoints of a run", "steps wait, ms", "spread", "written in, s")
    medians = {}
    for place, found in seconds.items():
        blocked = [wait for wait, _ in found]
        medians[place] = statistics.median(blocked)
        written = statistics.median([write for _, write in found])
        spread = f"{min(blocked) * 1e3:.1f} to {max(blocked) * 1e3:.1f}"
        table.add_row(place, f"{medians[place] * 1e3:.1f}", spread, f"{written:.2f}")
    Console().print(table)
    figures = {
        "ratio": medians["disk"] / medians["bucket"],
        **{f"{place}_seconds": [wait for wait, _ in found] for place, found in seconds.items()},
    }
    print(json.dumps(figures))
    return 0


def train(config: Config, root: Path, run: str) -> None:
    """Train a prior in a folder or a bucket."""
    every = config.steps_a_checkpoint
    command = [
        sys.executable, str(ROOT / "training" / "prior.py"), "--embeds", str(root / "embeds"),
        "--run", run, "--scratch", str(root / "scratch"), "--train.num-workers", "0",
        "--train.num-steps", str(every * CHECKPOINTS), "--train.checkpoint-every", str(every),
        "--train.report-every", str(every), "--train.global-batch-size", "16",
        "--train.num-threads", "1", "--diffusion.width", str(config.width), "--diffusion.depth",
        "3", "--diffusion.num-heads", "8",
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=900, stdout=subprocess.DEVNULL)


def waits(run: str) -> list[float]:
    """Return for how long the steps waited for a later checkpoint of a run, and its write took:
    medians."""
    from cluster.base.run_dir import METRICS_NAME
    from ingest.store.storage import storage_of
    from training.bucket.log_parts import PARTS_FOLDER, joined_lines

    storage = storage_of(run)
    parts = storage.names(f"{PARTS_FOLDER}/{METRICS_NAME}")
    lines = [json.loads(line) for line in joined_lines(storage, METRICS_NAME, parts).splitlines()]
    later = [line for line in lines if line["checkpoint_seconds"]][1:]
    names = ("checkpoint_seconds", "checkpoint_write_seconds")
    return [statistics.median(line[name] for line in later) for name in names]


if __name__ == "__main__":
    run_benchmark(Config, main, width=128, steps_a_checkpoint=10, repeats=1)
