"""What failing nodes cost, in closed form: goodput, and the best interval between checkpoints.

Failures of a node are a Poisson process. tests/_planning_oracles.py simulates the same run event by
event; tests hold the formulas to it. Times are in seconds, work in seconds of the complete cluster.
"""

import math
from dataclasses import dataclass, replace

MIN_GOODPUT = 1e-3


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The machines of a stage. mtbf: of one node, or inf; restart: from a failure to the next step;
    repair: until a failed node is back; elastic: whether to continue on fewer nodes while no spare
    is left."""

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
class CheckpointTimes:
    """interval: work between checkpoints; block: time for which one stops the steps; write: time
    until it is complete on storage, beside the steps."""

    interval: float
    block: float
    write: float = 0.0


def young_interval(block: float, mtbf: float) -> float:
    """Return sqrt(2 block mtbf), the first-order best interval (Young 1974)."""
    return math.sqrt(2 * block * mtbf)


def expected_goodput(interval: float, block: float, restart: float, mtbf: float) -> float:
    """Return interval / E[time of an interval], exact for failures at rate 1 / mtbf that also hit
    checkpoints and restarts (Daly 2006, eq. 13):

        E = mtbf exp(restart / mtbf) (exp((interval + block) / mtbf) - 1)
    """
    exponent = (restart + interval + block) / mtbf
    if exponent > 700:  # exp would overflow: the interval never ends
        return 0.0
    if math.isinf(mtbf):
        return interval / (interval + block)
    return interval / (mtbf * math.exp(restart / mtbf) * math.expm1((interval + block) / mtbf))


def best_interval(block: float, restart: float, mtbf: float) -> float:
    """Return the interval of the largest `expected_goodput`, which has one maximum, by golden
    section over its logarithm."""
    low, high = math.log(1e-3 * min(block or 1.0, mtbf)), math.log(20 * mtbf)
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        at_left, at_right = (
            expected_goodput(math.exp(x), block, restart, mtbf) for x in (left, right)
        )
        low, high = (low, right) if at_left >= at_right else (left, high)
    return math.exp((low + high) / 2)


def training_goodput(checkpoints: CheckpointTimes, nodes: Nodes) -> float:
    """Return the share of the time that goes into work that stays, of a run in lockstep.

    `expected_goodput`, where each failure also loses the work done while the last checkpoint was
    being written, at a rate of 1 / mtbf. Nodes under repair are Poisson of mean repair / mtbf
    (M/G/oo, Takacs 1962): a run that waits for them works while at most `spares` are away; an
    elastic run works at the speed of those that are left, and restarts once more to grow back.
    An elastic run takes the better way. Raises ValueError for a run that would hardly ever end.
    """
    mtbf, lag = nodes.system_mtbf, checkpoints.interval + checkpoints.block + checkpoints.write
    if math.isinf(mtbf):
        return expected_goodput(checkpoints.interval, checkpoints.block, 0.0, mtbf)
    if expected_goodput(lag, 0.0, nodes.restart, mtbf) < MIN_GOODPUT:
        raise ValueError(
            f"node_mtbf_hours: found a failure every {mtbf:.3g} s of {nodes.count} nodes, where a "
            f"restart takes {nodes.restart:.3g} s and a checkpoint is complete after {lag:.3g} s, "
            "expected rarer failures; take fewer nodes, or checkpoints more often"
        )

    def with_restart(restart: float) -> float:
        blocking = expected_goodput(checkpoints.interval, checkpoints.block, restart, mtbf)
        return 1 / (1 / blocking + checkpoints.write / mtbf / blocking) if blocking else 0.0

    away = nodes.repair / mtbf
    all_there = _poisson_at_most(nodes.spares, away)
    waiting = with_restart(nodes.restart) * all_there
    if not nodes.elastic:
        if all_there < MIN_GOODPUT:
            raise ValueError(
                f"spare_nodes: found {nodes.spares} where {away:.3g} of {nodes.count} nodes are "
                "under repair on average, expected more spares than that, or elastic true"
            )
        return waiting

    # The run grows back at the first complete checkpoint after the repair: half an interval later
    absent = (nodes.repair + (checkpoints.interval + checkpoints.block) / 2) / mtbf
    # E[max(0, K - spares)] of the Poisson number of absent nodes, by E[max(0, spares - K)]
    below = math.fsum(_poisson_at_most(k, absent) for k in range(nodes.spares))
    short = max(0.0, absent - nodes.spares + below)
    none_spare = 1 - _poisson_at_most(nodes.spares - 1, absent)
    restart = nodes.restart + none_spare * (nodes.restart + checkpoints.write)
    return max(waiting, with_restart(restart) * max(0.0, 1 - short / nodes.count))


def _poisson_at_most(most: int, mean: float) -> float:
    """Return the probability of at most so many, for a Poisson number of this mean."""
    if most < 0 or not mean:
        return float(most >= 0)
    logs = (k * math.log(mean) - mean - math.lgamma(k + 1) for k in range(most + 1))
    return min(1.0, math.fsum(map(math.exp, logs)))


def best_checkpoints(checkpoints: CheckpointTimes, nodes: Nodes) -> tuple[CheckpointTimes, float]:
    """Return the checkpoints at the closed form's best interval, but no shorter than a write takes,
    since one is written at a time; and their goodput."""
    best = best_interval(checkpoints.block, nodes.restart, nodes.system_mtbf)
    best = replace(checkpoints, interval=max(best, checkpoints.write, 1.0))
    return best, training_goodput(best, nodes)


def tasks_goodput(piece: float, nodes: Nodes) -> float:
    """Return the goodput of independent tasks of `piece` seconds of a node, such as shards: a
    failed node loses half a task on average, and is away alone, for a restart where there is a
    spare."""
    pause = nodes.restart if nodes.spares else max(nodes.repair, nodes.restart)
    return 1 / (1 + (pause + piece / 2) / nodes.mtbf)
