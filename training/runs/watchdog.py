"""The watchdog: ends a worker group that hangs, and reports which rank is behind.

    <run>/heartbeats/rank_0003.json   what a rank does, and since when

A thread of each rank writes what the rank is doing and reads what the others do. When its own rank
spends too long on a step, it reports the ranks that are silent, else those furthest behind, dumps
all stacks (`faulthandler`) and ends the process. The connections of the other ranks then break,
and Ray Train restarts the group from the newest checkpoint.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.base.files import write_json
from cluster.base.run_dir import HEARTBEATS_FOLDER
from training.runs.events import report_incident

PHASES = ("start", "fetch", "forward", "step", "checkpoint", "validation")
UNLIMITED = ("start", "checkpoint", "validation")  # as slow as storage and models are
FIRST_STEP = 10  # times the limit: kernels are compiled, caches filled


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What a rank does, and since when; `at` is when its process last wrote this."""

    rank: int
    step: int = 0
    phase: str = "start"
    since: float
    at: float
    host: str
    pid: int

    @property
    def progress(self) -> tuple[int, int]:
        """How far the rank is: later steps and phases compare greater."""
        return self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        return (
            f"rank {self.rank} ({self.host}, process {self.pid}) at step {self.step}, in "
            f"{self.phase} for {self.at - self.since:.0f} s"
        )


def last_step(run: Path) -> int:
    """Return the step that the foremost rank was last seen at, 0 where none was."""
    paths = (run / HEARTBEATS_FOLDER).glob("rank_*.json")
    return max((json.loads(path.read_text())["step"] for path in paths), default=0)


class Watchdog:
    """Limits the seconds of a step of this rank; with 0 it never ends anything.

    Time counts only while this process runs, a tick at a time: a suspended machine or a clock that
    is set hangs nobody. A peer is silent when its heartbeat has not changed for `seconds`.
    """

    def __init__(
        self, run: Path, rank: int, world_size: int, seconds: float,
        last_words: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """last_words: called before the process is ended."""
        self._run, self._seconds, self._last_words = run, seconds, last_words
        folder = run / HEARTBEATS_FOLDER
        self._paths = [folder / f"rank_{each:04d}.json" for each in range(world_size)]
        now = time.time()
        self._own = Heartbeat(
            rank=rank, since=now, at=now, host=socket.gethostname(), pid=os.getpid()
        )
        self._first_step: int | None = None  # of this process
        self._changes: dict[int, tuple[float, float]] = {}  # of peers: their `at`, our clock then
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run_thread, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._paths[0].parent.mkdir(exist_ok=True)
            write_json(self._paths[self._own.rank], asdict(self._own), durable=False)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._seconds:
            self._thread.join()

    def beat(self, step: int, phase: str) -> None:
        """Record what this rank does from now on; phase: one of PHASES."""
        self._first_step = step if self._first_step is None else self._first_step
        now = time.time()
        self._own = replace(self._own, step=step, phase=phase, since=now, at=now)

    def _run_thread(self) -> None:
        tick = min(5.0, self._seconds / 10)
        age, last_own, last = 0.0, self._own, time.monotonic()
        while not self._stop.wait(tick):
            now = time.monotonic()
            passed, last = min(now - last, 2 * tick), now
            age = age + passed if self._own is last_own else 0.0
            last_own = self._own
            own = replace(last_own, at=time.time())
            try:
                write_json(self._paths[own.rank], asdict(own), durable=False)
                others = self._read_others()
            except (OSError, ValueError, TypeError) as error:  # a disk that is full or far away
                print(f"{self._run}: watchdog: {error}", file=sys.stderr, flush=True)
                continue
            silent = [each for each in others if now - self._changes[each.rank][1] > self._seconds]
            if any(each.phase in UNLIMITED for each in others if each not in silent):
                age = 0.0  # whoever waits for a checkpoint or a validation has a new limit
            limit = self._seconds * (FIRST_STEP if own.step == self._first_step else 1)
            if own.phase not in UNLIMITED and age > limit:
                self._end(own, others, silent)

    def _read_others(self) -> list[Heartbeat]:
        """Read the other ranks' heartbeats, and note which have changed."""
        others = []
        for rank, path in enumerate(self._paths):
            if rank != self._own.rank and path.is_file():
                other = Heartbeat(**json.loads(path.read_text()))
                if self._changes.get(rank, (None,))[0] != other.at:
                    self._changes[rank] = other.at, time.monotonic()
                others.append(other)
        return others

    def _end(self, own: Heartbeat, others: list[Heartbeat], silent: list[Heartbeat]) -> None:
        """Report who is behind, as an incident unless a peer did so at this step, and exit."""
        everyone = [own, *others]
        least = min(each.progress for each in everyone)
        behind = silent or [each for each in everyone if each.progress == least]
        message = f"hung: {'; '.join(map(str, behind))}"
        try:
            print(f"{self._run}: {message}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.stderr)
            attempt = min(everyone, key=lambda each: each.rank).pid
            mark = self._paths[0].with_name(f"hang_{own.step:08d}_{attempt}")
            mark.touch(exist_ok=False)  # FileExistsError: a peer has reported it
            report_incident(self._run, "hang", own.step, message)
            self._last_words()
        finally:
            os._exit(1)
