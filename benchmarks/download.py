"""Downloading, side by side with the plain img2dataset command: images/s and per CPU-second.

    python benchmarks/download.py        # half an hour on two cores

A server on several loopback addresses (a process of its own) serves photograph-like JPEGs of about
1024 px, over http, and over https with a certificate that both commands trust. They fetch the same
list and store 256 px, alternating. Times are whole commands, start included; CPU-seconds are those
of a command's processes. Both commands run img2dataset's `download_shard`: ours with the transport
that has limits, robots.txt, and connections kept alive.
"""

import http.server
import io
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
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
HOSTS = tuple(f"127.0.0.{number}" for number in range(1, 9))
CERTIFICATE, KEY = "server.pem", "server.key"
POLL_SECONDS = 0.1  # between readings of the processes' CPU time


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the comparison."""

    num_samples: int = 6000
    """images a run"""
    repeats: int = 3
    """runs of each command and latency"""
    cases: tuple[str, ...] = ("http", "https")
    """scheme; `http 0.1 s` adds the server's latency before it answers"""
    num_processes: int = 2
    """of both commands"""
    ours: str = str(ROOT / "ingest" / "download.py")
    """script of our command; another checkout's for a comparison"""
    serve: str = ""
    """internal: be the server of this folder of pictures"""
    case: str = "http"
    """internal: of that server"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one command took. rate: images/s; per_cpu: images per CPU-second of all processes."""

    rate: float
    per_cpu: float


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    if config.serve:
        return _serve(Path(config.serve), config.case)
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "command", "images/s", "spread", "images per CPU-second", "spread")
    figures = {}
    summary: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        _draw(Path(folder))
        for case in config.cases:
            with _server(Path(folder), case) as port:
                runs = _compare(config, Path(folder), case, port)
            medians = {}
            for name, of_command in runs.items():
                rates, per_cpu = [r.rate for r in of_command], [r.per_cpu for r in of_command]
                figures[f"{name} {case}"] = {"images_per_second": rates, "per_cpu": per_cpu}
                medians[name] = float(np.median(rates)), float(np.median(per_cpu))
                columns = (medians[name][0], np.ptp(rates), medians[name][1], np.ptp(per_cpu))
                table.add_row(case, name, *(f"{value:.1f}" for value in columns))
            suffix = "" if case == "http" else f"_{case.replace(' ', '_')}"
            summary[f"ratio{suffix}"] = medians["ours"][0] / medians["img2dataset"][0]
            summary[f"ratio_per_cpu{suffix}"] = medians["ours"][1] / medians["img2dataset"][1]
    Console().print(table)
    print(json.dumps({**summary, "n": config.num_samples, "runs": figures}))
    return 0


def _compare(config: Config, folder: Path, case: str, port: int) -> dict[str, list[Run]]:
    """Run both commands in turn, each into a new folder."""
    import certifi
    import pyarrow as pa
    import pyarrow.parquet as pq

    scheme = case.split()[0]
    urls = [f"{scheme}://{HOSTS[n % len(HOSTS)]}:{port}/{n}.jpg" for n in range(config.num_samples)]
    captions = [f"picture {number}" for number in range(config.num_samples)]
    pq.write_table(pa.table({"URL": urls, "TEXT": captions}), folder / "list.parquet")
    # img2dataset's import asks the network without the first; both trust the certificate, beside
    # the usual authorities, whose reading is most of the price of a TLS context
    (folder / "trusted.pem").write_bytes(
        Path(certifi.where()).read_bytes() + (folder / CERTIFICATE).read_bytes()
    )
    environment = {"NO_ALBUMENTATIONS_UPDATE": "1", "SSL_CERT_FILE": str(folder / "trusted.pem")}
    runs_of: dict[str, list[Run]] = {"ours": [], "img2dataset": []}
    for _ in range(config.repeats):
        for name, runs in runs_of.items():
            with tempfile.TemporaryDirectory() as out:
                command = _command(name, config, folder / "list.parquet", Path(out, "images"), port)
                runs.append(_timed(command, environment, config.num_samples, Path(out, "images")))
    return runs_of


def _command(name: str, config: Config, urls: Path, out: Path, port: int) -> list[str]:
    """Spell a command: 32 connections a process, 256 px, quality 95, sha256, no retries."""
    if name == "ours":
        allowed = [part for host in HOSTS for part in ("--allow-address", f"{host}:{port}")]
        return [
            sys.executable, config.ours, "--urls", str(urls),
            "--out", str(out), "--image-size", "256", "--samples-per-shard", str(SHARD),
            "--num-processes", str(config.num_processes), "--num-threads", "32", "--retries", "0",
            "--host-rate", "0", "--host-connections", str(32 * config.num_processes), *allowed,
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


def _timed(command: list[str], environment: dict[str, str], num_samples: int, out: Path) -> Run:
    """Run a command to its end; RuntimeError unless every image was stored.

    The CPU time of its processes is read while they live: a process that ends is missing at most
    what it used since the last reading.
    """
    import tarfile

    import psutil

    started, used = time.perf_counter(), dict[tuple[int, float], float]()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **environment}
        )
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                for each in (tree, *tree.children(recursive=True)):
                    with each.oneshot():
                        times = each.cpu_times()
                        used[each.pid, each.create_time()] = times.user + times.system
            except psutil.NoSuchProcess:  # ended meanwhile
                continue
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - started
        log.seek(0)
        printed = log.read()
    stored = 0
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            stored += sum(name.endswith(".jpg") for name in tar.getnames())
    if process.returncode or stored != num_samples:
        raise RuntimeError(f"{command[1]}: stored {stored} of {num_samples}: {printed[-2000:]}")
    return Run(rate=num_samples / seconds, per_cpu=num_samples / sum(used.values()))


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
def _server(folder: Path, case: str) -> Iterator[int]:
    """Serve the pictures of a folder; yield the port."""
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            "-subj", "/CN=benchmark", "-keyout", str(folder / KEY), "-out",
            str(folder / CERTIFICATE), "-addext",
            "subjectAltName=" + ",".join(f"IP:{host}" for host in HOSTS),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    command = [sys.executable, __file__, "--serve", str(folder), "--case", case]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline())
    finally:
        server.kill()
        server.wait()


def _serve(folder: Path, case: str) -> int:
    """Answer /N.jpg with picture N modulo their number, on every host; print the port."""
    scheme, latency, *_ = [*case.split(), "0"]
    pictures = [(folder / f"{n}.jpg").read_bytes() for n in range(NUM_PICTURES)]

    class Answering(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if not self.path.endswith(".jpg"):  # robots.txt
                return self.send_error(404)
            time.sleep(float(latency))
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

        def finish_request(self, request, client_address) -> None:
            """Shake hands in the connection's own thread."""
            if scheme == "https":
                assert isinstance(request, socket.socket)
                request = context.wrap_socket(request, server_side=True)
            super().finish_request(request, client_address)

        def handle_error(self, request, client_address) -> None:
            """Say nothing: a client may hang up."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    first = Server((HOSTS[0], 0), Answering)
    port = first.server_address[1]
    for host in HOSTS[1:]:
        threading.Thread(target=Server((host, port), Answering).serve_forever, daemon=True).start()
    print(port, flush=True)
    first.serve_forever()
    return 0


if __name__ == "__main__":
    run_benchmark(Config, main, num_samples=200, repeats=1, cases=("http", "https"))
