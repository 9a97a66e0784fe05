"""Ranks agree on the checkpoint from which they continue; each verifies its share of it."""

import json
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from _runs import ROOT, environment, flip
from safetensors.torch import save_file

from cluster.base.files import digest_file
from cluster.base.run_dir import fragment_path, step_folder
from training.checkpoints import records
from training.checkpoints.records import FORMAT, Progress, Record

WRITERS, READERS = 3, 2
SECONDS = 120


def write(run: Path, step: int) -> None:
    """Write a checkpoint of three ranks."""
    fragments = step_folder(run, step) / "fragments"
    fragments.mkdir(parents=True)
    for rank in range(WRITERS):
        path = fragments / f"rank_{rank:04d}.safetensors"
        save_file({f"master/w/{rank}": torch.full((4,), float(step))}, str(path))
        record = Record(
            format=FORMAT, rank=rank, world_size=WRITERS, optimizer_step=step,
            sha256=digest_file(path), progress=asdict(Progress(step=step)),
        )  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps(asdict(record)))



def asked(meeting: Path, views: list[list[Path]]) -> list[tuple[int, Any]]:
    """Let two ranks look at their views of some runs; their exit codes, and what they tell: of each
    run the step and the files that they have read, or their last line."""
    meeting.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(meeting), *map(str, runs)], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment(),
        )
        for rank, runs in enumerate(views)
    ]  # fmt: skip
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=SECONDS)
            code = process.returncode
            found.append((code, json.loads(out) if code == 0 else err.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return found


def test_damage_that_one_rank_sees_leads_all_to_the_checkpoint_before(tmp_path: Path):
    whole, empty = tmp_path / "whole", tmp_path / "empty"
    empty.mkdir()
    damaged = [tmp_path / f"damaged_{rank}" for rank in range(WRITERS)]
    for run in (whole, *damaged):
        write(run, 4)
        write(run, 8)
    for rank, run in enumerate(damaged):
        flip(fragment_path(step_folder(run, 8), rank))
    runs = [whole, empty, *damaged]
    codes, reports = zip(*asked(tmp_path / "meeting", [runs] * READERS), strict=True)
    assert codes == (0, 0)
    for each in reports:
        assert [found["step"] for found in each] == [8, -1, 4, 4, 4]
    for number in (0, 2, 3, 4):
        mine = [each[number] for each in reports]
        parts = [[rank for step, rank in each["read"] if step == each["step"]] for each in mine]
        assert parts == [[0, 2], [1]]  # every part once in all


def test_a_rank_on_another_storage_says_so_instead_of_beginning_anew(tmp_path: Path):
    write(tmp_path / "run", 4)
    (tmp_path / "elsewhere").mkdir()
    views = [[tmp_path / "run"], [tmp_path / "elsewhere"]]
    with_it, without = asked(tmp_path / "meeting", views)
    assert with_it[0] and without[0]
    assert "OSError" in without[1] and "storage that all nodes share" in without[1]


def main() -> None:
    rank, meeting, *runs = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=int(rank), world_size=READERS
    )
    read: list[tuple[int, int]] = []
    digest_of = records.digest_file

    def counted(path: Path) -> str:
        read.append((int(path.parent.parent.name[-8:]), int(path.stem[-4:])))
        return digest_of(path)

    records.digest_file = counted
    engine: Any = SimpleNamespace(rank=int(rank), world_size=READERS, device=torch.device("cpu"))
    found = []
    for run in map(Path, runs):
        read.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = records.newest_valid_step(run, engine)
        found.append({"step": step, "read": list(read)})
    print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
