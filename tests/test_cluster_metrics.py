"""Laws of the metrics façade: closed labels, counters from 0, one server."""

import hashlib
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.base import exporter, metrics

ROOT = Path(__file__).parent.parent

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
        assert len(metric.combinations()) <= 64, metric.name
        for values in metric.labels.values():
            assert len(set(values)) == len(values)


def test_every_counter_is_served_from_zero_and_importing_it_imports_nothing_heavy():
    """In a process of its own, where nothing was counted before."""
    code = (
        "import sys, urllib.request\nfrom cluster.base.metrics import serve\n"
        "print([m for m in ('prometheus_client', 'ray', 'torch', 'numpy') if m in sys.modules])\n"
        "url = f'http://127.0.0.1:{serve(0)}/metrics'\n"
        "print(urllib.request.urlopen(url, timeout=5).read().decode())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, _, text = done.stdout.partition("\n")
    assert heavy == "[]"
    for metric in metrics.METRICS.values():
        assert f"# HELP {metric.name.removesuffix('_total')}" in text or metric.name in text
        if metric.kind == "counter":
            assert len(re.findall(rf"^{metric.name}[ {{]", text, re.MULTILINE)) == len(
                metric.combinations()
            )
    assert value(text, 'minidalle2_train_nonfinite_steps_total{model="up256"}') == 0
    values = re.findall(r"^minidalle2_.* (\S+)$", text, re.MULTILINE)
    assert {float(each) for each in values} == {0}, "no gauge is there before it is set"


def test_a_gauge_is_absent_until_it_is_set(port: int):
    series = 'minidalle2_train_mfu{model="up1024"}'
    assert series not in scrape(port)
    metrics.gauge("minidalle2_train_mfu").set(0.25, model="up1024")
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
    with pytest.raises(ValueError, match="model='unet'.*clip, prior, decoder, up256, up1024"):
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
    code = f"from cluster.base.metrics import serve; serve({port})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"ValueError: metrics port {port}: found Address already in use" in other.stderr
    with pytest.raises(ValueError, match="metrics port 70000"):
        metrics.serve(70000)


def test_closed_sets_are_those_of_the_code():
    from typing import get_args, get_type_hints

    from training.config import DecoderRunConfig

    stages = set(get_args(get_type_hints(DecoderRunConfig)["stage"]))
    assert set(metrics.MODELS) == {"clip", "prior", "decoder"} | stages - {"base"}


def test_hostile_rows_make_no_series(port: int, tmp_path: Path):
    """10,000 rows of URLs, captions and columns that would each like to be a label."""
    from ingest import download

    evil = '"} 1\\nminidalle2_evil_total{a="'
    urls = [
        f"{kind}{number}{evil}"
        for number in range(2000)
        for kind in ("javascript:", "http://10.0.0.1/", "http://[::1]:22/", "ftp://h/", "\x00")
    ]
    table = {"url": urls, "caption": [f"{evil}{i}" for i in range(len(urls))]}
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    config = download.DownloadConfig(
        urls=str(tmp_path / "list.parquet"), out=str(tmp_path / "out"), num_processes=0,
        robots=False, host_rate=0, samples_per_shard=5000, retries=0, metrics_port=port,
    )  # fmt: skip
    failed = 'minidalle2_ingest_rows_total{outcome="failed"}'
    before = value(scrape(port), failed)
    assert download.main(config) == 0
    text = scrape(port)
    assert value(text, failed) - before == 10_000
    every = re.findall(r"^minidalle2_\w+", text, re.MULTILINE)
    assert "evil" not in text and len(every) < 500
    most = sum(len(metric.combinations()) for metric in metrics.METRICS.values())
    most += len(metrics.MODELS) * (len(exporter.BUCKETS) + 2)  # of the one histogram
    assert most < 500, "were every gauge set"


# -- whoever scrapes, or does not ------------------------------------------------------------------

SCRIPT = """
import sys, time
from cluster.base.cli import run_script
from cluster.base.metrics import gauge, serve

def main():
    print(serve(0), flush=True)
    sys.stdin.readline()
    gauge("minidalle2_train_running").set(0, model="clip")
    print("ends", flush=True)

run_script(main)
"""


def script() -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def end(process: subprocess.Popen) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "ends\n"


def test_a_script_that_is_scraped_stays_until_its_last_values_were_seen():
    process, port = script()
    assert "train_running{" not in scrape(port)
    end(process)
    assert process.poll() is None
    assert value(scrape(port), 'minidalle2_train_running{model="clip"}') == 0
    assert process.wait(10) == 0
    process.communicate()


def test_a_script_waits_for_nobody_who_never_came():
    process, _ = script()
    end(process)
    assert process.wait(5) == 0, "UNKNOWN_INTERVAL_SECONDS is more"
    process.communicate()


def test_a_scraper_that_stopped_coming_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(exporter.time, "monotonic", lambda: clock[0])
    scrapes, waits = exporter.ScrapeTimes(), list[float]()
    monkeypatch.setattr(scrapes._changed, "wait_for", lambda _, timeout: waits.append(timeout))

    def scraped(at: float) -> None:
        clock[0] = at
        scrapes.add()

    def waited(at: float) -> float:
        clock[0] = at
        scrapes.wait()
        return waits[-1]

    scraped(1000)
    scraped(1010)
    assert [waited(at) for at in (1010, 1014, 1025, 2000)] == [15, 11, 0, 0]
    scraped(3000)
    assert waited(3000) == exporter.MAX_WAIT_SECONDS, "however rare they were"


def test_clients_that_say_nothing_or_nonsense_are_harmless(port: int):
    open_ones = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    open_ones[0].sendall(b"\x00\xff nonsense\r\n\r\n")
    open_ones[1].sendall(b"GET /metrics HTTP/1.1\r\nX: " + b"y" * 100_000)
    assert "minidalle2_train_samples_total" in scrape(port)
    for one in open_ones:
        one.close()
    assert "minidalle2_train_samples_total" in scrape(port)


@pytest.mark.slow
def test_training_is_the_same_whether_prometheus_is_there_or_not(
    tmp_path: Path, write_data: Callable
):
    """Served and never scraped, or not served; a taken port is refused before any writing."""
    data = write_data(tmp_path / "data", num_shards=1, samples_per_shard=32)
    command = [sys.executable, str(ROOT / "training" / "prior.py"), "--preset", "debug"]
    command += ["--embeds", str(data / "embeds"), "--train.num-workers", "0"]
    digests = []
    for name, more in (("alone", []), ("served", ["--metrics-port", "0"])):
        run = tmp_path / name
        done = subprocess.run([*command, "--run", str(run), *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests.append(hashlib.sha256((next(run.glob("*20")) / "ema.safetensors").read_bytes()))
    assert digests[0].digest() == digests[1].digest()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = ["--run", str(tmp_path / "none"), "--metrics-port", str(port)]
        done = subprocess.run([*command, *given], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"metrics port {port}: found Address already in use" in done.stderr
    assert not (tmp_path / "none").exists()
