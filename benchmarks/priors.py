"""The three priors on held-out captions, beside the caption's embedding in their place.

    python benchmarks/priors.py        # some forty minutes on two cores

For the drawn set, and for Fluent emoji where ../shared/data holds them: a CLIP is trained on the
training pairs, then each prior on its embeddings, for the same steps and batch. Scores are on
captions whose combination of things, or whose emoji, was never seen: the mean cosine of the draw to
the true image embedding, that to other captions' images, and how often the draw finds its own image
first. `z_t` is the caption's embedding taken for the image's. Of the autoregressive prior the mean
of several draws is quoted, its estimate of E[z_i | caption], which the regression prior gives at
once; a single draw, and the codes at their expected values, are shown beside it.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import BenchmarkConfig, run_benchmark
from _pairs import EMOJI, embedded_sets

ROOT = Path(__file__).resolve().parent.parent
NUM_AVERAGED = 16
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {  # by kind: names, and changes of the sampling
    "diffusion": {"diffusion": {}},
    "autoregressive": {
        "autoregressive, drawn": {},
        "autoregressive, expected codes": {"temperature": 0.0, "cfg_scale": 1.0},
        "autoregressive": {"cfg_scale": 1.0, "mean_of": NUM_AVERAGED},
    },
    "regression": {"regression": {}},
}
QUOTED = tuple(VARIANTS)


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the comparison."""

    num_train: int = 4500
    """training pairs, about"""
    num_test: int = 600
    """held-out pairs, about"""
    num_steps: int = 600
    """steps of each prior"""
    clip_steps: int = 600
    """steps of the CLIP"""
    sets: tuple[str, ...] = ("shapes", "emoji")
    """data sets"""
    seed: int = 0
    """of the split, the drawings, the weights and the draws"""
    num_threads: int = 2
    """threads on the CPU"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    from rich.console import Console
    from rich.table import Table

    figures: dict[str, Any] = {}
    names = ("cos", "cos_shuffled", "retrieval_at_1", "train_seconds", "ms_a_draw", "n")
    table = Table("set", "prior", *names)
    for name in config.sets:
        source = EMOJI if name == "emoji" else None
        if source is not None and not source.exists():
            print(f"{name}: left out: {source} is not there")
            continue
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = _compare(Path(folder), source, config)
        for prior, scores in figures[name].items():
            shown = [f"{scores[key]:.3f}" if key in scores else "" for key in names]
            table.add_row(name, prior, *shown)
    Console(width=120).print(table)
    worst = min(
        scores[prior]["cos"] / scores["z_t"]["cos"]
        for scores in figures.values()
        for prior in QUOTED
    )
    print(json.dumps({"ratio": worst, **figures}))
    return 0


def _compare(root: Path, source: Path | None, config: Config) -> dict[str, dict[str, float]]:
    from eval.scores.scorecard import meaning, read_embeds
    from models.scores import prior_scorecard

    counts = config.num_train, config.num_test
    embedded_sets(root, source, *counts, config.clip_steps, config.num_threads, config.seed)
    captions, image, text = read_embeds(str(root / "test_embeds"))
    meanings = [meaning(caption) for caption in captions]
    figures: dict[str, dict[str, float]] = {"z_t": prior_scorecard(text, image, text, meanings)}
    for kind in VARIANTS:
        started = time.perf_counter()
        _train(root, kind, config)
        seconds = time.perf_counter() - started
        for name, changes in VARIANTS[kind].items():
            draws, milliseconds = _draws(root, kind, captions, changes, config.seed)
            figures[name] = {
                **prior_scorecard(draws, image, text, meanings),
                "train_seconds": seconds,
                "ms_a_draw": milliseconds,
            }
            print(json.dumps({name: figures[name]}), flush=True)  # a run that is ended leaves these
    return figures


def _train(root: Path, kind: str, config: Config) -> None:
    command = [
        sys.executable, str(ROOT / "training" / "prior.py"), "--preset", "demo", "--prior", kind,
        "--embeds", str(root / "train_embeds"), "--run", str(root / kind),
        "--train.num-workers", "0", "--train.num-threads", str(config.num_threads),
        "--train.seed", str(config.seed), "--train.num-steps", str(config.num_steps),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=3600, stdout=subprocess.DEVNULL)


def _draws(
    root: Path, kind: str, captions: list[str], changes: dict[str, Any], seed: int
) -> tuple[Any, float]:
    """Return a draw for each caption, [N, E], and the milliseconds of one, in batches of 100."""
    import torch

    from eval.sampling.chain import load_chain
    from eval.sampling.generate import caption_keys, default_sampling

    chain = load_chain(str(root / "clip"), str(root / kind), "", (), device="auto")
    sampling = default_sampling()
    prior = dataclasses.replace(sampling.prior, **changes)
    sampling = dataclasses.replace(sampling, precision="fp32", prior=prior)
    keys = caption_keys(captions, seed)
    chain.sample_prior(keys[:100], captions[:100], sampling)
    started = time.perf_counter()
    parts = [
        chain.sample_prior(keys[start : start + 100], captions[start : start + 100], sampling)
        for start in range(0, len(captions), 100)
    ]
    seconds = time.perf_counter() - started
    return torch.cat(parts).cpu(), 1000 * seconds / len(captions)


if __name__ == "__main__":
    run_benchmark(
        Config, main, num_train=300, num_test=60, num_steps=10, clip_steps=10, sets=("shapes",)
    )  # fmt: skip
