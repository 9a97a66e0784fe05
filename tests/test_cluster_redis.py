"""The Redis of a head: who has not its password starts no head, and nobody else reads it there."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from _heads import ROOT, RedisServer, redis_server

from cluster.base.cli import DONE
from cluster.head.redis_relay import encoded, user_of
from cluster.start import AWAY_SECONDS, StartConfig, main

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="Debian's package redis-server is absent"
)
Started = list[tuple[list[str], dict[str, str]]]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("r") / "redis") as server:
        yield server


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "REDIS_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """What would have been executed."""
    found: Started = []
    monkeypatch.setattr(os, "execve", lambda path, command, env: found.append((command, env)))
    monkeypatch.setattr(os, "chdir", lambda path: None)
    return found


def config(redis: RedisServer, **fields: Any) -> StartConfig:
    given = {"redis": f"localhost:{redis.port}", "redis_ca": str(redis.ca), **fields}
    return StartConfig(**given)


def start(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "cluster" / "start.py"), *arguments]
    return subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )


@needs_redis
def test_a_wrong_password_is_one_line_and_starts_nothing(redis: RedisServer, home: Path):
    flags = ("--redis", f"localhost:{redis.port}", "--redis-ca", str(redis.ca))
    before = refusals(redis)
    for _ in range(3):
        done = start(*flags, REDIS_PASSWORD="0" * 32)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "found -WRONGPASS, expected the password that opens it" in done.stderr
        assert "ray start" not in done.stdout and "0000" not in done.stdout + done.stderr
    assert refusals(redis) == before + 3


def refusals(redis: RedisServer) -> int:
    """Return how many passwords the server has refused, as docs/cluster.md says it counts them."""
    command = ["redis-cli", "--tls", "--cacert", str(redis.ca), "-p", str(redis.port)]
    env = {**os.environ, "REDISCLI_AUTH": redis.password}
    info = subprocess.run(
        [*command, "INFO", "errorstats"], env=env, capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"errorstat_WRONGPASS:count=(\d+)", info)
    return int(found[1]) if found else 0


@needs_redis
def test_a_redis_that_is_not_closed_is_refused(
    redis: RedisServer, home: Path, tmp_path: Path, monkeypatch, started: Started
):
    monkeypatch.setenv("REDIS_PASSWORD", redis.password)
    expected = r"found \+PONG to who has no password, expected NOAUTH"
    with redis_server(tmp_path / "open", is_open=True) as other, pytest.raises(
        ValueError, match=expected
    ):
        main(config(other))
    with pytest.raises(ValueError, match="Connection refused, expected a Redis with TLS"):
        main(config(other))
    with pytest.raises(ValueError, match="self-signed certificate, expected TLS with a certifica"):
        main(config(redis, redis_ca=""))
    with pytest.raises(ValueError, match="--redis-ca .*: found .*, expected a file of certificat"):
        main(config(redis, redis_ca=str(ROOT / "README.md")))
    assert not started


@pytest.mark.parametrize("text", ["", "host", ":6379", "redis://host:1", "host:port"])
def test_what_is_no_address_is_refused(text: str, home: Path, started: Started, monkeypatch):
    monkeypatch.setenv("REDIS_PASSWORD", "x")
    if text:
        with pytest.raises(ValueError, match="expected HOST:PORT"):
            main(StartConfig(redis=text))
        assert not started
    with pytest.raises(ValueError, match="--redis: found --join beside it, expected it on the he"):
        (home / ".ray").mkdir(exist_ok=True)
        (home / ".ray" / "auth_token").touch(mode=0o600)
        (home / ".ray" / "auth_token").write_text("a")
        main(StartConfig(redis="host:1", join="10.0.0.5:6379"))


@needs_redis
def test_the_password_is_read_from_a_file_of_its_owner_alone(
    redis: RedisServer, home: Path, started: Started
):
    with pytest.raises(ValueError, match="found no password in REDIS_PASSWORD or ~/.ray/redis_pa"):
        main(config(redis))
    path = home / ".ray" / "redis_password"
    path.touch(mode=0o644)
    path.write_text(f"{redis.password}\n")
    with pytest.raises(ValueError, match=f"found a password that others can read.* 600 {path}"):
        main(config(redis))
    assert not started
    path.chmod(0o600)
    main(config(redis))
    assert len(started) == 1
    end_relays()


def asked_by_nobody(port: int) -> int:
    """Return how many bytes another user gets as an answer, from a process of his."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 101  # more than it may read
    try:
        os.setuid(65534)
        connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        code = 0
        with contextlib.suppress(ConnectionError):
            connection.sendall(encoded("PING"))
            code = len(connection.recv(100))
    finally:  # a child does not run the other tests
        os._exit(code)


@needs_redis
def test_ray_gets_a_way_to_redis_and_no_password(
    redis: RedisServer, home: Path, started: Started, monkeypatch, capsys
):
    monkeypatch.setenv("REDIS_PASSWORD", redis.password)
    main(config(redis, redis_namespace="one"))
    main(config(redis))
    [(command, env), (_, other)] = started
    assert redis.password not in str(command) + str(env) + capsys.readouterr().out
    assert env["RAY_external_storage_namespace"] == "one"
    assert other["RAY_external_storage_namespace"] == f"{socket.gethostname()}-6379"
    assert env["RAY_gcs_rpc_server_reconnect_timeout_s"] == str(AWAY_SECONDS)
    host, _, port = env["RAY_REDIS_ADDRESS"].partition(":")
    assert host == "127.0.0.1" and other["RAY_REDIS_ADDRESS"] != env["RAY_REDIS_ADDRESS"]

    # Through the relay this user is let in, whatever he asks
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        own = connection.getsockname()[1]
        assert user_of(own, int(port)) == os.getuid() and user_of(own, int(port) + 1) is None
        connection.sendall(encoded("SET", "a", "ä" * 100_000) + encoded("GET", "a"))
        with connection.makefile("rb") as answers:
            assert answers.readline() == b"+OK\r\n"
            assert answers.read(200_000 + 11).decode().strip() == "$200000\r\n" + "ä" * 100_000
    if os.getuid() == 0:  # another user is not
        assert asked_by_nobody(int(port)) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(port)), timeout=20)
    end_relays(without=redis.password)


def end_relays(without: str = "") -> None:
    """End the relays of heads that were not started; none has a word on its command line."""
    for process in psutil.Process().children():
        if "redis-server" not in process.name():
            assert not without or without not in " ".join(process.cmdline())
            process.kill()
            process.wait()


def test_a_dry_run_asks_no_redis(home: Path, run_here):
    code, output, _ = run_here("cluster/start.py", "--redis", "localhost:1", "--dry-run")
    assert code == DONE and "--head" in output and list(home.iterdir()) == []


def test_nobody_has_a_port_that_nobody_connects_from():
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    assert user_of(port, port) is None


def test_a_head_without_room_for_its_token_says_what_to_set(tmp_path: Path, monkeypatch):
    """As on a read-only root file system."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="found Not a directory, expected room .* RAY_AUTH_TOKEN"):
        main(StartConfig())
