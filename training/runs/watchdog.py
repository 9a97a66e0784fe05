"""The watchdog: ends a worker group that hangs, and says which rank does.

    <run>/heartbeats/rank_0003.json   what a rank does, and since when

A thread of each rank writes what the rank is doing, and looks whether that goes on for too long. A
rank that waits for others in a collective hangs as much as they; who is furthest behind is told.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from training.runs.incidents import report_incident

PHASES = ("start", "fetch", "forward", "step", "checkpoint", "validation")
UNLIMITED = ("start", "checkpoint", "validation")  # as long as storage and models are slow
FIRST_STEP = 10  # times the limit: kernels are compiled, caches filled
HEARTBEATS = "heartbeats"


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What a rank does, and since when; `at` is when it last showed that it lives."""

    rank: int
    step: int = 0
    phase: str = "start"
    since: float
    at: float
    host: str
    pid: int

    @property
    def progress(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        return (
            f"rank {self.rank} ({self.host}, process {self.pid}) at step {self.step}, in "
            f"{self.phase} for {self.at - self.since:.0f} s"
        )


def last_step(run: Path) -> int:
    """Return the step that the foremost rank was last seen at, 0 where none was."""
    found = [json.loads(path.read_text()) for path in (run / HEARTBEATS).glob("rank_*.json")]
    return max((beat["step"] for beat in found), default=0)


class Watchdog:
    """Watches this rank's steps; 0 `seconds`: never ends anything.

    Time counts only while this process runs, a tick at a time, so that a suspended machine or a
    clock that is set hangs nobody. A peer lives as long as its heartbeat changes, whatever its own
    clock says.
    """

    def __init__(self, run: Path, rank: int, world_size: int, seconds: float) -> None:
        self._run, self._world_size, self._seconds = run, world_size, seconds
        self._tick = min(5.0, seconds / 10)
        self._begun: int | None = None  # the first step of this process
        now = time.time()
        self._mine = Heartbeat(
            rank=rank, since=now, at=now, host=socket.gethostname(), pid=os.getpid()
        )
        self._seen: dict[int, tuple[float, float]] = {}  # of peers: their clock, ours at its change
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            (self._run / HEARTBEATS).mkdir(exist_ok=True)
            self._write(self._mine)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._seconds:
            self._thread.join()

    def beat(self, step: int, phase: str) -> None:
        """Say what this rank does from now on."""
        self._begun = step if self._begun is None else self._begun
        now = time.time()
        self._mine = replace(self._mine, step=step, phase=phase, since=now, at=now)

    def _watch(self) -> None:
        age, watched, last = 0.0, self._mine, time.monotonic()
        while not self._stop.wait(self._tick):
            now = time.monotonic()
            passed, last = min(now - last, 2 * self._tick), now
            age = age + passed if self._mine is watched else 0.0
            watched = self._mine
            try:
                mine = replace(watched, at=time.time())
                self._write(mine)
                others = self._others()
            except (OSError, ValueError, TypeError) as error:  # a disk that is full or far away
                print(f"{self._run}: watchdog: {error}", file=sys.stderr, flush=True)
                continue
            if any(other.phase in UNLIMITED for other in others if self._lives(other)):
                age = 0.0  # what they do may take its time, and who waits for them begins anew
            limit = self._seconds * (FIRST_STEP if mine.step == self._begun else 1)
            if mine.phase not in UNLIMITED and age > limit:
                self._end(mine, others)

    def _write(self, mine: Heartbeat) -> None:
        path = self._run / HEARTBEATS / f"rank_{mine.rank:04d}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(mine)))
        part.replace(path)

    def _others(self) -> list[Heartbeat]:
        """Read the other ranks' heartbeats, and note which have changed."""
        found = []
        for rank in range(self._world_size):
            path = self._run / HEARTBEATS / f"rank_{rank:04d}.json"
            if rank != self._mine.rank and path.is_file():
                other = Heartbeat(**json.loads(path.read_text()))
                if self._seen.get(rank, (None,))[0] != other.at:
                    self._seen[rank] = other.at, time.monotonic()
                found.append(other)
        return found

    def _lives(self, other: Heartbeat) -> bool:
        return time.monotonic() - self._seen[other.rank][1] < self._seconds

    def _end(self, mine: Heartbeat, others: list[Heartbeat]) -> None:
        """Tell who is silent, or else furthest behind, and leave: the others' collectives break,
        and workers of Ray Train begin again at the newest checkpoint."""
        try:
            everyone = [mine, *others]
            last = min(each.progress for each in everyone)
            silent = [each for each in others if not self._lives(each)]
            behind = silent or [each for each in everyone if each.progress == last]
            told = f"hung: {'; '.join(map(str, behind))}"
            print(f"{self._run}: {told}", file=sys.stderr, flush=True)
            if self._first_to_tell(mine, everyone):
                report_incident(self._run, "hang", mine.step, told)
            faulthandler.dump_traceback(file=sys.stderr)
        finally:
            os._exit(1)

    def _first_to_tell(self, mine: Heartbeat, everyone: list[Heartbeat]) -> bool:
        """Say whether no other rank of these processes has told of this step: who is first may be
        the last that lives."""
        attempt = min(everyone, key=lambda each: each.rank).pid
        try:
            (self._run / HEARTBEATS / f"hang_{mine.step:08d}_{attempt}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
