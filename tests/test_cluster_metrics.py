"""Laws of the metrics façade: closed labels, counters from 0, one server, a mirror inside Ray."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from cluster import metrics

WORKER = """
import json, time, urllib.request
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         _system_config={"metrics_report_interval_ms": 500})

@ray.remote
class Worker:
    def count(self):
        from cluster.metrics import counter, gauge, histogram
        counter("minidalle2_ingest_rows_total").inc(0, outcome="failed")
        counter("minidalle2_ingest_rows_total").inc(3, outcome="stored")
        gauge("minidalle2_train_loss").set(0.5, model="prior")
        histogram("minidalle2_checkpoint_seconds").observe(0.5, model="prior")

worker = Worker.remote()
ray.get(worker.count.remote())
node = ray.nodes()[0]
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
deadline, text = time.monotonic() + 30, ""
while "ray_minidalle2_train_loss{" not in text and time.monotonic() < deadline:
    time.sleep(0.2)
    text = urllib.request.urlopen(url, timeout=5).read().decode()
print(json.dumps([line for line in text.splitlines() if line.startswith("ray_minidalle2")]))
"""


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return answer.read().decode()


def value(text: str, series: str) -> float:
    return float(re.findall(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)[0])


@pytest.fixture(scope="module")
def port() -> int:
    found = metrics.serve(0)
    assert found
    return found


def test_names_follow_the_convention():
    for name, metric in metrics.METRICS.items():
        assert name == metric.name
        assert re.fullmatch(r"minidalle2_[a-z]+(_[a-z]+)*", name)
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert metric.kind != "histogram" or name.endswith(("_seconds", "_bytes")), name
        assert metric.help.endswith(".")


def test_labels_come_from_small_closed_sets():
    for metric in metrics.METRICS.values():
        assert len(metric.combinations()) <= 32, metric.name
        for values in metric.labels.values():
            assert len(set(values)) == len(values)


def test_every_counter_is_served_from_zero():
    """In a process of its own, where nothing was counted before."""
    code = (
        "import urllib.request\nfrom cluster.metrics import serve\n"
        "url = f'http://127.0.0.1:{serve(0)}/metrics'\n"
        "print(urllib.request.urlopen(url, timeout=5).read().decode())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text = done.stdout
    for metric in metrics.METRICS.values():
        assert f"# HELP {metric.name.removesuffix('_total')}" in text or metric.name in text
        if metric.kind == "counter":
            assert len(re.findall(rf"^{metric.name}[ {{]", text, re.MULTILINE)) == len(
                metric.combinations()
            )
    assert value(text, 'minidalle2_train_nonfinite_steps_total{model="upsampler"}') == 0
    values = re.findall(r"^minidalle2_.* (\S+)$", text, re.MULTILINE)
    assert {float(each) for each in values} == {0}, "no gauge is there before it is set"


def test_a_gauge_is_absent_until_it_is_set(port: int):
    series = 'minidalle2_train_loss{model="clip"}'
    assert series not in scrape(port)
    metrics.gauge("minidalle2_train_loss").set(0.25, model="clip")
    assert value(scrape(port), series) == 0.25


def test_counts_add_up(port: int):
    rows = metrics.counter("minidalle2_ingest_rows_total")
    before = value(scrape(port), 'minidalle2_ingest_rows_total{outcome="stored"}')
    rows.inc(outcome="stored")
    rows.inc(4, outcome="stored")
    assert value(scrape(port), 'minidalle2_ingest_rows_total{outcome="stored"}') == before + 5
    bytes_before = value(scrape(port), "minidalle2_ingest_bytes_total")
    metrics.counter("minidalle2_ingest_bytes_total").inc(1000)
    assert value(scrape(port), "minidalle2_ingest_bytes_total") == bytes_before + 1000


def test_a_histogram_counts_into_its_bucket(port: int):
    metrics.histogram("minidalle2_checkpoint_seconds").observe(0.5, model="decoder")
    text = scrape(port)
    bucket = 'minidalle2_checkpoint_seconds_bucket{{le="{}",model="decoder"}}'
    assert value(text, bucket.format("0.3")) == 0
    assert value(text, bucket.format("1.0")) == 1


def test_mistakes_are_named():
    loss = metrics.gauge("minidalle2_train_loss")
    with pytest.raises(ValueError, match="model='unet'.*clip, prior, decoder, upsampler"):
        loss.set(1.0, model="unet")
    with pytest.raises(ValueError, match="found labels none"):
        loss.set(1.0)
    with pytest.raises(ValueError, match=r"found labels \['model', 'url'\]"):
        loss.set(1.0, model="clip", url="a")
    with pytest.raises(ValueError, match="did you mean minidalle2_train_loss"):
        metrics.gauge("minidalle2_train_los")
    with pytest.raises(ValueError, match="as a counter, expected as a gauge"):
        metrics.counter("minidalle2_train_loss")
    with pytest.raises(ValueError):
        metrics.counter("minidalle2_ingest_bytes_total").inc(-1)


def test_a_port_is_shared_within_and_refused_across_processes(port: int):
    assert metrics.serve(None) is None
    assert metrics.serve(0) == port
    assert metrics.serve(port) == port
    code = f"from cluster.metrics import serve; serve({port})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"ValueError: metrics port {port}: found Address already in use" in other.stderr
    with pytest.raises(ValueError, match="metrics port 70000"):
        metrics.serve(70000)


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, cluster.metrics\n"
        "print([m for m in ('prometheus_client', 'ray', 'torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_inside_ray_values_reach_the_exporter_of_the_node(tmp_path: Path):
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", WORKER], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for line in json.loads(done.stdout.splitlines()[-1]):
        name, labels, number = re.findall(r"^(\w+)\{(.*)\} (\S+)$", line)[0]
        if not name.endswith("_bucket"):
            label = re.findall(r'(?:outcome|model)="\w+"', labels)
            found[name, *label] = float(number)
    assert found["ray_minidalle2_ingest_rows_total", 'outcome="stored"'] == 3
    assert found["ray_minidalle2_train_loss", 'model="prior"'] == 0.5
    assert found["ray_minidalle2_checkpoint_seconds_count", 'model="prior"'] == 1
