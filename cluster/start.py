"""Start Ray on this machine with its token on: the head of a cluster, or a node that joins one.

    python cluster/start.py --head-works                   # a cluster of this machine alone
    python cluster/start.py --bind 10.0.0.5                # the head of several machines
    python cluster/start.py --bind 10.0.0.6 --join 10.0.0.5:6379
    python cluster/start.py --bind 10.0.0.5 --redis 10.0.0.9:6380 --block    # a head that may die

The head makes the token, ~/.ray/auth_token, if there is none; whoever joins, or submits a job,
needs a copy of it. Ray is started in the project's root, so that
`ray job submit -- python training/prior.py` finds the scripts. It binds the dashboard to --bind;
its ports for other nodes listen on every interface, and that of its metrics without the token:
docs/cluster.md has the firewall's table of ports.
"""

import ipaddress
import json
import os
import secrets
import shlex
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cluster.base.cli import DONE, Option, parse, run_script
from cluster.base.ray_session import GROUPS
from cluster.head.redis_relay import (
    PASSWORD_VARIABLE,
    Redis,
    read_password,
    require_private,
    start_relay,
)

ROOT = Path(__file__).resolve().parent.parent
NVIDIA = Path("/proc/driver/nvidia/gpus")  # there where NVIDIA's driver is, in containers too
AWAY_SECONDS = 600  # that a node's work goes on without its head; Ray's own 60 are soon over
SHARES = 1  # of a group's resource that a node offers; work asks for a thousandth


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """How this machine takes part in a cluster."""

    bind: str = "127.0.0.1"
    """this machine's own address, by which other nodes reach it, and that of the dashboard;
    loopback = jobs from this machine alone"""
    join: str = ""
    """HOST:PORT of the head; empty = be the head"""
    group: Literal["auto", "cpu_group", "gpu_group"] = "auto"
    """what a node that joins is for: downloads and decoding, or encoders and training; auto:
    gpu_group where NVIDIA's driver is"""
    head_works: bool = False
    """the head runs tasks as well, and the cluster has no groups"""
    port: int = 6379
    """of the head"""
    dashboard_port: int = 8265
    """of the dashboard and of job submission, on the head"""
    metrics_export_port: int = 8080
    """of Ray's metrics on this machine; it asks for no token: keep it behind the firewall"""
    agent_port: Annotated[int, Option(hidden=True)] = 52365
    """of Ray's agent, which starts jobs"""
    redis: str = ""
    """HOST:PORT of a Redis with TLS and a password that keeps the head's state; empty = none, and
    the cluster ends with its head. The password is in REDIS_PASSWORD or --redis-password-file"""
    redis_ca: str = ""
    """PEM file of the authority that signed Redis's certificate; empty = the system's"""
    redis_password_file: str = "~/.ray/redis_password"
    """read where REDIS_PASSWORD is not set; only its owner may read it"""
    redis_namespace: str = ""
    """of this cluster in Redis; empty = this host's name and --port. A head that comes back on
    another host needs the one that it had"""
    autoscaling_config: str = ""
    """file by which the head starts and ends nodes; `ray up` hands one over"""
    block: bool = False
    """stay until Ray ends"""
    dry_run: bool = False
    """print the command and stop"""


def main(config: StartConfig) -> int:
    """Become `ray start`, in the project's root, with the token on."""
    _require_token(config)
    command = _command(config)
    redis = _redis(config) if config.redis else None
    print(f"$ RAY_AUTH_MODE=token {shlex.join(command)}", flush=True)
    if config.dry_run:
        return DONE
    print(f"metrics: port {config.metrics_export_port} asks for no token: firewall it", flush=True)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(AWAY_SECONDS))
    if redis:
        environment.pop(PASSWORD_VARIABLE, None)
        namespace = config.redis_namespace or f"{socket.gethostname()}-{config.port}"
        print(f"redis: {redis.name}, namespace {namespace}", flush=True)
        environment["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{start_relay(redis)}"
        environment["RAY_external_storage_namespace"] = namespace
    os.chdir(ROOT)
    os.execve(_ray(), command, environment)


def _command(config: StartConfig) -> list[str]:
    """Return the arguments of `ray start`."""
    command = ["ray", "start", f"--metrics-export-port={config.metrics_export_port}"]
    command.append(f"--dashboard-agent-listen-port={config.agent_port}")
    if not ipaddress.ip_address(config.bind).is_loopback:  # Ray has its own idea of this one
        command.append(f"--node-ip-address={config.bind}")
    if config.join:
        group = config.group
        if group == "auto":
            group = "gpu_group" if NVIDIA.is_dir() else "cpu_group"
        offered = {group: SHARES}
        command += [f"--address={config.join}", f"--resources={json.dumps(offered)}"]
    else:
        command += ["--head", f"--port={config.port}", f"--dashboard-host={config.bind}"]
        command += [f"--dashboard-port={config.dashboard_port}"]
        if not config.head_works:
            command += ["--num-cpus=0", "--num-gpus=0", f"--resources={json.dumps({GROUPS: 1})}"]
        if config.autoscaling_config:
            command.append(f"--autoscaling-config={config.autoscaling_config}")
    return [*command, "--block"] if config.block else command


def _redis(config: StartConfig) -> Redis:
    """Return the Redis of --redis, which answers to the password; ValueError if it does not."""
    if config.join:
        raise ValueError("--redis: found --join beside it, expected it on the head alone")
    host, _, port = config.redis.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise ValueError(f"--redis: found {config.redis!r}, expected HOST:PORT")
    password = "" if config.dry_run else read_password(Path(config.redis_password_file))
    redis = Redis(host=host.strip("[]"), port=int(port), password=password, ca=config.redis_ca)
    if not config.dry_run:
        redis.require()
    return redis


def _ray() -> str:
    beside = Path(sys.executable).parent / "ray"
    executable = str(beside) if beside.is_file() else shutil.which("ray")
    if not executable:
        raise ValueError(f"ray: found none beside {sys.executable}; `make setup` installs it")
    return executable


# -- who may come in -------------------------------------------------------------------------------


def _require_token(config: StartConfig) -> None:
    """Find the token, or make the one of a head that only its own network can reach."""
    inner = _is_inner(config.bind)
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        raise ValueError(f"RAY_AUTH_MODE: found {mode}, expected token, or none set")
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if path.is_file() and path.read_text().strip():
        require_private(path, "a token")
        return
    if config.join:
        raise ValueError(f"{path}: found no token, expected a copy of the head's")
    if not inner:
        raise ValueError(
            f"--bind {config.bind}: found no token in {path} for an address that anyone can reach, "
            "expected one: `ray get-auth-token --generate` makes it, `chmod 600` keeps it"
        )
    if not config.dry_run:
        _make_token(path)


def _is_inner(bind: str) -> bool:
    """Say whether an address is loopback, or of a network that the Internet does not reach.

    Raises ValueError for what is no address of one machine.
    """
    try:
        address = ipaddress.ip_address(bind)
    except ValueError:
        address = None
    if address is None or address.is_unspecified or address.is_multicast:
        raise ValueError(f"--bind: found {bind!r}, expected an IP address of this machine")
    return address.is_private


def _make_token(path: Path) -> None:
    """Write a new token that its owner alone can read; `ray get-auth-token --generate` makes one
    that everybody on the machine can."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # an empty file
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ValueError(
            f"{path}: found {error.strerror}, expected room for a token; set RAY_AUTH_TOKEN"
        ) from None
    with open(file, "w") as opened:
        opened.write(secrets.token_hex(32))
    print(f"made a token: {path}", flush=True)


if __name__ == "__main__":
    run_script(lambda: main(parse(StartConfig)))
