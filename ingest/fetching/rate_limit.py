"""Limits of connections and of requests per host, for the threads of a process.

`RowQueue` gives the rows of a shard to threads so that no thread waits for one host while another
host's rows could be fetched.
"""

import heapq
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MAX_HOSTS = 100_000  # remembered; beyond it idle ones are dropped, longest unused first
MIN_FRACTION = 1e-9  # of the limits per host: a smaller rest is a rounding error


@dataclass(slots=True)
class _Host:
    """connections: open now; tokens: requests it may be sent at once, as of `since`."""

    connections: int
    tokens: float
    since: float
    paused_until: float = 0.0


class HostLimits:
    """At most `connections` at once per host and `rate` requests per second (0: any number).

    The bucket holds one second's worth of requests, at least one. condition: notified whenever a
    host becomes free; its lock guards everything here.
    """

    def __init__(
        self, connections: int, rate: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.condition = threading.Condition()
        self.clock = clock
        self._connections, self._rate = connections, rate
        self._burst = max(1.0, rate)
        self._hosts: OrderedDict[str, _Host] = OrderedDict()

    def change(self, connections: int, rate: float) -> None:
        """Change the limits; open connections, pauses and used tokens stay counted."""
        with self.condition:
            self._connections, self._rate = connections, rate
            self._burst = max(1.0, rate)
            self.condition.notify_all()

    def try_acquire(self, host: str) -> float:
        """Take a connection and a token and return 0; or return the seconds after which to try
        again, inf for when a connection is released."""
        with self.condition:
            state = self._state(host)
            if state.connections >= self._connections:
                return math.inf
            wait = self._take(state)
            if wait == 0:
                state.connections += 1
            return wait

    def acquire(self, host: str, *, until: float) -> bool:
        """Wait for a connection and a token of `host`, at most to `until` on the clock."""
        return self._wait(lambda: self.try_acquire(host), until)

    def take_token(self, host: str, *, until: float) -> bool:
        """Wait for a token only: the connection is held already."""
        return self._wait(lambda: self._take(self._state(host)), until)

    def _wait(self, take: Callable[[], float], until: float) -> bool:
        with self.condition:
            while wait := take():
                left = until - self.clock()
                if left <= 0:
                    return False
                self.condition.wait(min(wait, left))
        return True

    def release(self, host: str) -> None:
        """Release a connection."""
        with self.condition:
            self._hosts[host].connections -= 1
            self.condition.notify_all()

    def pause(self, host: str, seconds: float) -> None:
        """Send a host nothing for a while, as its Retry-After asks."""
        with self.condition:
            state = self._state(host)
            state.paused_until = max(state.paused_until, self.clock() + seconds)

    def _state(self, host: str) -> _Host:
        state = self._hosts.get(host)
        if state is None:
            state = _Host(connections=0, tokens=self._burst, since=self.clock())
            self._hosts[host] = state
            for name in list(self._hosts)[:8] if len(self._hosts) > MAX_HOSTS else ():
                if not self._hosts[name].connections and name != host:
                    del self._hosts[name]
        self._hosts.move_to_end(host)
        return state

    def _take(self, state: _Host) -> float:
        now = self.clock()
        if now < state.paused_until:
            return state.paused_until - now
        if self._rate == 0:
            return 0.0
        state.tokens = min(self._burst, state.tokens + (now - state.since) * self._rate)
        state.since = now
        if state.tokens < 1:
            return (1 - state.tokens) / self._rate
        state.tokens -= 1
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Try:
    """One try at a row. row: its place in the shard; number: of the try, from 0."""

    row: int
    host: str
    number: int = 0


class RowQueue:
    """Gives tries to threads: every `take` is followed by a `done`.

    Hosts take turns; a host without a free connection or token is passed over.
    """

    def __init__(self, rows: Iterable[tuple[int, str]], limits: HostLimits) -> None:
        """rows: (place in the shard, host)."""
        self._limits, self._serial, self._drained = limits, 0, False
        self._waiting: dict[str, deque[Try]] = {}
        self._due: list[tuple[float, int, str]] = []  # when to look at a host again: once a host
        self._later: list[tuple[float, int, Try]] = []  # tries that wait on their own
        self._busy: set[str] = set()  # hosts whose connections are all in use
        self._open = 0  # rows that are not settled
        for row, host in rows:
            self._add(Try(row=row, host=host))
            self._open += 1

    def take(self) -> Try | None:
        """Wait for a try whose host is free, and take its connection; None when all is settled."""
        condition = self._limits.condition
        with condition:
            while self._open:
                now = self._limits.clock()
                attempt = self._next(now)
                if attempt is not None:
                    return attempt
                moments = [heap[0][0] for heap in (self._due, self._later) if heap]
                condition.wait(max(0.0, min(moments) - now) if moments else None)
            condition.notify_all()
            return None

    def done(self, item: Try, *, again_after: float | None = None) -> None:
        """Release the host's connection; the row is settled, or tried again after seconds."""
        with self._limits.condition:
            if again_after is None or self._drained:
                self._open -= 1
            else:
                self._serial += 1
                retry = Try(row=item.row, host=item.host, number=item.number + 1)
                when = self._limits.clock() + again_after
                heapq.heappush(self._later, (when, self._serial, retry))
            self._limits.release(item.host)

    def drain(self) -> None:
        """Settle every row that is not being tried right now; none is tried again."""
        with self._limits.condition:
            self._drained = True
            self._open -= len(self._later) + sum(len(tries) for tries in self._waiting.values())
            self._later, self._waiting, self._due = [], {}, []
            self._limits.condition.notify_all()

    def _add(self, item: Try) -> None:
        tries = self._waiting.setdefault(item.host, deque())
        tries.append(item)
        if len(tries) == 1 and item.host not in self._busy:
            self._schedule(item.host, 0.0)

    def _schedule(self, host: str, when: float) -> None:
        self._serial += 1
        heapq.heappush(self._due, (when, self._serial, host))

    def _next(self, now: float) -> Try | None:
        while self._later and self._later[0][0] <= now:
            self._add(heapq.heappop(self._later)[2])
        for host in list(self._busy):
            self._busy.remove(host)
            self._schedule(host, 0.0)
        while self._due and self._due[0][0] <= now:
            host = heapq.heappop(self._due)[2]
            tries = self._waiting.get(host)
            if not tries:
                continue
            wait = self._limits.try_acquire(host)
            if wait == 0:
                item = tries.popleft()
                if tries:
                    self._schedule(host, 0.0)
                return item
            if math.isinf(wait):
                self._busy.add(host)
            else:
                self._schedule(host, now + wait)
        return None


# -- shares of the limits --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HostShare:
    """What one shard in work may do at one host.

    fraction: of the limits of the download; rate: requests a second, 0 for any number.
    """

    fraction: float
    connections: int
    rate: float


def deal_host_share(
    connections: int, rate: float, held: Sequence[HostShare], room: int
) -> HostShare | None:
    """Return one more shard's share of the limits per host; None while nothing is left.

    connections, rate: the limits over all shards in work; held: the shares in use; room: the number
    of shards that fit at once. A shard keeps its share until it ends, so after a cluster has grown
    new shards wait for the end of the first ones at most. A share has at least one connection: only
    where more shards are in work than a host may have connections do they exceed that limit.
    """
    connections_left = max(connections, len(held) + 1) - sum(share.connections for share in held)
    fraction_left = 1 - sum(share.fraction for share in held)
    places = room - len(held)
    if places < 1 or connections_left < 1 or fraction_left < MIN_FRACTION:
        return None
    fraction = min(1 / room, fraction_left / places)
    return HostShare(
        fraction=fraction,
        connections=max(1, connections_left // places),
        rate=fraction * rate,
    )
