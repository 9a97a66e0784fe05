"""Where values go: to an HTTP server of this process, or to Ray's exporter of its node.

`cluster/base/metrics.py` is the façade over this, and the only importer beside
`cluster/base/cli.py`.
"""

import atexit
import functools
import socketserver
import sys
import threading
import time
import wsgiref.simple_server
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.base.metrics import Metric

MAX_WAIT_SECONDS = 30.0
UNKNOWN_INTERVAL_SECONDS = 15.0  # between two scrapes, where there was but one
REFRESH_SECONDS = 5.0  # a quarter of the time that Ray keeps a gauge without news of it

_servers: dict[int, Any] = {}
_series: dict[str, Any] = {}  # by the metric's name, here and
_mirrors: dict[str, Any] = {}  # in Ray
_recording = threading.Lock()


class _Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True


class _Handler(wsgiref.simple_server.WSGIRequestHandler):
    timeout = 10  # of a client that says nothing

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a scrape every few seconds is no news."""


class _Scrapes:
    """When the last two answers were out, by the monotonic clock."""

    def __init__(self) -> None:
        self._known = threading.Condition()
        self._last: list[float] = []

    def add(self) -> None:
        with self._known:
            self._last = [*self._last[-1:], time.monotonic()]
            self._known.notify_all()

    def wait(self) -> None:
        """Wait for one more answer, if one is to be expected: not for longer than 1.5 intervals
        after the last, nor than MAX_WAIT_SECONDS."""
        with self._known:
            before = list(self._last)
            if not before:
                return
            interval = before[-1] - before[0] or UNKNOWN_INTERVAL_SECONDS
            left = min(before[-1] + 1.5 * interval - time.monotonic(), MAX_WAIT_SECONDS)
            self._known.wait_for(lambda: self._last != before, timeout=max(0.0, left))


_scrapes = _Scrapes()


def await_scrape() -> None:
    """Stay until whoever scrapes this process has seen its last values.

    Without that a run's end, and the scores of a short job, would be in no one's records. Nobody
    is waited for who never came, or who stopped coming.
    """
    _scrapes.wait()


def serve(metrics: "Mapping[str, Metric]", port: int | None) -> int | None:
    """Serve `metrics` on the loopback; see `cluster.base.metrics.serve`."""
    if port is None:
        return None
    if port not in _servers and (port or not _servers):
        server = _start_server(port)
        with _recording:
            for metric in metrics.values():
                _exported(metric)
        _servers[server.server_port] = server
        return server.server_port
    return port or next(iter(_servers))


def _start_server(port: int) -> _Server:
    from prometheus_client import make_wsgi_app

    answer = make_wsgi_app(_registry())

    def counted(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        yield from answer(environ, start_response)
        _scrapes.add()

    try:
        server = wsgiref.simple_server.make_server(
            "127.0.0.1", port, counted, server_class=_Server, handler_class=_Handler
        )
    except (OSError, OverflowError) as error:
        found = getattr(error, "strerror", None) or error
        remedy = "expected a free one; 0 takes any"
        raise ValueError(f"metrics port {port}: found {found}, {remedy}") from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server


class _Refresher:
    """Sets Ray's gauges again and again, as long as values go there.

    Ray's exporter forgets a gauge that was not set for twice metrics_report_interval_ms (2.60: its
    open_telemetry_metric_recorder.py). What is set once, such as that a run is under way, would
    vanish after 20 s, while its process lives.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin, unless it has begun; the caller holds `_recording`."""
        if self._thread is None and not self._ended.is_set():
            self._thread = threading.Thread(target=self._work, name="metrics in Ray", daemon=True)
            self._thread.start()
            atexit.register(self._end)  # before Ray's own, and the interpreter's end

    def _end(self) -> None:
        self._ended.set()
        thread = self._thread
        if thread is not None:
            thread.join(REFRESH_SECONDS)

    def _work(self) -> None:
        failed = False
        while not self._ended.wait(REFRESH_SECONDS):
            with _recording:
                if not _goes_to_ray():
                    self._thread = None
                    return
                failed = not self._copied(tell=not failed)

    @staticmethod
    def _copied(*, tell: bool) -> bool:
        """Set every value in Ray again; say whether Ray took them. The next round may succeed,
        whatever Ray raised, so that a run of errors is told once."""
        try:
            _copy_all_to_ray()
        except Exception as error:
            if tell:
                found = f"{type(error).__name__}: {error}"
                print(f"metrics: Ray took none: {found}", file=sys.stderr, flush=True)
            return False
        return True


_refresher = _Refresher()


def record(metric: "Metric", method: str, value: float, labels: dict[str, str]) -> None:
    """Call `method` of the series with `labels`, here and, where it goes there, in Ray."""
    with _recording:
        series = _exported(metric)
        getattr(series.labels(**labels) if labels else series, method)(value)
        if _goes_to_ray():
            _refresher.start()
            if metric.kind == "histogram":
                _mirrored(metric).observe(value, tags=labels)
            else:
                _copy_to_ray(metric)


def hand_over_to_ray(metrics: "Mapping[str, Metric]") -> None:
    """Give Ray what this process has counted before it joined, and every counter that is still 0.

    A rate over a series that begins with its first increment would miss that one.
    """
    with _recording:
        if not _goes_to_ray():
            return
        _refresher.start()
        for metric in metrics.values():
            if metric.kind != "histogram":
                _copy_to_ray(metric)


@functools.cache
def _registry() -> Any:
    from prometheus_client import CollectorRegistry, disable_created_metrics

    disable_created_metrics()  # a second series for every counter, which no one reads
    return CollectorRegistry()


def _exported(metric: "Metric") -> Any:
    """Return the prometheus_client metric; counters and histograms begin with every series at 0,
    since a rate misses the first increment of a new series."""
    import prometheus_client

    from cluster.base.metrics import SECONDS_BUCKETS

    if metric.name in _series:
        return _series[metric.name]
    kinds = {"counter": "Counter", "gauge": "Gauge", "histogram": "Histogram"}
    extra = {"buckets": SECONDS_BUCKETS} if metric.kind == "histogram" else {}
    make = getattr(prometheus_client, kinds[metric.kind])
    series = make(metric.name, metric.help, tuple(metric.labels), registry=_registry(), **extra)
    if metric.kind != "gauge" and metric.labels:
        for labels in metric.combinations():
            series.labels(**labels)
    _series[metric.name] = series
    return series


def _goes_to_ray() -> bool:
    """Say whether this process is part of a Ray, as a driver or a worker, and serves no port of its
    own; never imports Ray."""
    ray = sys.modules.get("ray")
    joined = ray is not None and hasattr(ray, "is_initialized") and ray.is_initialized()
    return joined and not _servers


def _copy_all_to_ray() -> None:
    """Set again every series that Ray was given before; a histogram's Ray keeps by itself."""
    from cluster.base.metrics import METRICS

    for name in list(_mirrors):
        if METRICS[name].kind != "histogram":
            _copy_to_ray(METRICS[name])


def _copy_to_ray(metric: "Metric") -> None:
    """Set Ray's series to what this process exports."""
    for family in _exported(metric).collect():
        for sample in family.samples:
            _mirrored(metric).set(sample.value, tags=sample.labels)


def _mirrored(metric: "Metric") -> Any:
    """Return the Ray metric of that name; its exporter prefixes the name with `ray_`.

    Ray's own counter refuses to begin at 0, so a counter is one of its gauges there: its value is
    the same, and Prometheus takes rates of either.
    """
    import ray.util.metrics

    from cluster.base.metrics import SECONDS_BUCKETS

    if metric.name not in _mirrors:
        labels = tuple(metric.labels)
        if metric.kind == "histogram":
            made: Any = ray.util.metrics.Histogram(
                metric.name, metric.help, list(SECONDS_BUCKETS), labels
            )
        else:
            made = ray.util.metrics.Gauge(metric.name, metric.help, labels)
        _mirrors[metric.name] = made
    return _mirrors[metric.name]
