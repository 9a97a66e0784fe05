"""The `mini` base decoder on real pictures for some minutes: speed, MFU, memory, a grid.

    python benchmarks/gpu.py --minutes 10        # on one GPU; without Ray

On Fluent emoji (or the drawn set, where ../shared/data is not): a CLIP of the demo's size, its
embeddings, then the decoder for so long as was asked for. The grid shows held-out pictures beside
what the decoder makes of their embeddings. A machine without a GPU runs it too, as slowly as it is.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import BenchmarkConfig, run_benchmark
from _pairs import EMOJI, write_sets

ROOT = Path(__file__).resolve().parent.parent
TRIAL = 30  # steps, to learn how many fit into the time


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the run."""

    minutes: float = 10.0
    """time of the decoder's training"""
    decoder: str = "mini"
    """preset of the decoder: mini, demo, debug, ..."""
    num_train: int = 4500
    """training pairs, about"""
    num_test: int = 600
    """held-out pairs, about"""
    clip_steps: int = 400
    """steps of the CLIP"""
    compile: bool = False
    """compile the decoder"""
    channels_last: bool = False
    """keep the decoder's activations channels-last, where the preset does not"""
    out: str = "gpu_grid.png"
    """file of the grid"""
    num_threads: int = 2
    """threads on the CPU"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        lines = _trained(root, config)
        figures = {**_figures(lines, config), **_memory(), "n_steps": lines[-1]["step"]}
        _grid(root, config)
    table = Table("what", "figure")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    print(json.dumps(figures))
    return 0


def _trained(root: Path, config: Config) -> list[dict[str, Any]]:
    """Train CLIP and decoder; returns the lines of the decoder's metrics.jsonl."""
    from cluster.base.jsonl import read_lines
    from training.data.demo_data import embed_here

    write_sets(root, EMOJI if EMOJI.exists() else None, config.num_train, config.num_test)
    images = ("--images", str(root / "train"))
    _train("clip", config, "demo", *images, "--run", str(root / "clip"), "--block-size", "1",
           "--train.num-steps", str(config.clip_steps))  # fmt: skip
    for split in ("train", "test"):
        embed_here(str(root / split), root / f"{split}_embeds", str(root / "clip"))
    base = (*images, "--embeds", str(root / "train_embeds"), "--train.report-every", "5")
    compiled = ("--train.compile",) if config.compile else ()
    if config.channels_last:
        compiled += ("--base.unet.channels-last",)
    trial = root / "trial"
    _train("decoder", config, config.decoder, *base, *compiled, "--run", str(trial),
           "--train.num-steps", str(TRIAL))  # fmt: skip
    reports = read_lines(trial / "metrics.jsonl")
    a_step = (reports[-1]["seconds"] - reports[2]["seconds"]) / (TRIAL - reports[2]["step"])
    steps = max(TRIAL, int(60 * config.minutes / a_step))
    run = root / "base"
    _train("decoder", config, config.decoder, *base, *compiled, "--run", str(run),
           "--train.num-steps", str(steps), "--train.checkpoint-every", str(steps))  # fmt: skip
    return read_lines(run / "metrics.jsonl")


def _train(what: str, config: Config, preset: str, *arguments: str) -> None:
    script = str(ROOT / "training" / f"{what}.py")
    threads = ("--train.num-workers", "0", "--train.num-threads", str(config.num_threads))
    command = [sys.executable, script, "--preset", preset, *threads, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _figures(lines: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """Return speed, MFU where the device's peak is known, and the curve at ten places."""
    import numpy as np
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    steady = lines[len(lines) // 10 :]
    places = sorted({round(i) for i in np.linspace(0, len(lines) - 1, 10)})
    return {
        "device": device,
        "preset": config.decoder,
        "compiled": config.compile,
        "channels_last": config.channels_last,
        "images_per_second": float(np.median([line["samples_per_second"] for line in steady])),
        "mfu": float(np.median([line["mfu"] for line in steady])) if "mfu" in steady[0] else None,
        "device_memory_bytes": lines[-1].get("device_memory_bytes"),
        "data_wait_ratio": float(np.median([line["data_wait_ratio"] for line in steady])),
        "seconds": lines[-1]["seconds"],
        "loss_curve": [[lines[i]["step"], round(lines[i]["loss"], 4)] for i in places],
    }


def _memory() -> dict[str, float]:
    """Return the most memory that a training process, all of them children, has held."""
    import resource

    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"host_memory_bytes": float(peak)}


def _grid(root: Path, config: Config) -> None:
    """Write a row of held-out pictures, and one of what the decoder makes of their embeddings."""
    import numpy as np
    import torch

    from eval.sampling.chain import load_chain
    from eval.sampling.generate import SamplingSettings, build_sampling, render_all
    from eval.sampling.image_source import open_images
    from eval.scores.scorecard import read_embeds
    from training.tasks.pictures import grid, save_png

    captions, image, _ = read_embeds(str(root / "test_embeds"))
    chosen = range(0, len(captions), max(1, len(captions) // 12))[:12]
    chain = load_chain("", "", str(root / "base"), (), device="auto")
    sampling = build_sampling(SamplingSettings(precision="fp32"))
    chosen_captions = [captions[i] for i in chosen]
    drawn = render_all(chain, chosen_captions, image[torch.tensor(list(chosen))], sampling)
    size = drawn.shape[1]
    pictures = list(open_images(str(root / "test")))
    real = [np.asarray(pictures[i].resize((size, size))) for i in chosen]
    save_png(Path(config.out), grid([real, list(drawn)], ["real", "drawn"], []))


if __name__ == "__main__":
    run_benchmark(
        Config, main, minutes=0.3, decoder="debug", num_train=300, num_test=60, clip_steps=5
    )  # fmt: skip
