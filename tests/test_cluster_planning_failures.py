"""The cost of failing nodes: closed forms against each other and against a simulation."""

import dataclasses
import math

import numpy as np
import pytest
from _planning_oracles import Job, SimulatedRun, daly_interval, simulate, simulated_goodput

from cluster.planning.failures import (
    CheckpointTimes,
    Nodes,
    best_checkpoints,
    best_interval,
    expected_goodput,
    tasks_goodput,
    training_goodput,
    young_interval,
)
from cluster.planning.request import LLAMA_NODES, NODE_MTBF_HOURS

HOUR, DAY = 3600.0, 86_400.0
JOB = Job(work=10 * DAY, interval=900.0, block=10.0)
NEVER = Nodes(count=64, mtbf=math.inf, restart=300.0, repair=4 * HOUR)
SOME = Nodes(count=64, mtbf=1000 * HOUR, restart=300.0, repair=4 * HOUR, spares=8)


# -- the simulation itself -------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [900.0, 1000.0, 7 * DAY])
def test_without_failures_only_checkpoints_cost_time(interval: float):
    job = Job(work=10 * DAY, interval=interval, block=10.0, write=60.0)
    (found,) = simulate(job, NEVER)
    checkpoints = math.ceil(10 * DAY / interval)
    assert found.checkpoints == checkpoints and found.failures == 0
    assert found.elapsed == pytest.approx(10 * DAY + 10.0 * checkpoints + 60.0, rel=1e-12)
    assert training_goodput(job, NEVER) == pytest.approx(interval / (interval + 10.0))


@pytest.mark.parametrize("elastic", [False, True])
@pytest.mark.parametrize("spares", [0, 2])
def test_every_simulated_second_is_accounted_for(elastic: bool, spares: int):
    job = dataclasses.replace(JOB, write=120.0)
    nodes = dataclasses.replace(SOME, mtbf=300 * HOUR, elastic=elastic, spares=spares)
    for seed in range(10):
        run = SimulatedRun(job, nodes, np.random.default_rng(seed))
        found = run.run()
        assert found.failures > 0 and run.done == job.work == found.work
        assert min(dataclasses.astuple(found)) >= 0.0
        assert run.now == pytest.approx(found.elapsed, rel=1e-9)


# -- closed forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "block", "restart", "mtbf"),
    [(600.0, 5.0, 300.0, 20_000.0), (3000.0, 60.0, 600.0, 5000.0), (100.0, 50.0, 50.0, 400.0)],
)
def test_blocking_checkpoints_cost_what_daly_expects(interval, block, restart, mtbf):
    job = Job(work=1000 * interval, interval=interval, block=block)
    nodes = Nodes(count=1, mtbf=mtbf, restart=restart, repair=0.0)
    found = [job.work / history.elapsed for history in simulate(job, nodes, count=40)]
    error = np.std(found) / math.sqrt(len(found))
    expected = expected_goodput(interval, block, restart, mtbf)
    assert abs(np.mean(found) - expected) < 4 * error + 1e-4
    assert training_goodput(job, nodes) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("elastic", [False, True])
@pytest.mark.parametrize(
    ("hours", "spares", "repair", "write", "tolerance"),
    [(6335, 0, 4, 20, 0.003), (1000, 0, 4, 60, 0.01), (1000, 4, 4, 60, 0.005),
     (1000, 0, 0.1, 20, 0.01), (1000, 1, 24, 300, 0.03), (300, 8, 4, 60, 0.02)],
)  # fmt: skip
def test_the_goodput_is_the_simulations(hours, spares, repair, write, tolerance, elastic):
    nodes = Nodes(
        count=64, mtbf=hours * HOUR, restart=300.0, repair=repair * HOUR, spares=spares,
        elastic=elastic,
    )  # fmt: skip
    job = Job(work=40 * DAY, interval=1200.0, block=2.0, write=write)
    simulated = simulated_goodput(job, nodes, count=40)
    assert training_goodput(job, nodes) == pytest.approx(simulated, abs=tolerance)


def test_waiting_for_repairs_is_the_idleness_of_a_queue_with_endless_servers():
    """All nodes are there for exp(-L D) of the time (M/G/oo, Takacs 1962)."""
    nodes = Nodes(count=100, mtbf=100 * 10 * HOUR, restart=0.0, repair=4 * HOUR)
    checkpoints = CheckpointTimes(interval=1.0, block=0.0)
    assert training_goodput(checkpoints, nodes) == pytest.approx(math.exp(-4 / 10), rel=1e-3)


def test_the_best_interval_is_youngs_and_dalys_where_failures_are_rare():
    for block, mtbf in ((5.0, 20_000.0), (60.0, 100_000.0), (1.0, 3600.0)):
        best = best_interval(block, 300.0, mtbf)
        assert best == pytest.approx(daly_interval(block, mtbf), rel=0.005)
        assert best == pytest.approx(young_interval(block, mtbf), rel=0.05)
        around = [expected_goodput(best * x, block, 300.0, mtbf) for x in (0.9, 1.0, 1.1)]
        assert around[1] == max(around)
    assert daly_interval(50.0, 20.0) == 20.0  # longer than failures are apart
    best, goodput = best_checkpoints(CheckpointTimes(interval=1.0, block=1e-3, write=120.0), SOME)
    assert best.interval == 120.0 and goodput == training_goodput(best, SOME)  # one write at a time


def test_the_simulated_optimum_is_near_the_closed_forms():
    nodes = dataclasses.replace(SOME, spares=64)
    best, expected = best_checkpoints(CheckpointTimes(interval=1.0, block=60.0), nodes)
    at = {}
    for factor in (0.25, 0.6, 1.0, 1.6, 4.0):
        job = Job(work=60 * DAY, interval=factor * best.interval, block=60.0)
        at[factor] = simulated_goodput(job, nodes, count=30)
    assert max(at, key=lambda factor: at[factor]) in (0.6, 1.0, 1.6)
    assert at[1.0] == pytest.approx(expected, abs=0.01)


def test_llama_3_kept_more_than_nine_tenths_of_its_time():
    """Dubey et al. 2024, section 3.3.4, with our restart and spares at hand."""
    nodes = Nodes(
        count=LLAMA_NODES, mtbf=3600 * NODE_MTBF_HOURS, restart=300.0, repair=14_400.0, spares=64
    )
    _, goodput = best_checkpoints(CheckpointTimes(interval=1.0, block=2.0, write=30.0), nodes)
    assert 0.9 < goodput < 0.97


# -- monotony --------------------------------------------------------------------------------------


def test_rarer_failures_more_spares_and_shorter_restarts_never_hurt():
    def goodputs(**changes) -> list[float]:
        (name, values), = changes.items()
        return [training_goodput(JOB, dataclasses.replace(SOME, **{name: v})) for v in values]

    rarer = goodputs(mtbf=[hours * HOUR for hours in (200, 500, 1000, 5000, 1e6)])
    assert rarer == sorted(rarer) and rarer[-1] < 1.0
    for values in (goodputs(spares=(0, 1, 2, 8)), goodputs(restart=(1200, 600, 100, 0))):
        assert values == sorted(values)


@pytest.mark.parametrize("repair", [0.05, 0.2, 1.0, 4.0, 24.0])
def test_continuing_on_fewer_nodes_is_never_worse_than_waiting(repair: float):
    waits = dataclasses.replace(SOME, repair=repair * HOUR, spares=0)
    elastic = training_goodput(JOB, dataclasses.replace(waits, elastic=True))
    waiting = training_goodput(JOB, waits)
    assert elastic >= waiting and (repair < 4 or elastic > waiting + 0.05)


def test_a_single_failure_costs_what_one_computes():
    """One node of four is away for ten hours: waiting costs them, continuing a quarter of them, the
    two restarts, and what was done since a checkpoint was complete."""

    class Once(np.random.Generator):
        def exponential(self, scale: float = 1.0, size=None):  # type: ignore[override]
            return next(times)

    job, spent = Job(work=40 * HOUR, interval=HOUR, block=0.0), {}
    for elastic in (False, True):
        times = iter([5.5 * HOUR, *[math.inf] * 100])
        nodes = Nodes(count=4, mtbf=1.0, restart=300.0, repair=10 * HOUR, elastic=elastic)
        spent[elastic] = SimulatedRun(job, nodes, Once(np.random.PCG64(0))).run()
    waits, continues = spent[False], spent[True]
    assert waits.redone == continues.redone == pytest.approx(0.5 * HOUR)
    assert waits.down == pytest.approx(10 * HOUR + 300) and continues.down == pytest.approx(600)
    # slow until the first complete checkpoint at three quarters of the speed, after the repair
    cycle, back = HOUR / 0.75, 10 * HOUR - 300
    assert continues.slow == pytest.approx(math.ceil(back / cycle) * cycle / 4)
    assert continues.elapsed < waits.elapsed


def test_a_training_that_would_never_end_is_refused():
    with pytest.raises(ValueError, match=r"a failure every 3\.6 s of 1000 nodes"):
        training_goodput(JOB, Nodes(count=1000, mtbf=HOUR, restart=300.0))
    with pytest.raises(ValueError, match="spare_nodes: found 0 where 40 of 1000 nodes"):
        training_goodput(JOB, Nodes(count=1000, mtbf=1000 * HOUR, restart=1.0, repair=40 * HOUR))


def test_independent_tasks_lose_what_failed_nodes_had_in_hand():
    nodes = dataclasses.replace(SOME, mtbf=200 * HOUR, spares=0)
    assert tasks_goodput(600.0, NEVER) == 1.0
    assert tasks_goodput(600.0, nodes) == pytest.approx(200 * HOUR / (204 * HOUR + 300))
    assert tasks_goodput(600.0, nodes) > training_goodput(JOB, nodes)
    assert tasks_goodput(600.0, dataclasses.replace(nodes, spares=1)) > 0.99
