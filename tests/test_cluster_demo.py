"""Laws of the demo: what it serves, when it is incomplete, and what it does not do again."""

import io
import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import demo
from cluster.base.timings import Timings
from cluster.demo import Command, DemoConfig
from cluster.demo_data import base_name, drawn_pairs, given_pairs, read_pairs
from ingest.shapes import make_pairs
from ingest.shards import load_snapshot
from training.config import RunConfig

NUM_TRAIN, NUM_TEST = 16, 2


def fail_to_write(*_: object) -> None:
    raise OSError("no space left on device")


def downloaded(run: Path) -> int:
    """Draw a few pairs and download them; returns the exit code."""
    pairs = drawn_pairs(run / "source", NUM_TRAIN, NUM_TEST, seed=0)
    sets = {name: read_pairs(found) for name, found in pairs.items()}
    return demo._download(run, sets, Timings(run / "timings.json"), None)


@pytest.fixture
def taken(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Return a function that takes a port for the rest of the test."""

    def take(port: int) -> None:
        other = socket.create_server(("127.0.0.1", port))
        request.addfinalizer(other.close)

    return take


def test_an_incomplete_download_ends_the_demo_with_1_and_a_rerun_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run = tmp_path / "run"
    monkeypatch.setattr("cluster.base.ray_session.ensure_ray", lambda: None)
    monkeypatch.setattr("cluster.base.ray_session.has_gpus", lambda: False)
    monkeypatch.setattr(demo, "_workers", lambda *_: nullcontext())
    with monkeypatch.context() as patch:
        patch.setattr("ingest.fetching.shard_task.make_shard", fail_to_write)
        assert demo.main(DemoConfig(run=str(run), num_train=NUM_TRAIN, num_test=NUM_TEST)) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{run}: the download of train is incomplete; rerun the same command"
    assert downloaded(run) == 0
    assert load_snapshot(run / "data" / "train" / "images").num_samples == NUM_TRAIN


def test_a_whole_download_needs_its_old_port_no_more(
    tmp_path: Path, taken: Callable, capsys: pytest.CaptureFixture
):
    assert downloaded(tmp_path) == 0
    before = (tmp_path / "timings.json").read_bytes()
    taken(int((tmp_path / "source" / "port").read_text()))
    capsys.readouterr()
    assert downloaded(tmp_path) == 0
    assert capsys.readouterr().out.count("done already") == 2, "the shards are looked at again"
    assert (tmp_path / "timings.json").read_bytes() == before


def test_pending_rows_need_the_old_port(tmp_path: Path, taken: Callable):
    assert downloaded(tmp_path) == 0
    next((tmp_path / "data" / "test" / "images").glob("*.tar")).unlink()
    port = int((tmp_path / "source" / "port").read_text())
    taken(port)
    with pytest.raises(ValueError, match=f"port {port}: found it taken"):
        downloaded(tmp_path)


def test_an_output_is_made_anew_when_what_it_is_made_of_is_newer(tmp_path: Path):
    output, inputs = tmp_path / "scores.json", (tmp_path / "samples.jsonl", tmp_path / "final.json")
    stage = Command(
        name="evaluate", script="", arguments=(), num_images=0, output=output, inputs=inputs
    )

    def write(path: Path, seconds: int) -> None:
        path.touch()
        os.utime(path, (seconds, seconds))

    for path in inputs:
        write(path, 100)
    assert not demo._is_current(stage), "there is none"
    for seconds, current in ((99, False), (100, False), (101, True)):
        write(output, seconds)
        assert demo._is_current(stage) == current, seconds
    write(inputs[1], 102)
    assert not demo._is_current(stage), "one input is newer"


# -- a user's own pairs ----------------------------------------------------------------------------


def columns(count: int = 40) -> dict[str, list[Any]]:
    """Drawn pictures under made-up names, each twice: light and dark."""
    pictures = [pair.image_bytes for pair in make_pairs(count, 0, "train")]
    names = [f"thing {i // 2}: {'light' if i % 2 else 'dark'} skin tone" for i in range(count)]
    return {"image": pictures, "caption": [f"a flat icon of {n}" for n in names], "name": names}


def written(path: Path, content: dict[str, Any]) -> Path:
    pq.write_table(pa.table(content), path)
    return path


def test_every_pair_is_in_one_part_and_variants_stay_together(tmp_path: Path):
    given = columns()
    found = given_pairs(tmp_path, written(tmp_path / "own.parquet", given), 0)
    parts = {name: read_pairs(pairs) for name, pairs in found.items()}
    captions = {name: {row["caption"] for row in rows} for name, rows in parts.items()}
    assert captions["train"] | captions["test"] == set(given["caption"])
    bases = {name: {base_name(caption) for caption in captions[name]} for name in captions}
    assert bases["train"].isdisjoint(bases["test"]) and bases["test"]
    images = dict(zip(given["caption"], given["image"], strict=True))
    assert all(images[row["caption"]] == row["image"] for rows in parts.values() for row in rows)


def test_pairs_of_any_kind_are_adopted_and_a_second_run_continues(tmp_path: Path, capsys):
    """As Hugging Face stores them; the same split as of plain bytes."""
    given = columns()
    images = [{"bytes": image, "path": None} for image in given["image"]]
    source = written(tmp_path / "own.parquet", {**given, "image": images})
    paths = given_pairs(tmp_path / "run" / "source", source, 0)
    plain = given_pairs(tmp_path / "b", written(tmp_path / "b.parquet", given), 0)
    sets = {name: read_pairs(path) for name, path in paths.items()}
    assert sets == {name: read_pairs(path) for name, path in plain.items()}
    for _ in range(2):
        assert demo._adopt(tmp_path / "run", sets, Timings(tmp_path / "timings.json"), None) == 0
    assert capsys.readouterr().out.count("shards, 8 of them done already") >= 1
    for name, rows in sets.items():
        images_folder = tmp_path / "run" / "data" / name / "images"
        assert load_snapshot(images_folder).num_samples == len(rows)


def test_captions_may_be_encoded_as_a_dictionary(tmp_path: Path):
    given = columns()
    plain = given_pairs(tmp_path / "a", written(tmp_path / "a.parquet", given), 0)
    coded = {**given, "caption": pa.array(given["caption"]).dictionary_encode()}
    found = given_pairs(tmp_path / "b", written(tmp_path / "b.parquet", coded), 0)
    assert read_pairs(found["train"]) == read_pairs(plain["train"])


def test_what_was_split_stays(tmp_path: Path):
    source = written(tmp_path / "own.parquet", columns())
    before = read_pairs(given_pairs(tmp_path, source, 0)["test"])
    source.unlink()
    assert read_pairs(given_pairs(tmp_path, source, 0)["test"]) == before


def holed(values: list[Any], row: int, value: Any = None) -> list[Any]:
    return [*values[:row], value, *values[row + 1 :]]


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("caption", lambda v: holed(v, 7), "found no_caption in row own.parquet:7"),
        ("name", lambda v: holed(v, 3), "found no name in row own.parquet:3"),
        ("image", lambda v: holed(v, 0), "found no_image in row own.parquet:0"),
        ("image", lambda v: holed(v, 9, v[9][:99]), "found 99 bytes in row own.parquet:9 .*dec"),
        ("image", lambda v: holed(v, 5, b"no picture"), "found 10 bytes in row own.parquet:5"),
        ("image", lambda v: ["a.png"] * len(v), "no column of image bytes .*image .string."),
        ("caption", lambda v: list(range(len(v))), "column caption: found int64, expected text"),
    ],
)
def test_what_is_no_pair_is_named_in_one_line(
    column: str, change: Callable, message: str, tmp_path: Path
):
    given = columns()
    source = written(tmp_path / "own.parquet", {**given, column: change(given[column])})
    with pytest.raises(ValueError, match=message) as error:
        given_pairs(tmp_path, source, 0)
    assert "\n" not in str(error.value) and str(source) in str(error.value)


def test_pictures_beyond_the_limit_are_not_looked_at(tmp_path: Path):
    given = columns()
    pairs = given_pairs(tmp_path / "a", written(tmp_path / "a.parquet", given), 36)
    used = {row["caption"] for found in pairs.values() for row in read_pairs(found)}
    row = next(i for i, caption in enumerate(given["caption"]) if caption not in used)
    given["image"] = holed(given["image"], row, b"no picture")
    assert len(used) == 36
    given_pairs(tmp_path / "b", written(tmp_path / "b.parquet", given), 36)


def test_pictures_that_are_all_too_small_are_refused_before_anything_is_trained(tmp_path: Path):
    def icons(*sides: int) -> Path:
        given = columns()
        for row, side in enumerate(sides):
            file = io.BytesIO()
            Image.new("RGB", (2 * side, side)).save(file, "PNG")
            given["image"][row] = file.getvalue()
        return written(tmp_path / "own.parquet", given)

    with pytest.raises(ValueError, match="found pictures of 48 px at most, expected 64"):
        given_pairs(tmp_path / "a", icons(*[32] * 39, 48), 0)
    assert len(given_pairs(tmp_path / "b", icons(32), 0)) == 2


def test_two_lanes_want_two_cores_and_memory_for_two_trainings(monkeypatch: pytest.MonkeyPatch):
    commands = demo._commands(DemoConfig(), Path("runs/demo"), {"train": 1, "test": 1})
    commands = [each for each in commands if not each.script.startswith("eval/")]
    monkeypatch.setattr("cluster.base.ray_session.has_gpus", lambda: False)
    for cores, gib, expected in ((2, 24, 2), (1, 24, 1), (2, 3, 1)):
        monkeypatch.setattr("cluster.base.machine.available_cpus", lambda n=cores: n)
        monkeypatch.setattr("cluster.base.machine.total_memory", lambda n=gib: n << 30)
        lanes = demo._lanes(commands)
        assert len(lanes) == expected
        assert sorted(c.name for each in lanes for c in each) == sorted(c.name for c in commands)


@pytest.mark.parametrize(("cores", "in_bf16", "threads"), [
    (2, True, 1), (2, False, None), (16, True, 8), (16, False, 8), (1, True, None),
])  # fmt: skip
def test_lanes_share_the_cores_but_for_two_in_fp32(
    cores: int, in_bf16: bool, threads: int | None, monkeypatch: pytest.MonkeyPatch
):
    commands = demo._commands(DemoConfig(), Path("runs/demo"), {"train": 1, "test": 1})
    commands = [each for each in commands if not each.script.startswith("eval/")]
    monkeypatch.setattr("cluster.base.ray_session.has_gpus", lambda: False)
    monkeypatch.setattr("cluster.base.machine.available_cpus", lambda: cores)
    monkeypatch.setattr("cluster.base.machine.total_memory", lambda: 24 << 30)
    monkeypatch.setattr("training.engine.precision.native_bf16", lambda kind: in_bf16)
    for command in (command for lane in demo._lanes(commands) for command in lane):
        _, config = demo._request(command)  # which the script's own parser reads
        workers = config.train.workers if isinstance(config, RunConfig) else config
        assert getattr(workers, "num_threads") == threads, command  # noqa: B009
