"""Peak memory of this process and its children, sampled."""

import threading


class PeakMemory:
    """Context manager: `bytes` is the largest sum of unshared memory over the process tree.

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
