"""A run that is killed at any moment of writing its checkpoints ends as one that never was.

The kills are SIGKILLs that a process gives itself just before or just after one of its calls to the
disk, so the moments are all of them, not those that a clock happens to hit.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.base.jsonl import read_lines

NUM_STEPS = 31
# A process that has imported everything forks a child for each attempt: the child is what dies.
ATTEMPTS = """
import dataclasses, itertools, json, os, shutil, signal, sys
from pathlib import Path
import torch
from _line import CONFIG, run, squared_error
from cluster.base.cli import with_options
from safetensors.torch import load_file
from training.checkpoints import checkpointer
from training.checkpoints import records

folder, beside, moments = Path(sys.argv[1]), sys.argv[2] == "beside", json.loads(sys.argv[3])
config = with_options(
    CONFIG, num_steps=int(sys.argv[4]), checkpoint_every=2, keep_checkpoints=1, power_ema=(0.1,),
    snapshot_every=3, async_checkpoints=beside,
)
NAMES = ("save_file", "digest_file", "write_json", "save_weights", "save_config", "prune")
CALLS = [*((checkpointer, name) for name in NAMES), (records, "digest_file")]


def reported(model, batch):
    with (folder.parent / f"{folder.name}.ids").open("a") as file:
        file.write(json.dumps(batch.keys.tolist()) + chr(10))
    return squared_error(model, batch)


def scored(folder):
    return {"weight": load_file(str(folder / "ema.safetensors"))["weight"].item()}


def dying(module, name, calls, moment):
    real = getattr(module, name)

    def call(*arguments, **more):
        if next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*arguments, **more)
        if next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return call


torch.set_num_threads(1)
run(Path(str(folder) + ".warm"), config)  # what torch imports at its first step, once for all
for moment in [*moments, -1]:
    child = os.fork()
    if child == 0:
        calls = itertools.count()
        for module, name in CALLS:
            setattr(module, name, dying(module, name, calls, moment))
        run(folder, config, reported, validate=scored)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(json.dumps([moment, status]), flush=True)
"""


def attempts(folder: Path, beside: str, moments: list[int]) -> list[tuple[int, int]]:
    """Train in `folder`, killed at each of the moments in turn and then left alone; returns how
    each attempt ended."""
    tests = Path(__file__).parent
    arguments = [str(folder), beside, json.dumps(moments), str(NUM_STEPS)]
    command = [sys.executable, "-c", ATTEMPTS, *arguments]
    environment = {"PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tests.parent, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """Everything that a run leaves but for its clocks and locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors", ".json")
    }


def steps_of(folder: Path) -> list[list[int]]:
    """The keys of the samples of every step of every attempt, as they were trained on."""
    return [json.loads(line) for line in folder.with_suffix(".ids").read_text().splitlines()]


@pytest.mark.parametrize("beside", ["beside", "between"])
def test_killed_at_every_moment_of_a_checkpoint_it_ends_the_same(beside: str, tmp_path: Path):
    assert [status for _, status in attempts(tmp_path / "whole", beside, [])] == [0]
    moments = list(range(24))
    ended = attempts(tmp_path / "killed", beside, moments)
    killed = [moment for moment, status in ended if status == 9]
    assert ended[-1] == (-1, 0) and len(killed) >= 20
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.part"))
    whole = steps_of(tmp_path / "whole")
    assert len(whole) == NUM_STEPS
    again = steps_of(tmp_path / "killed")
    assert {json.dumps(step) for step in again} == {json.dumps(step) for step in whole}
    assert again[-1] == whole[-1]
    lines = [line["step"] for line in read_lines(tmp_path / "killed" / "metrics.jsonl")]
    assert lines == list(range(1, NUM_STEPS + 1)), "each step is reported once"
    scores = [read_lines(tmp_path / name / "validation.jsonl") for name in ("killed", "whole")]
    assert scores[0] == scores[1] and [line["step"] for line in scores[0]] == [
        *range(2, NUM_STEPS, 2), NUM_STEPS,
    ]  # fmt: skip


@pytest.mark.parametrize("moment", [10, 30, 45])
def test_a_kill_costs_no_more_than_the_steps_since_a_checkpoint(moment: int, tmp_path: Path):
    """No committed checkpoint is lost: the next attempt begins at most two steps before the last
    that was trained, or the one that was being written."""
    ended = attempts(tmp_path / "killed", "between", [moment])
    steps = steps_of(tmp_path / "killed")
    repeated = len(steps) - NUM_STEPS
    assert ended[0][1] == 9 and 0 <= repeated <= 2
