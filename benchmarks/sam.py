"""Sharpness-aware minimisation against plain training of the same small CLIP.

    python benchmarks/sam.py        # some twelve minutes on two cores

The paper trains its CLIP with it because the embeddings come out of lower rank: fewer principal
components hold 99 % of their variance, which is what makes the autoregressive prior's PCA cheap.
Both are trained on the drawn set from the same seed, for the same steps; `plain, twice the steps`
is given the time that SAM's second gradient takes. Rank is of the held-out images' embeddings;
retrieval is of held-out images by their captions.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import BenchmarkConfig, run_benchmark
from _pairs import write_sets

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the comparison."""

    num_train: int = 4500
    """training pairs"""
    num_test: int = 600
    """held-out pairs"""
    num_steps: int = 400
    """steps"""
    rho: float = 0.1
    """radius, the paper's"""
    seeds: tuple[int, ...] = (0, 1)
    """of weights and order"""
    num_threads: int = 2
    """threads on the CPU"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    from rich.console import Console
    from rich.table import Table

    ways = {
        "plain": (config.num_steps, 0.0),
        "plain, twice the steps": (2 * config.num_steps, 0.0),
        f"SAM, rho {config.rho:g}": (config.num_steps, config.rho),
    }
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_sets(root, None, config.num_train, config.num_test)
        for seed in config.seeds:
            for number, (way, (steps, rho)) in enumerate(ways.items()):
                run = root / f"clip_{number}_{seed}"
                runs[way].append(_measure(root, run, config, steps, rho, seed))
    names = ("rank_99", "rank_90", "retrieval_at_1", "train_seconds")
    table = Table("training", *names)
    middle = {
        way: {name: float(np.mean([each[name] for each in all_seeds])) for name in names}
        for way, all_seeds in runs.items()
    }
    for way, figures in middle.items():
        table.add_row(way, *(f"{figures[name]:.3g}" for name in names))
    Console().print(table)
    plain, _, sharp = middle.values()
    print(json.dumps({"ratio": plain["rank_99"] / sharp["rank_99"], **middle, "runs": runs}))
    return 0


def _measure(
    root: Path, run: Path, config: Config, steps: int, rho: float, seed: int
) -> dict[str, float]:
    """Train a CLIP and embed the held-out pairs with it."""
    from eval.scores.scorecard import meaning, read_embeds
    from ingest.embedding.statistics import EmbedStatistics
    from models.scores import retrieval_at_k
    from training.data.demo_data import embed_here

    command: list[Any] = [
        sys.executable, ROOT / "training" / "clip.py", "--preset", "demo", "--images",
        root / "train", "--run", run, "--train.num-steps", steps, "--sam-rho", rho, "--train.seed",
        seed, "--train.num-workers", 0, "--train.num-threads", config.num_threads,
    ]  # fmt: skip
    started = time.perf_counter()
    subprocess.run(
        [str(argument) for argument in command], check=True, timeout=3600, stdout=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - started
    embeds = root / f"{run.name}_embeds"
    embed_here(str(root / "test"), embeds, str(run))
    statistics = EmbedStatistics.read(embeds)
    captions, image, text = read_embeds(str(embeds))
    return {
        "rank_99": statistics.num_components(0.99),
        "rank_90": statistics.num_components(0.90),
        "retrieval_at_1": retrieval_at_k(text, image, [meaning(caption) for caption in captions]),
        "train_seconds": seconds,
    }


if __name__ == "__main__":
    run_benchmark(Config, main, num_train=300, num_test=60, num_steps=10, seeds=(0,))
