"""A head of a cluster with its state in Redis, its death, and stages that it must not harm."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.base.jsonl import read_lines
from cluster.base.run_dir import METRICS_NAME
from ingest.store.commits import committed
from models.weights import exported

ROOT = Path(__file__).resolve().parent.parent
MARK = "MINIDALLE2_HEAD_MARK"  # in the environment of all that a head starts
PATIENCE_SECONDS = 300.0
NUM_STARTS = 3  # of a head: its processes have 30 s each time


def free_port() -> int:
    """Return a port that nobody listens on, nor gets from the system, nor from Ray, while a head
    that had it is dead."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(("", random.randrange(20_000, 32_000)))
            return found.getsockname()[1]


# -- Redis -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RedisServer:
    """Debian's redis-server on the loopback, with TLS and a password."""

    port: int
    ca: Path
    password: str


@contextmanager
def redis_server(folder: Path, *, is_open: bool = False) -> Iterator[RedisServer]:
    """Run a Redis, with a certificate that is its own authority, until the block ends; is_open: it
    asks for no password."""
    folder.mkdir(parents=True)
    certificate, key = folder / "redis.pem", folder / "redis.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    server = RedisServer(free_port(), certificate, secrets.token_hex(16))
    settings = (
        f"bind 127.0.0.1\nport 0\ntls-port {server.port}\ntls-auth-clients no\nsave ''\n"
        f"tls-cert-file {certificate}\ntls-key-file {key}\ntls-ca-cert-file {certificate}\n"
        f"dir {folder}\n" + ("" if is_open else f"requirepass {server.password}\n")
    )
    log = folder / "redis.log"
    process = subprocess.Popen(
        ["redis-server", "-"], stdin=subprocess.PIPE, stdout=log.open("w"), text=True
    )
    assert process.stdin is not None
    process.stdin.write(settings)  # on no command line
    process.stdin.close()
    try:
        while "Ready to accept connections" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()


# -- the head --------------------------------------------------------------------------------------


@dataclass
class Head:
    """A head of one machine by cluster/start.py, in a HOME of its own."""

    redis: RedisServer
    folder: Path
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    ports: list[int] = field(default_factory=lambda: [free_port() for _ in range(4)])

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}"

    def environment(self, **more: str) -> dict[str, str]:
        """Return what a client of this head needs, and `more`."""
        found = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "REDIS"))}
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        found |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return found | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more

    def command(self, *more: str) -> list[str]:
        """Return the command that starts it."""
        flags = ("--port", "--dashboard-port", "--metrics-export-port", "--agent-port")
        ports = [word for pair in zip(flags, map(str, self.ports), strict=True) for word in pair]
        return [
            sys.executable, str(ROOT / "cluster" / "start.py"), "--head-works", *ports, "--redis",
            f"localhost:{self.redis.port}", "--redis-ca", str(self.redis.ca), *more,
        ]  # fmt: skip

    def start(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Start it, the first time or again."""
        given = {"REDIS_PASSWORD": self.redis.password, "RAY_TMPDIR": str(self.folder), **variables}
        for attempt in range(1, NUM_STARTS + 1):
            done = subprocess.run(
                self.command(), env=self.environment(**{MARK: self.mark, **given}),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180,
                start_new_session=True,
            )  # fmt: skip
            if done.returncode == 0 or variables or attempt == NUM_STARTS:
                return done
            self.kill()
        raise AssertionError("no start")

    def processes(self, mark: str = "") -> list[psutil.Process]:
        """Return all that it has started: Ray's processes, drivers, workers, the relay; or all with
        another mark."""
        found = []
        for process in psutil.process_iter():
            try:
                is_alive = process.status() != psutil.STATUS_ZOMBIE
                if is_alive and process.environ().get(MARK) == (mark or self.mark):
                    found.append(process)
            except psutil.Error:
                continue  # gone, or another user's
        return found

    def kill(self, mark: str = "") -> None:
        """Kill all of it at once, as the loss of its machine does."""
        while found := self.processes(mark):
            for process in found:
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(found, timeout=5)

    def supervise(self, name: str, command: list[str], log: Path) -> subprocess.Popen:
        """Submit a command by cluster/supervise.py, outside of the head."""
        script = [
            sys.executable, str(ROOT / "cluster" / "supervise.py"), "--address", self.address,
            "--name", name, "--max-attempts", "100", "--", *command,
        ]  # fmt: skip
        with log.open("a") as file:
            return subprocess.Popen(
                script, env=self.environment(), stdout=file, stderr=subprocess.STDOUT
            )


@contextmanager
def started_head(redis: RedisServer) -> Iterator[Head]:
    """Start a head; the block's end kills it and removes its files."""
    folder = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))  # sockets have short paths alone
    head = Head(redis, folder)
    try:
        done = head.start()
        assert done.returncode == 0, done.stdout
        yield head
    finally:
        head.kill()
        shutil.rmtree(folder, ignore_errors=True)


# -- stages ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Work in units that are committed one by one.

    command: from the output's folder; units: the stamp of each committed unit; result: what must
    be that of an undisturbed run; between: fewest and most new units from one kill to the next.
    """

    name: str
    command: Callable[[Path], list[str]]
    units: Callable[[Path], dict[str, float]]
    result: Callable[[Path], object]
    between: tuple[int, int] = (2, 6)


def _script(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / name), *map(str, arguments)]


def _commits(root: Path) -> dict[str, float]:
    found = {}
    for path in root.rglob("_commits/[!.]*.json"):
        found[str(path.relative_to(root))] = path.stat().st_mtime
    return found


def _digests(root: Path) -> dict[str, str]:
    return {name: commit.digest for name, commit in committed(root).items()}


def download_stage(urls: Path, address: str) -> Stage:
    """Two processes download a list, 16 rows a shard."""

    def command(out: Path) -> list[str]:
        return _script(
            "ingest/download.py", "--urls", urls, "--out", out, "--allow-address", address,
            "--image-size", 32, "--samples-per-shard", 16, "--num-processes", 2, "--num-threads",
            2, "--retries", 0, "--host-rate", 0,
        )  # fmt: skip

    return Stage(name="download", command=command, units=_commits, result=_digests)


def embed_stage(images: Path) -> Stage:
    """An encoder without weights embeds shards, in small batches."""

    def command(out: Path) -> list[str]:
        return _script(
            "ingest/embed.py", "--images", images, "--clip", "tiny:random", "--out", out,
            "--batch-size", 4, "--num-threads", 1,
        )  # fmt: skip

    return Stage(name="embed", command=command, units=_commits, result=_digests)


def prior_stage(embeds: Path, num_steps: int) -> Stage:
    """A worker trains a small prior; each step's line is a unit, and its file has no step twice."""

    def command(out: Path) -> list[str]:
        return _script(
            "training/prior.py", "--preset", "debug", "--embeds", embeds, "--run", out,
            "--train.num-workers", 1, "--train.num-threads", 1, "--train.precision", "fp32",
            "--train.global-batch-size", 24, "--train.micro-batch-size", 2, "--train.num-steps",
            num_steps, "--train.checkpoint-every", 5, "--train.report-every", 1,
        )  # fmt: skip

    def units(out: Path) -> dict[str, float]:
        lines = read_lines(out / METRICS_NAME)
        steps = [str(line["step"]) for line in lines]
        assert len(set(steps)) == len(steps), "a step twice"
        return {step: line["time"] for step, line in zip(steps, lines, strict=True)}

    def result(out: Path) -> object:
        weights = sorted(exported(out).glob("*.safetensors"))
        steps = [line["step"] for line in read_lines(out / METRICS_NAME)]
        return steps, [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]

    return Stage(name="prior", command=command, units=units, result=result, between=(6, 14))


def fid_stage(real: Path, fake: Path) -> Stage:
    """A worker extracts features, a block of 256 images a unit, and the scores follow."""

    def command(out: Path) -> list[str]:
        return _script(
            "eval/fid.py", "--real", real, "--fake", fake, "--clip", "tiny:random", "--out",
            out / "eval.json", "--features-dir", out / "features", "--num-workers", 1,
            "--num-threads", 1,
        )  # fmt: skip

    def result(out: Path) -> object:
        return json.loads((out / "eval.json").read_text())["images"]

    return Stage(name="fid", command=command, units=_commits, result=result, between=(1, 1))


@contextmanager
def slow_site(seconds: float) -> Iterator[str]:
    """Serve a picture for each number, /7.png, after a while; yield HOST:PORT."""
    from PIL import Image

    class Answering(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            number = self.path.strip("/").removesuffix(".png")
            if not number.isdigit():  # robots.txt
                return self.send_error(404)
            time.sleep(seconds)
            file = io.BytesIO()
            Image.new("RGB", (40, 40), (int(number) % 256, 40, 40)).save(file, "PNG")
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(file.tell()))
            self.end_headers()
            self.wfile.write(file.getvalue())

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing: who asked was killed."""

    server = Server(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


# -- a campaign ------------------------------------------------------------------------------------


@dataclass
class Deaths:
    """What a stage's campaign found; seconds: from each kill to the first new unit."""

    kills: int = 0
    lost: int = 0
    doubled: int = 0
    is_same: bool = False
    seconds: list[float] = field(default_factory=list)


def kill_head(head: Head, stage: Stage, folder: Path, kills: int, seed: int) -> Deaths:
    """Kill the head under a stage's job, and start it again at once, `kills` times.

    Raises AssertionError with the supervisor's output where the work stands still or fails.
    """
    whole, out, log = (folder / f"{stage.name}{end}" for end in ("_whole", "", ".txt"))
    environment = {k: v for k, v in head.environment().items() if not k.startswith("RAY_AUTH")}
    done = subprocess.run(stage.command(whole), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found, draw, seen = Deaths(), random.Random(seed), dict[str, float]()
    supervisor = head.supervise(stage.name, stage.command(out), log)

    def await_units(enough: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not enough(units := stage.units(out)):
            assert supervisor.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        return units

    try:
        for _ in range(kills):
            wanted, began = draw.randint(*stage.between), seen
            await_units(lambda units, n=wanted, old=began: len(units.keys() - old.keys()) >= n)
            time.sleep(draw.uniform(0, 0.5))
            head.kill()
            killed, kept = time.time(), stage.units(out)
            done = head.start()
            assert done.returncode == 0, done.stdout
            seen = await_units(lambda units, at=killed: max(units.values(), default=0) > at)
            found.seconds.append(max(seen.values()) - killed)
            found.kills += 1
            if stage.units is _commits:  # steps since a checkpoint are trained again
                found.lost += len(kept.keys() - seen.keys())
                found.doubled += sum(kept[u] != seen[u] for u in kept.keys() & seen.keys())
        code = supervisor.wait(PATIENCE_SECONDS)
        assert code == 0, log.read_text()
    finally:
        supervisor.kill()
        supervisor.wait()
    left, right = stage.units(out), stage.units(whole)
    found.lost += len(right.keys() - left.keys())
    found.doubled += len(left.keys() - right.keys())
    found.is_same = stage.result(out) == stage.result(whole)
    return found
