"""The rows of one shard, fetched and decoded by a pool of threads, whatever the web does.

Hosts take turns (`rate_limit.RowQueue`), failures that may pass are tried again after a pause,
and at the deadline what is left is said to be left.
"""

import hashlib
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.base.outcomes import TRANSIENT
from ingest.fetching.decode import DecodeError, Picture, Resizer
from ingest.fetching.fetch import Fetcher, host_of
from ingest.fetching.rate_limit import RowQueue, Try

MAX_RETRY_AFTER_SECONDS = 30.0  # a host that asks for more is left to --retry-failed
DECODING_THREADS = 2  # at once: an image may need 200 MB


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row to fetch. row: its place in the shard; hashes: expected digests, hex, by name."""

    row: int
    url: str | None
    hashes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Harvested:
    """What became of a row: a picture, or the reason why not. sha256: of the bytes fetched."""

    reason: str | None = None
    picture: Picture | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """How the rows of a shard are worked on. deadline_seconds: for all of them; None for ever."""

    num_threads: int
    retries: int
    deadline_seconds: float | None = None


def harvest(
    requests: Sequence[Request],
    fetcher: Fetcher,
    resizer: Resizer,
    config: HarvestConfig,
) -> dict[int, Harvested]:
    """Fetch and decode every row; return what became of each, by its place in the shard.

    An error that is no fault of a row, such as a lack of memory, is raised.
    """
    work = _Harvest(requests, fetcher, resizer, config)
    count = min(config.num_threads, max(1, len(requests)))
    threads = [threading.Thread(target=work.run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    ends = None if config.deadline_seconds is None else time.monotonic() + config.deadline_seconds
    for thread in threads:
        thread.join(None if ends is None else max(0.0, ends - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        work.queue.drain()  # a try in progress ends by its own deadline
        for thread in threads:
            thread.join()
    if work.error is not None:
        raise work.error
    late = Harvested(reason="shard_deadline")
    return {request.row: work.found.get(request.row, late) for request in requests}


class _Harvest:
    """The state that the threads of one harvest share."""

    def __init__(
        self,
        requests: Sequence[Request],
        fetcher: Fetcher,
        resizer: Resizer,
        config: HarvestConfig,
    ) -> None:
        self.requests = {request.row: request for request in requests}
        self.queue = RowQueue(((r.row, host_of(r.url)) for r in requests), fetcher.limits)
        self.found: dict[int, Harvested] = {}
        self.error: BaseException | None = None
        self._fetcher, self._resizer, self._retries = fetcher, resizer, config.retries
        self._decoding = threading.BoundedSemaphore(DECODING_THREADS)

    def run(self) -> None:
        """Work until every row is settled."""
        while (item := self.queue.take()) is not None:
            pause = None
            try:
                pause = self._try(item)
            except BaseException as error:  # noqa: BLE001 - raised again where the harvest ends
                self.error = error
                self.queue.drain()
            finally:
                self.queue.done(item, again_after=pause)

    def _try(self, item: Try) -> float | None:
        """Try a row once; return the seconds after which to try again, None if it is settled."""
        request = self.requests[item.row]
        got = self._fetcher.fetch(request.url)
        if got.reason is None:
            self.found[item.row] = self._stored(got.body or b"", request)
            return None
        self.found[item.row] = Harvested(reason=got.reason)
        if got.reason not in TRANSIENT:
            return None
        asked = got.retry_after or 0.0
        if got.reason in ("rate_limited", "server_error") and asked:
            self._fetcher.limits.pause(item.host, min(asked, MAX_RETRY_AFTER_SECONDS))
        if item.number == self._retries or asked > MAX_RETRY_AFTER_SECONDS:
            return None
        return max(asked, backoff_seconds(item.number))

    def _stored(self, body: bytes, request: Request) -> Harvested:
        for kind, expected in request.hashes.items():
            digest = hashlib.new(kind, body, usedforsecurity=False).hexdigest()
            if digest != expected.strip().lower():
                return Harvested(reason="hash_mismatch")
        try:
            with self._decoding:
                picture = self._resizer(body)
        except DecodeError as error:
            return Harvested(reason=error.reason)
        return Harvested(picture=picture, sha256=hashlib.sha256(body).hexdigest())


def backoff_seconds(number: int, draw: Callable[[], float] = random.random) -> float:
    """Return the pause after the `number`-th try, from 0, seconds.

    Full jitter: the rows of one broken host must not come back all at once.
    """
    return draw() * min(8.0, 0.5 * 2**number)


def without_repetitions(found: Mapping[int, Harvested]) -> dict[int, Harvested]:
    """Return `found` with images whose bytes an earlier row of the shard has marked as such."""
    seen: set[str] = set()
    marked = {}
    for row in sorted(found):
        one = found[row]
        if one.sha256 is not None and one.sha256 in seen:
            one = replace(one, picture=None, reason="duplicate_image")
        elif one.sha256 is not None:
            seen.add(one.sha256)
        marked[row] = one
    return marked
