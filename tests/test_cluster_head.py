"""A head that is killed with its drivers and comes back: the same results, and no secret shown."""

import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from _faults import write_embeds
from _heads import (
    MARK,
    Head,
    RedisServer,
    Stage,
    download_stage,
    free_port,
    kill_head,
    prior_stage,
    redis_server,
    slow_site,
    started_head,
)
from _prometheus import wait_for

from cluster.head.redis_relay import encoded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("redis-server") is None, reason="Debian's package redis-server is absent"
    ),
]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("r") / "redis") as server:
        yield server


@pytest.fixture(scope="module")
def head(redis: RedisServer) -> Iterator[Head]:
    with started_head(redis) as found:
        yield found


def ask(redis: RedisServer, *commands: bytes) -> list[bytes]:
    """Return what Redis answers to each command, over one connection."""
    context = ssl.create_default_context(cafile=str(redis.ca))
    with (
        socket.create_connection(("127.0.0.1", redis.port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
        connection.makefile("rb") as answers,
    ):
        connection.sendall(b"".join(commands))
        return [answers.readline() for _ in commands]


def shown(head: Head, folder: Path) -> str:
    """Return all that is there to be read: command lines, what Ray and the jobs have written."""
    lines = [" ".join(found.info["cmdline"] or ()) for found in psutil.process_iter(["cmdline"])]
    files = [p for root in (head.folder, folder) for p in root.rglob("*") if p.is_file()]
    kept = (p for p in files if p.name != "auth_token" and p.parent.name != "redis")
    return "\n".join(lines + [p.read_text(errors="replace") for p in kept])


@pytest.mark.parametrize("name", ["download", "prior"])
def test_a_killed_head_loses_nothing_and_does_nothing_twice(
    name: str, head: Head, redis: RedisServer, tmp_path: Path
):
    with slow_site(0.05) as address:
        stage: Stage
        if name == "download":
            urls = tmp_path / "urls.txt"
            urls.write_text("".join(f"http://{address}/{i}.png\n" for i in range(16 * 12)))
            stage = download_stage(urls, address)
        else:
            stage = prior_stage(write_embeds(tmp_path), num_steps=30)
        deaths = kill_head(head, stage, tmp_path, kills=1, seed=0)
    print(f"{name}: {deaths.seconds[0]:.1f} s from the kill to the first new unit")
    assert (deaths.kills, deaths.lost, deaths.doubled, deaths.is_same) == (1, 0, 0, True)
    log = (tmp_path / f"{name}.txt").read_text()
    assert "its node died after" in log and f"{name}-2: succeeded after" in log

    # Its state is in Redis, which nobody enters without the password, and that is nowhere
    assert ask(redis, encoded("KEYS", "*"))[0].startswith(b"-NOAUTH")
    right = ask(redis, encoded("AUTH", redis.password), encoded("EXISTS", "x"), encoded("DBSIZE"))
    assert right[0] == b"+OK\r\n" and int(right[2].strip(b":\r\n")) > 0
    found = shown(head, tmp_path)
    assert "gcs_server" in found and redis.password not in found
    token = (head.folder / "home" / ".ray" / "auth_token").read_text().strip()
    assert token not in found


DRIVER = """
import os, sys, time, ray
ray.init(sys.argv[1], _node_ip_address="127.0.0.2", log_to_driver=False)

@ray.remote(num_cpus=1, resources={"outside": 0.001})
def work(i):
    time.sleep(0.2)
    return i

@ray.remote(num_cpus=0, resources={"outside": 0.001})
class Counter:
    def __init__(self):
        self.count = 0

    def add(self):
        self.count += 1
        return self.count

counter, i = Counter.remote(), 0
while not os.path.exists(sys.argv[2]):
    i += 1
    print(ray.get(work.remote(i)), ray.get(counter.add.remote()), flush=True)
print("new", ray.get(Counter.remote().add.remote()))
"""


def test_a_driver_outside_of_the_head_works_on(head: Head, tmp_path: Path):
    """On a second node of this machine: while the head is away, and with it when it is back."""
    stop, log, mark = tmp_path / "stop", tmp_path / "driver.txt", f"{head.mark}-node"
    env = head.environment(**{MARK: mark, "RAY_gcs_rpc_server_reconnect_timeout_s": "600"})
    head_file = head.folder / "ray" / "ray_current_cluster"
    address = head_file.read_text().strip()
    node = [
        str(Path(sys.executable).parent / "ray"), "start", f"--address={address}", "--num-cpus=1",
        "--node-ip-address=127.0.0.2", '--resources={"outside": 1}',
        f"--metrics-export-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
        "--object-store-memory=100000000",
    ]  # fmt: skip

    def lines() -> list[str]:
        return log.read_text().splitlines()

    def await_lines(more: int) -> None:
        count = len(lines())
        wait_for(lambda: len(lines()) >= count + more or driver.poll() is not None, "lines")
        assert driver.poll() is None, (tmp_path / "errors.txt").read_text()

    try:
        done = subprocess.run(node, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        with log.open("w") as file, (tmp_path / "errors.txt").open("w") as errors:
            driver = subprocess.Popen(
                [sys.executable, "-c", DRIVER, address, str(stop)], env=env, stdout=file,
                stderr=errors, start_new_session=True,
            )  # fmt: skip
        await_lines(5)
        head.kill()
        await_lines(10)
        head_file.unlink()  # else Ray takes the node of this machine for the head
        done = head.start()
        assert done.returncode == 0, done.stdout
        await_lines(5)
        stop.touch()
        assert driver.wait(120) == 0, (tmp_path / "errors.txt").read_text()
    finally:
        head.kill(mark)
    *counted, last = lines()
    assert counted == [f"{i} {i}" for i in range(1, len(counted) + 1)] and last == "new 1"
    assert len(counted) >= 20
