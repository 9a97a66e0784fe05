"""Laws of the timings: what was needed is added up once, what is finished stays."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.base import timings
from cluster.base.timings import Timings


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that each further look at the clock is later than the one before."""
    steps, now = [], [0.0]

    def look() -> float:
        now[0] += steps.pop(0)
        return now[0]

    monkeypatch.setattr(timings.time, "perf_counter", look)
    monkeypatch.setattr(timings.time, "time", lambda: now[0])
    return steps


def attempted(path: Path, *, done: bool = True, fault: type[BaseException] | None = None) -> dict:
    """Attempt the stage "prior" of 100 images in a new process, as it were; returns its row."""
    with Timings(path).attempt("prior", "python training/prior.py", 100) as attempt:
        if fault:
            raise fault
        attempt.done = done
    return row(path)


def row(path: Path) -> dict[str, Any]:
    (found,) = json.loads(path.read_text())
    return found


def test_the_seconds_of_all_attempts_are_the_stages(clock: list[float], tmp_path: Path):
    """One that raises, one that is interrupted, one that is incomplete, one that ends."""
    path = tmp_path / "timings.json"
    clock += [0, 10, 0, 20, 0, 5, 0, 15]
    for fault in (ValueError, KeyboardInterrupt):
        with pytest.raises(fault):
            attempted(path, fault=fault)
    assert (row(path)["seconds"], row(path)["done"]) == (30, False)
    assert not attempted(path, done=False)["done"]
    found = attempted(path)
    assert (found["seconds"], found["images_per_second"], found["done"]) == (50, 2, True)


def test_a_finished_stage_keeps_its_row(clock: list[float], tmp_path: Path):
    path = tmp_path / "timings.json"
    clock += [0, 10, 0, 5]
    attempted(path)
    before = path.read_bytes()
    attempted(path)
    with pytest.raises(ValueError):
        attempted(path, fault=ValueError)
    assert path.read_bytes() == before


def test_rows_stand_in_the_order_in_which_stages_end(clock: list[float], tmp_path: Path):
    clock += [0, 1] * 3
    kept = Timings(tmp_path / "timings.json")
    for stage, done in (("download train", False), ("clip", True), ("download train", True)):
        with kept.attempt(stage) as attempt:
            attempt.done = done
    again = Timings(tmp_path / "timings.json").rows
    assert again == kept.rows
    assert [found["stage"] for found in again] == ["clip", "download train"]
    assert again[0]["images_per_second"] is None


def test_the_time_left_follows_the_pace_of_this_machine(clock: list[float], tmp_path: Path):
    """A machine half as fast as usual is believed more with every stage; the done ones are not
    announced again."""
    usual = {"pairs": 30.0, "clip": 100.0, "prior": 370.0}
    kept = Timings(tmp_path / "timings.json", usual)
    assert kept.outlook("pairs") == "stage 1 of 3: pairs, 0 s gone, about 8 min left"
    left = []
    for stage, following in (("pairs", "clip"), ("clip", "prior")):
        clock += [0, 2 * usual[stage]]
        with kept.attempt(stage) as attempt:
            attempt.done = True
        left.append(kept.outlook(following))
    assert left == [
        "stage 2 of 3: clip, 60 s gone, about 12 min left",
        "stage 3 of 3: prior, 4 min gone, about 11 min left",
    ]
    assert kept.outlook("clip") == kept.outlook("another") == ""


def test_the_metric_is_the_sum_over_the_parts_of_a_stage(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from cluster.base import metrics

    clock += [0, 1, 0, 2, 0, 4]
    said: dict[str, float] = {}

    class Gauge:
        def set(self, value: float, *, stage: str) -> None:
            said[stage] = value

    monkeypatch.setattr(metrics, "gauge", lambda name: Gauge())
    kept = Timings(tmp_path / "timings.json")
    for stage, done in (("embed train", True), ("embed test", True), ("prior", False)):
        with kept.attempt(stage) as attempt:
            attempt.done = done
    assert said == {"embed": 3}


def test_what_ran_side_by_side_took_its_time_once(tmp_path: Path):
    """Of two stages the time in which either ran, with a pause between them and the third."""
    path = tmp_path / "timings.json"
    rows = [("clip", 100.0, 150.0), ("up", 30.0, 90.0), ("base", 20.0, 200.0), ("old", 7.0, None)]
    named = [
        {"stage": stage, "seconds": seconds, **({"ended": ended} if ended else {})}
        for stage, seconds, ended in rows
    ]
    path.write_text(json.dumps(named))
    assert Timings(path).elapsed() == 100 + 20 + 7
