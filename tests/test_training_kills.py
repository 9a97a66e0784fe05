"""A run that is killed at any moment of writing its checkpoints ends as one that never was.

The kills are SIGKILLs that a process gives itself just before or just after one of its calls to the
disk, so the moments are all of them, not those that a clock happens to hit.
"""

import itertools
import json
import sys
from pathlib import Path

import pytest
from _runs import ROOT, done

from cluster.base.jsonl import read_lines
from cluster.base.run_dir import VALIDATION_NAME

NUM_STEPS = 31
# A process that has imported everything forks a child for each attempt: the child is what dies.
ATTEMPTS = """
import dataclasses, itertools, json, os, shutil, sys
from pathlib import Path
import torch
from _deaths import dying
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
        file.write(json.dumps([moment, batch.keys.tolist()]) + chr(10))
    return squared_error(model, batch)


def scored(folder):
    return {"weight": load_file(str(folder / "ema.safetensors"))["weight"].item()}


torch.set_num_threads(1)
moment = -1
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
    arguments = [str(folder), beside, json.dumps(moments), str(NUM_STEPS)]
    path = {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    ended = done([sys.executable, "-c", ATTEMPTS, *arguments], 300, **path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return [tuple(json.loads(line)) for line in ended.stdout.splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """Everything that a run leaves but for its clocks and locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors", ".json")
    }


def steps_of(folder: Path) -> list[tuple[int, list[int]]]:
    """The moment of each attempt's kill with the keys of its samples, step by step."""
    return [json.loads(line) for line in folder.with_suffix(".ids").read_text().splitlines()]


@pytest.mark.parametrize("beside", ["beside", "between"])
def test_killed_at_every_moment_of_a_checkpoint_it_ends_the_same(beside: str, tmp_path: Path):
    """No committed checkpoint is lost: a kill costs at most the two steps since a checkpoint, or
    four where the last one is still being written beside the steps."""
    assert [status for _, status in attempts(tmp_path / "whole", beside, [])] == [0]
    ended = attempts(tmp_path / "killed", beside, list(range(24)))
    killed = [moment for moment, status in ended if status == 9]
    assert ended[-1] == (-1, 0) and len(killed) >= 20
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.part"))
    whole = [keys for _, keys in steps_of(tmp_path / "whole")]
    assert len(whole) == NUM_STEPS
    again = [(moment, whole.index(keys)) for moment, keys in steps_of(tmp_path / "killed")]
    most = 4 if beside == "beside" else 2
    for (before, last), (after, step) in itertools.pairwise(again):
        assert 0 <= last + 1 - step <= (most if before != after else 0)
    assert again[0][1] == 0 and again[-1][1] == NUM_STEPS - 1
    lines = [line["step"] for line in read_lines(tmp_path / "killed" / "metrics.jsonl")]
    assert lines == list(range(1, NUM_STEPS + 1)), "each step is reported once"
    scores = [
        [(line["step"], line["weight"]) for line in read_lines(tmp_path / name / VALIDATION_NAME)]
        for name in ("killed", "whole")
    ]
    assert scores[0] == scores[1] and [step for step, _ in scores[0]] == [
        *range(2, NUM_STEPS, 2), NUM_STEPS,
    ]  # fmt: skip
