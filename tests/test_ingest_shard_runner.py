"""Laws of units of work: each is made once, and together they keep to the limits per host."""

import os
import random
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import ray
from ray.exceptions import WorkerCrashedError

from ingest.fetching.rate_limit import HostShare, deal_host_share
from ingest.store import shard_runner
from ingest.store.shard_runner import Unit, UnitResult, WorkerPool, run_units


@dataclass
class Cluster:
    """In the place of Ray: its CPUs come and go, and any of its workers dies at times."""

    connections: int
    rate: float
    draw: random.Random
    in_flight: dict[int, Unit] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    most_at_once: int = 0
    next_reference: int = 0

    def remote(self, _make: Any, unit: Unit) -> int:
        self.next_reference += 1
        self.in_flight[self.next_reference] = unit
        shares = [unit.share for unit in self.in_flight.values()]
        assert min(share.connections for share in shares) >= 1
        limit = max(self.connections, len(shares))
        assert sum(share.connections for share in shares) <= limit
        assert sum(share.rate for share in shares) <= self.rate * (1 + 1e-9)
        assert all(share.rate > 0 for share in shares) or not self.rate
        self.most_at_once = max(self.most_at_once, len(shares))
        return self.next_reference

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.draw.randint(1, 20))}

    def wait(self, references: list[int], **_: Any) -> tuple[list[int], list[int]]:
        assert set(references) == set(self.in_flight)
        return [self.draw.choice(references)], []

    def get(self, reference: int) -> str:
        unit = self.in_flight.pop(reference)
        if self.draw.random() < 0.1:
            raise WorkerCrashedError
        self.made.append(unit.name)
        return f"commit {unit.name}"


@pytest.mark.parametrize("connections", [1, 2, 4, 7, 32])
@pytest.mark.parametrize("rate", [0.0, 10.0])
def test_shares_never_exceed_the_limits_while_a_cluster_grows_and_shrinks(
    connections: int, rate: float, monkeypatch: pytest.MonkeyPatch
):
    cluster = Cluster(connections, rate, random.Random(connections))
    for name in ("cluster_resources", "wait", "get"):
        monkeypatch.setattr(ray, name, getattr(cluster, name))
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _function: cluster)
    monkeypatch.setattr("cluster.base.ray_session.ensure_ray", lambda: None)
    monkeypatch.setattr(shard_runner, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(shard_runner, "MAX_TRIES", 1000)
    names = [f"{number:06d}" for number in range(300)]
    deal = partial(deal_host_share, connections, rate)
    units = (Unit(name=name) for name in names)
    results = list(run_units(print, units, WorkerPool(), deal_share=deal))
    assert sorted(result.name for result in results if result.error is None) == names
    assert sorted(cluster.made) == names, "each once, however often its worker died"
    assert cluster.most_at_once == 21, "and as many at once as there is room for, and one more"


@pytest.mark.parametrize("room", range(1, 12))
def test_all_there_is_is_dealt_evenly(room: int):
    held = list[HostShare]()
    while share := deal_host_share(8, 4.0, held, room):
        held.append(share)
    assert len(held) == room and sum(share.rate for share in held) == pytest.approx(4.0)
    counts = [share.connections for share in held]
    assert max(counts) - min(counts) <= 1 and sum(counts) <= max(8, room)


def test_shares_of_the_first_units_are_dealt_again_when_they_end():
    """Two began on a machine of one CPU, which then had a hundred: no later shard is left with
    little for long."""
    held = list[HostShare]()
    while share := deal_host_share(4, 10.0, held, 2):
        held.append(share)
    assert deal_host_share(4, 10.0, held, 101) is None
    for _ in range(300):
        held.pop(0)
        while share := deal_host_share(4, 10.0, held, 101):
            held.append(share)
    assert len(held) == 101 and min(share.rate for share in held) > 0.5 * 10 / 101


class BusyError(OSError):
    """An error that may pass."""


def test_in_this_process_errors_that_may_pass_are_tried_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shard_runner, "PAUSE_SECONDS", 0.0)
    tries: list[str] = []

    def make(unit: Unit) -> int:
        tries.append(unit.name)
        if unit.name == "never" or (unit.name == "later" and tries.count("later") < 3):
            raise BusyError("no network")
        if unit.name == "bad":
            raise ValueError("bad unit")
        if unit.name == "full":
            raise OSError(28, "No space left on device")
        return unit.payload

    units = [Unit(name=name, payload=7) for name in ("good", "later", "never", "bad", "full", "x")]
    results = list(run_units(make, units, WorkerPool(number=0), passing=(BusyError,)))
    values = {result.name: result.value for result in results if result.error is None}
    assert values == {"good": 7, "later": 7}
    assert [r.problem("out") for r in results if r.error] == [
        "no network", "bad unit", "No space left on device: make room in out",
    ]  # fmt: skip
    expected = ["good", *["later"] * 3, *["never"] * 3, "bad", "full"]
    assert tries == expected, "none after the disk is full"


@pytest.mark.slow
def test_actors_keep_what_they_loaded_and_dead_ones_are_replaced(tmp_path, monkeypatch):
    class Make:  # local, so that it travels to the workers by value
        def __init__(self) -> None:
            self.made = 0

        def __call__(self, unit: Unit) -> tuple[int, int]:
            self.made += 1
            if unit.name == "2" and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os._exit(1)
            if unit.name == "3":
                raise ValueError("bad unit")
            return unit.payload, self.made

    monkeypatch.setattr(shard_runner, "PAUSE_SECONDS", 0.1)
    units = [Unit(name=str(number), payload=10 * number) for number in range(6)]
    results = list(run_units(Make(), units, WorkerPool(number=1, actors=True)))
    by_name: dict[str, UnitResult] = {result.name: result for result in results}
    assert len(results) == 6 and str(by_name.pop("3").error) == "bad unit"
    values = {name: result.get()[0] for name, result in by_name.items()}
    assert values == {"0": 0, "1": 10, "2": 20, "4": 40, "5": 50}
    assert max(result.get()[1] for result in by_name.values()) >= 3, "an actor made several"
