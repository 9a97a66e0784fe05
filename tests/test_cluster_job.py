"""Jobs on a local Ray head with its token on: accepted with the token, refused without it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _prometheus import free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
START_SECONDS, JOB_SECONDS = 120, 420


def run(*command: str, env: dict[str, str], seconds: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip


@dataclass(frozen=True)
class Head:
    """A running head: where its jobs go, what a client with the token has, and more ports: of
    metrics, of the agent that starts jobs, and of the dashboard's own metrics."""

    address: str
    env: dict[str, str]
    metrics: int
    agent: int
    requests: int

    def submit(self, *script: str, env: dict[str, str] | None = None, folder: str = ".") -> Any:
        """Submit a job and wait for its end, its agent's first seconds included."""
        where = ("--working-dir", folder) if folder else ()
        job = ("ray", "job", "submit", "--address", self.address, *where, "--", *script)
        deadline = time.monotonic() + START_SECONDS
        while True:
            done = run(*job, env=env or self.env, seconds=JOB_SECONDS)
            if "No available agent" not in done.stderr or time.monotonic() > deadline:
                return done  # the head answers before its agent, which starts jobs, is there
            time.sleep(1)

    def succeed(self, *script: str, folder: str = ".") -> str:
        """Submit a job that is to succeed; returns what it logged."""
        done = self.submit(*script, folder=folder)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def submissions(self) -> set[str]:
        """Return the entry points of all jobs so far."""
        token = (Path(self.env["HOME"]) / ".ray" / "auth_token").read_text()
        bearer = {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers=bearer)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return {job["entrypoint"] for job in json.load(answer)}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Start a head in the project's root, its token made in an empty HOME."""
    home = tmp_path_factory.mktemp("home")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    made = run("ray", "get-auth-token", "--generate", env=env, seconds=60)
    assert made.returncode == 0 and (home / ".ray" / "auth_token").is_file(), made.stderr
    for _ in range(3):  # a raylet has 30 s to start, which a busy machine may not give it
        found, server = start(env, home / "head.txt")
        if wait_for(server, home / "head.txt"):
            break
        stop(server)
    else:
        raise AssertionError((home / "head.txt").read_text()[-3000:])
    try:
        yield found
    finally:
        stop(server)


def start(env: dict[str, str], log: Path) -> tuple[Head, subprocess.Popen]:
    port, dashboard, metrics, agent, requests = (free_port() for _ in range(5))
    env = {**env, "DASHBOARD_METRIC_PORT": str(requests)}
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
        f"--dashboard-port={dashboard}", "--object-store-memory=500000000",
        f"--dashboard-agent-listen-port={agent}",  # another Ray here has the usual one
        f"--metrics-export-port={metrics}", "--node-ip-address=127.0.0.1",
        f"--temp-dir=/tmp/r{os.getpid()}",
    ]  # fmt: skip
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
    return Head(f"http://127.0.0.1:{dashboard}", env, metrics, agent, requests), server


def stop(server: subprocess.Popen) -> None:
    """End the head and all that it started; a draining raylet would take half a minute."""
    os.killpg(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(timeout=3)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(timeout=60)


def wait_for(server: subprocess.Popen, log: Path) -> bool:
    """Wait until the head runs; False if it ends instead."""
    deadline = time.monotonic() + START_SECONDS
    while "Ray runtime started" not in log.read_text():
        if server.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def status(url: str, method: str = "GET", body: dict | None = None) -> int | None:
    """Ask as someone who has no token; returns the status, None if nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


# -- who has the token -----------------------------------------------------------------------------


def test_the_readmes_job_trains(head: Head, tmp_path: Path):
    trained = tmp_path / "run"
    script = ("python", "training/prior.py", "--preset", "debug")
    output = head.succeed(*script, "--run", str(trained))
    assert "prior: step 20/20, loss" in output and (trained / "final.json").is_file()


def test_every_stage_is_a_job(head: Head, site, tmp_path: Path):
    """From a URL list to scores; one is submitted bare, as on an image with the project in it."""
    images, embeds, base = (str(tmp_path / name) for name in ("images", "embeds", "base"))
    fake = tmp_path / "fake"
    fake.mkdir()
    urls = [site.put(f"/{i}.png", site.picture(40, 36, 10 * i)) for i in range(24)]
    for number in range(24):
        (fake / f"{number:06d}.png").write_bytes(site.picture(36, 36, 10 * number + 5))
    captions = [f"caption {i}" for i in range(24)]
    listed = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": urls, "caption": captions}), listed)

    output = head.succeed(
        "python", "ingest/download.py", "--urls", str(listed), "--out", images,
        "--image-size", "32", "--samples-per-shard", "12", "--allow-address", site.address,
        "--num-processes", "1", "--no-robots", folder="",
    )  # fmt: skip
    assert "download: " in output and "24 rows = 24 stored" in output
    output = head.succeed(
        "python", "ingest/embed.py", "--images", images, "--clip", "tiny:random", "--out", embeds
    )
    assert "embed: 2 shards" in output and "embed: 24 samples in 2 shards" in output
    output = head.succeed(
        "python", "training/decoder.py", "--preset", "debug", "--images", images,
        "--embeds", embeds, "--run", base, "--train.num-workers", "0", "--train.num-steps", "5",
    )  # fmt: skip
    assert "decoder: step 5/5, loss" in output and (Path(base) / "final.json").is_file()
    output = head.succeed(
        "python", "eval/fid.py", "--real", images, "--fake", str(fake), "--clip", "tiny:random",
        "--out", str(tmp_path / "eval.json"),
    )  # fmt: skip
    assert "fd_clip" in output
    assert json.loads((tmp_path / "eval.json").read_text())["images"]["fd_clip"] > 0


@pytest.mark.parametrize(
    "script",
    [
        ("training/prior.py", "--preset", "debug", "--run", "../../outside"),
        ("ingest/download.py", "--urls", "list.txt", "--out", "../outside"),
        ("ingest/embed.py", "--images", "/images", "--clip", "tiny:random", "--out", "outside"),
    ],
    ids=lambda script: script[0],
)
def test_what_a_job_writes_is_refused_below_or_beside_its_copy(script, head: Head):
    done = head.submit("python", *script)
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "expected an absolute one" in output
    assert "Traceback" not in done.stdout


# -- who has not -----------------------------------------------------------------------------------


def test_a_job_without_the_token_is_refused(head: Head, tmp_path: Path):
    for mode in ("disabled", "token"):
        stranger = {**head.env, "HOME": str(tmp_path), "RAY_AUTH_MODE": mode}
        if mode == "token":
            stranger["RAY_AUTH_TOKEN"] = "0" * 64
        done = head.submit("touch", str(tmp_path / "in"), env=stranger, folder="")
        assert done.returncode != 0 and "token" in (done.stdout + done.stderr).lower()
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize(
    "script",
    ["ingest/download.py", "ingest/embed.py", "training/prior.py", "training/decoder.py",
     "eval/fid.py"],
)  # fmt: skip
def test_no_stage_can_be_posted_without_the_token(script: str, head: Head):
    entry = f"python {script} --stranger"
    outer = socket.gethostbyname(socket.gethostname())
    doors = [f"{head.address}/api/jobs/"]
    doors += [f"http://{host}:{head.agent}/api/job_agent/jobs/" for host in ("127.0.0.1", outer)]
    job = {"entrypoint": entry, "runtime_env": {}}
    codes = [status(door, "POST", job) for door in doors]
    assert codes[0] == 401 and set(codes[1:]) <= {401, None} and 401 in codes[1:]
    assert entry not in head.submissions()


def test_the_dashboard_tells_a_stranger_nothing(head: Head):
    """Only the page that asks for the token, and whether Ray lives, are there for everybody."""
    paths = (
        "/api/jobs/", "/nodes?view=summary", "/api/cluster_status", "/api/v0/nodes",
        "/api/v0/actors", "/api/v0/logs", "/api/v0/tasks", "/logical/actors",
        "/api/v0/logs/file?filename=raylet.out",
        "/api/component_activities", "/events", "/api/packages/gcs/_ray_pkg_0.zip",
        "/worker/traceback?pid=1", "/task/traceback", "/memory_profile?pid=1", "/api/snapshot",
    )  # fmt: skip
    codes = {path: status(f"{head.address}{path}") for path in paths}
    assert {path: code for path, code in codes.items() if code not in (401, 404, 405)} == {}
    assert codes["/api/jobs/"] == codes["/nodes?view=summary"] == codes["/api/v0/tasks"] == 401
    package = f"{head.address}/api/packages/gcs/_ray_pkg_0123456789abcdef.zip"
    assert status(package, "PUT", {}) == 401
    for method in ("DELETE", "POST"):
        assert status(f"{head.address}/api/jobs/raysubmit_0/stop", method, {}) in (401, 405)


def test_a_refused_request_is_counted(head: Head):
    """By Ray, in the metric that docs/cluster.md names."""

    def refused() -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{head.requests}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        name = "ray_dashboard_api_requests_count_requests_total{"
        counted = [line for line in lines if line.startswith(name) and 'status="4xx"' in line]
        return sum(float(line.rpartition(" ")[2]) for line in counted)

    before = refused()
    codes = [status(f"{head.address}/api/jobs/", method) for method in ("GET", "POST", "POST")]
    assert codes == [401] * 3 and refused() == before + 3


def test_no_driver_joins_without_the_token(head: Head, tmp_path: Path):
    [gcs] = {address for address, what in listening(head) if "gcs_server" in what}
    code = f"import ray; ray.init('127.0.0.1:{gcs.port}', log_to_driver=False); print('joined')"
    stranger = {**head.env, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    done = run("python", "-c", code, env=stranger, seconds=JOB_SECONDS)
    assert done.returncode != 0 and "joined" not in done.stdout


def listening(head: Head) -> list[tuple[Any, str]]:
    """Return the sockets on which the head's processes wait, and those processes' commands."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("HOME") == head.env["HOME"]:
                what = " ".join(process.cmdline())
                sockets = process.net_connections(kind="tcp")
                found += [(s.laddr, what) for s in sockets if s.status == "LISTEN"]
    return found


def test_the_job_port_listens_on_the_loopback_alone(head: Head):
    """Ray's ports for other nodes do not: the token guards them. Metrics answer without it: what
    protects those is the firewall, as docs/cluster.md says."""
    port = int(head.address.rpartition(":")[2])
    assert {address.ip for address, _ in listening(head) if address.port == port} == {"127.0.0.1"}
    assert status(f"http://127.0.0.1:{head.metrics}/metrics") == 200
