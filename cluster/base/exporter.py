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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cluster.base.files import Json

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

MAX_WAIT_SECONDS = 30.0
UNKNOWN_INTERVAL_SECONDS = 15.0  # between two scrapes, where there was only one
REFRESH_SECONDS = 5.0  # a quarter of the time that Ray keeps a gauge that is not set again
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # of histograms, in seconds

Kind = Literal["counter", "gauge", "histogram"]
_lock = threading.Lock()  # held while a value is recorded or copied
_servers: dict[int, "_Server"] = {}  # by port
_series: Json = {}  # of prometheus_client, by the metric's name


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric: its Prometheus name, what it counts, the closed set of each label's values."""

    name: str
    kind: Kind
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def check(self, labels: dict[str, str]) -> None:
        """Raise ValueError unless `labels` gives each label of this metric a value of its set."""
        if labels.keys() != self.labels.keys():
            found, expected = sorted(labels) or "none", sorted(self.labels) or "none"
            raise ValueError(f"{self.name}: found labels {found}, expected {expected}")
        for label, value in labels.items():
            if value not in self.labels[label]:
                allowed = ", ".join(self.labels[label])
                raise ValueError(f"{self.name}: found {label}={value!r}, expected one of {allowed}")

    def combinations(self) -> list[dict[str, str]]:
        """List every combination of label values; one empty combination where there is no label."""
        values = itertools.product(*self.labels.values())
        return [dict(zip(self.labels, combination, strict=True)) for combination in values]


def record(metric: Metric, method: str, value: float, labels: dict[str, str]) -> None:
    """Call `method` (inc, set or observe) of the series with `labels`, here and in Ray."""
    metric.check(labels)
    with _lock:
        series = _exported(metric)
        getattr(series.labels(**labels) if labels else series, method)(value)
        if not _goes_to_ray():
            return
        if metric.kind == "histogram":
            _ray.metric(metric).observe(value, tags=labels)
        else:
            _ray.copy(metric)
        _ray.keep_fresh()


def export_to_ray(metrics: Iterable[Metric]) -> None:
    """Give Ray what this process has counted before it joined, and every counter that is still 0.

    A rate over a series that begins with its first increment would miss that one.
    """
    with _lock:
        if _goes_to_ray():
            for metric in metrics:
                if metric.kind != "histogram":
                    _ray.copy(metric)
            _ray.keep_fresh()


@functools.cache
def _registry() -> "CollectorRegistry":
    from prometheus_client import CollectorRegistry, disable_created_metrics

    disable_created_metrics()  # a second series for every counter, which nobody reads
    return CollectorRegistry()


def _exported(metric: Metric) -> Any:
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

    app: Callable[..., Iterable[bytes]] = make_wsgi_app(_registry())

    def counted(environ: Json, start_response: Any) -> Iterable[bytes]:
        yield from app(environ, start_response)
        _scrapes.add()

    try:
        server = wsgiref.simple_server.make_server(
            "127.0.0.1", port, counted, server_class=_Server, handler_class=_Handler
        )
    except (OSError, OverflowError) as error:
        found = getattr(error, "strerror", None) or error
        raise ValueError(
            f"metrics port {port}: found {found}, expected a free one; 0 takes any"
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
    """The metrics that Ray's exporter was given, set again as long as values go there.

    Ray's exporter forgets a gauge that was not set for twice metrics_report_interval_ms (2.60: its
    open_telemetry_metric_recorder.py). A value that is set once, such as that a run is under way,
    would vanish after 20 s. The caller of each method holds `_lock`.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, tuple[Metric, Any]] = {}
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def metric(self, metric: Metric) -> Any:
        """Return the Ray metric of that name; its exporter prefixes the name with `ray_`.

        Ray's own counter refuses to begin at 0, so a counter is one of its gauges: its value is the
        same, and Prometheus takes rates of either.
        """
        import ray.util.metrics

        if metric.name not in self._metrics:
            labels = tuple(metric.labels)
            if metric.kind == "histogram":
                made = ray.util.metrics.Histogram(metric.name, metric.help, list(BUCKETS), labels)
            else:
                made = ray.util.metrics.Gauge(metric.name, metric.help, labels)
            self._metrics[metric.name] = metric, made
        return self._metrics[metric.name][1]

    def copy(self, metric: Metric) -> None:
        """Set Ray's series to what this process exports."""
        for family in _exported(metric).collect():
            for sample in family.samples:
                self.metric(metric).set(sample.value, tags=sample.labels)

    def keep_fresh(self) -> None:
        """Start the thread that sets everything again, unless it runs."""
        if self._thread is None and not self._ended.is_set():
            self._thread = threading.Thread(target=self._run, name="metrics in Ray", daemon=True)
            self._thread.start()
            atexit.register(self._end)  # before Ray's own, and the interpreter's end

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
                kinds = (metric for metric, _ in list(self._metrics.values()))
                try:
                    for metric in (m for m in kinds if m.kind != "histogram"):  # Ray keeps those
                        self.copy(metric)
                    failed = False
                except Exception as error:  # whatever Ray raises: the next round may succeed
                    if not failed:
                        message = f"metrics: Ray took none: {type(error).__name__}: {error}"
                        print(message, file=sys.stderr, flush=True)
                    failed = True


_ray = RayMirror()
