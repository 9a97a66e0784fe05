"""Checkpoints are written beside the steps: the same bits, one at a time, and no error is lost."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from _line import CONFIG, network, run, squared_error
from safetensors.torch import load_file

from cluster.base.cli import with_options
from cluster.base.run_dir import STATE_NAME, fragment_path, step_folder
from training.bucket.mirror import Mirror
from training.checkpoints import checkpointer
from training.checkpoints.checkpointer import Checkpointer, Writer
from training.checkpoints.records import Progress, valid_records
from training.engine.ema import Ema
from training.engine.engines import PlainEngine
from training.runs.reporting import Reporter


def files(folder: Path) -> dict[str, bytes]:
    """What a run leaves on disk, but for its clocks."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths
            if path.suffix in (".safetensors", ".json")}  # fmt: skip


def plain(run: Path, asynchronous: bool = False) -> tuple[Any, Ema, Checkpointer]:
    """The line's engine, its averages, and what saves both to a run."""
    engine = PlainEngine(network(), squared_error, CONFIG, torch.device("cpu"))
    averages = Ema(engine.fragments(), 0.9, (0.1,))
    config = with_options(CONFIG, async_checkpoints=asynchronous, keep_checkpoints=9)
    return engine, averages, Checkpointer(Mirror(run), engine, averages, {"kind": "line"}, config)


def test_what_is_written_beside_the_steps_is_what_is_written_between_them(tmp_path: Path):
    config = with_options(CONFIG, checkpoint_every=2, keep_checkpoints=2)
    for name, beside in (("beside", True), ("between", False)):
        run(tmp_path / name, with_options(config, async_checkpoints=beside))
    found = files(tmp_path / "beside")
    assert found == files(tmp_path / "between")
    assert {name.split("/")[0] for name in found} >= {"step_00000006", "step_00000007"}


def test_a_checkpoint_is_of_its_step_however_late_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Training continues before the write has begun, and moves every tensor of it."""
    gate, save_file = threading.Event(), checkpointer.save_file

    def late(tensors: dict[str, torch.Tensor], path: str) -> None:
        assert gate.wait(10)
        save_file(tensors, path)

    monkeypatch.setattr(checkpointer, "save_file", late)
    engine, averages, checkpoints = plain(tmp_path, asynchronous=True)
    averages.update(0, 0)
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    checkpoints.save(Progress(step=1))
    with torch.no_grad():
        shadows = [shadow for each in averages.by_fragment() for shadow in each.values()]
        states = [value for state in engine.optimizer.state.values() for value in state.values()]
        for tensor in (*engine.model.parameters(), *shadows, *states):
            tensor.add_(1.0)
    assert not checkpoints.idle
    gate.set()
    checkpoints.wait()
    folder = step_folder(tmp_path, 1)
    exported = load_file(str(folder / "model.safetensors"))
    assert all(torch.equal(exported[name], value) for name, value in before.items())
    stored = load_file(str(fragment_path(folder, 0)))
    assert torch.equal(stored["ema/weight/0"], before["weight"].flatten())
    assert not stored["exp_avg/weight/0"].any()
    records = valid_records(folder)
    assert records is not None and records[0].optimizer_step == 0


def test_each_checkpoint_has_the_bits_of_its_own_step(tmp_path: Path):
    """Copies are made in the memory of those before."""
    engine, _, checkpoints = plain(tmp_path, asynchronous=True)
    for step in (1, 2, 3):
        with torch.no_grad():
            engine.model.get_parameter("weight").fill_(step)
        checkpoints.save(Progress(step=step))
    checkpoints.wait()
    for step in (1, 2, 3):
        stored = load_file(str(step_folder(tmp_path, step) / "model.safetensors"))
        assert stored["weight"].item() == step


def test_one_write_at_a_time():
    gate, done = threading.Event(), list[str]()

    def held() -> None:
        assert gate.wait(10)
        done.append("first")

    writer = Writer(asynchronous=True)
    writer.start(held)
    assert not done and not writer.idle, "the steps continue while it writes"
    threading.Timer(0.2, gate.set).start()
    writer.start(lambda: done.append("second"))
    assert done[0] == "first"
    writer.wait()
    assert done == ["first", "second"] and writer.idle


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_write_that_fails_is_raised_by_the_next_call(asynchronous: bool):
    writer = Writer(asynchronous=asynchronous)

    def full() -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        writer.start(full)
        writer.wait()
    writer.start(lambda: None)
    writer.wait()


def test_the_first_rank_waits_for_the_fragments_of_all(tmp_path: Path):
    """Of two ranks the second writes late: the export is of both."""
    both = []
    for rank in range(2):
        engine: Any = PlainEngine(network(), squared_error, CONFIG, torch.device("cpu"))
        own = engine.fragments()[rank : rank + 1]
        engine.rank, engine.world_size, engine.fragments = rank, 2, lambda own=own: own
        averages = Ema(own, 0.9, ())
        checkpoints = Checkpointer(Mirror(tmp_path), engine, averages, {"kind": "line"}, CONFIG)
        both.append(checkpoints)
    with pytest.MonkeyPatch.context() as patch:  # no process group to meet in
        patch.setattr(checkpointer, "from_first_rank", lambda engine, value: value)
        both[0].save(Progress(step=1))
        time.sleep(0.2)
        assert not both[0].idle and not (tmp_path / "step_00000001" / STATE_NAME).exists()
        patch.setattr(checkpointer.shutil, "rmtree", lambda path: None)
        both[1].save(Progress(step=1))
    for each in both:
        each.wait()
    exported = load_file(str(tmp_path / "step_00000001" / "model.safetensors"))
    expected = network().state_dict()
    assert all(torch.equal(exported[name], value) for name, value in expected.items())


def test_a_checkpoint_that_fewer_ranks_wrote_is_exported_without_waiting_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run killed between its fragments and its weights, and continued by a larger group."""
    engine, _, checkpoints = plain(tmp_path)
    checkpoints.save(Progress(step=1))
    folder = step_folder(tmp_path, 1)
    for name in (STATE_NAME, "ema.safetensors", "model.safetensors"):
        (folder / name).unlink()
    engine.world_size = 3
    monkeypatch.setattr(checkpointer, "from_first_rank", lambda engine, value: value)
    monkeypatch.setattr(checkpointer, "AWAIT_SECONDS", 0)
    checkpoints.save(Progress(step=1))
    assert (folder / STATE_NAME).is_file() and (folder / "ema.safetensors").is_file()


def test_waiting_for_a_slow_disk_is_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a step may take is limited; what a checkpoint takes that is to be validated is not."""
    phases = ["start"]
    monkeypatch.setattr(Reporter, "enters", lambda self, step, phase: phases.append(phase))
    wait, waits = Writer.wait, list[str]()

    def waiting(self: Writer) -> None:
        if not self.idle:
            waits.append(phases[-1])
        wait(self)

    await_ranks = checkpointer.await_ranks

    def slowly(folder: Path, mirror: Mirror) -> None:
        time.sleep(0.2)
        await_ranks(folder, mirror)

    monkeypatch.setattr(Writer, "wait", waiting)
    monkeypatch.setattr(checkpointer, "await_ranks", slowly)
    config = with_options(CONFIG, checkpoint_every=1)
    run(tmp_path, config, validate=lambda folder: {"loss": 0.0})
    assert waits and set(waits) == {"checkpoint"}


def test_steps_go_on_while_a_checkpoint_that_is_to_be_validated_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The write of step 2 lasts until step 4 is done; it is validated before the next one is begun,
    and each once."""
    gate, order = threading.Event(), list[str]()
    await_ranks = checkpointer.await_ranks

    def held_up(folder: Path, mirror: Mirror) -> None:
        assert gate.wait(30)
        await_ranks(folder, mirror)

    monkeypatch.setattr(checkpointer, "await_ranks", held_up)

    def objective(model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        order.append("step")
        if order.count("step") == 4:
            gate.set()
        return squared_error(model, batch)

    def validated(folder: Path) -> None:
        assert valid_records(folder) is not None
        order.append(folder.name)

    config = with_options(CONFIG, checkpoint_every=2)
    run(tmp_path / "run", config, objective, on_checkpoint=validated)
    assert [each for each in order if each != "step"] == [
        f"step_{step:08d}" for step in (2, 4, 6, 7)
    ]
    assert order.index("step_00000002") >= 4  # steps 3 and 4 were taken meanwhile
