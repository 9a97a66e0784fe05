"""What the watch page is fed: the answers of Prometheus to the panels' queries, and no others."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.panels import DASHBOARDS, Panel

WINDOWS = {"5m": 300, "15m": 900, "1h": 3600, "6h": 21600, "1d": 86400, "7d": 604800}  # in seconds
POINTS = 240  # of a line, at most
MAX_LINES = 24  # of a panel
MAX_BYTES = 8 << 20  # of an answer
TIMEOUT_SECONDS = 10.0
PANELS: dict[str, Panel] = {
    f"{dashboard.name}-{number}": panel
    for dashboard in DASHBOARDS
    for number, panel in enumerate(dashboard.panels)
}
RUNS = ("running", "step", "loss", "samples_per_second", "data_wait_ratio", "eta_seconds")
RUNS_QUERY = f'{{__name__=~"minidalle2:train_({"|".join(RUNS)})"}}'


class FeedError(Exception):
    """Prometheus does not answer, or not as it should; args[0] says so in a line."""


def layout() -> list[dict[str, Any]]:
    """Return the dashboards as the page draws them, each panel with the key to ask for it by."""
    keys = {id(panel): key for key, panel in PANELS.items()}
    return [
        {
            "name": dashboard.name,
            "title": dashboard.title.partition(": ")[2],
            "rows": [
                {
                    "title": title,
                    "panels": [
                        {"key": keys[id(panel)], "title": panel.title, "help": panel.help,
                         "unit": panel.unit}
                        for panel in panels
                    ],
                }
                for title, panels in dashboard.rows.items()
            ],
        }
        for dashboard in DASHBOARDS
    ]  # fmt: skip


@dataclass(frozen=True)
class Feed:
    """Reads one Prometheus, whose address ends without a slash."""

    prometheus: str

    def answer(self, make: Callable[[], Any]) -> bytes:
        """Return as JSON what `make`, one of the methods below, makes of Prometheus's answer.

        Raises FeedError, also for an answer of another shape than Prometheus's.
        """
        try:
            return json.dumps(make()).encode()
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise FeedError(f"{self.prometheus} is no Prometheus") from error

    def lines(self, key: str, window: str, now: float) -> dict[str, Any]:
        """Return a panel's lines over the last `window`, as {"from", "to", "lines": [{"name",
        "points": [[time, value]]}]}; key and window are of PANELS and WINDOWS."""
        panel, seconds = PANELS[key], WINDOWS[window]
        step = max(1, seconds // POINTS)
        end = int(now) // step * step  # so that points stay where they are from call to call
        asked = {"query": panel.query, "start": end - seconds, "end": end, "step": step}
        found = self._ask("query_range", asked)["result"]
        lines = [
            {
                "name": named(panel.legend, each["metric"]),
                "points": [[when, number(value)] for when, value in each["values"]],
            }
            for each in found[:MAX_LINES]
        ]
        more = max(0, len(found) - MAX_LINES)
        lines.sort(key=lambda line: line["name"])
        return {"from": end - seconds, "to": end, "step": step, "lines": lines, "more": more}

    def runs(self) -> list[dict[str, Any]]:
        """Return the trainings that Prometheus knows of now: {"model", "instance", and of RUNS
        what each has}."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for each in self._ask("query", {"query": RUNS_QUERY})["result"]:
            labels = each["metric"]
            model, instance = labels.get("model", ""), labels.get("instance", "")
            run = found.setdefault((model, instance), {"model": model, "instance": instance})
            name = labels["__name__"].removeprefix("minidalle2:train_")
            run[name] = number(each["value"][1])
        return [found[key] for key in sorted(found)]

    def alerts(self) -> list[dict[str, str]]:
        """Return what is wrong: {"name", "state", "severity", "summary", "help", "since"}."""
        found = [
            {
                "name": each["labels"].get("alertname", ""),
                "state": each["state"],
                "severity": each["labels"].get("severity", ""),
                "summary": each["annotations"].get("summary", ""),
                "help": each["annotations"].get("description", ""),
                "since": each["activeAt"],
            }
            for each in self._ask("alerts", {})["alerts"]
        ]
        return sorted(found, key=lambda alert: (alert["state"], alert["severity"], alert["name"]))

    def _ask(self, what: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Ask one of Prometheus's read-only addresses; follows no redirect and no proxy."""
        import urllib3

        try:
            answer = _pool().request(
                "GET",
                f"{self.prometheus}/api/v1/{what}",
                fields=fields,
                redirect=False,
                retries=False,
                timeout=TIMEOUT_SECONDS,
                preload_content=False,
            )
            body = answer.read(MAX_BYTES + 1, decode_content=True)
            answer.release_conn() if len(body) <= MAX_BYTES else answer.close()
        except urllib3.exceptions.HTTPError as error:
            raise FeedError(f"Prometheus at {self.prometheus} does not answer") from error
        if len(body) > MAX_BYTES:
            raise FeedError(f"Prometheus at {self.prometheus} answers with too much")
        content = json.loads(body)
        if content["status"] == "success":
            return content["data"]
        raise FeedError(f"Prometheus at {self.prometheus}: {str(content['error'])[:200]}")


def named(legend: str, labels: dict[str, str]) -> str:
    """Fill a legend, such as "{{model}} {{instance}}", with labels."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend).strip()


def number(text: str) -> float | None:
    """Return a sample's value; None, which JSON knows, for what is not finite."""
    value = float(text)
    return value if abs(value) < float("inf") else None


def _pool() -> Any:
    import urllib3

    if "pool" not in _pools:
        _pools["pool"] = urllib3.PoolManager(maxsize=8, block=False)
    return _pools["pool"]


_pools: dict[str, Any] = {}
