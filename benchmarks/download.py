"""Downloading, side by side with the plain img2dataset command: images/s and per CPU-second.

    python benchmarks/download.py        # some eight minutes on two cores

One loopback server (a process of its own) serves photograph-like JPEGs of about 1024 px; both
commands fetch the same list and store 256 px, alternating. Times are whole commands, start
included; CPU-seconds are the machine's without the server's, so nothing else may run beside.
"""

import http.server
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _common import BenchmarkConfig, run_benchmark

ROOT = Path(__file__).resolve().parent.parent
NUM_PICTURES = 40  # distinct ones; the list repeats them under paths of their own
SHARD = 500


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the comparison."""

    num_samples: int = 2000
    """images a run"""
    repeats: int = 3
    """runs of each command and latency"""
    latencies: tuple[float, ...] = (0.0, 0.1)
    """of the server before it answers, seconds"""
    num_processes: int = 2
    """of both commands"""
    serve: str = ""
    """internal: be the server of this folder of pictures"""
    latency: float = 0.0
    """internal: of that server"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one command took. rate: images/s; per_cpu: images per CPU-second of all processes."""

    rate: float
    per_cpu: float


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    if config.serve:
        return _serve(Path(config.serve), config.latency)
    from rich.console import Console
    from rich.table import Table

    table = Table("latency", "command", "images/s", "spread", "images per CPU-second", "spread")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        _draw(Path(folder))
        for latency in config.latencies:
            with _server(Path(folder), latency) as (port, pid):
                runs = _compare(config, Path(folder), port, pid)
            for name, of_loader in runs.items():
                rates, per_cpu = [r.rate for r in of_loader], [r.per_cpu for r in of_loader]
                figures[f"{name} {latency:g} s"] = {"images_per_second": rates, "per_cpu": per_cpu}
                columns = (np.median(rates), np.ptp(rates), np.median(per_cpu), np.ptp(per_cpu))
                table.add_row(f"{latency:g} s", name, *(f"{value:.1f}" for value in columns))
    Console().print(table)
    first = f"{config.latencies[0]:g} s"
    ratios = {
        key: float(np.median(figures[f"ours {first}"][key]))
        / float(np.median(figures[f"img2dataset {first}"][key]))
        for key in ("images_per_second", "per_cpu")
    }
    summary = {"ratio": ratios["images_per_second"], "ratio_per_cpu": ratios["per_cpu"]}
    print(json.dumps({**summary, "n": config.num_samples, "runs": figures}))
    return 0


def _compare(config: Config, folder: Path, port: int, pid: int) -> dict[str, list[Run]]:
    """Run both commands in turn, each into a new folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    urls = [f"http://127.0.0.1:{port}/{number}.jpg" for number in range(config.num_samples)]
    captions = [f"picture {number}" for number in range(config.num_samples)]
    pq.write_table(pa.table({"URL": urls, "TEXT": captions}), folder / "list.parquet")
    runs_of: dict[str, list[Run]] = {"ours": [], "img2dataset": []}
    for _ in range(config.repeats):
        for name, runs in runs_of.items():
            with tempfile.TemporaryDirectory() as out:
                command = _command(name, config, folder / "list.parquet", Path(out, "images"), port)
                runs.append(_timed(command, config.num_samples, Path(out, "images"), pid))
    return runs_of


def _command(name: str, config: Config, urls: Path, out: Path, port: int) -> list[str]:
    """Spell a command: 32 connections a process, 256 px, quality 95, sha256, no retries."""
    if name == "ours":
        return [
            sys.executable, str(ROOT / "ingest" / "download.py"), "--urls", str(urls),
            "--out", str(out), "--image-size", "256", "--samples-per-shard", str(SHARD),
            "--num-processes", str(config.num_processes), "--num-threads", "32", "--retries", "0",
            "--allow-address", f"127.0.0.1:{port}",
            "--host-rate", "0", "--host-connections", str(32 * config.num_processes),
        ]  # fmt: skip
    return [
        str(Path(sys.executable).parent / "img2dataset"), f"--url_list={urls}",
        "--input_format=parquet", "--url_col=URL", "--caption_col=TEXT",
        "--output_format=webdataset", f"--output_folder={out}", "--image_size=256",
        "--resize_mode=keep_ratio", "--resize_only_if_bigger=True", "--encode_quality=95",
        f"--processes_count={config.num_processes}", "--thread_count=32",
        f"--number_sample_per_shard={SHARD}", "--compute_hash=sha256", "--retries=0",
        "--enable_wandb=False",
    ]  # fmt: skip


def _timed(command: list[str], num_samples: int, out: Path, server: int) -> Run:
    """Run a command to its end; RuntimeError unless every image was stored."""
    import tarfile

    before, started = _cpu_seconds(server), time.perf_counter()
    quiet = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}  # img2dataset's import asks the network
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=quiet)
    seconds, cpu = time.perf_counter() - started, _cpu_seconds(server) - before
    stored = 0
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            stored += sum(name.endswith(".jpg") for name in tar.getnames())
    if done.returncode or stored != num_samples:
        raise RuntimeError(f"{command[1]}: stored {stored} of {num_samples}: {done.stderr[-2000:]}")
    return Run(rate=num_samples / seconds, per_cpu=num_samples / cpu)


def _cpu_seconds(server: int) -> float:
    """Return what all processes but the server have used; Ray's do not die as our children."""
    import psutil

    whole, served = psutil.cpu_times(), psutil.Process(server).cpu_times()
    return whole.user + whole.nice + whole.system - served.user - served.system


# -- the server ------------------------------------------------------------------------------------


def _draw(folder: Path) -> None:
    """Write pictures with the spectrum of photographs, some 200 kB each."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        width, height = int(rng.integers(900, 1150)), int(rng.integers(650, 850))
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
        spectrum = np.fft.rfft2(rng.normal(size=(4, height, width)))
        fields = np.fft.irfft2(spectrum / np.maximum(frequency, 1 / width), s=(height, width))
        brightness, *tints = fields / fields.std()
        values = 127 + 45 * brightness + 6 * np.stack(tints) + rng.normal(0, 1, (3, height, width))
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        image.save(folder / f"{number}.jpg", quality=85)


@contextmanager
def _server(folder: Path, latency: float) -> Iterator[tuple[int, int]]:
    command = [sys.executable, __file__, "--serve", str(folder), "--latency", str(latency)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline()), server.pid
    finally:
        server.kill()
        server.wait()


def _serve(folder: Path, latency: float) -> int:
    """Answer /N.jpg with picture N modulo their number; prints the port."""
    pictures = [(folder / f"{n}.jpg").read_bytes() for n in range(NUM_PICTURES)]

    class Answering(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if not self.path.endswith(".jpg"):  # robots.txt
                return self.send_error(404)
            time.sleep(latency)
            body = pictures[int(self.path.strip("/").removesuffix(".jpg")) % len(pictures)]
            head = io.BytesIO()
            head.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n")
            head.write(b"Content-Length: %d\r\n\r\n" % len(body))
            self.wfile.write(head.getvalue() + body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Answering)
    print(server.server_address[1], flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    run_benchmark(Config, main, num_samples=200, repeats=1, latencies=(0.0,))
