"""Bad nights of a run in a bucket, on a real S3 server: kills, a server that goes away, many
launches at once."""

import json
import random
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from _line import run, squared_error
from _runs import ROOT, done
from _s3 import AWS, Door, MortalServer, body_of
from test_training_bucket import STEPS, assert_all_whole, lines_in, train_line

from cluster.base.cli import with_options
from cluster.base.run_dir import METRICS_NAME
from ingest.store.storage import storage_of
from training.bucket import bucket_mirror as mirrors
from training.bucket import lease as leases
from training.bucket.lease import Lease


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(leases, "LOOK_SECONDS", 0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MortalServer]:
    server = MortalServer(tmp_path_factory.mktemp("s3"))
    yield server
    server.end()


@pytest.fixture
def door(server: MortalServer) -> Door:
    return server.door


@pytest.fixture
def bucket(door: Door, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty bucket of a real server; the environment leads to it."""
    import s3fs

    for name, value in {**AWS, "AWS_ENDPOINT_URL": door.url}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{abs(hash(request.node.name)):x}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


# -- a bad night -----------------------------------------------------------------------------------


def test_a_storage_that_goes_away_and_comes_back_costs_time_alone(
    bucket: str, door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It goes away 20 times in the middle of what is pushed."""
    monkeypatch.setattr(mirrors, "LONGEST_PAUSE", 0.2)
    steps = with_options(STEPS, num_steps=41, async_checkpoints=True)
    run(tmp_path / "folder", steps)
    draw, stop, cuts = random.Random(0), threading.Event(), []

    def cut() -> None:
        while not stop.is_set() and len(cuts) < 20:
            before, wanted = door.passed, draw.randint(1, 6)
            while door.passed < before + wanted and not stop.is_set():
                time.sleep(0.002)
            door.shut()
            cuts.append(door.passed)
            time.sleep(draw.random() * 0.3)
            door.open()

    def slow(model: Any, batch: Any) -> dict:
        time.sleep(0.1)
        return squared_error(model, batch)

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            copy = train_line(f"{bucket}/line", tmp_path / "scratch", steps, objective=slow)
    finally:
        stop.set()
        thread.join()
    assert len(cuts) == 20
    for name in ("model", "ema"):
        path = f"step_00000041/{name}.safetensors"
        assert (copy / path).read_bytes() == (tmp_path / "folder" / path).read_bytes()
        assert storage_of(f"{bucket}/line").read(path) == (copy / path).read_bytes()
    lines = lines_in(f"{bucket}/line", tmp_path, METRICS_NAME)
    assert [line["step"] for line in lines] == list(range(1, 42))


def test_nothing_is_asked_for_beyond_the_runs_own_prefix(
    bucket: str, server: MortalServer, tmp_path: Path
):
    """Neighbours whose names begin alike among it; the server is killed on the way, and replays."""
    name = bucket.removeprefix("s3://")
    storage_of(f"{bucket}/runs/line_2").replace("config.yaml", b"train: {}")
    start = len(server.requests())
    train_line(f"{bucket}/runs/line", tmp_path / "one")
    server.kill_and_restart()
    train_line(f"{bucket}/runs/line", tmp_path / "two")
    asked = [each for each in server.requests()[start:] if name in each["url"]]
    assert len(asked) > 50
    for each in asked:
        url = urlsplit(each["url"])
        places = [unquote(url.path).removeprefix(f"/{name}").strip("/")]
        if not places[0]:  # many to be deleted, or a list
            places = re.findall("<Key>(.*?)</Key>", body_of(each).decode())
            places += parse_qs(url.query).get("prefix", [])
        assert places and all(f"{place}/".startswith("runs/line/") for place in places), url


# A process that has imported everything forks a child for each attempt: the child is what dies, in
# one of its calls to the storage.
ATTEMPTS = """
import itertools, json, os, sys
from pathlib import Path
import torch
from _deaths import dying
from _line import run
from ingest.store import storage
from test_training_bucket import train_line
from test_training_bucket_nights import NIGHT
from training.bucket import bucket_mirror, lease

lease.LEASE_SECONDS, lease.LOOK_SECONDS, bucket_mirror.LOOK_SECONDS = 0.3, 0.05, 0.05
url, scratch, moments = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
Bucket, CALLS = storage._ObjectStorage, ("put", "replace", "create", "delete", "get")


torch.set_num_threads(1)
run(Path(str(scratch) + ".warm"), NIGHT)  # what torch imports at its first step, once for all
for number, moment in enumerate([*moments, -1]):
    child = os.fork()
    if child == 0:
        calls = itertools.count()
        for name in CALLS:
            setattr(Bucket, name, dying(Bucket, name, calls, moment))
        train_line(url, scratch.with_name(f"machine_{number % 2}"), NIGHT)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(json.dumps([moment, status]), flush=True)
"""
NIGHT = with_options(STEPS, num_steps=60, async_checkpoints=True, power_ema=(0.1,))


@pytest.mark.slow
def test_killed_at_any_call_to_the_storage_it_ends_the_same(bucket: str, tmp_path: Path):
    """Two machines take turns, each with the copy that it had."""
    run(tmp_path / "folder", NIGHT)
    url, draw = f"{bucket}/line", random.Random(1)
    moments = [*range(8, 48, 3), *(draw.randrange(20, 160) for _ in range(16))]
    path = {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    arguments = [url, str(tmp_path / "scratch"), json.dumps(moments)]
    ended = done([sys.executable, "-c", ATTEMPTS, *arguments], 500, **path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    statuses = [json.loads(line)[1] for line in ended.stdout.splitlines() if line.startswith("[")]
    assert statuses.count(9) >= 20 and statuses[-1] == 0, ended.stdout[-2000:]
    storage = storage_of(url)
    for name in ("model", "ema"):
        weights = f"step_00000060/{name}.safetensors"
        assert storage.read(weights) == (tmp_path / "folder" / weights).read_bytes()
    lines = lines_in(url, tmp_path, METRICS_NAME)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert assert_all_whole(storage) == 2


def test_of_many_launches_at_once_one_begins(bucket: str):
    url = f"{bucket}/line"
    storage, won, refused = storage_of(url), [], []
    barrier = threading.Barrier(8)

    def begin() -> None:
        barrier.wait()
        try:
            won.append(Lease.acquire(storage_of(url), url))
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(refused) == 7
    assert leases.newest_token(storage) == won[0].token
