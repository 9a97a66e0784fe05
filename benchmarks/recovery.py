"""Seconds from a fault to the next training step, on simulated nodes of one machine.

    python benchmarks/recovery.py                              # some twenty minutes on two cores
    python benchmarks/recovery.py --faults worker --repeats 1

Two workers train a small prior (ZeRO stage 1) on Ray nodes of one CPU each, and one fault after
another befalls them, at a random step:

    worker    a worker is killed
    writing   a worker is killed while it writes its part of a checkpoint
    damaged   the newest checkpoint is truncated, a bit of it flipped or a part deleted; then worker
    raylet    a node's raylet is killed, where another node is free
    driver    the driver is killed, and its command given again at once
    hang      a worker stands still; counted from the end of the time that a step is given
    elastic   a node of two is lost, and then comes back: goes on with one worker, and with two

What the run's own timeline.jsonl tells, split into detection (until the loss was noticed, or the
command runs), restart (until a worker runs), restore (until it has read its checkpoint) and step
(until it has done one). Each run must end with the samples of an undisturbed run at every step, and
but for elastic with its very weights; else the exit code is 1. No peer: `ratio` is the smallest
limit over its median.
"""

import json
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from _common import BenchmarkConfig, run_benchmark
from _faults import (
    CHECKPOINT_EVERY,
    HANG_SECONDS,
    Nodes,
    Training,
    check_samples,
    largest_difference,
    nodes,
    write_embeds,
)

from cluster.base.cli import DONE, INCOMPLETE

LIMITS = {"worker": 90.0, "raylet": 150.0, "driver": 90.0}  # seconds, of the medians
KINDS = ("worker", "raylet", "driver", "hang", "elastic", "writing", "damaged")
PARTS = ("detection", "restart", "restore", "step")
# More for a node, since Ray takes a while to see that one is gone, when its workers still step, and
# a minute to see that one has come back.
UNSEEN_STEPS = {"raylet": 2000, "elastic": 2000}
# A sample a micro-batch, for the undisturbed run as well: steps take long enough for Ray to see the
# node before the run has ended with one worker.
SLOW_STEPS = ("--train.micro-batch-size", "1")
ELASTIC_TOLERANCE = 1e-3  # of weights that another order of sums has led elsewhere


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Faults and their number."""

    faults: tuple[str, ...] = ("worker", "raylet", "driver", "hang", "elastic")
    """kinds of faults: worker, raylet, driver, hang, elastic, writing, damaged"""
    repeats: int = 5
    """faults of each kind"""
    together: bool = False
    """let all kinds befall one run, instead of one run for each"""
    steps_a_fault: int = 100
    """length of a run, for each fault in it and once more"""
    seed: int = 0
    """of the moments, and of who is hit"""
    keep: str = ""
    """folder that keeps the runs and their output; empty = none does"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    unknown = set(config.faults) - set(KINDS)
    if unknown:
        raise ValueError(
            f"faults: found {sorted(unknown)[0]}, expected some of {', '.join(KINDS)}"
        )
    if config.together and "elastic" in config.faults:
        raise ValueError("together: found elastic, expected other faults: it takes all spare nodes")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(config.keep or folder).absolute()
        root.mkdir(parents=True, exist_ok=True)
        with nodes(2) as cluster:
            results, lawful = campaign(config, root, cluster)
    _print_table(results, lawful)
    ratios = [LIMITS[kind] / result["median"] for kind, result in results.items() if kind in LIMITS]
    print(json.dumps({"ratio": min(ratios, default=0.0), "lawful": lawful, **results}))
    return DONE if all(lawful.values()) else INCOMPLETE


def campaign(
    config: Config, root: Path, cluster: Nodes
) -> tuple[dict[str, dict], dict[str, bool]]:
    """Train undisturbed, then under faults; return the seconds of each kind, and for each run
    whether the laws held."""
    plan = {kind: [kind] * config.repeats for kind in config.faults}
    if config.together:
        plan = {"together": [*config.faults] * config.repeats}
    embeds = write_embeds(root)
    seconds: dict[str, list] = {}
    lawful = {}
    for name, kinds in plan.items():
        num_steps = config.steps_a_fault * (1 + len(kinds))
        num_steps += sum(UNSEEN_STEPS.get(kind, 0) for kind in kinds)
        elastic = "elastic" in kinds
        undisturbed = f"undisturbed_{'slow_' if elastic else ''}{num_steps}"
        reference, disturbed = (
            Training(run=root / each, embeds=embeds, address=cluster.address, num_steps=num_steps)
            for each in (undisturbed, name)
        )
        if elastic:
            reference.options = SLOW_STEPS
            disturbed.options = ("--train.min-workers", "1", *SLOW_STEPS)
        if not reference.run.exists():
            reference.start()
            reference.finish()
        try:
            disturb(disturbed, kinds, random.Random(f"{config.seed} {name}"), cluster, seconds)
            check_samples(disturbed.run, reference.run, num_steps)
            difference = largest_difference(disturbed.run, reference.run)
            lawful[name] = difference <= (ELASTIC_TOLERANCE if elastic else 0.0)
            print(f"{name}: weights differ from undisturbed ones by at most {difference:.3g}")
        except AssertionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            lawful[name] = False
        finally:
            disturbed.stop()
    return {kind: _figures(each) for kind, each in seconds.items()}, lawful


def disturb(
    training: Training, kinds: list[str], dice: random.Random, cluster: Nodes,
    seconds: dict[str, list],
) -> None:  # fmt: skip
    """Train to the end under faults, and add the seconds of their recoveries."""
    num_nodes = 2 + kinds.count("raylet")
    cluster.have(num_nodes)
    training.start()
    for kind in kinds:
        training.await_that("two ranks train", lambda: len(training.ranks()) == 2)
        training.await_step(training.step + dice.randrange(5, 25))
        step, committed = training.step, training.committed()
        fault = _befall(training, kind, dice, cluster)
        seconds.setdefault(kind, []).append(_recovered(training, kind, fault, committed))
        seconds[kind][-1]["redone_steps"] = max(0, step - training.attempts()[-1]["step"])
        if kind == "elastic":
            cluster.have(num_nodes)
    if kinds[-1] == "elastic":
        training.await_that("two ranks train", lambda: len(training.ranks()) == 2)
    training.finish()


def _figures(recoveries: list[dict[str, float]]) -> dict:
    """Return the medians of the recoveries from one kind of fault."""
    totals = [sum(each[phase] for phase in PARTS) for each in recoveries]
    parts = {phase: float(np.median([each[phase] for each in recoveries])) for phase in PARTS}
    redone = float(np.mean([each["redone_steps"] for each in recoveries]))
    return {"median": float(np.median(totals)), "most": max(totals), **parts,
            "redone_steps": redone, "seconds": recoveries}  # fmt: skip


def _befall(training: Training, kind: str, dice: random.Random, cluster: Nodes) -> float:
    if kind == "driver":
        return training.kill_driver()
    if kind == "worker":
        return training.kill_worker(dice)
    if kind == "hang":
        return training.stop_worker(dice)
    if kind == "writing":
        return training.kill_while_it_writes()
    if kind == "damaged":
        return training.damage_checkpoint(dice)
    return training.kill_raylet(dice, cluster)


def _recovered(training: Training, kind: str, fault: float, committed: int) -> dict[str, float]:
    """Wait for the next step, and return the seconds of each part of the recovery."""
    training.await_that("the next step", lambda: training.recovery(fault) is not None)
    recovery = training.recovery(fault)
    assert recovery is not None
    begun = training.attempts()[-1]
    lost = CHECKPOINT_EVERY if kind == "damaged" else 0
    assert begun["step"] >= committed - lost, f"went back to {begun['step']}, not {committed}"
    if kind == "elastic":
        assert begun["num_workers"] == 1, "goes on with what is left"
    seconds = asdict(recovery)
    if kind == "hang":
        seconds["detection"] -= HANG_SECONDS
    return seconds


def _print_table(results: dict[str, dict], lawful: dict[str, bool]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("fault", "number", "median, s", "most, s", *PARTS, "steps redone", "limit, s")
    for kind, result in results.items():
        figures = [f"{result[name]:.1f}" for name in ("median", "most", *PARTS, "redone_steps")]
        limit = f"{LIMITS[kind]:.0f}" if kind in LIMITS else ""
        table.add_row(kind, str(len(result["seconds"])), *figures, limit)
    console = Console(width=120)
    console.print(table)
    for name, held in lawful.items():
        console.print(f"{name}: {'the laws held' if held else 'a law was broken'}")


if __name__ == "__main__":
    run_benchmark(Config, main, faults=("worker",), repeats=1, steps_a_fault=20)
