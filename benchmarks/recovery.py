"""Seconds from a fault to the next training step, on simulated nodes of one machine.

    python benchmarks/recovery.py                                  # some twenty minutes on two cores
    python benchmarks/recovery.py --faults worker --repeats 1

Two workers train a small prior (ZeRO stage 1) on Ray nodes of one CPU each, and one fault after
another befalls them, at a random step: a killed worker; a killed raylet, where a third node is
free; a killed driver, whose command is given again at once; a rank that stands still, which counts
from the end of the run's own limit for a step (--train.hang-seconds 30). elastic: a node of two is
lost and comes back 30 steps later; the run goes on with one worker and then with two.

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
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from _faults import Nodes, Training, check_samples, largest_difference, nodes, write_embeds

from cluster.cli import DONE, INCOMPLETE, parse, run_script

LIMITS = {"worker": 90.0, "raylet": 150.0, "driver": 90.0, "hang": 120.0}  # seconds
HANG_SECONDS = 30.0
STEPS_A_FAULT = 100
PARTS = ("detection", "restart", "restore", "step")
ELASTIC_TOLERANCE = 1e-3  # of weights that another order of sums has led elsewhere


@dataclass(frozen=True, kw_only=True)
class Config:
    """Faults and their number."""

    faults: tuple[str, ...] = ("worker", "raylet", "driver", "hang", "elastic")
    """kinds of faults: worker, raylet, driver, hang, elastic"""
    repeats: int = 5
    """faults of each kind, in one run; elastic: 1"""
    seed: int = 0
    """of the moments, and of who is hit"""
    keep: str = ""
    """folder that keeps the runs and their output; empty = none does"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    unknown = set(config.faults) - {*LIMITS, "elastic"}
    if unknown:
        known = ", ".join((*LIMITS, "elastic"))
        raise ValueError(f"faults: found {sorted(unknown)[0]}, expected some of {known}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(config.keep or folder).absolute()
        root.mkdir(parents=True, exist_ok=True)
        with nodes(2) as cluster:
            found = campaign(config, root, cluster)
    _print_table(found)
    medians = [LIMITS[kind] / told["median"] for kind, told in found.items() if kind in LIMITS]
    print(json.dumps({"ratio": min(medians, default=0.0), **found}))
    return DONE if all(told["lawful"] for told in found.values()) else INCOMPLETE


def campaign(config: Config, root: Path, cluster: Nodes) -> dict[str, dict]:
    """Train undisturbed, then under each kind of fault; return what each took."""
    num_steps = STEPS_A_FAULT * (config.repeats + 1)
    embeds = write_embeds(root)

    def training(name: str, *options: str) -> Training:
        return Training(
            run=root / name, embeds=embeds, address=cluster.address, num_steps=num_steps,
            options=options,
        )  # fmt: skip

    reference = training("undisturbed")
    reference.start()
    reference.finish()
    found = {}
    for kind in config.faults:
        dice = random.Random(f"{config.seed} {kind}")
        elastic = ("--train.min-workers", "1") if kind == "elastic" else ()
        disturbed = training(kind, *elastic)
        try:
            told = disturb(disturbed, kind, config.repeats, dice, cluster)
            told |= _lawful(disturbed, reference, 0.0 if kind in LIMITS else ELASTIC_TOLERANCE)
        except AssertionError as error:
            print(f"{kind}: {error}", file=sys.stderr)
            told = {"lawful": False, "median": float("inf")}
        finally:
            disturbed.stop()
        found[kind] = told
    return found


def disturb(
    training: Training, kind: str, repeats: int, dice: random.Random, cluster: Nodes
) -> dict:
    """Train to the end under a kind of fault; return the seconds of its recoveries."""
    cluster.have(3 if kind == "raylet" else 2)
    training.start()
    seconds, redone = [], []
    for _ in range(1 if kind == "elastic" else repeats):
        training.await_that("all ranks train", lambda: bool(training.ranks()))
        target = training.step + dice.randrange(5, 5 + STEPS_A_FAULT // 5)
        training.await_that(f"step {target}", lambda: training.step >= target)
        step, committed = training.step, training.committed()
        fault = _befall(training, kind, dice, cluster)
        seconds.append(_recovered(training, kind, fault, committed))
        redone.append(step - training.attempts()[-1]["step"])
        cluster.have(2 if kind != "raylet" else 3)
    training.finish()
    totals = [sum(each.values()) for each in seconds]
    parts = {part: float(np.median([each[part] for each in seconds])) for part in PARTS}
    return {"median": float(np.median(totals)), "most": max(totals), **parts,
            "redone_steps": float(np.mean(redone)), "seconds": seconds}  # fmt: skip


def _befall(training: Training, kind: str, dice: random.Random, cluster: Nodes) -> float:
    if kind == "driver":
        return training.kill_driver()
    if kind == "worker":
        return training.kill_worker(dice)
    if kind == "hang":
        return training.stop_worker(dice)
    return training.kill_raylet(dice, cluster)


def _recovered(training: Training, kind: str, fault: float, committed: int) -> dict[str, float]:
    """Wait for the next step, and return the seconds of each part of the recovery."""
    training.await_that("the next step", lambda: training.recovery(fault) is not None)
    recovery = training.recovery(fault)
    assert recovery is not None
    begun = training.attempts()[-1]
    assert begun["step"] >= committed, f"went back to {begun['step']}, behind {committed}"
    if kind == "elastic":
        assert begun["num_workers"] == 1, "goes on with what is left"
    seconds = asdict(recovery)
    if kind == "hang":
        seconds["detection"] -= HANG_SECONDS
    return seconds


def _lawful(training: Training, reference: Training, tolerance: float) -> dict:
    check_samples(training.run, reference.run, training.num_steps)
    difference = largest_difference(training.run, reference.run)
    assert difference <= tolerance, f"weights differ by {difference:.2g}"
    return {"lawful": True, "largest_difference": difference}


def _print_table(found: dict[str, dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("fault", "median, s", "most, s", *PARTS, "steps redone", "limit, s", "laws hold")
    for kind, told in found.items():
        figures = [f"{told.get(name, float('nan')):.1f}"
                   for name in ("median", "most", *PARTS, "redone_steps")]  # fmt: skip
        limit = f"{LIMITS[kind]:.0f}" if kind in LIMITS else ""
        table.add_row(kind, *figures, limit, "yes" if told["lawful"] else "no")
    Console(width=120).print(table)


if __name__ == "__main__":
    run_script(lambda: main(parse(Config)))
