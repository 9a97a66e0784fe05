"""img2dataset makes a shard: its `Downloader.download_shard` runs the threads, and calls our
transport for each row, our resizer for each image, and our writer.

img2dataset asks for its rows in a fixed order, in which a thread would wait for a slow host while
rows of other hosts could be fetched. It is therefore given numbered places instead of rows: the
transport answers each request with the next row whose host is free (`rate_limit.RowQueue`). A
failure that may pass is tried again after a pause; rows that are left at the deadline fail with
that reason. img2dataset prints and drops what a resizer or a writer raises; here it fails the
shard, and so does a row that got lost.
"""

import hashlib
import io
import os
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.base.outcomes import TRANSIENT
from ingest.fetching.decode import DecodeError, ResizedImage, Resizer
from ingest.fetching.fetch import Fetcher, host_of
from ingest.fetching.rate_limit import RowQueue, Try
from ingest.store.shard_runner import HopelessError

if TYPE_CHECKING:
    from img2dataset.downloader import Downloader

MAX_RETRY_AFTER_SECONDS = 30.0  # a host that asks for more is left to --retry-failed
MAX_BACKOFF_SECONDS = 8.0
RESIZE_GRACE_SECONDS = 20.0  # after a shard's deadline, for images that wait for the resizer
PLACE_URL = "http://row.invalid/#"  # followed by the place; the top-level domain never resolves
SHARD_DIGITS = 6  # of a shard's name, as img2dataset counts them
Sizes = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]
NOT_RESIZED: Sizes = (None, None, None, None, None, "stopped")


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


class RowFailedError(OSError):
    """There is no image for a row; img2dataset takes the message as the row's reason."""


class TransportBypassedError(HopelessError):
    """img2dataset does not fetch through our transport: none of its limits would hold."""


class ShardDownload(urllib.request.OpenerDirector):
    """What img2dataset calls while it makes one shard: an opener, a resizer, and a writer.

    left_out: rows that are not fetched, with the reason; finish: given the result of every row, by
    its place in the shard, when img2dataset closes its writer; it writes the shard's files.
    """

    def __init__(
        self,
        requests: Sequence[RowRequest],
        fetcher: Fetcher,
        resizer: Resizer,
        config: EngineConfig,
        finish: Callable[[dict[int, RowResult]], None],
        left_out: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__()
        self._requests = {request.row: request for request in requests}
        self._fetcher, self._resizer, self._config = fetcher, resizer, config
        self._finish = finish
        self._queue = RowQueue(((r.row, host_of(r.url)) for r in requests), fetcher.limits)
        self._results = {row: RowResult(reason=why) for row, why in (left_out or {}).items()}
        self._left_out = iter(list(self._results.values()))  # answered first
        self._fetched: dict[int, tuple[int, str]] = {}  # by place: the row, the bytes' sha256
        self._num_rows, self._num_written = len(requests) + len(self._results), 0
        self._error: BaseException | None = None
        self._resize_until = float("inf")
        self._lock = threading.Lock()

    def run(self, folder: Path, name: str) -> None:
        """Make the shard `name`; `finish` and img2dataset, its statistics, write into `folder`.

        An error that is no fault of a row, such as a lack of memory, is raised.
        """
        require_our_transport()
        import pyarrow as pa

        places = pa.table(
            {
                "url": [f"{PLACE_URL}{place}" for place in range(self._num_rows)],
                "place": pa.array(range(self._num_rows), pa.int64()),
            }
        )
        path = folder / "places.arrow"  # which img2dataset deletes
        with pa.ipc.new_file(path, places.schema) as file:
            file.write_table(places)
        downloader = self._downloader(folder)
        deadline = self._config.deadline_seconds
        timer = threading.Timer(deadline, self._queue.drain) if deadline is not None else None

        # In a thread: img2dataset's loop would not end by an interrupt that is raised within. Its
        # pool, left while it runs, would wait for ever when the process exits
        with _installed(self), ThreadPoolExecutor(1, "shard") as threads:
            if timer is not None and deadline is not None:
                self._resize_until = time.monotonic() + deadline + RESIZE_GRACE_SECONDS
                timer.daemon = True
                timer.start()
            shard = threads.submit(downloader.download_shard, (int(name), os.fspath(path)))
            while not shard.done():
                try:
                    wait([shard])
                except BaseException as error:  # again, where the user interrupts again
                    self._stop(error)
            if timer is not None:
                timer.cancel()
        if self._error is not None:
            raise self._error
        shard.result()

    def _downloader(self, folder: Path) -> "Downloader":
        from img2dataset.downloader import Downloader

        return Downloader(
            sample_writer_class=lambda *_: self,
            resizer=self.resize,
            thread_count=max(1, min(self._config.num_threads, self._num_rows)),
            save_caption=False,
            extract_exif=False,
            output_folder=os.fspath(folder),
            column_list=["url", "place"],
            timeout=None,  # a try has its own deadlines
            number_sample_per_shard=max(1, self._num_rows),
            oom_shard_count=SHARD_DIGITS,
            compute_hash=None,
            verify_hash_type=None,
            encode_format="jpg",
            retries=0,
            user_agent_token=None,
            disallowed_header_directives=None,
            blurring_bbox_col="place",  # is passed to the resizer
        )

    def _stop(self, error: BaseException) -> None:
        """Let img2dataset's loop run out, and the shard fail."""
        self._error = self._error or error
        self._queue.drain()

    # -- what img2dataset calls --------------------------------------------------------------------

    def open(self, fullurl, data=None, timeout=None) -> io.BytesIO:
        """Fetch a row, for the place that a request names; return its bytes.

        Raises RowFailedError of the reason why there are none.
        """
        assert isinstance(fullurl, urllib.request.Request), "img2dataset passes a request"
        place = int(fullurl.full_url.removeprefix(PLACE_URL))
        try:
            with self._lock:
                left_out = next(self._left_out, None)
            if left_out is not None:
                raise RowFailedError(left_out.reason)
            while (attempt := self._queue.take()) is not None:
                pause = None
                try:
                    body, pause = self._try(attempt, place)
                finally:
                    self._queue.done(attempt, again_after=pause)
                if body is not None:
                    return io.BytesIO(body)
                if pause is None:
                    raise RowFailedError(self._results[attempt.row].reason)
            raise RowFailedError("shard_deadline")
        except RowFailedError:
            raise
        except BaseException as error:
            self._stop(error)
            raise RowFailedError("stopped") from error  # others would end img2dataset's thread

    def _try(self, attempt: Try, place: int) -> tuple[bytes | None, float | None]:
        """Try a row once; return its bytes, or the seconds after which to try again, or neither."""
        request = self._requests[attempt.row]
        fetched = self._fetcher.fetch(request.url)
        if fetched.body is not None:
            for kind, expected in request.hashes.items():
                digest = hashlib.new(kind, fetched.body, usedforsecurity=False).hexdigest()
                if digest != expected.strip().lower():
                    self._results[attempt.row] = RowResult(reason="hash_mismatch")
                    return None, None
            self._fetched[place] = attempt.row, hashlib.sha256(fetched.body).hexdigest()
            return fetched.body, None
        self._results[attempt.row] = RowResult(reason=fetched.reason)
        if fetched.reason not in TRANSIENT:
            return None, None
        asked = fetched.retry_after or 0.0
        if fetched.reason in ("rate_limited", "server_error") and asked:
            self._fetcher.limits.pause(attempt.host, min(asked, MAX_RETRY_AFTER_SECONDS))
        if attempt.number == self._config.retries or asked > MAX_RETRY_AFTER_SECONDS:
            return None, None
        return None, max(asked, backoff_seconds(attempt.number))

    def resize(self, img_stream: io.BytesIO, place: int) -> Sizes:
        """Return what is stored of the image that was fetched for a place: bytes, sizes, reason."""
        row, sha256 = self._fetched.pop(place)
        if self._error is not None:
            return NOT_RESIZED
        if time.monotonic() > self._resize_until:
            self._results[row] = RowResult(reason="shard_deadline")
            return NOT_RESIZED
        try:
            image = self._resizer(img_stream.getvalue())
        except DecodeError as error:
            self._results[row] = RowResult(reason=error.reason)
            return None, None, None, None, None, error.reason
        except BaseException as error:
            self._stop(error)
            return NOT_RESIZED
        self._results[row] = RowResult(image=image, sha256=sha256)
        return (
            image.data, image.width, image.height, image.original_width, image.original_height,
            None,
        )  # fmt: skip

    def write(self, img_str: bytes | None, key: str, caption: str | None, meta: object) -> None:
        """Count a row; the shard is written in the order of its rows when all are there."""
        self._num_written += 1

    def close(self) -> None:
        """Write the shard; OpenerDirector has this method too, and nothing to close."""
        if self._error is not None:
            raise self._error
        if self._num_written != self._num_rows:
            raise RuntimeError(f"img2dataset lost {self._num_rows - self._num_written} rows")
        if self._fetched:  # such as for a lack of memory, which it takes for the row's fault
            raise RuntimeError(f"img2dataset lost {len(self._fetched)} fetched images")
        late = RowResult(reason="shard_deadline")
        rows = sorted([*self._requests, *self._results.keys() - self._requests.keys()])
        self._finish({row: self._results.get(row, late) for row in rows})


class _Probe(urllib.request.OpenerDirector):
    """Answers nothing; remembers that it was asked."""

    asked = False

    def open(self, fullurl, data=None, timeout=None) -> io.BytesIO:
        self.asked = True
        raise OSError("probe")


@lru_cache(maxsize=1)
def require_our_transport() -> None:
    """Raise TransportBypassedError unless img2dataset fetches through urllib's installed opener.

    Once a process, before its first shard: a later img2dataset may fetch by other means.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network
    from img2dataset.downloader import download_image

    probe = _Probe()
    with _installed(probe):
        options = {"user_agent_token": None, "disallowed_header_directives": None}
        download_image((0, f"{PLACE_URL}0"), timeout=1.0, **options)
    if not probe.asked:
        raise TransportBypassedError(
            "img2dataset: does not fetch through urllib's opener, so no limit would hold; install "
            "the version of requirements.lock"
        )


@contextmanager
def _installed(opener: urllib.request.OpenerDirector) -> Iterator[None]:
    """Let every urlopen of this process go through an opener."""
    urllib.request.install_opener(opener)
    try:
        yield
    finally:
        urllib.request.install_opener(urllib.request.build_opener())


def backoff_seconds(number: int) -> float:
    """Return the pause after the `number`-th try, from 0, seconds.

    Full jitter: the rows of one broken host must not come back all at once.
    """
    return random.random() * min(MAX_BACKOFF_SECONDS, 0.5 * 2**number)
