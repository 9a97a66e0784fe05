"""Where the values of metrics go: to an HTTP server of this process, or to Ray's exporter.

A process that was given a port serves all metrics itself, with prometheus_client. One that was not,
and is part of a Ray cluster, sets them in the exporter of its node, where the same name begins with
`ray_`: a value is never in both. cluster/base/metrics.py holds the table of metrics, and the
functions by which the code counts.
"""

import atexit
import functools
import itertools
import socketserver
import sys
import threading
import time
import wsgiref.simple_server
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    import ray.util.metrics
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

MAX_WAIT_SECONDS = 30.0
UNKNOWN_INTERVAL_SECONDS = 15.0  # between two scrapes, where there was only one
REFRESH_SECONDS = 5.0  # a quarter of the time that Ray keeps a gauge that is not set again
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # of histograms, in seconds

Kind = Literal["counter", "gauge", "histogram"]
_lock = threading.Lock()  # held while a value is recorded or copied
_servers: dict[int, "_Server"] = {}  # by port
_series: "dict[str, Counter | Gauge | Histogram]" = {}  # by the metric's name


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric: its Prometheus name, what it counts, the closed set of each label's values.

    A counter only grows, from 0 when the process starts; a gauge is absent until first set; a
    histogram is a distribution over buckets from 10 milliseconds to 5 minutes. Each of the methods
    that record a value raises ValueError for an unknown label.
    """

    name: str
    kind: Kind
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def inc(self, amount: float = 1, **labels: str) -> None:
        """Add `amount` to a counter; ValueError if it is negative."""
        self._record("inc", amount, labels)

    def set(self, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._record("set", value, labels)

    def observe(self, value: float, **labels: str) -> None:
        """Add one observation to a histogram, in seconds."""
        self._record("observe", value, labels)

    def combinations(self) -> list[dict[str, str]]:
        """List every combination of label values; one empty combination where there is no label."""
        values = itertools.product(*self.labels.values())
        return [dict(zip(self.labels, combination, strict=True)) for combination in values]

    def _record(self, method: str, value: float, labels: dict[str, str]) -> None:
        """Call `method` of the series with `labels`, here and in Ray."""
        if labels.keys() != self.labels.keys():
            given, expected = sorted(labels) or "none", sorted(self.labels) or "none"
            raise ValueError(f"{self.name}: found labels {given}, expected {expected}")
        for label, text in labels.items():
            if text not in self.labels[label]:
                allowed = ", ".join(self.labels[label])
                raise ValueError(f"{self.name}: found {label}={text!r}, expected one of {allowed}")
        with _lock:
            series = _exported(self)
            getattr(series.labels(**labels) if labels else series, method)(value)
            if _goes_to_ray():
                _ray.export([self])


def export_to_ray(metrics: Iterable[Metric]) -> None:
    """Give Ray what this process has counted before it joined, and every count that is still 0.

    A rate over a series that begins with its first increment would miss that one.
    """
    with _lock:
        if _goes_to_ray():
            _ray.export(metrics)


@functools.cache
def _registry() -> "CollectorRegistry":
    from prometheus_client import CollectorRegistry, disable_created_metrics

    disable_created_metrics()  # a second series for every counter, which nobody reads
    return CollectorRegistry()


def _exported(metric: Metric) -> "Counter | Gauge | Histogram":
    """Return the prometheus_client metric; a counter or histogram begins with every series at 0."""
    import prometheus_client as client

    if metric.name not in _series:
        arguments = (metric.name, metric.help, tuple(metric.labels))
        if metric.kind == "histogram":
            series = client.Histogram(*arguments, registry=_registry(), buckets=BUCKETS)
        else:
            make = client.Counter if metric.kind == "counter" else client.Gauge
            series = make(*arguments, registry=_registry())
        if metric.kind != "gauge" and metric.labels:
            for labels in metric.combinations():
                series.labels(**labels)
        _series[metric.name] = series
    return _series[metric.name]


# -- over HTTP -------------------------------------------------------------------------------------


class _Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True


class _Handler(wsgiref.simple_server.WSGIRequestHandler):
    timeout = 10  # seconds, for a client that sends nothing

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: there is a scrape every few seconds."""


class ScrapeTimes:
    """When the last two scrapes were answered, by the monotonic clock."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last: list[float] = []

    def add(self) -> None:
        """Record a scrape that was answered now."""
        with self._changed:
            self._last = [*self._last[-1:], time.monotonic()]
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait for one more scrape, if one is to be expected.

        At most until 1.5 intervals after the last one, and at most MAX_WAIT_SECONDS.
        """
        with self._changed:
            before = list(self._last)
            if before:
                interval = before[-1] - before[0] or UNKNOWN_INTERVAL_SECONDS
                left = min(before[-1] + 1.5 * interval - time.monotonic(), MAX_WAIT_SECONDS)
                self._changed.wait_for(lambda: self._last != before, timeout=max(0.0, left))


_scrapes = ScrapeTimes()


def await_scrape() -> None:
    """Wait until whoever scrapes this process has seen its last values.

    Otherwise the end of a run and the scores of a short job would be lost. A scraper that never
    came, or that stopped coming, is not waited for.
    """
    _scrapes.wait()


def serve(metrics: Iterable[Metric], port: int) -> int:
    """Serve `metrics` on the loopback; see `cluster.base.metrics.serve`."""
    if port in _servers or (not port and _servers):
        return port or next(iter(_servers))
    from prometheus_client import make_wsgi_app

    app = make_wsgi_app(_registry())

    def counted(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterator[bytes]:
        yield from app(environ, start_response)
        _scrapes.add()

    try:
        server = wsgiref.simple_server.make_server(
            "127.0.0.1", port, counted, server_class=_Server, handler_class=_Handler
        )
    except (OSError, OverflowError) as error:
        problem = getattr(error, "strerror", None) or error
        raise ValueError(
            f"metrics port {port}: found {problem}, expected a free one; 0 takes any"
        ) from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    with _lock:
        for metric in metrics:
            _exported(metric)
    _servers[server.server_port] = server
    return server.server_port


# -- in Ray ----------------------------------------------------------------------------------------


def _goes_to_ray() -> bool:
    """Return whether this process is part of a Ray and serves no port; never imports Ray."""
    ray = sys.modules.get("ray")
    return bool(ray and hasattr(ray, "is_initialized") and ray.is_initialized() and not _servers)


class RayMirror:
    """The series that Ray's exporter was given, set again as long as values go there.

    Each is one of Ray's gauges, whatever its kind: Ray's own counter refuses to begin at 0, and
    Prometheus takes rates and quantiles of the same values. Ray's exporter prefixes each name with
    `ray_`. It forgets a gauge that was not set for twice metrics_report_interval_ms (2.60: its
    open_telemetry_metric_recorder.py): a value that is set once, such as that a run is under way,
    would vanish after 20 s. The caller of each method holds `_lock`.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}
        self._gauges: dict[str, ray.util.metrics.Gauge] = {}  # by the name of the series
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def export(self, metrics: Iterable[Metric]) -> None:
        """Set Ray's series of some metrics, and keep them fresh by a thread."""
        for metric in metrics:
            self._metrics[metric.name] = metric
            self.copy(metric)
        if self._thread is None and not self._ended.is_set():
            self._thread = threading.Thread(target=self._run, name="metrics in Ray", daemon=True)
            self._thread.start()
            atexit.register(self._end)  # before Ray's own, and the interpreter's end

    def copy(self, metric: Metric) -> None:
        """Set Ray's series to what this process exports; of a histogram, those of its buckets."""
        import ray.util.metrics

        for family in _exported(metric).collect():
            for sample in family.samples:
                if sample.name not in self._gauges:
                    labels = tuple(sample.labels)
                    gauge = ray.util.metrics.Gauge(sample.name, metric.help, labels)
                    self._gauges[sample.name] = gauge
                self._gauges[sample.name].set(sample.value, tags=sample.labels)

    def _end(self) -> None:
        self._ended.set()
        thread = self._thread
        if thread is not None:
            thread.join(REFRESH_SECONDS)

    def _run(self) -> None:
        failed = False
        while not self._ended.wait(REFRESH_SECONDS):
            with _lock:
                if not _goes_to_ray():
                    self._thread = None
                    return
                try:
                    for metric in self._metrics.values():
                        self.copy(metric)
                    failed = False
                except Exception as error:  # whatever Ray raises: the next round may succeed
                    if not failed:
                        message = f"metrics: Ray took none: {type(error).__name__}: {error}"
                        print(message, file=sys.stderr, flush=True)
                    failed = True


_ray = RayMirror()
