"""Laws of lanes: order across them, and an early end."""

import threading
from pathlib import Path

import pytest
from _prometheus import wait_for

from cluster import lanes
from cluster.base.run_dir import STOP_NAME
from cluster.lanes import Command, run_lanes


def lane(*names: str, **needs: str) -> list[Command]:
    return [
        Command(name=name, script="", arguments=(), num_images=0,
                needs=(needs[name],) if name in needs else ())
        for name in names
    ]  # fmt: skip


def test_a_command_waits_for_those_of_another_lane_that_it_needs(tmp_path: Path):
    """Both lanes run at once, and "base" after "embed train" whatever the order of the lanes."""
    ran: list[str] = []
    together = threading.Barrier(2, timeout=60)

    def run_command(command: Command) -> int:
        if command.name in ("up", "clip"):
            together.wait()
        ran.append(command.name)
        return 0

    both = [lane("up", "base", base="embed train"), lane("clip", "embed train", "prior")]
    assert run_lanes(both, tmp_path, run_command) == 0
    assert sorted(ran) == ["base", "clip", "embed train", "prior", "up"]
    assert ran.index("base") > ran.index("embed train")


@pytest.mark.parametrize("fault", [None, ValueError("no such file")])
def test_a_lane_that_ends_early_stops_the_training_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception | None
):
    """CLIP is left incomplete, or raises, while "up" trains: that is asked to stop, and nothing
    waits for embeddings that do not come."""
    (tmp_path / "up").mkdir()
    training, stop = threading.Event(), tmp_path / "up" / STOP_NAME

    def run_command(command: Command) -> int:
        if command.name == "up":
            training.set()
            for _asked in range(2):  # what is asked while the run is being launched is forgotten
                wait_for(stop.exists, "the request to stop", 60)
                stop.unlink()
            return 1
        assert command.name == "clip" and training.wait(60)
        if fault is not None:
            raise fault
        return 1

    monkeypatch.setattr(lanes, "ASK_SECONDS", 0.01)
    both = [lane("up", "base", base="embed train"), lane("clip", "embed train", "prior")]
    if fault is None:
        assert run_lanes(both, tmp_path, run_command) == 1
        return
    with pytest.raises(ValueError, match="no such file"):
        run_lanes(both, tmp_path, run_command)
