"""What a step costs beyond a bare PyTorch loop, for the plain engine and each stage of DeepSpeed.

    python benchmarks/train_step.py        # some ten minutes on two cores

A diffusion prior of two sizes takes whole steps: forward, loss, backward, clipping, fused AdamW,
averaging, from a batch in memory. Steps of the bare loop and of an engine alternate in one process,
so that what else the machine does meets both; a second bare loop in the engine's place says how far
two equal things differ (`aa`). The larger size also writes two checkpoints: `block_ratio` is the
share of the second's writing for which the steps wait (the first's copy touches its memory for the
first time: `first_block_seconds`); `memory_ratio` is the peak of its steps over the state's 20
bytes a parameter: weights, gradients, two moments, average.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.cli import parse, run_script

SIZES = {  # width, depth, batch: 3 and 100 million parameters
    "small": (256, 4, 64),
    "large": (1024, 8, 8),
}
ENGINES = ("aa", "plain", "zero0", "zero1", "zero2", "zero3")
EMBED, WORDS = 512, 24
WARMING = 3  # steps
BYTES_A_PARAMETER = 20  # weights, gradients, two moments and an average in fp32


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the comparison."""

    pairs: int = 12
    """pairs of steps of a measurement, after three that warm up"""
    repeats: int = 3
    """measurements of each, in turn"""
    num_threads: int = 2
    """threads on the CPU"""
    sizes: tuple[str, ...] = ("small", "large")
    """sizes of the model"""
    measure: str = ""
    """internal: measure size:engine:time or size:engine:memory, here"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    if config.measure:
        print(json.dumps(_measure(config, *config.measure.split(":"))))
        return 0
    from rich.console import Console
    from rich.table import Table

    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(config.repeats):
        for size in config.sizes:
            for engine in ENGINES:
                found.setdefault((size, engine), []).append(_run(config, size, engine, "time"))
    table = Table("size", "engine", "parameters", "ms a step", "over the bare loop", "spread")
    figures: dict[str, Any] = {}
    for (size, engine), rounds in found.items():
        ratios = [each["ratio"] for each in rounds]
        ratio, spread = statistics.median(ratios), max(ratios) - min(ratios)
        figures[f"{size}_{engine}"] = {"ratio": ratio, "spread": spread, "rounds": ratios}
        milliseconds = statistics.median(each["milliseconds"] for each in rounds)
        count = f"{rounds[0]['parameters'] / 1e6:.1f} M"
        row = (f"{milliseconds:.1f}", f"{ratio:.3f}", f"{spread:.3f}")
        table.add_row(size, engine, count, *row)
    Console().print(table)
    last = config.sizes[-1]
    alone = [_run(config, last, "plain", "memory") for _ in range(config.repeats)]
    names = ("first_block_seconds", "block_seconds", "write_seconds", "memory_ratio")
    checkpoints = {name: [each[name] for each in alone] for name in names}
    first, block, write, memory = (statistics.median(each) for each in checkpoints.values())
    summary = {
        "overhead": figures[f"{last}_plain"]["ratio"],
        "overhead_spread": figures[f"{last}_plain"]["spread"],
        "aa": figures[f"{last}_aa"]["ratio"],
        "aa_spread": figures[f"{last}_aa"]["spread"],
        **{f"overhead_zero{stage}": figures[f"{last}_zero{stage}"]["ratio"] for stage in range(4)},
        "block_ratio": block / write,
        "block_seconds": block,
        "first_block_seconds": first,
        "write_seconds": write,
        "memory_ratio": memory,
    }
    print(json.dumps({**summary, "checkpoints": checkpoints, **figures}))
    return 0


def _run(config: Config, size: str, engine: str, what: str) -> dict[str, float]:
    """Measure one engine in a process of its own."""
    command = [
        sys.executable, __file__, "--measure", f"{size}:{engine}:{what}",
        "--pairs", str(config.pairs), "--num-threads", str(config.num_threads),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise RuntimeError(f"{size} {engine}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(config: Config, size: str, engine: str, what: str) -> dict[str, float]:
    """Return the figures of one engine: of its time beside the bare loop's, or of its memory and
    its checkpoint, alone."""
    import torch

    from training.allocator import ALL, keep_freed_memory

    torch.set_num_threads(config.num_threads)
    keep_freed_memory(ALL)  # as training does on a CPU; the bare loop's gain, too
    count = sum(p.numel() for p in _model(size, "meta").parameters())
    if what == "memory":
        return {"parameters": float(count), **_alone(size, engine, count)}
    bare = _bare(_model(size), SIZES[size][2])
    step = _bare_or_engine(size, engine)[0]
    timed: list[tuple[float, float]] = []
    for number in range(WARMING + config.pairs):
        if number % 2:
            timed.append((_timed(bare), _timed(step)))
        else:
            seconds = _timed(step)
            timed.append((_timed(bare), seconds))
    timed = timed[WARMING:]
    return {
        "ratio": statistics.median(theirs / mine for mine, theirs in timed),
        "milliseconds": 1000 * statistics.median(theirs for _, theirs in timed),
        "parameters": float(count),
    }


def _bare_or_engine(size: str, engine: str) -> tuple[Callable[[], None], Callable[[], dict]]:
    """Return a step, and what measures its checkpoint."""
    batch_size = SIZES[size][2]
    if engine == "aa":
        return _bare(_model(size), batch_size), dict
    return _engine(_model(size), engine, batch_size)


def _alone(size: str, engine: str, count: int) -> dict[str, float]:
    """Return the memory that three steps take at their peak, and the times of a checkpoint."""
    before = _resident()
    step, checkpoint = _bare_or_engine(size, engine)
    for _ in range(WARMING):
        step()
    state = BYTES_A_PARAMETER * count
    return {"memory_ratio": (_resident() - before) / state, **checkpoint()}


def _timed(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _resident() -> int:
    """Return the most memory that this process has held, in bytes."""
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _model(size: str, device: str = "cpu") -> Any:
    import torch

    from models.configs import DiffusionPriorConfig
    from models.diffusion_prior import DiffusionPrior

    width, depth, _ = SIZES[size]
    torch.manual_seed(0)
    config = DiffusionPriorConfig(width=width, depth=depth, num_heads=width // 64)
    with torch.device(device):
        return DiffusionPrior(config, embed_dim=EMBED, text_width=EMBED, context_length=WORDS)


def _batch(batch_size: int) -> Any:
    """Return a batch as a feed makes it."""
    import torch
    import torch.nn.functional as F

    from training.batches import Batch

    columns = {
        "image_embed": F.normalize(torch.randn(batch_size, EMBED), dim=1),
        "text_embed": F.normalize(torch.randn(batch_size, EMBED), dim=1),
        "states": torch.randn(batch_size, WORDS, EMBED),
        "token_mask": torch.ones(batch_size, WORDS, dtype=torch.bool),
    }
    return Batch(
        columns=columns, keys=torch.arange(batch_size), weight=torch.ones(batch_size),
        num_real=batch_size,
    )  # fmt: skip


def _objective(model: Any, batch: Any) -> Any:
    from models.priors import PriorText

    text = PriorText(
        text_embed=batch["text_embed"], text=batch["states"], token_mask=batch["token_mask"]
    )
    return model.losses(batch.keys, batch["image_embed"], text)


def _bare(model: Any, batch_size: int) -> Callable[[], None]:
    """Return a step as anyone would write it: the same model, optimizer, clipping and average."""
    import torch

    batch = _batch(batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    average = [p.detach().clone() for p in model.parameters()]
    model.train()

    def step() -> None:
        loss = _objective(model, batch)["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for shadow, parameter in zip(average, model.parameters(), strict=True):
                shadow.lerp_(parameter, 0.001)
        loss.item()

    return step


def _engine(model: Any, engine: str, batch_size: int) -> tuple[Callable, Callable]:
    """Return the step of an engine as the loop takes it, and what measures its checkpoint."""
    import torch

    from training.averages import Averages
    from training.config import TrainConfig
    from training.loop import _agreed, _forward_backward
    from training.zero import PlainEngine, ZeroEngine

    stage: Any = 0 if engine == "plain" else int(engine.removeprefix("zero"))
    config = TrainConfig(
        global_batch_size=batch_size, learning_rate=1e-4, precision="fp32", zero_stage=stage,
        num_workers=0 if engine == "plain" else 1,
    )  # fmt: skip
    if engine != "plain":
        _join_alone()
    kind: Any = PlainEngine if engine == "plain" else ZeroEngine
    made = kind(model, _objective, config, torch.device("cpu"))
    averages = Averages(made.fragments(), 0.999)
    batch, count = _batch(batch_size), iter(range(1 << 30))
    model.train()

    def step() -> None:
        scores = _forward_backward(made, [batch])
        finite, _, _ = _agreed(made, scores, stop=False, written=True)
        if not finite:
            raise FloatingPointError("a loss that is not finite")
        made.step(1.0)
        averages.update(next(count), 0)

    return step, lambda: _checkpointed(made, averages) if engine == "plain" else {}


def _join_alone() -> None:
    """Be the one rank of a process group, as a worker of Ray Train is of its own."""
    import torch.distributed as dist

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")


def _checkpointed(engine: Any, averages: Any) -> dict[str, float]:
    """Return how long a checkpoint holds up the steps, and how long it takes to write; the first
    one, which touches the memory of its copy for the first time, apart."""
    from functools import partial

    from training import checkpoint
    from training.records import Progress
    from training.writing import Writer

    writer, copies, blocked = Writer(beside=True), checkpoint.Copies(), []
    with tempfile.TemporaryDirectory() as folder:
        for step in (1, 2):
            started = time.perf_counter()
            writer.begin(
                partial(
                    checkpoint.capture, Path(folder), engine, averages, Progress(step=step),
                    {"kind": "benchmark"}, copies,
                )
            )  # fmt: skip
            blocked.append(time.perf_counter() - started)
            writer.finish()
    first, block = blocked
    return {"first_block_seconds": first, "block_seconds": block, "write_seconds": writer.seconds}


if __name__ == "__main__":
    run_script(lambda: main(parse(Config)))
