"""The event log of a run: JSON lines in its folder, which any rank may append to.

    incidents.jsonl     {"kind", "step", "message", "time"}: what went wrong without ending it
    timeline.jsonl      {"event", "time", ...}: when it began, lost workers, continued
    samples/rank_0003.jsonl   {"attempt", "step", "num_workers", "keys"}: --train.log-samples

Incidents: spike, a loss far above the last ones; hang, a rank that took too long over a step; lost,
workers that ended; broken, a checkpoint that did not verify when the run continued; refused,
another launch wanted the run.

Events: launched, the driver started; lost, a worker's end was noticed; placed, the first rank runs
our code; restored, it has read its checkpoint (attempt, step, num_workers); stepped, the first step
of the attempt is done; validator failed, the validation command failed (message).

No torch here, since Ray's controller imports it.
"""

import math
import os
import socket
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.base.files import Json
from cluster.base.jsonl import add_line, read_lines
from cluster.base.metrics import Incident
from cluster.base.run_dir import INCIDENTS_NAME, TIMELINE_NAME, samples_path

if TYPE_CHECKING:
    from training.data.dataloader import Batch

SPIKE_WINDOW = 64  # losses that a new one is compared with
SPIKE_MINIMUM = 32  # of them, before any spike is reported
SMALLEST_LOSS = 1e-12  # whose logarithm is taken
NORMAL_DEVIATION = 1.4826  # median absolute deviations in a standard deviation


# -- incidents -------------------------------------------------------------------------------------


def report_incident(run: Path, kind: Incident, step: int, message: str) -> None:
    """Append an incident; the driver prints and counts it."""
    line = {"kind": kind, "step": step, "message": message, "time": time.time()}
    add_line(run / INCIDENTS_NAME, line)


def report_refusal(run: Path) -> None:
    """Append that the launch of this process was refused, for another one holds the run."""
    who = f"process {os.getpid()} of {socket.gethostname()}"
    report_incident(run, "refused", 0, f"a launch by {who}, beside the one that trains")


class SpikeDetector:
    """Finds losses far above those of the last steps.

    Far is `deviations` standard deviations above the median of their logarithms, estimated by the
    median absolute deviation, which the spikes themselves do not move. Logarithms, because a
    diffusion's loss depends on its timesteps and has a long tail in a small batch: of 2,200 steps
    of 24 samples that went well, 112 lay 8 deviations of the loss itself above its median, and none
    6 deviations of its logarithm. With 0 deviations it finds none.
    """

    def __init__(self, deviations: float) -> None:
        self._deviations = deviations
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def check(self, loss: float) -> str:
        """Add a finite loss; return a message if it is a spike, else ""."""
        recent, message = self._recent, ""
        log = math.log(max(loss, SMALLEST_LOSS))
        if self._deviations and len(recent) >= SPIKE_MINIMUM:
            median = statistics.median(recent)
            spread = NORMAL_DEVIATION * statistics.median(abs(other - median) for other in recent)
            if log > median + self._deviations * spread:
                message = (
                    f"loss {loss:.4g}, over a median of {math.exp(median):.4g} with a deviation of "
                    f"a factor {math.exp(spread):.3g} in the last {len(recent)} steps"
                )
        recent.append(log)
        return message


# -- timeline --------------------------------------------------------------------------------------


def record_event(run: Path, event: str, **fields: str | int) -> None:
    """Append an event to the timeline, at the present time of the clock."""
    add_line(run / TIMELINE_NAME, {"event": event, "time": time.time(), **fields})


def read_timeline(run: Path) -> list[Json]:
    """Return the events of a run."""
    return read_lines(run / TIMELINE_NAME)


def num_attempts(run: Path) -> int:
    """Return how often a run has begun to train."""
    return sum(line["event"] == "restored" for line in read_timeline(run))


# -- samples ---------------------------------------------------------------------------------------


class SampleLog:
    """Writes the keys of the samples of a rank's steps, which prove that none was repeated or lost.

    A key is of one (seed, epoch, sample): see models/diffusion/keyed_random.py. A line is written
    once its step has moved the weights. What an attempt trained past the checkpoint that its
    successor begins at is trained again: of each step the last attempt counts.
    """

    def __init__(self, run: Path, rank: int, *, num_workers: int, attempt: int) -> None:
        """attempt: a number that all ranks of an attempt share."""
        self._path = samples_path(run, rank)
        self._path.parent.mkdir(exist_ok=True)
        self._attempt = {"attempt": attempt, "num_workers": num_workers}

    def write(self, step: int, micro_batches: "Sequence[Batch]") -> None:
        """Append the samples of weight 1 of a step; the first step is 1."""
        keys = [key for batch in micro_batches for key in batch.keys[batch.weight > 0].tolist()]
        add_line(self._path, {**self._attempt, "step": step, "keys": keys})
