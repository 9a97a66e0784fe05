"""robots.txt (RFC 9309), requested once a host and kept for a day.

A host without the file allows everything. While a host cannot answer, nothing is allowed (section
2.3.1.4), which counts as a failure that may pass.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from protego import Protego

MAX_BYTES = 500 * 1024  # section 2.5: what a crawler must read at least
KEPT_SECONDS = 24 * 3600.0  # section 2.4
FAILURE_KEPT_SECONDS = 10.0  # the other rows of a dead host need no request of their own
MAX_ORIGINS = 10_000

Origin = tuple[str, str, int]  # scheme, host, port


class RobotsUnavailableError(Exception):
    """A host's rules are not available. retry_after: seconds until they are requested again."""

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


@dataclass(frozen=True, kw_only=True)
class _Rules:
    """parser: None allows everything; failure: why there are no rules."""

    until: float
    parser: "Protego | None" = None
    failure: str | None = None


class RobotsCache:
    """The rules of every host that a process has requested from, for one user agent.

    load: returns the status and the body of an origin's /robots.txt, redirects followed; on a
    failure it raises OSError whose first argument is the reason. It runs once however many
    threads ask.
    """

    def __init__(
        self,
        load: Callable[[Origin], tuple[int, bytes]],
        agent: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load, self._agent, self._clock = load, agent, clock
        self._lock = threading.Lock()
        self._rules: OrderedDict[Origin, Future[_Rules]] = OrderedDict()

    def allowed(self, origin: Origin, url: str) -> bool:
        """Return whether `url` of `origin` may be fetched.

        Raises RobotsUnavailableError while the host cannot answer.
        """
        with self._lock:
            future = self._rules.get(origin)
            stale = future is not None and future.done() and future.result().until <= self._clock()
            is_ours = future is None or stale
            if future is None or stale:
                future = self._rules[origin] = Future()
            self._rules.move_to_end(origin)
            while len(self._rules) > MAX_ORIGINS:
                self._rules.popitem(last=False)
        if is_ours:
            try:
                future.set_result(self._request(origin))
            except BaseException as error:  # the threads that wait must get it, whatever it is
                with self._lock:
                    self._rules.pop(origin, None)
                future.set_exception(error)
                raise
        rules = future.result()
        if rules.failure is not None:
            raise RobotsUnavailableError(rules.failure, max(0.0, rules.until - self._clock()))
        return rules.parser is None or rules.parser.can_fetch(url, self._agent)

    def _request(self, origin: Origin) -> _Rules:
        from protego import Protego

        status, body, failure = 0, b"", None
        try:
            status, body = self._load(origin)
            if status >= 500 or status == 429:
                failure = "robots_unavailable"
        except OSError as error:
            failure = str(error.args[0])
        if failure is not None:
            return _Rules(until=self._clock() + FAILURE_KEPT_SECONDS, failure=failure)
        until = self._clock() + KEPT_SECONDS
        if status != 200:
            return _Rules(until=until)
        return _Rules(until=until, parser=Protego.parse(body.decode("utf-8", "replace")))
