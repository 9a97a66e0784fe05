"""A log of the samples that a run trained on, which proves that none was repeated or skipped.

    <run>/samples/rank_0003.jsonl   {"attempt", "step", "num_workers", "keys"}, a line a step

keys: those of a rank's samples of weight 1, each of one (seed, epoch, sample): see
models/diffusion/keyed_random.py. A line is written as a whole once its step has moved the
weights, and so outlives its process. What an attempt trained past the checkpoint that its
successor began at, the
successor trains again: of each step the last attempt counts.
"""

from pathlib import Path

import torch

from cluster.base.jsonl import add_line, read_lines
from training.data.dataloader import Batch

SAMPLES = "samples"


class SampleLog:
    """Writes the samples of a rank's steps; `attempt`: a number that all its ranks share."""

    def __init__(self, run: Path, rank: int, *, num_workers: int, attempt: int) -> None:
        self._path = run / SAMPLES / f"rank_{rank:04d}.jsonl"
        self._path.parent.mkdir(exist_ok=True)
        self._told = {"attempt": attempt, "num_workers": num_workers}

    def write(self, step: int, micro_batches: list[Batch]) -> None:
        """Add the samples of step number `step`, the first of which is 1."""
        keys = torch.cat([batch.keys[batch.weight > 0] for batch in micro_batches])
        add_line(self._path, {**self._told, "step": step, "keys": keys.tolist()})


def trained_samples(run: Path, last_step: int) -> list[list[int]]:
    """Return the keys of the samples that made each of the steps 1 to `last_step`, sorted.

    Raises ValueError where the log does not tell of a step, or not of all its ranks.
    """
    found: dict[int, dict[int, list[dict]]] = {}
    for path in sorted((run / SAMPLES).glob("rank_*.jsonl")):
        for line in read_lines(path):
            found.setdefault(line["step"], {}).setdefault(line["attempt"], []).append(line)
    steps = []
    for step in range(1, last_step + 1):
        attempts = found.get(step, {})
        lines = attempts[max(attempts)] if attempts else []
        expected = lines[0]["num_workers"] if lines else 1
        if len(lines) != expected:
            raise ValueError(
                f"{run / SAMPLES}: found the samples of {len(lines)} ranks at step {step}, "
                f"expected {expected}; a run must be logged from its first step on"
            )
        steps.append(sorted(key for line in lines for key in line["keys"]))
    return steps
