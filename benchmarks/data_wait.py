"""The share of its time that training the demo's base decoder waits for data.

    python benchmarks/data_wait.py        # some three minutes on two cores

Trains the demo's preset, in a process of its own, on drawn pairs: `first_epoch` decodes every
image, later ones find them in memory. The share is what the run itself reports (`data_wait_ratio`
in metrics.jsonl, "waiting for data" in its progress lines). No peer: `ratio` is the share allowed,
2 %, over the share found.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _common import BenchmarkConfig, run_benchmark
from _pairs import write_sets

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = 0.02


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the run."""

    num_train: int = 6000
    """pairs"""
    num_steps: int = 160
    """steps"""
    ingest: str = "native"
    """native or ray"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    from rich.console import Console
    from rich.table import Table

    from training.data.demo_data import embed_here

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_sets(root, None, config.num_train, 3)
        embed_here(str(root / "train"), root / "embeds", "tiny:random")
        command = [
            sys.executable, str(ROOT / "training" / "decoder.py"), "--preset", "demo", "--images",
            str(root / "train"), "--embeds", str(root / "embeds"), "--run", str(root / "run"),
            "--train.num-workers", "0", "--train.num-steps", str(config.num_steps),
            "--train.checkpoint-every", "1000", "--ingest", config.ingest,
        ]  # fmt: skip
        subprocess.run(command, check=True, timeout=1800, stdout=subprocess.DEVNULL)
        text = (root / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    first = [line for line in lines if line["samples_seen"] <= config.num_train]
    later = lines[len(first) :]
    shares = {
        name: float(np.mean([line["data_wait_ratio"] for line in of_phase]))
        for name, of_phase in (("first_epoch", first), ("later", later), ("whole", lines))
    }
    table = Table("part of the run", "waiting for data")
    for name, share in shares.items():
        table.add_row(name, f"{share:.2%}")
    Console().print(table)
    speed = float(np.median([line["samples_per_second"] for line in lines]))
    figures = {"ratio": ALLOWED / max(shares["whole"], 1e-9), "samples_per_second": speed, **shares}
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    run_benchmark(Config, main, num_train=600, num_steps=20)
