"""Laws of the simulation of failing nodes: conservation, closed forms, monotonicity, seeds."""

import dataclasses
import math

import numpy as np
import pytest

from cluster.planning.simulation import (
    History,
    Nodes,
    PipelineStage,
    Tasks,
    Training,
    best_interval,
    best_simulated_interval,
    daly_interval,
    expected_goodput,
    mean_goodput,
    simulate,
    simulate_pipeline,
    simulate_tasks,
    young_interval,
)

HOUR, DAY = 3600.0, 86_400.0
JOB = Training(work=10 * DAY, interval=900.0, block=10.0)
NEVER = Nodes(count=64, mtbf=math.inf, restart=300.0, repair=4 * HOUR)
SOME = Nodes(count=64, mtbf=1000 * HOUR, restart=300.0, repair=4 * HOUR, spares=8)


def goodput(training: Training, nodes: Nodes, count: int = 40, seed: int = 0) -> float:
    return mean_goodput(simulate(training, nodes, seed=seed, count=count))


# -- what is exact ---------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [900.0, 1000.0, 7 * DAY])
def test_without_failures_the_goodput_is_one_less_the_checkpoints(interval: float):
    """A last checkpoint ends the run; its write is waited for, others are beside the steps."""
    job = Training(work=10 * DAY, interval=interval, block=10.0, write=60.0)
    (found,) = simulate(job, NEVER)
    checkpoints = math.ceil(10 * DAY / interval)
    assert found.checkpoints == checkpoints and found.failures == 0
    assert found.elapsed == pytest.approx(10 * DAY + 10.0 * checkpoints + 60.0, rel=1e-12)
    assert found.redone == found.down == found.slow == 0.0


@pytest.mark.parametrize("elastic", [False, True])
@pytest.mark.parametrize("spares", [0, 2])
@pytest.mark.parametrize("write", [0.0, 120.0])
def test_every_second_is_accounted_for(elastic: bool, spares: int, write: float):
    """The clock that events move tells what the parts add up to, and all work gets done."""
    from cluster.planning.simulation import _Run

    job = dataclasses.replace(JOB, write=write)
    nodes = dataclasses.replace(SOME, mtbf=300 * HOUR, elastic=elastic, spares=spares)
    for seed in range(20):
        run = _Run(job, nodes, np.random.default_rng(seed))
        found = run.run()
        assert found.failures > 0 and run.done == job.work == found.work
        parts = dataclasses.asdict(found)
        assert min(parts.values()) >= 0.0, parts
        assert run.now == pytest.approx(found.elapsed, rel=1e-9)
        assert run.active <= nodes.count


def test_the_same_seed_is_the_same_history():
    assert simulate(JOB, SOME, seed=3, count=3) == simulate(JOB, SOME, seed=3, count=3)
    assert simulate(JOB, SOME, seed=3) != simulate(JOB, SOME, seed=4)
    assert simulate(JOB, SOME, seed=3, count=2) == simulate(JOB, SOME, seed=3, count=3)[:2]


# -- against what is known in closed form ----------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "block", "restart", "mtbf"),
    [(600.0, 5.0, 300.0, 20_000.0), (3000.0, 60.0, 600.0, 5000.0), (100.0, 50.0, 50.0, 400.0)],
)
def test_blocking_checkpoints_cost_what_daly_expects(interval, block, restart, mtbf):
    """Exponential failures of the whole, which also hit checkpoints and restarts."""
    job = Training(work=3000 * interval, interval=interval, block=block)
    nodes = Nodes(count=1, mtbf=mtbf, restart=restart, repair=0.0)
    found = [history.goodput for history in simulate(job, nodes, count=40)]
    error = np.std(found) / math.sqrt(len(found))
    expected = expected_goodput(interval, block, restart, mtbf)
    assert abs(np.mean(found) - expected) < 4 * error + 1e-4


def test_waiting_for_repairs_is_the_idleness_of_a_queue_with_endless_servers():
    """Nodes fail at a total rate L and are away for D: all are there for exp(-L D) of the time,
    where checkpoints and restarts cost nothing (M/G/oo, Takacs 1962)."""
    nodes = Nodes(count=100, mtbf=100 * 10 * HOUR, restart=0.0, repair=4 * HOUR)
    job = Training(work=200 * DAY, interval=1.0, block=0.0)
    # while k nodes are away the others fail less often: 1 - k / 100 of it, a percent here
    assert goodput(job, nodes, 20) == pytest.approx(math.exp(-4 / 10), rel=0.03)


def test_the_best_interval_is_youngs_and_dalys_where_failures_are_rare():
    for block, mtbf in ((5.0, 20_000.0), (60.0, 100_000.0), (1.0, 3600.0)):
        best = best_interval(block, 300.0, mtbf)
        assert best == pytest.approx(daly_interval(block, mtbf), rel=0.005)
        assert best == pytest.approx(young_interval(block, mtbf), rel=0.05)
        around = [expected_goodput(best * x, block, 300.0, mtbf) for x in (0.9, 1.0, 1.1)]
        assert around[1] == max(around)
    assert daly_interval(50.0, 20.0) == 20.0  # longer than failures are apart


@pytest.mark.parametrize(("block", "hours"), [(60.0, 1000.0), (300.0, 3000.0)])
def test_the_simulated_optimum_is_near_the_closed_forms(block: float, hours: float):
    nodes = dataclasses.replace(SOME, mtbf=hours * HOUR, spares=64)
    job = dataclasses.replace(JOB, block=block)
    interval, best = best_simulated_interval(job, nodes, count=60, points=13)
    young = young_interval(block, nodes.system_mtbf)
    # a step of the grid is a quarter; goodput is flat there, so that it is what is compared closely
    assert young / 1.6 < interval < young * 1.6
    expected = expected_goodput(young, block, nodes.restart, nodes.system_mtbf)
    assert best == pytest.approx(expected, abs=0.01)


def test_a_checkpoint_written_beside_the_steps_loses_its_write_at_a_failure_alone():
    """Failures at rate 1 / M lose `write` seconds more each."""
    nodes = Nodes(count=1, mtbf=50_000.0, restart=300.0, repair=0.0)
    job = Training(work=400 * DAY, interval=1800.0, block=5.0)
    beside = dataclasses.replace(job, write=600.0)
    ours = [1 / goodput(one, nodes, 60) for one in (job, beside)]
    assert ours[1] - ours[0] == pytest.approx(600.0 / 50_000.0 * ours[0], rel=0.2)


# -- monotony --------------------------------------------------------------------------------------


def test_rarer_failures_never_hurt():
    nodes = [dataclasses.replace(SOME, mtbf=hours * HOUR) for hours in (200, 500, 1000, 5000, 1e6)]
    found = [goodput(JOB, each) for each in nodes]
    assert found == sorted(found) and found[-1] < 1.0


def test_more_spares_and_shorter_restarts_never_hurt():
    spares = [goodput(JOB, dataclasses.replace(SOME, spares=n)) for n in (0, 1, 2, 8)]
    restarts = [goodput(JOB, dataclasses.replace(SOME, restart=s)) for s in (1200, 600, 100, 0)]
    assert spares == sorted(spares) and restarts == sorted(restarts)


@pytest.mark.parametrize("repair", [0.05, 0.2, 1.0, 4.0, 24.0])
def test_going_on_with_fewer_is_never_worse_than_waiting(repair: float):
    """Where the repair is shorter than growing back costs, the elastic run waits as well."""
    waits = dataclasses.replace(SOME, repair=repair * HOUR, spares=0)
    goes_on = dataclasses.replace(waits, elastic=True)
    elastic, waiting = goodput(JOB, goes_on, 60), goodput(JOB, waits, 60)
    assert elastic >= waiting - 0.002  # the noise of sixty histories
    if repair >= 4:
        assert elastic > waiting + 0.05


def test_a_single_failure_costs_what_one_computes():
    """One node of four is away for ten hours: waiting costs them, going on a quarter of them, the
    two restarts, and what was done since a checkpoint was whole."""

    class Once(np.random.Generator):
        def exponential(self, scale: float = 1.0, size=None):  # type: ignore[override]
            return next(times)

    from cluster.planning.simulation import _Run

    job = Training(work=40 * HOUR, interval=HOUR, block=0.0)
    spent = {}
    for elastic in (False, True):
        times = iter([5.5 * HOUR, *[math.inf] * 100])
        nodes = Nodes(count=4, mtbf=1.0, restart=300.0, repair=10 * HOUR, elastic=elastic)
        spent[elastic] = _Run(job, nodes, Once(np.random.PCG64(0))).run()
    waits, goes_on = spent[False], spent[True]
    assert waits.redone == pytest.approx(0.5 * HOUR)
    assert waits.down == pytest.approx(10 * HOUR + 300)
    assert goes_on.down == pytest.approx(600) and goes_on.redone == pytest.approx(0.5 * HOUR)
    # slow until the first whole checkpoint at three quarters of the speed, after the node is back
    cycle, back = HOUR / 0.75, 10 * HOUR - 300
    assert goes_on.slow == pytest.approx(math.ceil(back / cycle) * cycle / 4)
    assert goes_on.elapsed < waits.elapsed


# -- what makes no progress is refused -------------------------------------------------------------


def test_a_training_that_would_never_end_is_refused():
    with pytest.raises(ValueError, match="a failure every 3.6 s of 1000 nodes"):
        simulate(JOB, Nodes(count=1000, mtbf=HOUR, restart=300.0))
    with pytest.raises(ValueError, match="spare_nodes: found 0 where 40 of 1000 nodes"):
        simulate(JOB, Nodes(count=1000, mtbf=1000 * HOUR, restart=1.0, repair=40 * HOUR))
    with pytest.raises(ValueError, match="expected more than 0"):
        Training(work=1.0, interval=0.0, block=1.0)


# -- tasks and the pipeline ------------------------------------------------------------------------


def test_independent_pieces_lose_what_failed_nodes_had_in_hand():
    job = Tasks(work=10 * DAY, piece=600.0)
    quiet = simulate_tasks(job, NEVER, np.random.default_rng(0))
    assert quiet.elapsed == 10 * DAY and quiet.goodput == 1.0
    nodes = dataclasses.replace(SOME, mtbf=200 * HOUR, spares=0)
    found = simulate_tasks(job, nodes, np.random.default_rng(0))
    assert found.failures > 20 and found.redone <= 600.0 / 64 * found.failures
    # each is away for the repair, and the others go on meanwhile
    away = found.failures * nodes.repair / nodes.count
    assert found.slow == pytest.approx(away, rel=0.1)
    assert found.goodput > goodput(JOB, nodes)


def test_a_pipeline_keeps_its_order_and_shares_its_pools():
    nodes = dataclasses.replace(SOME, elastic=True)
    stages = [
        PipelineStage(name="download", job=Tasks(work=2 * DAY, piece=60.0), nodes=nodes,
                      pool="cpu"),
        PipelineStage(name="up", job=JOB, nodes=nodes, pool="gpu", after=("download",)),
        PipelineStage(name="embed", job=Tasks(work=DAY, piece=60.0), nodes=nodes, pool="cpu",
                      after=("download",)),
        PipelineStage(name="prior", job=JOB, nodes=nodes, pool="gpu", after=("embed",)),
    ]  # fmt: skip
    found = simulate_pipeline(stages, seed=1)
    begins, ends = found.begins, found.ends
    assert begins["up"] == ends["download"] == begins["embed"]  # beside each other
    assert begins["prior"] == max(ends["up"], ends["embed"])
    assert found.elapsed == ends["prior"]
    for name, history in found.histories.items():
        assert ends[name] - begins[name] == pytest.approx(history.elapsed)
    assert found == simulate_pipeline(stages, seed=1)


def test_a_thousand_nodes_are_few_events():
    """A month of them is some hundred failures, whatever the number of steps."""
    nodes = Nodes(count=1000, mtbf=6335 * HOUR, restart=300.0, repair=4 * HOUR, elastic=True)
    job = Training(work=30 * DAY, interval=600.0, block=1.0, write=60.0)
    histories: list[History] = simulate(job, nodes, count=16)
    expected = 30 * 24 / 6.335
    assert np.mean([h.failures for h in histories]) == pytest.approx(expected, rel=0.15)
    assert 0.9 < mean_goodput(histories) < 0.99
