"""CPU-seconds of a command with all its children, daemons included, whatever else the machine does.

Linux counts them in a control group, which the superuser may make; elsewhere the whole machine's
are counted, and `method` says so: then nothing else may run.
"""

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
SETTLE_SECONDS = 2  # daemons end a moment after the command that started them


def cpu_seconds_of(command: list[str], timeout: float = 1200) -> float:
    """Run a command to its end; return the CPU-seconds it took. RuntimeError if it fails."""
    group = new_group()
    before = _seconds(group)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=joining(group),
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=timeout)
        if process.returncode:
            raise RuntimeError(f"{command[1]}: {errors[-2000:]}")
        time.sleep(SETTLE_SECONDS)
        return _seconds(group) - before
    finally:
        remove_group(group)


def method() -> str:
    """Say what is counted."""
    group = new_group()
    remove_group(group)
    return "machine" if group is None else "control group"


def new_group() -> Path | None:
    """Make a control group; None where this user may not."""
    for root in (CONTROL_GROUPS / "cpuacct", CONTROL_GROUPS):  # version 1, version 2
        group = root / f"minidalle2-{os.getpid()}"
        if not (root / "cgroup.procs").exists():
            continue
        try:
            group.mkdir(exist_ok=True)
            return group
        except OSError:
            continue
    return None


def joining(group: Path | None) -> Callable[[], None]:
    """Return what a process does to be counted in the group, with all that it will start."""

    def join() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    return join


def remove_group(group: Path | None) -> None:
    """Remove a group that is empty."""
    if group is not None:
        with suppress(OSError):  # something still runs: the next count begins where this one is
            group.rmdir()


def _seconds(group: Path | None) -> float:
    if group is None:
        import psutil

        times = psutil.cpu_times()
        return times.user + times.nice + times.system
    if (group / "cpuacct.usage").exists():
        return int((group / "cpuacct.usage").read_text()) / 1e9
    lines = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
    return int(lines["usage_usec"]) / 1e6
