"""What this machine has, and what is used of it: cores and memory."""

import os
import threading
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": microseconds a period, or "max"
CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")  # bytes, or "max"


def available_cpus(quota_file: Path = CGROUP_QUOTA) -> int:
    """Return the cores that this process may use: of its affinity, and of its cgroup's quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()[:2]
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup of version 2, or no limit
        return cores


def total_memory(limit_file: Path = CGROUP_MEMORY) -> int:
    """Return the bytes of memory that this process and its kin may use: of the machine, and of its
    cgroup's limit."""
    import psutil

    machine = psutil.virtual_memory().total
    try:
        return min(machine, int(limit_file.read_text()))
    except (OSError, ValueError):  # no cgroup of version 2, or no limit
        return machine


def threads_for(chosen: int | None, num_processes: int | None = None) -> int:
    """Return the threads of each of `num_processes` on this machine: `chosen`, or for None an equal
    share of the cores.

    num_processes: None = as many as a launcher such as Ray Train says that it placed here, or 1.
    """
    if num_processes is None:
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return chosen or max(1, available_cpus() // max(1, num_processes))


class PeakMemory:
    """Context manager: `bytes` is the peak of unshared memory, summed over the process tree.

    Shared pages (libraries, Ray's object store) are left out, since every process would count
    them again.
    """

    def __init__(self, every_seconds: float = 1.0) -> None:
        self.bytes = 0
        self._every = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        import psutil

        root, stopped = psutil.Process(), False
        while not stopped:
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    memory = process.memory_info()
                    total += memory.rss - memory.shared
                except psutil.NoSuchProcess:  # it has ended since it was listed
                    continue
            self.bytes = max(self.bytes, total)
            stopped = self._stop.wait(self._every)
