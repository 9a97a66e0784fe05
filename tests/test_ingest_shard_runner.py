"""Laws of the shards in work: together they keep to the limits per host, and each is made once."""

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest
import ray
from ray.exceptions import WorkerCrashedError

from ingest.fetching.fetch import FetchPolicy
from ingest.store import shard_runner
from ingest.store.shard_runner import Share, Todo, _Supervisor, share_of

ROWS = pa.table({"url": ["http://example.org/a.png"]})


@dataclass
class Cluster:
    """In the place of Ray: its CPUs come and go, and any of its workers dies at times."""

    policy: FetchPolicy
    draw: random.Random
    most_cpus: int
    cpus: int = 1

    def __post_init__(self) -> None:
        self.in_work: dict[int, tuple[int, Share]] = {}
        self.made: list[int] = []
        self.at_most = self.next_reference = 0

    def remote(self, _job: Any, number: int, _rows: pa.Table, share: Share) -> int:
        self.next_reference += 1
        self.in_work[self.next_reference] = (number, share)
        shares = [share for _, share in self.in_work.values()]
        assert min(share.connections for share in shares) >= 1
        most = max(self.policy.host_connections, len(shares))
        assert sum(share.connections for share in shares) <= most
        assert sum(share.rate for share in shares) <= self.policy.host_rate * (1 + 1e-9)
        assert all(share.rate > 0 for share in shares) or not self.policy.host_rate
        self.at_most = max(self.at_most, len(shares))
        return self.next_reference

    def cluster_resources(self) -> dict[str, float]:
        self.cpus = self.draw.randint(1, self.most_cpus)
        return {"CPU": float(self.cpus)}

    def wait(self, references: list[int], **_: Any) -> tuple[list[int], list[int]]:
        assert set(references) == set(self.in_work)
        return [self.draw.choice(references)], []

    def get(self, reference: int) -> str:
        number, _ = self.in_work.pop(reference)
        if self.draw.random() < 0.1:
            raise WorkerCrashedError
        self.made.append(number)
        return f"commit {number}"


def supervised(cluster: Cluster, count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make shards on the cluster; return their numbers, in order."""
    for name in ("cluster_resources", "wait", "get"):
        monkeypatch.setattr(ray, name, getattr(cluster, name))
    monkeypatch.setattr(shard_runner, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(shard_runner, "MAX_TRIES", 1000)
    job = cast(Any, SimpleNamespace(policy=cluster.policy, root="images"))
    todo = (Todo(number=number, rows=ROWS) for number in range(count))
    made = _Supervisor(cast(Any, cluster), job, todo, None).run()
    return sorted(one.number for one in made if one.commit is not None)


@pytest.mark.parametrize("connections", [1, 2, 4, 7, 32])
@pytest.mark.parametrize("rate", [0.0, 10.0])
def test_shares_never_exceed_the_limits_while_a_cluster_grows_and_shrinks(
    connections: int, rate: float, monkeypatch: pytest.MonkeyPatch
):
    policy = FetchPolicy(host_connections=connections, host_rate=rate)
    cluster = Cluster(policy, random.Random(connections), most_cpus=20)
    assert supervised(cluster, 300, monkeypatch) == list(range(300))
    assert sorted(cluster.made) == list(range(300)), "each once, however often its worker died"
    assert cluster.at_most == 21, "and as many at once as there is room for, and one more"


@pytest.mark.parametrize("room", range(1, 12))
def test_all_there_is_is_dealt_evenly(room: int):
    policy, held = FetchPolicy(host_connections=8, host_rate=4.0), list[Share]()
    while share := share_of(policy, held, room):
        held.append(share)
    assert len(held) == room and sum(share.rate for share in held) == pytest.approx(4.0)
    counts = [share.connections for share in held]
    assert max(counts) - min(counts) <= 1 and sum(counts) <= max(8, room)


def test_what_the_first_ones_hold_is_dealt_anew_when_they_end():
    """Two began on a machine of one CPU, which then had a hundred: no later shard is left with
    little for long."""
    policy, held = FetchPolicy(host_connections=4, host_rate=10.0), list[Share]()
    while share := share_of(policy, held, 2):
        held.append(share)
    assert share_of(policy, held, 101) is None
    for _ in range(300):
        held.pop(0)
        while share := share_of(policy, held, 101):
            held.append(share)
    assert len(held) == 101 and min(share.rate for share in held) > 0.5 * 10 / 101
