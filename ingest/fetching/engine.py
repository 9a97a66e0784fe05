"""Fetch and decode the rows of one shard by a pool of threads: rows in, a result for each row out.

Hosts take turns (`rate_limit.RowQueue`), failures that may pass are tried again after a pause, and
rows that are left at the deadline fail with that reason.
"""

import hashlib
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.base.outcomes import TRANSIENT
from ingest.fetching.decode import DecodeError, ResizedImage, Resizer
from ingest.fetching.fetch import Fetcher, host_of
from ingest.fetching.rate_limit import RowQueue, Try

MAX_RETRY_AFTER_SECONDS = 30.0  # a host that asks for more is left to --retry-failed
MAX_BACKOFF_SECONDS = 8.0
DECODING_THREADS = 2  # at once: an image may need 200 MB


@dataclass(frozen=True, kw_only=True)
class RowRequest:
    """One row to fetch. row: its place in the shard; hashes: expected digests, hex, by name."""

    row: int
    url: str | None
    hashes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """The image of a row, or the reason why there is none. sha256: of the fetched bytes."""

    reason: str | None = None
    image: ResizedImage | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Threads of a shard, further tries of a row. deadline_seconds: for all rows; None: no end."""

    num_threads: int
    retries: int
    deadline_seconds: float | None = None


def fetch_rows(
    requests: Sequence[RowRequest], fetcher: Fetcher, resizer: Resizer, config: EngineConfig
) -> dict[int, RowResult]:
    """Fetch and decode every row; return the result of each, by its place in the shard.

    An error that is no fault of a row, such as a lack of memory, is raised.
    """
    by_row = {request.row: request for request in requests}
    queue = RowQueue(((r.row, host_of(r.url)) for r in requests), fetcher.limits)
    results: dict[int, RowResult] = {}
    errors: list[BaseException] = []
    decoding = threading.BoundedSemaphore(DECODING_THREADS)

    def try_row(attempt: Try) -> float | None:
        """Try a row once; return the seconds after which to try again, None if it is settled."""
        request = by_row[attempt.row]
        fetched = fetcher.fetch(request.url)
        if fetched.reason is None:
            with decoding:
                results[attempt.row] = _decode(fetched.body or b"", request, resizer)
            return None
        results[attempt.row] = RowResult(reason=fetched.reason)
        if fetched.reason not in TRANSIENT:
            return None
        asked = fetched.retry_after or 0.0
        if fetched.reason in ("rate_limited", "server_error") and asked:
            fetcher.limits.pause(attempt.host, min(asked, MAX_RETRY_AFTER_SECONDS))
        if attempt.number == config.retries or asked > MAX_RETRY_AFTER_SECONDS:
            return None
        return max(asked, backoff_seconds(attempt.number))

    def work() -> None:
        while (attempt := queue.take()) is not None:
            pause = None
            try:
                pause = try_row(attempt)
            except BaseException as error:
                errors.append(error)
                queue.drain()
            finally:
                queue.done(attempt, again_after=pause)

    count = min(config.num_threads, max(1, len(requests)))
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    deadline = None
    if config.deadline_seconds is not None:
        deadline = time.monotonic() + config.deadline_seconds
    for thread in threads:
        thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        queue.drain()
        for thread in threads:  # a try in progress ends by its own deadline
            thread.join()
    if errors:
        raise errors[-1]
    late = RowResult(reason="shard_deadline")
    return {request.row: results.get(request.row, late) for request in requests}


def _decode(body: bytes, request: RowRequest, resizer: Resizer) -> RowResult:
    for kind, expected in request.hashes.items():
        digest = hashlib.new(kind, body, usedforsecurity=False).hexdigest()
        if digest != expected.strip().lower():
            return RowResult(reason="hash_mismatch")
    try:
        image = resizer(body)
    except DecodeError as error:
        return RowResult(reason=error.reason)
    return RowResult(image=image, sha256=hashlib.sha256(body).hexdigest())


def backoff_seconds(number: int) -> float:
    """Return the pause after the `number`-th try, from 0, seconds.

    Full jitter: the rows of one broken host must not come back all at once.
    """
    return random.random() * min(MAX_BACKOFF_SECONDS, 0.5 * 2**number)
