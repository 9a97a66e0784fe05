"""Laws of the mirror inside Ray: values reach its exporter, and stay as long as their process."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster.base import exporter
from cluster.base.metrics import METRICS

# Two processes on one Ray that forgets a gauge which is not recorded again within two seconds.
SCRIPT = """
import json, time, urllib.request
import ray
from cluster.base import exporter
exporter.REFRESH_SECONDS = 0.5
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)

@ray.remote
class Worker:
    def count(self):
        from cluster.base import exporter
        from cluster.base.metrics import counter, gauge, histogram
        exporter.REFRESH_SECONDS = 0.5
        counter("minidalle2_ingest_rows_total").inc(0, outcome="failed")
        counter("minidalle2_ingest_rows_total").inc(3, outcome="stored")
        gauge("minidalle2_train_loss").set(0.5, model="prior")
        gauge("minidalle2_train_running").set(1, model="prior")
        histogram("minidalle2_checkpoint_seconds").observe(0.5, model="prior")

from cluster.base.metrics import counter, gauge, export_to_ray
counter("minidalle2_embed_images_total").inc(5)
counter("minidalle2_train_incidents_total")
export_to_ray()
gauge("minidalle2_train_loss").set(0.25, model="clip")
gauge("minidalle2_train_running").set(1, model="clip")
worker = Worker.remote()
ray.get(worker.count.remote())
node = ray.nodes()[0]
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

def served(name):
    lines = urllib.request.urlopen(url, timeout=5).read().decode().splitlines()
    return [line for line in lines if line.startswith(f"ray_minidalle2{name}")]

def exported():
    rows = [line for line in served("_ingest_rows_total{") if "stored" in line]
    stored = sum(float(line.split()[-1]) for line in rows)
    return stored == 3 and len(served("_train_loss{")) >= 2 and running() == ["clip", "prior"]

def running():
    lines = served("_train_running{")
    return sorted(m for m in ("clip", "prior") if any(f'model="{m}"' in line for line in lines))

def wait_for(true, seconds):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.2)

wait_for(exported, 60)
lines, first = served(""), running()
least, end = first, time.monotonic() + 8
while time.monotonic() < end:
    least = [each for each in least if each in running()]
    time.sleep(0.2)
ray.kill(worker)
wait_for(lambda: running() == ["clip"], 30)
print(json.dumps([lines, first, least, running()]))
"""


def test_ray_is_given_values_again_and_a_repeated_error_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Errors of Ray end nothing; once this process has left Ray, nothing is given any more."""
    rounds, fails = list[int](), (False, True, True, False)

    def copy(mirror: exporter.RayMirror, metric: exporter.Metric) -> None:
        rounds.append(len(rounds))
        if fails[rounds[-1]]:
            raise RuntimeError("gone")

    monkeypatch.setattr(exporter, "REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(exporter, "_goes_to_ray", lambda: len(rounds) < len(fails))
    monkeypatch.setattr(exporter.RayMirror, "copy", copy)
    mirror = exporter.RayMirror()
    threads = threading.active_count()
    mirror.export([METRICS["minidalle2_train_loss"]])
    mirror.export([])
    assert threading.active_count() <= threads + 1, "one thread is enough"
    deadline = time.monotonic() + 10
    while any(thread.name == "metrics in Ray" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert rounds == [0, 1, 2, 3]
    assert capsys.readouterr().err == "metrics: Ray took none: RuntimeError: gone\n"


@pytest.mark.slow
def test_inside_ray_values_reach_the_exporter_of_the_node_and_stay_as_long_as_their_process(
    tmp_path: Path,
):
    """Ray forgets a gauge that is not recorded again; what a run sets as it begins is an alert's
    condition for days."""
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_metrics_report_interval_ms": "1000"}  # forgotten after twice as long
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines, first, kept, after_the_kill = json.loads(done.stdout.splitlines()[-1])
    found = {}
    for line in lines:
        name, labels, number = re.findall(r"^(\w+)\{(.*)\} (\S+)$", line)[0]
        if not name.endswith("_bucket"):
            label = re.findall(r'(?:outcome|model|kind)="\w+"', labels)
            found[name, *label] = found.get((name, *label), 0) + float(number)  # of all processes
    assert found["ray_minidalle2_ingest_rows_total", 'outcome="stored"'] == 3
    assert found["ray_minidalle2_train_loss", 'model="prior"'] == 0.5
    assert found["ray_minidalle2_train_loss", 'model="clip"'] == 0.25, "the driver's"
    assert found["ray_minidalle2_embed_images_total",] == 5, "counted before it joined"
    assert found["ray_minidalle2_train_incidents_total", 'kind="hang"', 'model="prior"'] == 0
    assert found["ray_minidalle2_checkpoint_seconds_count", 'model="prior"'] == 1
    assert first == kept == ["clip", "prior"] and after_the_kill == ["clip"]
