"""What a step costs beyond a bare PyTorch loop, for the plain engine and each stage of DeepSpeed.

    python benchmarks/train_step.py                              # half an hour on two cores
    python benchmarks/train_step.py --sizes large --repeats 1

A diffusion prior of two sizes takes whole steps: forward, loss, backward, clipping, fused AdamW,
averaging, from a batch in memory.

- One rank: steps of the bare loop and of an engine alternate in one process, so that what else the
  machine does meets both; a second bare loop in the engine's place says how far two equal things
  differ (`aa`).
- Two ranks of one thread: steps of torch's DistributedDataParallel and of DeepSpeed's stage
  alternate, each rank with half of the batch; and beside them steps of one rank alone with the
  whole batch, and of both ranks on their own at once. `efficiency` is the samples a second of two
  ranks over twice those of one; `machine`, what is left of one's own speed beside an equal that it
  has nothing to do with.
- Memory: the peak of three steps beside what is known to be there at once: the state's 20 bytes a
  parameter (weights, gradients, two moments, average) and ZeRO's buffers. What the forward pass
  keeps is stated besides: it is there while there are no gradients.
- Checkpoints: the larger size writes two. `block_ratio` is the share of the second's writing for
  which the steps wait; the first's copy touches its memory for the first time
  (`first_block_seconds`).
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import BenchmarkConfig, run_benchmark
from _engines import SIZES, bare_step, build_model, engine_step, join, saved_bytes

ENGINES = ("aa", "plain", "zero0", "zero1", "zero2", "zero3")
STAGES = ENGINES[2:]
NAMES = {"aa": "aa", "plain": "overhead"}  # of ratios; else overhead_ENGINE
CHECKPOINT = ("first_block_seconds", "block_seconds", "write_seconds")
MACHINE = ("ddp_efficiency", "machine")
WARMING = 3  # steps
SECONDS_A_MEASUREMENT = 1200
BYTES_A_PARAMETER = 20  # weights, gradients, two moments and an average in fp32
# What DeepSpeed holds besides, in a step: stages 1 and 2 a flat copy of the gradients, stage 3 one
# of a partition's, a bucket for them and the weights that it gathered.
BUFFERS = {"zero1": 4, "zero2": 4, "zero3": 12}


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the comparison."""

    pairs: int = 8
    """pairs of steps of a measurement, after three that warm up"""
    repeats: int = 3
    """measurements of each, in turn"""
    num_threads: int = 2
    """threads on the CPU, of one rank alone"""
    sizes: tuple[str, ...] = ("small", "large")
    """sizes of the model"""
    engines: tuple[str, ...] = ENGINES
    """engines beside the bare loop: aa, plain, zero0, zero1, zero2, zero3"""
    measure: str = ""
    """internal: measure size:engine:what:rank, here"""
    meeting: str = ""
    """internal: folder in which ranks meet"""


def main(config: Config) -> int:
    """Print tables, and one JSON object as the last line."""
    if config.measure:
        print(json.dumps(_measure(config, *config.measure.split(":"))))
        return 0
    engines = [engine for engine in ENGINES if engine in config.engines]
    stages = [stage for stage in STAGES if stage in engines]
    what = [("time", engine) for engine in engines] + [("two", stage) for stage in stages]
    cases = [(size, *case) for size in config.sizes for case in what]
    rounds_of: dict[tuple[str, str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(config.repeats):
        for case in cases:
            rounds_of[case].append(_run(config, *case))
    last = config.sizes[-1]
    memory = {engine: _run(config, last, "memory", engine) for engine in engines if engine != "aa"}
    written = [_run(config, last, "checkpoint", "plain") for _ in range(config.repeats)]
    figures = {":".join(case): _figures(rounds) for case, rounds in rounds_of.items()}
    _print_tables(figures, memory)
    alone = {engine: figures[f"{last}:time:{engine}"] for engine in engines}
    two = {stage: figures[f"{last}:two:{stage}"] for stage in stages}
    names = {engine: f"overhead_{engine}" for engine in engines} | NAMES
    blocks = [each["block_seconds"] / each["write_seconds"] for each in written]
    summary = {
        **{names[engine]: result["ratio"] for engine, result in alone.items()},
        **{f"{names[engine]}_spread": result["ratio_spread"] for engine, result in alone.items()},
        **{f"two_ranks_{stage}": result["ratio"] for stage, result in two.items()},
        **{f"efficiency_{stage}": result["efficiency"] for stage, result in two.items()},
        "block_ratio": statistics.median(blocks),
        "block_ratio_spread": max(blocks) - min(blocks),
        **{key: statistics.median(each[key] for each in written) for key in CHECKPOINT},
        **{
            f"memory_ratio_{engine}": result["peak"] / result["state"]
            for engine, result in memory.items()
        },
    }
    if "plain" in alone:
        summary["ratio"] = 1 / alone["plain"]["ratio"]
    if two:
        results = two.values()
        summary |= {key: statistics.median(each[key] for each in results) for key in MACHINE}
    print(json.dumps({**summary, "memory": memory, "checkpoints": written, **figures}))
    return 0


def _figures(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Return the medians of repeated measurements, the spread of the ratio, and every ratio."""
    medians = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    ratios = [each["ratio"] for each in rounds]
    return {**medians, "ratio_spread": max(ratios) - min(ratios), "ratios": ratios}


def _print_tables(figures: dict[str, dict], memory: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    one_rank = Table("size", "engine", "parameters", "ms a step", "bare ms", "over bare", "spread")
    two = Table("size", "two ranks", "ms a step", "DDP's ms", "over DDP", "spread", "efficiency",
                "DDP's", "machine's")  # fmt: skip
    for name, result in figures.items():
        size, what, engine = name.split(":")
        peer = result["bare_ms" if what == "time" else "ddp_ms"]
        cells = (f"{result['ms']:.1f}", f"{peer:.1f}", f"{result['ratio']:.3f}")
        cells = (*cells, f"{result['ratio_spread']:.3f}")
        if what == "time":
            one_rank.add_row(size, engine, f"{result['parameters'] / 1e6:.1f} M", *cells)
        else:
            keys = ("efficiency", *MACHINE)
            two.add_row(size, engine, *cells, *(f"{result[key]:.3f}" for key in keys))
    parts = ("peak", "state", "buffers", "rest", "forward")
    bytes_of = Table("engine, bytes a parameter", *parts)
    for engine, result in memory.items():
        bytes_of.add_row(engine, *(f"{result[kind] / result['parameters']:.2f}" for kind in parts))
    for table in (one_rank, two, bytes_of):
        Console().print(table)


def _run(config: Config, size: str, what: str, engine: str) -> dict[str, float]:
    """Measure one engine in a process of its own, or in one for each of two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{rank}.txt" for rank in range(2 if what == "two" else 1)]
        processes = []
        for rank, output in enumerate(outputs):
            command = [
                sys.executable, __file__, "--measure", f"{size}:{engine}:{what}:{rank}",
                "--pairs", str(config.pairs), "--num-threads", str(config.num_threads),
                "--meeting", folder,
            ]  # fmt: skip
            with output.open("w") as file:
                processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
        try:
            codes = _ended(processes)
        finally:
            for process in processes:
                process.kill()
        texts = [output.read_text() for output in outputs]
    if any(code != 0 for code in codes):
        ends = "\n\n".join(each[-2000:] for each in texts)
        raise RuntimeError(f"{size} {engine} {what}: exit codes {codes}\n{ends}")
    return json.loads(texts[0].splitlines()[-1])


def _ended(processes: list[subprocess.Popen]) -> list[int | None]:
    """Wait for all, or for the first that fails, whom the others would wait for; their codes."""
    deadline = time.monotonic() + SECONDS_A_MEASUREMENT
    codes = [each.poll() for each in processes]
    while None in codes and not any(codes) and time.monotonic() < deadline:
        time.sleep(0.2)
        codes = [each.poll() for each in processes]
    return codes


def _measure(config: Config, size: str, engine: str, what: str, rank: str) -> dict[str, float]:
    """Return the figures of one engine, as one rank of it."""
    import torch

    from training.engine.allocator import ALL, keep_freed_memory

    ranks = 2 if what == "two" else 1
    torch.set_num_threads(1 if what == "two" else config.num_threads)
    keep_freed_memory(ALL)  # as training does on a CPU; the bare loop's gain, too
    if engine.startswith("zero"):
        join(Path(config.meeting), int(rank), ranks)
    count = float(sum(p.numel() for p in build_model(size, "meta").parameters()))
    if what == "memory":
        return {"parameters": count, **_memory(size, engine, count)}
    if what == "two":
        return {"parameters": count, **_two_ranks(config, size, engine, int(rank))}
    if what == "checkpoint":
        step, checkpoint = engine_step(build_model(size), engine, SIZES[size][2])
        for _ in range(WARMING):
            step()
        return {"parameters": count, **checkpoint()}
    return {"parameters": count, **_one_rank(config, size, engine)}


def _one_rank(config: Config, size: str, engine: str) -> dict[str, float]:
    """Return the time of an engine's step, and its ratio to that of the bare loop's."""
    batch = SIZES[size][2]
    bare = bare_step(build_model(size), batch)
    again = engine == "aa"
    other = bare_step(build_model(size), batch) if again else _step(size, engine, batch)
    timed = _in_turn(config, [bare, other], _timed)
    ratio = statistics.median(theirs / ours for ours, theirs in timed)
    ours, theirs = (1000 * statistics.median(each) for each in zip(*timed, strict=True))
    return {"ratio": ratio, "ms": theirs, "bare_ms": ours}


def _two_ranks(config: Config, size: str, engine: str, rank: int) -> dict[str, float]:
    """Return what two ranks of one thread make of the same steps."""
    import torch.distributed as dist

    batch = SIZES[size][2]
    alone = bare_step(build_model(size), batch)
    ddp = bare_step(build_model(size), batch // 2, ranks=2)
    ours = _step(size, engine, batch // 2, ranks=2)

    def together(step: Callable[[], None]) -> float:
        """Both ranks begin at once, and the last one's end counts."""
        dist.barrier()
        started = time.perf_counter()
        step()
        dist.barrier()
        return time.perf_counter() - started

    def idle() -> None:
        """The other rank waits."""

    steps = [alone if rank == 0 else idle, alone, ddp, ours]
    timed = _in_turn(config, steps, together)
    single, both, peer, pair = (statistics.median(each) for each in zip(*timed, strict=True))
    return {
        "ratio": statistics.median(each[3] / each[2] for each in timed),
        "ms": 1000 * pair,
        "ddp_ms": 1000 * peer,
        "efficiency": single / (2 * pair),
        "ddp_efficiency": single / (2 * peer),
        "machine": single / both,
    }


def _step(size: str, engine: str, batch: int, ranks: int = 1) -> Callable[[], None]:
    return engine_step(build_model(size), engine, batch, ranks)[0]


def _in_turn(
    config: Config, steps: list[Callable[[], None]], timed: Callable[[Callable], float]
) -> list[tuple[float, ...]]:
    """Return the seconds of each step in each round; every other round goes backwards."""
    rounds = []
    for number in range(WARMING + config.pairs):
        order = range(len(steps))
        seconds = {i: timed(steps[i]) for i in (order if number % 2 else reversed(order))}
        rounds.append(tuple(seconds[i] for i in order))
    return rounds[WARMING:]


def _memory(size: str, engine: str, count: float) -> dict[str, float]:
    """Return the bytes of three steps' peak, and what they are of."""
    batch = SIZES[size][2]
    saved_bytes(build_model("small"), 1)  # what is imported and made once is no step's
    import deepspeed  # noqa: F401  its code is not a step's

    before = _resident()
    step, _ = engine_step(build_model(size), engine, batch)
    for _ in range(WARMING):
        step()
    peak = float(_resident() - before)
    forward = float(saved_bytes(build_model(size), batch))
    state = BYTES_A_PARAMETER * count
    buffers = BUFFERS.get(engine, 0) * count
    rest = peak - state - buffers
    return {"peak": peak, "state": state, "buffers": buffers, "rest": rest, "forward": forward}


def _timed(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _resident() -> int:
    """Return the most memory that this process has held, in bytes."""
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    run_benchmark(Config, main, pairs=2, repeats=1, sizes=("small",))
