"""Make units of work, in this process or on Ray: each once, a bounded number at a time.

    pool = WorkerPool(number=4)
    for result in run_units(make, (Unit(name=name) for name in missing), pool):
        ...

A unit whose worker died is made again, and so is one that failed for a reason that may pass, after
a pause. A full disk ends the run, since no other unit would succeed.
"""

import errno
import heapq
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from cluster.base.files import Json

if TYPE_CHECKING:
    import ray

    from cluster.base.ray_session import Group

MAX_TRIES = 3  # of a unit whose worker died, or that failed for a reason that may pass
PAUSE_SECONDS = 5.0  # before the second try, doubled before the third
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
POLL_SECONDS = 1.0  # how often the cluster's size is read again while nothing ends
NODE_CHECK_SECONDS = 5.0  # how often the driver checks that its own node is alive

Value = TypeVar("Value")  # what a unit is made into
DealShare = Callable[[Sequence[Any], int], object]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One unit of work.

    name: of its commit; payload: what it is made of, picklable; share: what it may use of a budget
    that all units in flight have in common (see `run_units`), None for all of it.
    """

    name: str
    payload: Any = None
    share: Any = None


@dataclass(frozen=True, kw_only=True)
class UnitResult(Generic[Value]):
    """The value that `make` returned for a unit, or the error that it raised."""

    name: str
    value: Value | None = None
    error: BaseException | None = None

    def get(self) -> Value:
        """Return the value; raise the error if there is one."""
        if self.error is not None:
            raise self.error
        return cast(Value, self.value)

    @property
    def disk_full(self) -> bool:
        """Whether the disk is full or read-only: no other unit would succeed."""
        return isinstance(self.error, OSError) and self.error.errno in DISK_ERRORS

    def problem(self, root: str) -> str:
        """Return the error as a message, with the remedy where the disk of `root` is full."""
        if self.disk_full and isinstance(self.error, OSError):
            return f"{os.strerror(self.error.errno or 0)}: make room in {root}"
        return str(self.error) or repr(self.error)


class HopelessError(ValueError):
    """What is wrong is no unit's fault: none would succeed, and neither would a rerun."""


class WorkerDiedError(RuntimeError):
    """The worker of a unit, or its node, died in each of `MAX_TRIES` tries."""


@dataclass(frozen=True, kw_only=True)
class WorkerPool:
    """The processes that make units.

    number: of workers; 0 is this process, without Ray; None is one per CPU of the cluster, as it
    grows and shrinks. actors: workers keep their copy of `make`, with what it has loaded, from unit
    to unit and end with the run; otherwise each unit is a Ray task. num_cpus, num_gpus: of a
    worker; None for num_cpus is an equal part of the cluster's CPUs, at most 1.
    """

    number: int | None = None
    actors: bool = False
    num_cpus: float | None = None
    num_gpus: float = 0.0
    group: "Group" = "cpu_group"


def run_units(
    make: Callable[[Unit], Value],
    units: Iterable[Unit],
    pool: WorkerPool,
    *,
    passing: tuple[type[BaseException], ...] = (),
    deal_share: DealShare | None = None,
) -> Generator[UnitResult[Value], None, None]:
    """Make each unit; yield the results as they come. After a full disk no unit is started.

    make: picklable. units: read as workers become free. passing: errors after which a unit is tried
    again. deal_share: given the shares in use and the number of units that fit, returns the share
    of one more unit, None while nothing is left; on Ray each unit gets one for as long as it runs.
    Raises ConnectionError when this machine is no longer part of Ray, and in this process what
    `make` raises, unless it is an OSError or a ValueError.
    """
    if pool.number != 0:
        yield from _RayRunner(make, iter(units), pool, passing, deal_share).results()
        return
    for unit in units:
        result = _make_here(make, unit, passing)
        yield result
        if result.disk_full:
            return


def _make_here(
    make: Callable[[Unit], Value], unit: Unit, passing: tuple[type[BaseException], ...]
) -> UnitResult[Value]:
    for tries in range(1, MAX_TRIES + 1):
        try:
            return UnitResult(name=unit.name, value=make(unit))
        except (OSError, ValueError, *passing) as error:
            if not isinstance(error, passing) or tries == MAX_TRIES:
                return UnitResult(name=unit.name, error=error)
            time.sleep(PAUSE_SECONDS * 2 ** (tries - 1))
    raise AssertionError("the last try returns")


class _Actor:
    """A Ray actor that keeps `make`, and what it loads, from unit to unit."""

    def __init__(self, make: Callable[[Unit], object]) -> None:
        self._make = make

    def run(self, unit: Unit) -> object:
        return self._make(unit)


def _make_in_task(make: Callable[[Unit], object], unit: Unit) -> object:
    return make(unit)


def _num_cpus() -> int:
    """Return the CPUs of the cluster as it is now."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


@dataclass(kw_only=True)
class _Try:
    """A try at a unit, in flight or to be started again. tries: this one included."""

    unit: Unit
    tries: int = 1
    actor: Any = None


class _RayRunner(Generic[Value]):
    """Keeps as many units in flight as there is room for, until none is left."""

    def __init__(
        self,
        make: Callable[[Unit], Value],
        units: Iterator[Unit],
        pool: WorkerPool,
        passing: tuple[type[BaseException], ...],
        deal_share: DealShare | None,
    ) -> None:
        from cluster.base.ray_session import ensure_ray, group_resources

        ensure_ray()
        import ray

        self._make, self._units, self._pool = make, units, pool
        self._passing, self._deal_share = passing, deal_share
        self._in_flight: dict[ray.ObjectRef, _Try] = {}
        self._later: list[tuple[float, str, _Try]] = []  # heap: when to start a unit again
        self._idle: list[Any] = []  # actors
        self._exhausted = False
        cpus = _num_cpus()
        options: Json = {
            "num_cpus": pool.num_cpus or min(1.0, cpus / (pool.number or cpus)),
            "num_gpus": pool.num_gpus,
            "resources": group_resources(pool.group),
        }
        if pool.actors:
            self._remote: Any = ray.remote(**options, max_restarts=0)(_Actor)
        else:
            self._remote = ray.remote(**options, max_retries=0)(_make_in_task)

    def results(self) -> Iterator[UnitResult[Value]]:
        import ray

        from cluster.base.ray_session import require_own_node

        checked, disk_full = time.monotonic(), False
        try:
            while not disk_full and (self._in_flight or self._later or not self._exhausted):
                if time.monotonic() - checked > NODE_CHECK_SECONDS:
                    require_own_node()
                    checked = time.monotonic()
                self._start_units()
                if not self._in_flight:
                    time.sleep(POLL_SECONDS / 10)
                    continue
                ended, _ = ray.wait(list(self._in_flight), num_returns=1, timeout=POLL_SECONDS)
                for reference in ended:  # of which there is at most one
                    result = self._result(self._in_flight.pop(reference), reference)
                    yield from (result,) if result else ()
                    disk_full = disk_full or bool(result and result.disk_full)
        finally:
            actors = (*self._idle, *(attempt.actor for attempt in self._in_flight.values()))
            for actor in filter(None, actors):
                ray.kill(actor)

    def _start_units(self) -> None:
        # One task more than can run is submitted: no CPU idles while the next unit is read, and a
        # cluster that scales by demand sees some. An actor has one unit in hand.
        room = self._pool.number or _num_cpus()  # a cluster may have grown
        room += 0 if self._pool.actors else 1
        while len(self._in_flight) < room:
            due = bool(self._later) and self._later[0][0] <= time.monotonic()
            if not due and (self._exhausted or len(self._in_flight) + len(self._later) >= room):
                return
            share = None
            if self._deal_share is not None:
                held = [attempt.unit.share for attempt in self._in_flight.values()]
                share = self._deal_share(held, room)
                if share is None:
                    return
            if due:
                attempt = heapq.heappop(self._later)[2]
            elif (unit := next(self._units, None)) is not None:
                attempt = _Try(unit=unit)
            else:
                self._exhausted = True
                continue
            attempt.unit = replace(attempt.unit, share=share)
            if self._pool.actors:
                attempt.actor = self._idle.pop() if self._idle else self._remote.remote(self._make)
                reference = attempt.actor.run.remote(attempt.unit)
            else:
                reference = self._remote.remote(self._make, attempt.unit)
            self._in_flight[reference] = attempt

    def _result(self, attempt: _Try, reference: "ray.ObjectRef") -> UnitResult[Value] | None:
        """Return the result of a try that ended; None if the unit is to be tried again."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        name, passes, actor_lives = attempt.unit.name, False, True
        try:
            return UnitResult(name=name, value=ray.get(reference))
        except RayTaskError as error:
            problem: BaseException = error.cause
            passes = isinstance(problem, self._passing)
        except RayError as error:  # the worker died, or its node; the next unit starts another
            problem, passes = WorkerDiedError(str(error).splitlines()[0]), True
            actor_lives = False
        finally:
            if attempt.actor is not None and actor_lives:
                self._idle.append(attempt.actor)
        if not passes or attempt.tries == MAX_TRIES:
            return UnitResult(name=name, error=problem)
        when = time.monotonic() + PAUSE_SECONDS * 2 ** (attempt.tries - 1)
        again = _Try(unit=attempt.unit, tries=attempt.tries + 1)
        heapq.heappush(self._later, (when, name, again))
        return None
