"""Debian's Prometheus, with the rules and the configuration of the repository, for a test."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER = Path(__file__).resolve().parent.parent / "cluster"
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Debian's package prometheus is absent"
)


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def wait_for(true: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """Return what `true` returns once that is something; an assertion fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = true()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s for {what}")


class Prometheus:
    """Asks a Prometheus over HTTP."""

    def __init__(self, port: int) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.started = time.time()

    def get(self, path: str, **fields: Any) -> Any:
        """Return the data of an answer of its API."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(fields)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def ready(self) -> bool:
        """Say whether it answers."""
        try:
            urllib.request.urlopen(f"{self.url}/-/ready", timeout=1).close()
        except OSError:
            return False
        return True

    def now(self, query: str) -> list[float]:
        """Return the values of a query now."""
        found = self.get("query", query=query)["result"]
        return [float(each["value"][1]) for each in found]

    def ever(self, query: str) -> list[float]:
        """Return all finite values of a query since this Prometheus began."""
        end = time.time()
        span = {"start": self.started, "end": end, "step": max(1.0, (end - self.started) / 1000)}
        found = self.get("query_range", query=query, **span)["result"]
        values = [float(value) for each in found for _, value in each["values"]]
        return [value for value in values if abs(value) < float("inf")]


def configuration(folder: Path, **files: Any) -> Path:
    """Write cluster/prometheus to `folder` with a pace of one second; files: of its file_sd, by
    job, what they list. Returns the configuration's path."""
    for path in (CLUSTER / "prometheus").glob("*.yaml"):
        shutil.copy(path, folder / path.name)
    config = yaml.safe_load((folder / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        if "file_sd_configs" in job:
            path = folder / f"{job['job_name']}.json"
            path.write_text(json.dumps(files.get(job["job_name"], [])))
            job["file_sd_configs"] = [{"files": [str(path)], "refresh_interval": "1s"}]
    path = folder / "live.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def prometheus(config: Path) -> Iterator[Prometheus]:
    """Run Debian's Prometheus on the loopback until the block ends."""
    port = free_port()
    text = config.read_text().replace("127.0.0.1:9090", f"127.0.0.1:{port}")
    config.write_text(text)
    command = [
        "prometheus", f"--config.file={config}", f"--storage.tsdb.path={config.parent / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (config.parent / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=config.parent)
        try:
            found = Prometheus(port)
            wait_for(lambda: process.poll() is not None or found.ready(), "Prometheus", 60)
            assert process.poll() is None, (config.parent / "prometheus.log").read_text()[-2000:]
            yield found
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
