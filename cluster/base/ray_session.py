"""One Ray for all stages: the cluster that RAY_ADDRESS names, else a private local one."""

import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

LOOK_SECONDS = 5.0
CONNECT_SECONDS = 15.0  # for the head of a cluster, which may be starting
NUM_STARTS = 3  # of a private Ray, whose processes have 30 s each time
MIN_FILES_BYTES = 64 << 20
SHARED_MEMORY = "/dev/shm"  # where Ray looks for room for its objects first
GROUPS = "minidalle2_groups"  # the resource of a head whose cluster has groups of nodes
Group = Literal["cpu_group", "gpu_group"]
# Passes its input on, but for lines of Ray's C++ code below "fatal"; the beginning of a line too,
# where it cannot be one
FILTER = r"""
import os, re
rays, rest = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [DIWE] \d+ \d+\] \S+\.cc:\d+:"), b""
while block := os.read(0, 65536):
    *lines, rest = (rest + block).split(b"\n")
    kept = b"".join(line + b"\n" for line in lines if not rays.match(line))
    if not rest.startswith(b"["):
        kept, rest = kept + rest, b""
    os.write(1, kept)
os.write(1, rest)
"""


def ensure_ray() -> None:
    """Connect to Ray once a process.

    A bare `ray.init()` would join any cluster that it finds on the machine; "local" never does.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import ray

    from cluster.base.metrics import export_to_ray

    if ray.is_initialized():
        return
    is_captured = sys.stderr is None or sys.stderr is not sys.__stderr__
    if not is_captured and not os.environ.get("MINIDALLE2_TRACEBACK"):
        _filter_stderr()
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        _start_private()
    else:
        _require_head(address)
        ray.init(address=address, logging_level=_log_level())
    export_to_ray()


@cache
def _filter_stderr() -> "subprocess.Popen[bytes]":
    """Keep the lines of Ray's C++ code off this process's stderr, which has no option for that.

    They ask for no action, and are in the driver's log in Ray's folder as well. Another process
    filters: a thread would take the last words of a crash with it.
    """
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", FILTER], stdin=read, stdout=sys.stderr.fileno(),
        start_new_session=True,
    )  # fmt: skip
    os.dup2(write, sys.stderr.fileno())
    os.close(read)
    os.close(write)
    return process


def _log_level() -> int:
    """Return the level of Ray's own lines: its warnings, such as on tokens, ask for no action."""
    return logging.WARNING if os.environ.get("MINIDALLE2_TRACEBACK") else logging.ERROR


def _require_head(address: str) -> None:
    """Raise OSError where nothing listens at the address of a cluster: Ray would try for a quarter
    of an hour. Another name than HOST:PORT is Ray's to find."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    deadline = time.monotonic() + CONNECT_SECONDS
    while port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise OSError(
                    f"RAY_ADDRESS: found no cluster at {address} ({error}), expected its head; "
                    "start it, or unset RAY_ADDRESS for a private Ray"
                ) from None
        time.sleep(1)


def _start_private() -> None:
    """Start a local Ray, again where its processes did not answer within its own limit of 30 s.

    Raises OSError where it does not start: an overloaded host, too little memory, no room for its
    files.
    """
    import ray

    if not os.path.isdir(SHARED_MEMORY):
        raise OSError(
            f"{SHARED_MEMORY}: found no such folder, expected one for Ray's objects; mount it: "
            f"mount -t tmpfs tmpfs {SHARED_MEMORY}, or start the container with --shm-size"
        )
    # Where Ray keeps sockets and logs, and its objects too where /dev/shm has no room for them
    files = os.environ.get("RAY_TMPDIR") or "/tmp"
    free = shutil.disk_usage(files).free if os.path.isdir(files) else 0
    if free < MIN_FILES_BYTES:
        raise OSError(
            f"{files}: found {free >> 20:,} MB free, expected {MIN_FILES_BYTES >> 20} for Ray's "
            "files; free some, or name another short path: RAY_TMPDIR=PATH"
        )
    # In a job on a head with Redis, whose state a second head of that name would take for its own
    os.environ.pop("RAY_REDIS_ADDRESS", None)
    home = Path.home()
    if not os.access(home, os.W_OK) and home.exists() and not (home / ".ray/auth_token").is_file():
        # Ray would write one there; the processes of this Ray inherit the variable
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    for start in range(1, NUM_STARTS + 1):
        try:
            # Scripts print their own progress; what workers print is in Ray's session folder
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=512 << 20,
                log_to_driver=bool(os.environ.get("MINIDALLE2_TRACEBACK")),
                logging_level=_log_level(),
            )
            return
        except Exception as error:  # Ray's own are bare ones
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
        print(f"Ray did not start within 30 s, attempt {start} of {NUM_STARTS}", file=sys.stderr)
    raise OSError(
        f"Ray did not start: found a load of {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores, "
        "expected a less busy host, or some 3 GB of memory; its logs are in "
        f"{files}/ray/session_latest/logs"
    )


def group_resources(group: Group) -> dict[str, float]:
    """Return the resources by which Ray places work on one group of the cluster's nodes.

    cpu_group: for downloads and decoding; gpu_group: for encoders and training. A cluster has them
    if its head offers `GROUPS`, even while all nodes of a group are scaled away; in any other the
    result is empty, and any node will do.
    """
    import ray

    return {group: 0.001} if ray.cluster_resources().get(GROUPS) else {}


def has_gpus() -> bool:
    """Return whether the cluster has GPUs, or starts nodes with GPUs on demand."""
    import ray

    return bool(ray.cluster_resources().get("GPU") or group_resources("gpu_group"))


def require_own_node() -> None:
    """Raise ConnectionError if this machine is no longer part of the Ray it joined.

    Without its raylet a driver would wait for ever: nothing that it submits can be placed. Ray
    marks a node dead some 15 s after the last message of its raylet.
    """
    import ray

    own = ray.get_runtime_context().get_node_id()
    if not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == own):
        raise ConnectionError("Ray's raylet on this machine is gone")


@contextmanager
def ending_with_own_node() -> Iterator[None]:
    """End the process, with a line and exit code 1, if its node leaves Ray within the block.

    For waits inside Ray that would never end; a loop calls `require_own_node` instead.
    """
    ended = threading.Event()

    def check() -> None:
        while not ended.wait(LOOK_SECONDS):
            try:
                require_own_node()
            except ConnectionError as error:
                if not ended.is_set():
                    print(f"error: {error}; rerun the same command", file=sys.stderr, flush=True)
                    os._exit(1)

    threading.Thread(target=check, name="own node", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
