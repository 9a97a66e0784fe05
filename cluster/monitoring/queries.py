"""What the watch page may ask of Prometheus: the queries of the panels, runs and alerts."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.base.files import Json
from cluster.monitoring.panels import DASHBOARDS, Panel

if TYPE_CHECKING:
    import urllib3

WINDOWS = {"5m": 300, "15m": 900, "1h": 3600, "6h": 21600, "1d": 86400, "7d": 604800}  # in seconds
POINTS = 240  # of a line, at most
MAX_LINES = 24  # of a panel
MAX_BYTES = 8 << 20  # of an answer
TIMEOUT_SECONDS = 10.0
PANELS: dict[str, Panel] = {
    panel.key: panel for dashboard in DASHBOARDS for panel in dashboard.panels
}
RUNS = ("running", "step", "loss", "samples_per_second", "data_wait_ratio", "eta_seconds")
RUNS_QUERY = f'{{__name__=~"minidalle2:train_({"|".join(RUNS)})"}}'


class PrometheusError(Exception):
    """Prometheus does not answer, or not as it should; args[0] says so in a line."""


def layout() -> list[Json]:
    """Return the dashboards as the page draws them, each panel with its key in PANELS."""
    fields, dashboards = ("key", "title", "help", "unit"), []
    for dashboard in DASHBOARDS:
        rows = [
            {"title": title, "panels": [{f: getattr(panel, f) for f in fields} for panel in panels]}
            for title, panels in dashboard.rows.items()
        ]
        title = dashboard.title.partition(": ")[2]
        dashboards.append({"name": dashboard.name, "title": title, "rows": rows})
    return dashboards


@dataclass(frozen=True)
class PrometheusClient:
    """Reads one Prometheus, whose address ends without a slash."""

    url: str

    def answer(self, make: Callable[[], object]) -> bytes:
        """Return what `make`, one of the methods below, returns, as JSON.

        Raises PrometheusError, also for an answer of another shape than Prometheus's.
        """
        try:
            return json.dumps(make()).encode()
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise PrometheusError(f"{self.url} is no Prometheus") from error

    def lines(self, key: str, window: str, now: float) -> Json:
        """Return a panel's lines over the last `window`; key and window are of PANELS and WINDOWS.

        {"from", "to", "step", "lines": [{"name", "points": [[time, value]]}], "more"}
        """
        panel, seconds = PANELS[key], WINDOWS[window]
        step = max(1, seconds // POINTS)
        end = int(now) // step * step  # so that points stay where they are from call to call
        query = {"query": panel.query, "start": end - seconds, "end": end, "step": step}
        series = self._get("query_range", query)["result"]
        lines = [
            {
                "name": fill_legend(panel.legend, each["metric"]),
                "points": [[time, finite(value)] for time, value in each["values"]],
            }
            for each in series[:MAX_LINES]
        ]
        more = max(0, len(series) - MAX_LINES)
        lines.sort(key=lambda line: line["name"])
        return {"from": end - seconds, "to": end, "step": step, "lines": lines, "more": more}

    def runs(self) -> list[Json]:
        """Return the trainings under way: {"model", "instance", and of RUNS what each has}."""
        runs: dict[tuple[str, str], Json] = {}
        for each in self._get("query", {"query": RUNS_QUERY})["result"]:
            labels = each["metric"]
            model, instance = labels.get("model", ""), labels.get("instance", "")
            run = runs.setdefault((model, instance), {"model": model, "instance": instance})
            run[labels["__name__"].removeprefix("minidalle2:train_")] = finite(each["value"][1])
        return [runs[key] for key in sorted(runs)]

    def alerts(self) -> list[dict[str, str]]:
        """Return the alerts: {"name", "state", "severity", "summary", "help", "since"}."""
        alerts = [
            {
                "name": each["labels"].get("alertname", ""),
                "state": each["state"],
                "severity": each["labels"].get("severity", ""),
                "summary": each["annotations"].get("summary", ""),
                "help": each["annotations"].get("description", ""),
                "since": each["activeAt"],
            }
            for each in self._get("alerts", {})["alerts"]
        ]
        return sorted(alerts, key=lambda alert: (alert["state"], alert["severity"], alert["name"]))

    def _get(self, path: str, fields: Json) -> Json:
        """Read one of Prometheus's read-only addresses; follows no redirect and no proxy."""
        import urllib3

        try:
            response = _pool().request(
                "GET", f"{self.url}/api/v1/{path}", fields=fields, redirect=False, retries=False,
                timeout=TIMEOUT_SECONDS, preload_content=False,
            )  # fmt: skip
            body = response.read(MAX_BYTES + 1, decode_content=True)
            response.release_conn() if len(body) <= MAX_BYTES else response.close()
        except urllib3.exceptions.HTTPError as error:
            raise PrometheusError(f"Prometheus at {self.url} does not answer") from error
        if len(body) > MAX_BYTES:
            raise PrometheusError(f"Prometheus at {self.url} answers with too much")
        content = json.loads(body)
        if content["status"] != "success":
            raise PrometheusError(f"Prometheus at {self.url}: {str(content['error'])[:200]}")
        return content["data"]


def fill_legend(legend: str, labels: dict[str, str]) -> str:
    """Fill a legend, such as "{{model}} {{instance}}", with labels."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend).strip()


def finite(text: str) -> float | None:
    """Return a sample's value; None, which JSON knows, for what is not finite."""
    value = float(text)
    return value if abs(value) < float("inf") else None


@functools.cache
def _pool() -> "urllib3.PoolManager":
    import urllib3

    return urllib3.PoolManager(maxsize=8, block=False)
