"""On one GPU, without Ray: whether the numbers are a CPU's, what steps cost, and a run of minutes.

    python benchmarks/gpu.py --all --work gpu           # all of it, some 30 minutes
    python benchmarks/gpu.py --minutes 10               # the run alone

    tests    tests/test_models_cuda.py and tests/test_training_cuda.py
    kernel   benchmarks/group_norm.py
    steps    benchmarks/preset_step.py: U-Nets, an upsampler, priors and CLIP; plain and compiled
    run      the `mini` base decoder on real pictures: images/s, MFU, memory, losses, a grid

The run takes Fluent emoji (or the drawn set, where ../shared/data is not), a CLIP of the demo's
size and its embeddings, then trains the decoder for so long as was asked for. The grid shows
held-out pictures beside what the decoder makes of their embeddings.

Each result is a line of <work>/results.jsonl as soon as it is there, and is not made again: a
machine that is lent for minutes continues where the last one ended. A machine without a GPU runs
all of it too, at the size of toys.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import BenchmarkConfig, run_benchmark
from _pairs import EMOJI, embedded_sets

ROOT = Path(__file__).resolve().parent.parent
TRIAL = 30  # steps, to learn how many fit into the time
TESTS = ("tests/test_models_cuda.py", "tests/test_training_cuda.py")
UNETS = ("plain", "compiled", "channels_last_compiled")
OTHERS = ("plain", "compiled")
STEPS: dict[str, tuple[str, ...]] = {
    "decoder/mini:256": UNETS,
    "prior/modern:512": OTHERS,
    "prior/mini:1024": OTHERS,
    "decoder/modern:64": UNETS,
    "decoder/mini_up:256": UNETS,
    "clip/ViT-B-32:512": OTHERS,
    "decoder/paper_up1024:8": UNETS,
    "prior/paper_ar:64": OTHERS,
}
TOY_STEPS: dict[str, tuple[str, ...]] = {
    "decoder/debug:4": ("plain",),
    "prior/debug:4": ("plain",),
    "clip/debug:4": ("plain",),
}
SECONDS = 300  # of one test file or measurement, compiling included


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """What to do, and sizes of the run."""

    all: bool = False
    """tests, kernel and steps as well, before the run"""
    work: str = ""
    """folder that keeps data, runs and results, to continue; empty = a temporary one"""
    minutes: float = 10.0
    """time of the decoder's training; 0 = no run"""
    decoder: str = "mini"
    """preset of the decoder: mini, demo, debug, ..."""
    num_train: int = 4500
    """training pairs, about"""
    num_test: int = 600
    """held-out pairs, about"""
    clip_steps: int = 400
    """steps of the CLIP"""
    out: str = "gpu_grid.png"
    """file of the grid"""
    num_threads: int | None = None
    """threads on the CPU; None = all cores"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line; 1 where a result failed, which the same
    command tries again."""
    from cluster.base.cli import DONE, INCOMPLETE

    with tempfile.TemporaryDirectory() as folder:
        work = Path(config.work or folder).absolute()
        work.mkdir(parents=True, exist_ok=True)
        results = Results(work / "results.jsonl")
        if config.all:
            for name in TESTS:
                results.add(f"tests {name}", lambda name=name: _tests(name))
            results.add("kernel", lambda: _last_line("group_norm.py", *_quick()))
            steps = STEPS if _has_gpu() else TOY_STEPS
            for stage, variants in steps.items():
                for variant in variants:
                    results.add(f"step {stage} {variant}", lambda s=stage, v=variant: _step(s, v))
        if config.minutes:
            results.add("run", lambda: _run(work, config))
    results.show()
    return INCOMPLETE if results.failed else DONE


class Results:
    """Results by name, in a file as soon as they are there."""

    def __init__(self, path: Path) -> None:
        from cluster.base.jsonl import read_lines

        self._path = path
        self._lines = {line.pop("name"): line for line in read_lines(path)}

    def add(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Keep what `measure` returns, or that it failed and how; not where there is a result."""
        from cluster.base.jsonl import add_line

        if "failed" in self._lines.get(name, {"failed": ""}):
            print(name, flush=True)
            try:
                line = measure()
            except (subprocess.SubprocessError, ValueError) as error:
                output = getattr(error, "stderr", None) or getattr(error, "stdout", None) or ""
                line = {"failed": f"{type(error).__name__}: {error}", "output": output[-2000:]}
            self._lines[name] = line
            add_line(self._path, {"name": name, **line})

    @property
    def failed(self) -> list[str]:
        """The names of what failed."""
        return [name for name, line in self._lines.items() if "failed" in line]

    def show(self) -> None:
        """Print a table, and all as one JSON object."""
        from rich.console import Console
        from rich.table import Table

        table = Table("what", "figure", "value")
        for name, line in self._lines.items():
            for key, value in line.items():
                shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
                table.add_row(name, key, shown)
        Console(width=140).print(table)
        print(json.dumps(self._lines))


# -- tests, kernel, steps --------------------------------------------------------------------------


def _call(*command: str, seconds: float = SECONDS) -> str:
    """Run a command from the repository; returns what it printed. subprocess' errors else."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True,
        timeout=seconds,
    )  # fmt: skip
    return done.stdout


def _tests(name: str) -> dict[str, Any]:
    """Return the last line of pytest's, which counts what passed."""
    found = _call("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", name)
    return {"tests": found.splitlines()[-1]}


def _last_line(script: str, *arguments: str) -> dict[str, Any]:
    """Return the JSON object that a benchmark ends with."""
    return json.loads(_call(f"benchmarks/{script}", *arguments).splitlines()[-1])


def _step(stage: str, variant: str) -> dict[str, Any]:
    """Measure the step of a preset."""
    arguments = ("--stages", stage, "--variants", variant, *_quick())
    return _last_line("preset_step.py", *arguments)["measured"][0]


def _quick() -> tuple[str, ...]:
    return () if _has_gpu() else ("--quick",)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# -- the run ---------------------------------------------------------------------------------------


def _run(work: Path, config: Config) -> dict[str, Any]:
    """Train CLIP and decoder, and draw; returns the figures of the decoder's run."""
    lines = _trained(work, config)
    _grid(work, config)
    return {**_figures(lines, config), **_memory(), "n_steps": lines[-1]["step"]}


def _trained(work: Path, config: Config) -> list[dict[str, Any]]:
    """Train CLIP and decoder; returns the lines of the decoder's metrics.jsonl."""
    from cluster.base.jsonl import read_lines

    data, pairs = work / "data", EMOJI if EMOJI.exists() else None
    counts = config.num_train, config.num_test
    embedded_sets(data, pairs, *counts, config.clip_steps, config.num_threads)
    base = ("--images", str(data / "train"), "--embeds", str(data / "train_embeds"),
            "--clip", str(data / "clip"), "--train.report-every", "5")  # fmt: skip
    trial = work / "trial"
    _train(config, *base, "--run", str(trial), "--train.num-steps", str(TRIAL))
    reports = read_lines(trial / "metrics.jsonl")
    a_step = (reports[-1]["seconds"] - reports[2]["seconds"]) / (TRIAL - reports[2]["step"])
    steps = max(TRIAL, int(60 * config.minutes / a_step))
    run = work / "base"
    steps_of = ("--train.num-steps", str(steps), "--train.checkpoint-every", str(steps))
    _train(config, *base, "--run", str(run), *steps_of)
    return read_lines(run / "metrics.jsonl")


def _train(config: Config, *arguments: str) -> None:
    threads = () if config.num_threads is None else ("--train.num-threads", str(config.num_threads))
    workers = ("--train.num-workers", "0")
    command = ["-u", "training/decoder.py", "--preset", config.decoder, *workers, *threads]
    _call(*command, *arguments, seconds=60 * config.minutes + 20 * SECONDS)


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


def _grid(work: Path, config: Config) -> None:
    """Write a row of held-out pictures, and one of what the decoder makes of their embeddings."""
    import numpy as np
    import torch

    from eval.sampling.chain import load_chain
    from eval.sampling.generate import SamplingSettings, build_sampling, render_all
    from eval.sampling.image_source import open_images
    from eval.scores.scorecard import read_embeds
    from training.tasks.pictures import grid, save_png

    captions, image, _ = read_embeds(str(work / "data" / "test_embeds"))
    chosen = range(0, len(captions), max(1, len(captions) // 12))[:12]
    chain = load_chain("", "", str(work / "base"), (), device="auto")
    sampling = build_sampling(SamplingSettings(precision="fp32"))
    chosen_captions = [captions[i] for i in chosen]
    drawn = render_all(chain, chosen_captions, image[torch.tensor(list(chosen))], sampling)
    size = drawn.shape[1]
    pictures = list(open_images(str(work / "data" / "test")))
    real = [np.asarray(pictures[i].resize((size, size))) for i in chosen]
    save_png(Path(config.out), grid([real, list(drawn)], ["real", "drawn"], []))


if __name__ == "__main__":
    run_benchmark(
        Config, main, minutes=0.1, decoder="debug", num_train=300, num_test=60, clip_steps=5
    )  # fmt: skip
