"""Make many shards, in this process or on Ray: a bounded number at once, dead workers replaced.

The limits per host are a whole, of which every shard in work holds a share, however a cluster grows
and shrinks. The least of connections is one: only where there are more shards in work than a host
may have connections does it meet as many as there are shards.
A shard that fails for a reason that may pass is tried again after a pause; a full disk ends the
run, since no other shard would fare better.
"""

import errno
import faulthandler
import heapq
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ingest.fetching.fetch import FetchPolicy
from ingest.fetching.shard_task import NetworkDown, ShardJob, make_shard, process_fetcher

if TYPE_CHECKING:
    import pyarrow as pa

    from ingest.store.commits import Commit

MAX_TRIES = 3  # of a shard whose worker died, or that met no network
PAUSE_SECONDS = 5.0  # before the second try, doubled before the third
GRACE_SECONDS = 60.0  # after a shard's deadline, for the tries in progress and for writing
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
WAIT_SECONDS = 1.0  # how often the supervisor looks up, though nothing ended
LOOK_SECONDS = 5.0  # how often it asks whether its own node is alive
LEAST_PART = 1e-9  # of the limits per host: less is nothing


@dataclass(frozen=True, kw_only=True)
class Todo:
    """One shard to make: its number, and its rows of the list."""

    number: int
    rows: "pa.Table"


@dataclass(frozen=True, kw_only=True)
class Made:
    """What became of a shard: a commit, or an error; fatal: no other shard would fare better."""

    number: int
    commit: "Commit | None" = None
    error: str | None = None
    fatal: bool = False


def in_this_process(job: ShardJob, todo: Iterator[Todo]) -> Iterator[Made]:
    """Make the shards one after the other, without Ray."""
    return (_patiently(job, item) for item in todo)


def _patiently(job: ShardJob, item: Todo) -> Made:
    for tries in range(MAX_TRIES):
        try:
            return Made(number=item.number, commit=make_shard(job, item.number, item.rows))
        except NetworkDown as error:
            if tries + 1 == MAX_TRIES:
                return _failed(job, item.number, error)
            time.sleep(PAUSE_SECONDS * 2**tries)
        except OSError as error:
            return _failed(job, item.number, error)
    raise AssertionError("the last try returns")


def on_ray(job: ShardJob, todo: Iterator[Todo], num_processes: int | None) -> Iterator[Made]:
    """Make each shard in a Ray task; num_processes: at once, None for as many as there are CPUs.

    One more than can run is submitted where the limits per host have a share for it: no CPU idles
    while rows are read, and a cluster that scales by demand sees some.
    """
    from cluster.base.ray_session import ensure_ray, placed_on

    ensure_ray()
    import ray

    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    at_once = num_processes or cpus
    asked = {"num_cpus": min(1.0, cpus / at_once), "resources": placed_on("cpu_group")}
    task = ray.remote(**asked, max_retries=0)(_supervised)
    yield from _Supervisor(task, job, todo, num_processes).run()


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one shard in work may do at one host; part: of the whole, rate: requests a second, 0 for
    any number."""

    part: float
    connections: int
    rate: float


def share_of(policy: FetchPolicy, held: list[Share], room: int) -> Share | None:
    """Deal one more shard its share of the limits per host; None while there is nothing left.

    held: of the shards in work; room: for how many there is some. A share once dealt is kept until
    its shard ends, so that after growth the new ones wait for, at most, the end of the first ones.
    """
    most = max(policy.host_connections, len(held) + 1)
    connections_left = most - sum(share.connections for share in held)
    left = 1 - sum(share.part for share in held)
    places = room - len(held)
    if places < 1 or connections_left < 1 or left < LEAST_PART:
        return None
    part = min(1 / room, left / places)
    connections = max(1, connections_left // places)
    return Share(part=part, connections=connections, rate=part * policy.host_rate)


def _supervised(job: ShardJob, number: int, rows: "pa.Table", share: Share) -> "Commit":
    """Make a shard in a worker that ends itself, with its stacks in the log, should it hang."""
    fetcher = process_fetcher(job.policy)  # what it knows of hosts outlives its shares
    fetcher.limits.change(share.connections, share.rate)
    limit = job.harvest.deadline_seconds
    if limit is not None:
        faulthandler.dump_traceback_later(limit + GRACE_SECONDS, exit=True)
    try:
        return make_shard(job, number, rows, fetcher=fetcher)
    finally:
        faulthandler.cancel_dump_traceback_later()


@dataclass(kw_only=True)
class _Running:
    """A shard that is submitted, or is to be again. tries: before this one."""

    item: Todo
    tries: int
    share: Share | None = None


@dataclass
class _Supervisor:
    """Keeps as many tasks running as there is room for, until nothing is left to do."""

    task: Any
    job: ShardJob
    todo: Iterator[Todo]
    num_processes: int | None
    running: dict[Any, _Running] = field(default_factory=dict)
    later: list[tuple[float, int, _Running]] = field(default_factory=list)
    exhausted: bool = False

    def run(self) -> Iterator[Made]:
        """Yield shards as they end; raise ConnectionError when this node is no part of Ray."""
        import ray

        from cluster.base.ray_session import require_own_node

        looked = time.monotonic()
        while self.running or self.later or not self.exhausted:
            if time.monotonic() - looked > LOOK_SECONDS:
                require_own_node()
                looked = time.monotonic()
            self._submit()
            if not self.running:
                time.sleep(WAIT_SECONDS / 10)
                continue
            ended, _ = ray.wait(list(self.running), num_returns=1, timeout=WAIT_SECONDS)
            for reference in ended:
                made = self._settle(self.running.pop(reference), reference)
                if made is not None:
                    yield made
                if made is not None and made.fatal:
                    return

    def _submit(self) -> None:
        import ray

        now = time.monotonic()
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))  # a cluster may have grown
        room = self.num_processes or cpus
        while self.later and self.later[0][0] <= now and (share := self._share(room)):
            self._start(heapq.heappop(self.later)[2], share)
        while not self.exhausted and len(self.running) + len(self.later) <= room:
            share = self._share(room)
            if share is None:
                return
            item = next(self.todo, None)
            if item is None:
                self.exhausted = True
            else:
                self._start(_Running(item=item, tries=0), share)

    def _share(self, room: int) -> Share | None:
        held = [running.share for running in self.running.values() if running.share]
        return share_of(self.job.policy, held, room + 1)  # one more than can run is submitted

    def _start(self, running: _Running, share: Share) -> None:
        item, running.share = running.item, share
        self.running[self.task.remote(self.job, item.number, item.rows, share)] = running

    def _settle(self, running: _Running, reference: Any) -> Made | None:
        """Return what became of a task that ended; None if it is tried again."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        number = running.item.number
        try:
            return Made(number=number, commit=ray.get(reference))
        except RayTaskError as error:
            problem: BaseException = error.cause
            passing = isinstance(problem, NetworkDown)
        except RayError as error:  # the worker died, or its node
            problem, passing = RuntimeError(str(error).splitlines()[0]), True
        if not passing or running.tries + 1 == MAX_TRIES:
            return _failed(self.job, number, problem)
        when = time.monotonic() + PAUSE_SECONDS * 2**running.tries
        again = _Running(item=running.item, tries=running.tries + 1)
        heapq.heappush(self.later, (when, number, again))
        return None


def _failed(job: ShardJob, number: int, problem: BaseException) -> Made:
    if isinstance(problem, OSError) and problem.errno in DISK_ERRORS:
        error = f"{os.strerror(problem.errno or 0)}: make room in {job.root}"
        return Made(number=number, error=error, fatal=True)
    return Made(number=number, error=str(problem) or repr(problem))
