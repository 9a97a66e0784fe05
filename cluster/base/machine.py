"""What this machine has: the cores that its processes may use."""

import os
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": microseconds a period, or "max"


def available_cpus(quota_file: Path = CGROUP_QUOTA) -> int:
    """Return the cores that this process may use: of its affinity, and of its cgroup's quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()[:2]
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup of version 2, or no limit
        return cores


def threads_for(chosen: int | None, num_processes: int | None = None) -> int:
    """Return the threads of each of `num_processes` on this machine: `chosen`, or for None an equal
    share of the cores.

    num_processes: None = as many as a launcher such as Ray Train says that it placed here, or 1.
    """
    if num_processes is None:
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return chosen or max(1, available_cpus() // max(1, num_processes))
