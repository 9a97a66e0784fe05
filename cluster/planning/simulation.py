"""A discrete-event simulation of runs on nodes that fail, and what is known of them in closed form.

Failures of a node are a Poisson process, so after every event the time to the next one may be
drawn anew, and between two events work proceeds by arithmetic: a month on a thousand nodes is some
hundred events. Times are in seconds, work in seconds of the whole cluster.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

MAX_EVENTS = 1_000_000
LEAST_GOODPUT = 1e-3


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The machines a stage runs on. mtbf: of one node, in seconds or inf; restart: from a failure
    to the next step; repair: until a failed node is back; elastic: whether to go on with fewer
    nodes while none is spare."""

    count: int
    mtbf: float
    restart: float = 0.0
    repair: float = 0.0
    spares: int = 0
    elastic: bool = False

    @property
    def system_mtbf(self) -> float:
        """Mean time between failures of any of them."""
        return self.mtbf / self.count


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run in lockstep: one failed node stops all, and what no checkpoint holds is lost.

    work: without failures and checkpoints; interval: of work between checkpoints; block: for which
    one holds up the steps; write: until it is whole on storage, beside the steps.
    """

    work: float
    interval: float
    block: float
    write: float = 0.0

    def __post_init__(self) -> None:
        if self.interval <= 0 or self.work <= 0:
            raise ValueError(
                f"simulation: found work {self.work:g} and an interval of {self.interval:g} "
                "seconds, expected more than 0 of both"
            )


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Work in independent pieces that are committed one by one, such as shards: a failed node loses
    the piece it has in hand. piece: seconds of one node for one piece."""

    work: float
    piece: float


@dataclass(kw_only=True)
class History:
    """Where the time went: elapsed = work + redone + slow + blocked + flushing + down, each in
    seconds of the whole cluster.

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

    @property
    def goodput(self) -> float:
        """Share of the time that went into work that stayed."""
        return self.work / self.elapsed


# -- closed forms ----------------------------------------------------------------------------------


def young_interval(block: float, mtbf: float) -> float:
    """Return sqrt(2 block mtbf), the first-order best interval (Young 1974)."""
    return math.sqrt(2 * block * mtbf)


def daly_interval(block: float, mtbf: float) -> float:
    """Return the higher-order best interval (Daly 2006, eq. 37), of work between checkpoints."""
    if block >= 2 * mtbf:
        return mtbf
    x = block / (2 * mtbf)
    return young_interval(block, mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - block


def expected_goodput(interval: float, block: float, restart: float, mtbf: float) -> float:
    """Return interval / E[time of an interval], exact for failures at rate 1 / mtbf that also hit
    checkpoints and restarts (Daly 2006, eq. 13):

        E = mtbf exp(restart / mtbf) (exp((interval + block) / mtbf) - 1)
    """
    exponent = (restart + interval + block) / mtbf
    if exponent > 700:  # exp would overflow: it never gets there
        return 0.0
    return interval / (mtbf * math.exp(restart / mtbf) * math.expm1((interval + block) / mtbf))


def best_interval(block: float, restart: float, mtbf: float) -> float:
    """Return the interval of the largest `expected_goodput`, by golden section over its logarithm,
    of which it has one maximum."""
    low, high = math.log(1e-3 * min(block or 1.0, mtbf)), math.log(20 * mtbf)
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        at_left, at_right = (
            expected_goodput(math.exp(x), block, restart, mtbf) for x in (left, right)
        )
        low, high = (low, right) if at_left >= at_right else (left, high)
    return math.exp((low + high) / 2)


# -- training --------------------------------------------------------------------------------------


class _Run:
    """One history of a training."""

    def __init__(self, training: Training, nodes: Nodes, rng: np.random.Generator) -> None:
        self.job, self.nodes, self.rng = training, nodes, rng
        self.now = self.done = 0.0
        self.active, self.spares = nodes.count, nodes.spares
        self.repairs: list[float] = []  # when failed nodes are back
        self.history = History(work=training.work)

    @property
    def speed(self) -> float:
        return self.active / self.nodes.count

    def run(self) -> History:
        events = 0
        while self.done < self.job.work:
            events += 1
            assert events < MAX_EVENTS, "_require_progress keeps histories short"
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
        # checkpoints that are whole on storage, and blocks begun
        whole = min(max(0, math.floor((stop - job.write) / cycle + 1e-9)), count - 1)
        begun = min(math.floor(stop / cycle), count)
        rest = stop - begun * cycle
        inside = begun * job.interval + min(rest * self.speed, job.interval)
        inside = min(inside, left)
        waits = stop - inside / self.speed - begun * job.block  # within a block, or the last write
        self._spend(inside, whole * job.interval, begun, max(0.0, waits))
        self.done += whole * job.interval
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
        """Lose a node; then take those that are there, and go on with fewer or wait."""
        self._lose_node()
        self._take_nodes()
        missing = self.active < self.nodes.count
        if missing and not self._goes_on():
            self._wait()
        self._restart()

    def _lose_node(self) -> None:
        self.history.failures += 1
        self.active -= 1
        heapq.heappush(self.repairs, self.now + self.nodes.repair)

    def _take_nodes(self) -> None:
        """Bring repaired nodes and spares into a run that stands."""
        while self.repairs and self.repairs[0] <= self.now + 1e-9:
            heapq.heappop(self.repairs)
            self.spares += 1
        taken = min(self.spares, self.nodes.count - self.active)
        self.active, self.spares = self.active + taken, self.spares - taken

    def _goes_on(self) -> bool:
        """Whether fewer nodes do more until one is back than growing back costs: its restart, and
        what is done while a checkpoint is written."""
        wait = self.repairs[0] - self.now
        done = (wait - self.nodes.restart) * self.speed
        return self.nodes.elastic and done > self.nodes.restart + self.job.write

    def _wait(self) -> None:
        """Stand still until all nodes are there; others may fail meanwhile."""
        while self.active < self.nodes.count:
            fails = self.now + (self._next_failure() if self.active else math.inf)
            until = min(fails, self.repairs[0])
            self._stand(until)
            if until == fails:
                self._lose_node()
            self._take_nodes()

    def _restart(self) -> None:
        """Begin anew from the last whole checkpoint; a failure meanwhile begins that anew."""
        until = self.now + self.nodes.restart
        fails = self.now + self._next_failure()
        self._stand(min(until, fails))
        if fails < until:
            self._fail()

    def _stand(self, until: float) -> None:
        self.history.down += until - self.now
        self.now = until

    def _growth(self, cycle: float, end: float) -> float:
        """Return when to stop for a repaired node: at the first whole checkpoint after it is back,
        or never, where the restart costs more than it brings."""
        if self.active == self.nodes.count or not self.repairs:
            return math.inf
        back = self.repairs[0] - self.now
        at = max(1, math.ceil((back - self.job.write) / cycle)) * cycle + self.job.write
        left = (end - at) * self.speed
        gain = left / self.speed - left * self.nodes.count / (self.active + 1)
        return at if gain > self.nodes.restart + self.job.write else math.inf


def simulate(training: Training, nodes: Nodes, *, seed: int = 0, count: int = 1) -> list[History]:
    """Return so many histories of a training, a function of the seed alone. Raises ValueError for a
    training that would hardly ever end."""
    _require_progress(training, nodes)
    seeds = np.random.SeedSequence(seed).spawn(count)
    return [_Run(training, nodes, np.random.default_rng(each)).run() for each in seeds]


def _require_progress(training: Training, nodes: Nodes) -> None:
    if math.isinf(nodes.mtbf):
        return
    fails = nodes.system_mtbf
    lag = training.interval + training.block + training.write  # nothing stays before
    if expected_goodput(lag, 0.0, nodes.restart, fails) < LEAST_GOODPUT:
        raise ValueError(
            f"node_mtbf_hours: found a failure every {fails:.3g} s of {nodes.count} nodes, where a "
            f"restart takes {nodes.restart:.3g} s and a checkpoint is whole after {lag:.3g} s, "
            "expected failures rarer than that; take fewer nodes, or checkpoints more often"
        )
    away = nodes.repair / fails  # nodes under repair: Poisson, of this mean
    if not nodes.elastic and _poisson_up_to(nodes.spares, away) < LEAST_GOODPUT:
        raise ValueError(
            f"spare_nodes: found {nodes.spares} where {away:.3g} of {nodes.count} nodes are under "
            "repair on average, expected some more than those; or go on with fewer (elastic)"
        )


def _poisson_up_to(most: int, mean: float) -> float:
    """Return the probability of at most so many, for a Poisson number of this mean."""
    if not mean:
        return 1.0
    logs = (k * math.log(mean) - mean - math.lgamma(k + 1) for k in range(most + 1))
    return math.fsum(map(math.exp, logs))


def best_simulated_interval(
    training: Training, nodes: Nodes, *, seed: int = 0, count: int = 8, points: int = 13
) -> tuple[float, float]:
    """Return the interval of the largest mean goodput, and that goodput, among intervals from a
    quarter to four times the closed form's, none shorter than a write; all see the same seeds. Of
    the training only its checkpoints count: work is a hundred times what is between failures."""
    middle = best_interval(training.block, nodes.restart, nodes.system_mtbf)
    training = replace(training, work=100 * (nodes.system_mtbf + middle))
    least = max(training.write, 1.0)  # one at a time is written
    tried = sorted({max(least, middle * 4**x) for x in np.linspace(-1, 1, points)})
    jobs = (replace(training, interval=each) for each in tried)
    found = [mean_goodput(simulate(job, nodes, seed=seed, count=count)) for job in jobs]
    goodput, interval = max(zip(found, tried, strict=True))
    return float(interval), goodput


def mean_goodput(histories: Sequence[History]) -> float:
    """Return all work over all time: what a long sequence of such runs would reach."""
    return sum(h.work for h in histories) / sum(h.elapsed for h in histories)


# -- independent tasks, and the pipeline -----------------------------------------------------------


def simulate_tasks(tasks: Tasks, nodes: Nodes, rng: np.random.Generator) -> History:
    """Return a history of independent pieces: the work of a failed node waits for it alone."""
    history, now, done = History(work=tasks.work), 0.0, 0.0
    active, spares, repairs = nodes.count, nodes.spares, []
    while done < tasks.work:
        speed = active / nodes.count
        end = (tasks.work - done) / speed if active else math.inf
        fallible = active and not math.isinf(nodes.mtbf)
        fails = float(rng.exponential(nodes.mtbf / active)) if fallible else math.inf
        back = repairs[0] - now if repairs else math.inf
        step = min(end, fails, back)
        now, done = now + step, done + step * speed
        history.slow += step * (1 - speed)
        if step == end:
            break
        if step == fails:
            history.failures += 1
            lost = float(rng.uniform(0, tasks.piece)) / nodes.count
            lost = min(lost, done)
            done, history.redone = done - lost, history.redone + lost
            pause = nodes.restart if spares else max(nodes.repair, nodes.restart)
            spares -= bool(spares)
            active -= 1
            heapq.heappush(repairs, now + pause)
        else:
            heapq.heappop(repairs)
            active += 1
    return history


@dataclass(frozen=True, kw_only=True)
class PipelineStage:
    """A stage: its work, its nodes, the kind of nodes it takes all of, and the stages it reads."""

    name: str
    job: Training | Tasks
    nodes: Nodes
    pool: str
    after: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When each stage of one simulated pipeline began and ended, and where its time went."""

    begins: dict[str, float] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    histories: dict[str, History] = field(default_factory=dict)

    @property
    def elapsed(self) -> float:
        return max(self.ends.values(), default=0.0)


def simulate_pipeline(stages: Sequence[PipelineStage], *, seed: int = 0) -> Schedule:
    """Run stages in the order given: each when what it reads is there and its pool is free."""
    schedule, free = Schedule(), {}
    seeds = np.random.SeedSequence(seed).spawn(len(stages))
    for stage, each in zip(stages, seeds, strict=True):
        rng = np.random.default_rng(each)
        if isinstance(stage.job, Tasks):
            history = simulate_tasks(stage.job, stage.nodes, rng)
        else:
            history = _Run(stage.job, stage.nodes, rng).run()
        ready = max((schedule.ends[name] for name in stage.after), default=0.0)
        begin = max(ready, free.get(stage.pool, 0.0))
        schedule.begins[stage.name] = begin
        schedule.ends[stage.name] = free[stage.pool] = begin + history.elapsed
        schedule.histories[stage.name] = history
    return schedule
