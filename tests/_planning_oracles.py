"""Independent models that the formulas of cluster/planning are compared with: a discrete-event
simulation of a run on nodes that fail, and published figures.

Failures of a node are a Poisson process, so after every event the time to the next one may be
drawn again, and between two events work proceeds by arithmetic. Times are in seconds, work in
seconds of the complete cluster.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

from cluster.planning.failures import CheckpointTimes, Nodes, young_interval


@dataclass(frozen=True, kw_only=True)
class Job(CheckpointTimes):
    """A run in lockstep: one failed node stops all, and what no checkpoint holds is lost."""

    work: float


@dataclass(kw_only=True)
class History:
    """Where the time went, in seconds of the complete cluster.

    redone: work that was lost and done again; slow: what running on fewer nodes cost; flushing: the
    last checkpoint's write; down: restarts and waiting.
    """

    work: float = 0.0
    redone: float = 0.0
    slow: float = 0.0
    blocked: float = 0.0
    flushing: float = 0.0
    down: float = 0.0
    failures: int = 0
    checkpoints: int = 0

    @property
    def elapsed(self) -> float:
        return self.work + self.redone + self.slow + self.blocked + self.flushing + self.down


class SimulatedRun:
    """One history of a training, event by event."""

    def __init__(self, job: Job, nodes: Nodes, rng: np.random.Generator) -> None:
        self.job, self.nodes, self.rng = job, nodes, rng
        self.now = self.done = 0.0
        self.active, self.spares = nodes.count, nodes.spares
        self.repairs: list[float] = []  # when failed nodes are back
        self.history = History(work=job.work)

    @property
    def speed(self) -> float:
        return self.active / self.nodes.count

    def run(self) -> History:
        while self.done < self.job.work:
            self._proceed()
        return self.history

    def _next_failure(self) -> float:
        if math.isinf(self.nodes.mtbf):
            return math.inf
        return float(self.rng.exponential(self.nodes.mtbf / self.active))

    def _proceed(self) -> None:
        """Work from a checkpoint on until the end, a failure, or a moment to grow back."""
        job, left = self.job, self.job.work - self.done
        cycle = job.interval / self.speed + job.block
        count = math.ceil(left / job.interval - 1e-9)
        end = left / self.speed + count * job.block + job.write
        fails = self._next_failure()
        grows = self._growth(cycle, end)
        stop = min(end, fails, grows)
        self.now += stop
        if stop == end:
            self._spend(left, left, count, 0.0)
            self.history.flushing += job.write
            self.done = job.work
            return
        # checkpoints that are complete on storage, and blocks begun
        complete = min(max(0, math.floor((stop - job.write) / cycle + 1e-9)), count - 1)
        begun = min(math.floor(stop / cycle), count)
        rest = stop - begun * cycle
        inside = begun * job.interval + min(rest * self.speed, job.interval)
        inside = min(inside, left)
        waits = stop - inside / self.speed - begun * job.block  # within a block, or the last write
        self._spend(inside, complete * job.interval, begun, max(0.0, waits))
        self.done += complete * job.interval
        if stop == fails:
            self._fail()
        else:
            self._take_nodes()
            self._restart()

    def _spend(self, worked: float, kept: float, checkpoints: int, waited: float) -> None:
        """Account for work, of which `kept` stays, and for checkpoints."""
        seconds = worked / self.speed
        self.history.slow += seconds - worked
        self.history.redone += worked - kept
        self.history.blocked += checkpoints * self.job.block + waited
        self.history.checkpoints += checkpoints

    def _fail(self) -> None:
        """Lose a node; then take those that are there, and continue with fewer or wait."""
        self._lose_node()
        self._take_nodes()
        missing = self.active < self.nodes.count
        if missing and not self._continues():
            self._wait()
        self._restart()

    def _lose_node(self) -> None:
        self.history.failures += 1
        self.active -= 1
        heapq.heappush(self.repairs, self.now + self.nodes.repair)

    def _take_nodes(self) -> None:
        """Bring repaired nodes and spares into a run that has stopped."""
        while self.repairs and self.repairs[0] <= self.now + 1e-9:
            heapq.heappop(self.repairs)
            self.spares += 1
        taken = min(self.spares, self.nodes.count - self.active)
        self.active, self.spares = self.active + taken, self.spares - taken

    def _continues(self) -> bool:
        """Whether fewer nodes do more until one is back than growing back costs: its restart, and
        what is done while a checkpoint is written."""
        wait = self.repairs[0] - self.now
        done = (wait - self.nodes.restart) * self.speed
        return self.nodes.elastic and done > self.nodes.restart + self.job.write

    def _wait(self) -> None:
        """Wait until all nodes are there; others may fail meanwhile."""
        while self.active < self.nodes.count:
            fails = self.now + (self._next_failure() if self.active else math.inf)
            until = min(fails, self.repairs[0])
            self._stop(until)
            if until == fails:
                self._lose_node()
            self._take_nodes()

    def _restart(self) -> None:
        """Restart from the last complete checkpoint; a failure meanwhile restarts that."""
        until = self.now + self.nodes.restart
        fails = self.now + self._next_failure()
        self._stop(min(until, fails))
        if fails < until:
            self._fail()

    def _stop(self, until: float) -> None:
        self.history.down += until - self.now
        self.now = until

    def _growth(self, cycle: float, end: float) -> float:
        """Return when to stop for a repaired node: at the first complete checkpoint after its
        repair, or never, where the restart costs more than it brings."""
        if self.active == self.nodes.count or not self.repairs:
            return math.inf
        back = self.repairs[0] - self.now
        at = max(1, math.ceil((back - self.job.write) / cycle)) * cycle + self.job.write
        left = (end - at) * self.speed
        gain = left / self.speed - left * self.nodes.count / (self.active + 1)
        return at if gain > self.nodes.restart + self.job.write else math.inf


def simulate(job: Job, nodes: Nodes, *, seed: int = 0, count: int = 1) -> list[History]:
    """Return so many histories, a function of the seed alone."""
    seeds = np.random.SeedSequence(seed).spawn(count)
    return [SimulatedRun(job, nodes, np.random.default_rng(each)).run() for each in seeds]


def simulated_goodput(job: Job, nodes: Nodes, *, count: int = 40) -> float:
    """Return all work over all time: what a long sequence of such runs would reach."""
    histories = simulate(job, nodes, count=count)
    return sum(h.work for h in histories) / sum(h.elapsed for h in histories)


def daly_interval(block: float, mtbf: float) -> float:
    """Return the higher-order best interval (Daly 2006, eq. 37), of work between checkpoints."""
    if block >= 2 * mtbf:
        return mtbf
    x = block / (2 * mtbf)
    return young_interval(block, mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - block
