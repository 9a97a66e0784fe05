"""A head that is killed with its drivers and comes back: the same results, and no secret shown."""

import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from _faults import write_embeds
from _heads import (
    Head,
    RedisServer,
    Stage,
    download_stage,
    kill_head,
    prior_stage,
    redis_server,
    slow_site,
    started_head,
)

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
    lines = [" ".join(process.cmdline()) for process in psutil.process_iter()]
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
