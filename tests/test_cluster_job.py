"""A job on a local Ray head with its token on: accepted with the token, refused without it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
START_SECONDS, JOB_SECONDS = 120, 420


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(*command: str, env: dict[str, str], seconds: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """Start a head, its token made in an empty HOME; yields its address and environment."""
    home = tmp_path_factory.mktemp("home")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    made = run("ray", "get-auth-token", "--generate", env=env, seconds=60)
    assert made.returncode == 0 and (home / ".ray" / "auth_token").is_file(), made.stderr
    port, dashboard = free_port(), free_port()
    server = subprocess.Popen(
        [
            str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
            f"--dashboard-port={dashboard}", "--object-store-memory=500000000",
            f"--dashboard-agent-listen-port={free_port()}",  # another Ray here has the usual one
            "--node-ip-address=127.0.0.1", f"--temp-dir=/tmp/r{os.getpid()}",
        ],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(address, server)
        yield address, env
    finally:
        stop(server)


def stop(server: subprocess.Popen) -> None:
    """End the head and all that it started; a draining raylet would take half a minute."""
    os.killpg(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(timeout=3)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(timeout=60)


def wait_for(address: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while status(f"{address}/api/version") is None:
        assert server.poll() is None, "the head ended"
        assert time.monotonic() < deadline, "the head does not answer"
        time.sleep(1)


def status(url: str) -> int | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def test_a_job_without_the_token_is_refused(head: tuple[str, dict[str, str]], tmp_path: Path):
    address, env = head
    assert status(f"{address}/api/jobs/") == 401
    stranger = {**env, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    listed = run("ray", "job", "list", "--address", address, env=stranger, seconds=120)
    assert listed.returncode != 0 and "token" in (listed.stdout + listed.stderr)


def test_the_readmes_job_trains(head: tuple[str, dict[str, str]], tmp_path: Path):
    address, env = head
    trained = tmp_path / "run"
    script = ("python", "training/prior.py", "--config", "training/presets/prior_debug.yaml")
    job = ("ray", "job", "submit", "--address", address, "--working-dir", ".", "--", *script)
    deadline = time.monotonic() + START_SECONDS
    while True:
        done = run(*job, "--run", str(trained), env=env, seconds=JOB_SECONDS)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            break  # the head answers some seconds before its agent, which starts jobs, is there
        time.sleep(1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (trained / "final.json").is_file()
    relative = run(*job, "--run", "runs/lost", env=env, seconds=JOB_SECONDS)
    assert relative.returncode != 0 and "absolute" in relative.stdout + relative.stderr
