"""A run in a bucket ends as one in a folder does, whoever is killed and whenever; nothing in it
looks whole that is not."""

import hashlib
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from _line import CONFIG, run, squared_error
from _runs import HERE, prior_run

from cluster.base.cli import with_options
from cluster.base.jsonl import add_line, read_lines
from cluster.base.run_dir import (
    INCIDENTS_NAME,
    METRICS_NAME,
    TIMELINE_NAME,
    fragment_path,
    record_path,
)
from cluster.run_store import RunsFolder
from ingest.store.storage import Storage, storage_of
from training.bucket import bucket_mirror as mirrors
from training.bucket import lease as leases
from training.bucket.bucket_mirror import NODE, mirror_of
from training.bucket.lease import Lease, LeaseLostError
from training.bucket.log_parts import LogParts
from training.checkpoints.checkpointer import await_ranks
from training.config import TrainConfig
from training.runs.worker import launch

BUILD = "training.tasks.prior:build_prior"
STEPS = with_options(
    CONFIG, num_steps=9, checkpoint_every=2, keep_checkpoints=2, async_checkpoints=False
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(leases, "LOOK_SECONDS", 0.05)


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"memory://{request.node.originalname}/runs/line"
    yield name
    files = fsspec.filesystem("memory")
    if files.exists(name):
        files.rm(name, recursive=True)


def train_line(url: str, scratch: Path, config: TrainConfig = STEPS, **fields: Any) -> Path:
    """Train the line in a bucket, as `launch` does with any model; return the copy."""
    mirror = mirror_of(url, str(scratch), NODE)
    with mirror.leased():
        mirror.begin(fresh=False)
        (mirror.folder / "config.yaml").write_text("train: {}\n")
        mirror.push()
        mirror.pull()
        with mirror.kept_alike():
            run(mirror, config, **fields)
    return mirror.folder


def failing_at(count: int) -> Callable[..., dict]:
    """The objective of the line, whose call of that number fails."""
    calls = itertools.count()

    def fails(model: Any, batch: Any) -> dict:
        if next(calls) == count:
            raise RuntimeError("a bad night")
        return squared_error(model, batch)

    return fails


def objects(url: str) -> set[str]:
    """The names of everything in the bucket but leases."""
    return {name for name in storage_of(url).find() if not name.startswith("lease/")}


def lines_in(url: str, tmp_path: Path, name: str) -> list[dict]:
    """The lines of a file as somebody on another machine sees them."""
    parts = LogParts(storage_of(url), tmp_path, name, "reader")
    parts.pull()
    return read_lines(tmp_path / name)


def assert_all_whole(storage: Storage) -> int:
    """Nothing in a bucket looks whole that is not; return the number of ranks' records."""
    records = [n for n in storage.find() if "/fragments/" in n and n.endswith(".json")]
    for name in records:
        fragments = storage.read(name.replace(".json", ".safetensors"))
        assert hashlib.sha256(fragments).hexdigest() == json.loads(storage.read(name))["sha256"]
    return len(records)


def weights_in(url: str) -> dict[str, bytes]:
    storage = storage_of(url)
    return {name: storage.read(name) for name in storage.find() if name.endswith(".safetensors")}


# -- a run -----------------------------------------------------------------------------------------


def test_a_run_in_a_bucket_is_that_of_a_folder(url: str, tmp_path: Path):
    run(tmp_path / "folder", STEPS)
    copy = train_line(url, tmp_path / "scratch")
    expected = {
        str(path.relative_to(tmp_path / "folder")): path.read_bytes()
        for path in (tmp_path / "folder").rglob("*.safetensors")
    }
    assert weights_in(url) == expected and expected
    steps = {name.partition("/")[0] for name in objects(url) if name.startswith("step_")}
    assert steps == {"step_00000008", "step_00000009"} and "final.json" in objects(url)
    assert [line["step"] for line in lines_in(url, tmp_path, METRICS_NAME)] == list(range(1, 10))
    assert copy.parent.parent == tmp_path / "scratch"


def test_a_run_continues_on_a_machine_that_has_no_copy(url: str, tmp_path: Path):
    run(tmp_path / "folder", STEPS)
    with pytest.raises(RuntimeError):
        train_line(url, tmp_path / "first", objective=failing_at(5))
    copy = train_line(url, tmp_path / "second")
    for name in ("model", "ema"):
        path = f"step_00000009/{name}.safetensors"
        assert (copy / path).read_bytes() == (tmp_path / "folder" / path).read_bytes()
    lines = lines_in(url, tmp_path, METRICS_NAME)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["attempt"] for line in lines] == [0] * 4 + [1] * 5, "it went back to step 4"
    events = [line["event"] for line in lines_in(url, tmp_path, TIMELINE_NAME)]
    assert events.count("restored") == 2


def test_a_copy_of_another_time_does_not_count(url: str, tmp_path: Path):
    """The bucket decides: a checkpoint that it does not have, whole as it may be, is deleted."""
    with pytest.raises(RuntimeError):
        train_line(url, tmp_path / "scratch", objective=failing_at(7))
    storage = storage_of(url)
    storage.delete("step_00000006")
    mirror = mirror_of(url, str(tmp_path / "scratch"), NODE)
    assert (mirror.folder / "step_00000006").is_dir()
    (mirror.folder / "snapshot_images.txt").write_text("of another run\n")
    mirror.pull()
    assert not (mirror.folder / "step_00000006").exists()
    assert not (mirror.folder / "snapshot_images.txt").exists()

    # ... and one whose fragments were damaged in the bucket is passed over
    name = "step_00000004/fragments/rank_0000.safetensors"
    assert name in storage.find()
    storage.replace(name, storage.read(name)[:-4] + b"\x00\x01\x02\x03")
    (mirror.folder / name).unlink()
    with pytest.warns(UserWarning, match="digest differs"):
        mirror.pull()


def test_launch_takes_a_url(
    url: str, tmp_path: Path, write_data: Callable[..., Path], capsys: pytest.CaptureFixture
):
    data = write_data(tmp_path / "data", num_shards=2, samples_per_shard=10)
    settings = TrainConfig.of(**HERE, num_steps=4, checkpoint_every=2, global_batch_size=4)
    config = prior_run(data, Path("x"), train=settings, scratch=str(tmp_path / "scratch"))
    assert launch(config, url, BUILD, "prior") == 0
    assert launch(config, url, BUILD, "prior") == 0
    assert f"{url}: finished already" in capsys.readouterr().out
    names = objects(url)
    assert {"config.yaml", "code.json", "final.json", "step_00000004/MODEL_CARD.md"} <= names
    assert not [name for name in names if name.startswith(("errors/", "stop", "parts/samples"))]

    assert not list((tmp_path / "scratch").rglob("*.*")), "the copy is gone"
    runs = RunsFolder(url.rpartition("/")[0])
    info = runs.read("line")
    assert (info.state, info.kind) == ("finished", "prior diffusion")
    assert info.records["last"]["step"] == 4

    # Another configuration, another folder; a longer run; over again
    here = {"scratch": config.scratch}
    other = prior_run(data, Path("x"), train=with_options(settings, seed=1), **here)
    with pytest.raises(ValueError, match="train.seed: found 0 in the run, expected 1"):
        launch(other, url, BUILD, "prior")
    storage_of(f"{url}_other").replace("notes.txt", b"mine")
    with pytest.raises(ValueError, match=r"found notes.txt without config.yaml, expected a run"):
        launch(config, f"{url}_other", BUILD, "prior")
    longer = prior_run(data, Path("x"), train=with_options(settings, num_steps=6), **here)
    assert launch(longer, url, BUILD, "prior") == 0
    assert {"step_00000006/ema.safetensors", "final.json"} <= objects(url)
    fresh = prior_run(data, Path("x"), train=with_options(settings, seed=1), fresh=True, **here)
    assert launch(fresh, url, BUILD, "prior") == 0
    assert "step_00000006/ema.safetensors" not in objects(url)
    assert [line["step"] for line in lines_in(url, tmp_path, METRICS_NAME)] == [1, 2, 3, 4]

    # It is sampled and continued from by its URL
    from models.convert.runs import load_model

    _, stored = load_model(url, "prior")
    assert stored["kind"] == "diffusion_prior"


def test_a_stop_in_the_bucket_stops_at_a_checkpoint(url: str, tmp_path: Path):
    long = with_options(STEPS, num_steps=2000, checkpoint_every=1000)
    storage, states = storage_of(url), []

    def ask(model: Any, batch: Any) -> dict:
        if not asked.is_set():
            asked.set()
            states.append(RunsFolder(url.rpartition("/")[0]).read("line").state)
            storage.replace("stop", b"")
        time.sleep(0.005)
        return squared_error(model, batch)

    asked = threading.Event()
    train_line(url, tmp_path / "scratch", long, objective=ask)
    assert "final.json" not in objects(url)
    assert [name for name in objects(url) if name.endswith("state.json")]
    states.append(RunsFolder(url.rpartition("/")[0]).read("line").state)
    assert states == ["running", "stopped"]


# -- leases ----------------------------------------------------------------------------------------


def test_one_launch_holds_a_run(url: str, tmp_path: Path):
    """Another is refused, and is among the run's incidents."""
    storage = storage_of(url)
    first = Lease.acquire(storage, url)
    first.require()
    alive = threading.Event()

    def live() -> None:
        while not alive.wait(0.05):
            first.show_life()

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(ValueError, match="another process trains here: process"):
        Lease.acquire(storage, url)
    with pytest.raises(ValueError, match="another process"), mirror_of(url, "", NODE).leased():
        pytest.fail("held twice")
    alive.set()
    thread.join()
    (line,) = lines_in(url, tmp_path, INCIDENTS_NAME)
    assert line["kind"] == "refused" and f"process {os.getpid()}" in line["message"]
    second = Lease.acquire(storage, url)  # which waits for a silent one
    assert second.token == first.token + 1
    with pytest.raises(LeaseLostError, match="found the lease 2, expected 1"):
        first.require()
    second.release()
    began = time.monotonic()
    assert Lease.acquire(storage, url).token == 3 and time.monotonic() - began < 0.4


def test_a_launch_that_was_taken_for_dead_writes_no_checkpoint(url: str, tmp_path: Path):
    taken = threading.Event()

    def loses(model: Any, batch: Any) -> dict:
        if not taken.is_set():
            taken.set()
            storage_of(url).create("lease/000002", b"process 7 of elsewhere")
        return squared_error(model, batch)

    with pytest.raises(LeaseLostError, match="another launch has taken this run over"):
        train_line(url, tmp_path / "scratch", objective=loses)
    assert not [name for name in objects(url) if name.startswith("step_")]


def test_what_was_cut_off_while_it_wrote_overwrites_nothing_of_its_successor(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The write is tried again, but the run has been taken over meanwhile."""
    mirror, storage, name = mirror_of(url, str(tmp_path), NODE), storage_of(url), "step_1/part"
    path = mirror.folder / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"of the dead")

    def fails(*_: object) -> None:
        monkeypatch.undo()
        storage.create("lease/000002", b"process 7 of elsewhere")
        storage.replace(name, b"of the living")
        raise ConnectionError("no route")

    with mirror.leased():
        monkeypatch.setattr(type(storage), "put", fails)
        with pytest.warns(UserWarning, match="no route"), pytest.raises(LeaseLostError):
            mirror.push(path)
    assert storage.read(name) == b"of the living"


def test_an_earlier_group_of_workers_of_the_same_launch_writes_no_more(url: str, tmp_path: Path):
    with mirror_of(url, str(tmp_path), NODE).leased():
        groups = [mirror_of(url, str(tmp_path), NODE, token=1) for _ in range(2)]
        for group in groups:
            group.join_group(group.name_group())
        path = groups[0].folder / "step_1"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
        groups[1].push(path)
        with pytest.raises(LeaseLostError, match="another group of workers"):
            groups[0].push(path)


# -- copies ----------------------------------------------------------------------------------------


def test_a_checkpoint_waits_until_other_ranks_parts_are_in_the_bucket(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On one machine the others' files are there before they are uploaded."""
    monkeypatch.setattr("training.checkpoints.checkpointer.AWAIT_SECONDS", 0.3)
    mirror, storage = mirror_of(url, str(tmp_path), NODE), storage_of(url)
    folder = mirror.folder / "step_00000002"
    for rank in range(2):
        record_path(folder, rank).parent.mkdir(parents=True, exist_ok=True)
        record_path(folder, rank).write_text('{"world_size": 2}')
        fragment_path(folder, rank).write_bytes(b"x")
    names = [f"step_00000002/fragments/rank_{rank:04d}.json" for rank in range(2)]
    storage.replace(names[0], b"{}")
    with pytest.raises(OSError, match="found no record of rank 1 in"):
        await_ranks(folder, mirror)
    storage.replace(names[1], b"{}")
    await_ranks(folder, mirror)


def test_only_the_process_that_keeps_a_copy_pushes_the_rest_of_it(url: str, tmp_path: Path):
    first, second = (mirror_of(url, str(tmp_path), NODE, token=1) for _ in range(2))
    storage_of(url).create("lease/000001", b"")
    storage_of(url).replace("config.yaml", b"train: {}")
    first.pull()
    add_line(first.folder / METRICS_NAME, {"step": 1})
    path = first.folder / "step_00000001" / "part"
    path.parent.mkdir()
    path.write_bytes(b"x")
    second.push(path)
    assert lines_in(url, tmp_path, METRICS_NAME) == []
    first.push()
    assert lines_in(url, tmp_path, METRICS_NAME) == [{"step": 1}]


def test_a_copy_is_made_of_whatever_a_kill_has_left(url: str, tmp_path: Path):
    """A log of samples, a fragment without its record, averages that were not uploaded."""
    storage, mirror = storage_of(url), mirror_of(url, str(tmp_path), NODE)
    storage.replace("config.yaml", b"train: {}")
    storage.replace("parts/samples/rank_0000.jsonl/1_x", b'{"step": 1}\n')
    storage.replace("step_00000004/fragments/rank_0003.safetensors", b"half")
    storage.replace("ema_snapshots/step_00000002/fragments/rank_0000.json", b"{}")
    averages = [mirror.folder / "ema_snapshots" / f"step_0000000{n}" / "x" for n in (3, 4)]
    fragment = mirror.folder / "step_00000004" / "fragments" / "rank_0003.safetensors"
    for path in (*averages, fragment):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    storage.replace("ema_snapshots/step_00000004/x", b"x")
    (mirror.folder / "config.yaml").write_text("train: {}")
    with pytest.warns(UserWarning, match="found the records of 0 ranks"):
        mirror.pull()
    assert read_lines(mirror.folder / "samples" / "rank_0000.jsonl") == [{"step": 1}]
    assert [path.is_file() for path in averages] == [False, True]


def test_parts_of_a_larger_group_that_was_killed_do_not_stay(url: str, tmp_path: Path):
    storage, name = storage_of(url), "step_00000006/fragments/rank_0007"
    storage.replace("config.yaml", b"train: {}")
    for left in (f"{name}.safetensors", f"ema_snapshots/{name}.json"):
        storage.replace(left, b"{}")
    steps = with_options(STEPS, power_ema=(0.1,), snapshot_every=6, num_steps=7)
    with pytest.warns(UserWarning, match="found the records of 0 ranks"):
        train_line(url, tmp_path / "scratch", steps)
    assert "final.json" in objects(url)
    assert not [left for left in objects(url) if "rank_0007" in left]


def test_a_launch_that_was_killed_at_its_first_file_can_be_repeated(url: str, tmp_path: Path):
    storage = storage_of(url)
    for name in ("code.json", "watch.jsonl", "parts/timeline.jsonl/1_x"):
        storage.replace(name, b"{}")
    train_line(url, tmp_path / "scratch", with_options(STEPS, num_steps=2))
    assert "final.json" in objects(url)


# -- files of lines --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_files_of_lines_in_parts_are_those_that_were_written(
    url: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
):
    """A writer whose run goes back now and then, another process that appends, and readers."""
    monkeypatch.setattr("training.bucket.log_parts.MOST_PARTS", 5)
    draw, storage = random.Random(seed), storage_of(url)
    folders = {name: tmp_path / name for name in ("rank", "driver", "late")}
    for folder in folders.values():
        folder.mkdir()
    logs = {n: LogParts(storage, folders[n], METRICS_NAME, n) for n in ("rank", "driver")}
    path, count = folders["rank"] / METRICS_NAME, itertools.count()
    for _ in range(120):
        action = draw.choice(["add", "add", "add", "push", "push", "back", "collect", "driver"])
        if action == "add":
            add_line(path, {"step": next(count)})
        elif action == "back" and path.is_file():
            kept = read_lines(path)[: draw.randint(0, 30)]
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            part.replace(path)
        elif action == "collect":
            logs["driver"].push()
            logs["driver"].collect()
        elif action == "push":
            logs["rank"].push()
    logs["rank"].push()
    logs["driver"].collect()
    expected = read_lines(path)
    late = LogParts(storage, folders["late"], METRICS_NAME, "late")
    late.pull()
    assert read_lines(folders["late"] / METRICS_NAME) == expected
    assert read_lines(folders["driver"] / METRICS_NAME) == expected
    assert len(storage.names(f"parts/{METRICS_NAME}")) <= 7


def test_a_file_that_could_not_be_replaced_is_replaced_later(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    storage, path = storage_of(url), tmp_path / METRICS_NAME
    log = LogParts(storage, tmp_path, METRICS_NAME, "rank")
    for step in range(10):
        add_line(path, {"step": step})
    log.push()
    part = tmp_path / "part"
    part.write_text('{"step": 0}\n')
    part.replace(path)
    for step in range(20, 40):
        add_line(path, {"step": step})
    with monkeypatch.context() as patch:
        patch.setattr(type(storage), "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            log.push()
    log.push()
    (tmp_path / "late").mkdir()
    assert [each["step"] for each in lines_in(url, tmp_path / "late", METRICS_NAME)] == [
        0, *range(20, 40),
    ]  # fmt: skip


def test_two_processes_write_to_one_file(url: str, tmp_path: Path):
    storage, names = storage_of(url), ("driver", "node")
    for name in names:
        (tmp_path / name).mkdir()
    logs = {n: LogParts(storage, tmp_path / n, TIMELINE_NAME, n) for n in names}
    for number in range(20):
        name = names[number % 2]
        add_line(tmp_path / name / TIMELINE_NAME, {"event": name, "number": number})
        logs[name].push()
        logs["driver"].collect()
    found = read_lines(tmp_path / "driver" / TIMELINE_NAME)
    assert [line["number"] for line in found] == list(range(20))
    assert lines_in(url, tmp_path, TIMELINE_NAME) == found
    assert len(read_lines(tmp_path / "node" / TIMELINE_NAME)) == 10
