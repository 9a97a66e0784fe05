"""Checkpoints are written beside the steps: the same bits, one at a time, and no error is lost."""

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _line import CONFIG, network, run, squared_error
from safetensors.torch import load_file

from cluster.base.cli import with_options
from cluster.base.run_dir import step_folder
from training.checkpoints import checkpoint
from training.checkpoints.records import Progress, records
from training.checkpoints.writer import Writer
from training.engine.ema import Averages
from training.engine.engines import PlainEngine
from training.runs.reporting import Reporter


def files(folder: Path) -> dict[str, bytes]:
    """What a run leaves on disk, but for its clocks."""
    told = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in told
            if path.suffix in (".safetensors", ".json")}  # fmt: skip


def test_what_is_written_beside_the_steps_is_what_is_written_between_them(tmp_path: Path):
    config = with_options(CONFIG, checkpoint_every=2, keep_checkpoints=2)
    for name, beside in (("beside", True), ("between", False)):
        run(tmp_path / name, with_options(config, async_checkpoints=beside))
    found = files(tmp_path / "beside")
    assert found == files(tmp_path / "between")
    assert {name.split("/")[0] for name in found} >= {"step_00000006", "step_00000007"}


def test_a_checkpoint_is_of_its_step_however_late_it_is_written(tmp_path: Path):
    """Training goes on before the write has begun, and moves every tensor of it."""
    model = network()
    engine = PlainEngine(model, squared_error, CONFIG, torch.device("cpu"))
    averages = Averages(engine.fragments(), 0.9, (0.1,))
    averages.update(0, 0)
    write = checkpoint.capture(tmp_path, engine, averages, Progress(step=1), {"kind": "line"})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        shadows = [shadow for each in averages.by_fragment() for shadow in each.values()]
        for tensor in (*model.parameters(), *shadows):
            tensor.add_(1.0)
        for state in engine.optimizer.state.values():
            for value in state.values():
                value.add_(1.0)
    folder = write()
    exported = load_file(str(folder / "model.safetensors"))
    for name, value in before.items():
        assert torch.equal(exported[name], value)
    stored = load_file(str(folder / "fragments" / "rank_0000.safetensors"))
    assert torch.equal(stored["ema/weight/0"], before["weight"].flatten())
    assert not stored["exp_avg/weight/0"].any()
    found = records(folder)
    assert found is not None and found[0].optimizer_step == 0


def test_copies_are_made_in_the_memory_of_those_before(tmp_path: Path):
    """Each checkpoint has the bits of its own step; a tensor of another size gets room of its own,
    and what is not there any more is not written."""
    copies = checkpoint.Copies()
    first = copies.of([("a", torch.ones(3)), ("b", torch.zeros(2))])
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    second = copies.of([("a", torch.full((3,), 2.0)), ("b", torch.full((5,), 3.0))])
    assert second["a"].tolist() == [2.0] * 3 and second["b"].tolist() == [3.0] * 5
    assert second["a"].data_ptr() == places["a"]
    assert copies.of([("a", torch.ones(3, dtype=torch.int64))])["a"].dtype == torch.int64

    model = network()
    engine = PlainEngine(model, squared_error, CONFIG, torch.device("cpu"))
    averages = Averages(engine.fragments(), 0.9, ())
    for step in (1, 2):
        with torch.no_grad():
            model.get_parameter("weight").fill_(step)
        checkpoint.capture(tmp_path, engine, averages, Progress(step=step), {}, copies)()
    for step in (1, 2):
        stored = load_file(str(step_folder(tmp_path, step) / "model.safetensors"))
        assert stored["weight"].item() == step


def held(gate: threading.Event, done: list[str], name: str) -> Callable[[], Callable[[], None]]:
    """A write that waits for `gate`; its capture says so as well."""

    def write() -> None:
        assert gate.wait(10)
        done.append(f"wrote {name}")

    def capture() -> Callable[[], None]:
        done.append(f"captured {name}")
        return write

    return capture


def test_one_write_at_a_time_and_no_copy_before_the_last_is_written():
    gate, done = threading.Event(), []
    writer = Writer(beside=True)
    writer.begin(held(gate, done, "a"))
    assert done == ["captured a"], "the steps go on while it writes"
    threading.Timer(0.2, gate.set).start()
    writer.begin(held(gate, done, "b"))
    assert done[:3] == ["captured a", "wrote a", "captured b"]
    writer.finish()
    assert done[-1] == "wrote b"
    writer.finish()


@pytest.mark.parametrize("beside", [True, False])
def test_a_write_that_fails_is_told_by_the_next_call(beside: bool):
    writer = Writer(beside=beside)

    def full() -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        writer.begin(lambda: full)
        writer.finish()
    writer.begin(lambda: lambda: None)
    writer.finish()


def test_a_run_whose_disk_is_full_says_so_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = with_options(CONFIG, checkpoint_every=2)
    real, calls = checkpoint.save_file, iter(range(10))

    def failing(tensors: dict[str, torch.Tensor], path: str) -> None:
        if next(calls) == 1:
            raise OSError("no space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", failing)
    with pytest.raises(OSError, match="no space left"):
        run(tmp_path / "full", config)
    assert records(step_folder(tmp_path / "full", 2)) is not None
    monkeypatch.undo()
    whole, _ = run(tmp_path / "whole", config)
    mended, _ = run(tmp_path / "full", config)
    assert torch.equal(whole.get_parameter("weight"), mended.get_parameter("weight"))


def test_the_first_rank_waits_for_the_parts_of_all(tmp_path: Path):
    """Of two ranks the second writes late: the export is of both."""
    engines: list[Any] = []
    for rank in range(2):
        engine: Any = PlainEngine(network(), squared_error, CONFIG, torch.device("cpu"))
        mine = engine.fragments()[rank : rank + 1]
        engine.rank, engine.fragments = rank, lambda mine=mine: mine
        engines.append(engine)
    writes = []
    for engine in engines:
        averages = Averages(engine.fragments(), 0.9, ())
        engine.world_size = 1  # no process group to wait in
        write = checkpoint.capture(tmp_path, engine, averages, Progress(step=1), {"kind": "line"})
        writes.append(write)
    for engine in engines:
        engine.world_size = 2
    thread = threading.Thread(target=writes[0])
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive() and not (tmp_path / "step_00000001" / "model.safetensors").exists()
    writes[1]()
    thread.join(10)
    exported = load_file(str(tmp_path / "step_00000001" / "model.safetensors"))
    expected = network().state_dict()
    assert all(torch.equal(exported[name], value) for name, value in expected.items())


def test_a_checkpoint_that_fewer_ranks_wrote_is_exported_without_waiting_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run killed between its fragments and its weights, and continued by a larger group."""
    engine: Any = PlainEngine(network(), squared_error, CONFIG, torch.device("cpu"))
    averages = Averages(engine.fragments(), 0.9, ())
    save = partial(checkpoint.capture, tmp_path, engine, averages, Progress(step=1), {"kind": "x"})
    folder = save()()
    for name in (checkpoint.STATE_NAME, "ema.safetensors", "model.safetensors"):
        (folder / name).unlink()
    assert not checkpoint.is_exported(folder)
    write = save()
    engine.world_size = 3
    monkeypatch.setattr(checkpoint, "AWAIT_SECONDS", 0)
    write()
    assert checkpoint.is_exported(folder) and (folder / "ema.safetensors").is_file()


def test_waiting_for_a_slow_disk_is_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a step may take is limited; what a checkpoint takes that is to be judged is not."""
    phases = ["start"]
    monkeypatch.setattr(Reporter, "enters", lambda self, step, phase: phases.append(phase))
    finish, waits = Writer.finish, list[str]()

    def finishing(self: Writer) -> None:
        if not self.idle:
            waits.append(phases[-1])
        finish(self)

    whole = checkpoint._await_ranks

    def slowly(folder: Path) -> None:
        time.sleep(0.2)
        whole(folder)

    monkeypatch.setattr(Writer, "finish", finishing)
    monkeypatch.setattr(checkpoint, "_await_ranks", slowly)
    config = with_options(CONFIG, checkpoint_every=1)
    run(tmp_path, config, validate=lambda folder: {"loss": 0.0})
    assert waits and set(waits) == {"checkpoint"}


def test_steps_go_on_while_a_checkpoint_that_is_to_be_judged_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The write of step 2 lasts until step 4 is done; it is judged before the next one is begun,
    and each once."""
    gate, order = threading.Event(), list[str]()
    whole = checkpoint._await_ranks

    def held_up(folder: Path) -> None:
        assert gate.wait(30)
        whole(folder)

    monkeypatch.setattr(checkpoint, "_await_ranks", held_up)

    def objective(model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        order.append("step")
        if order.count("step") == 4:
            gate.set()
        return squared_error(model, batch)

    def judged(folder: Path) -> None:
        assert records(folder) is not None
        order.append(folder.name)

    config = with_options(CONFIG, checkpoint_every=2)
    run(tmp_path / "run", config, objective, hand_over=judged)
    assert [each for each in order if each != "step"] == [
        f"step_{step:08d}" for step in (2, 4, 6, 7)
    ]
    assert order.index("step_00000002") >= 4  # steps 3 and 4 were taken meanwhile
