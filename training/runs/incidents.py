"""What went wrong in a run without ending it: incidents.jsonl, which the driver tells and counts.

{"kind", "step", "told", "time"}   a line each, of whoever saw it first: a rank, or what watches
over the ranks, of one that is gone

spike    a loss far above the last ones
hang     a rank that took too long over a step
lost     workers that are gone
broken   a checkpoint that was not whole when a run looked for one to go on from
"""

import math
import statistics
import time
from collections import deque
from pathlib import Path

from cluster.base.jsonl import add_line
from cluster.base.run_dir import INCIDENTS_NAME

KINDS = ("spike", "hang", "lost", "broken")
WINDOW = 64  # losses that a spike is judged by
ENOUGH = 32  # of them
SMALLEST = 1e-12  # loss whose logarithm is taken
NORMAL = 1.4826  # median absolute deviations in a standard deviation


def report_incident(run: Path, kind: str, step: int, told: str) -> None:
    """Add a line; the file takes whole lines from any rank."""
    add_line(run / INCIDENTS_NAME, {"kind": kind, "step": step, "told": told, "time": time.time()})


class LossWatch:
    """Finds losses far above those of the last steps.

    Far is `deviations` standard deviations above the median of their logarithms, estimated by the
    median absolute deviation, which the spikes themselves do not move. Logarithms, because a
    diffusion's loss depends on its timesteps and has a long tail in a small batch: of 2,200 steps
    of 24 samples that went well 112 lay 8 deviations of the loss itself above its median, and none
    6 deviations of its logarithm. 0 deviations: it finds none.
    """

    def __init__(self, deviations: float) -> None:
        self._deviations = deviations
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def spike(self, loss: float) -> str:
        """Say what is strange about a finite loss, or nothing."""
        recent, found = self._recent, ""
        log = math.log(max(loss, SMALLEST))
        if self._deviations and len(recent) >= ENOUGH:
            middle = statistics.median(recent)
            spread = NORMAL * statistics.median(abs(other - middle) for other in recent)
            if log > middle + self._deviations * spread:
                found = (
                    f"loss {loss:.4g}, over a median of {math.exp(middle):.4g} with a deviation of "
                    f"a factor {math.exp(spread):.3g} in the last {len(recent)} steps"
                )
        recent.append(log)
        return found
