"""A small checkpoint of three ranks, made by hand."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cluster.base.files import digest_file
from cluster.base.run_dir import step_folders
from training.checkpoints.records import FORMAT, Progress, Record, valid_records


def write_by_three_ranks(folder: Path, whole: torch.Tensor) -> list[Record]:
    """Three ranks own [0, 2), [2, 7) and [7, 10) of parameter `w`, and share out the rest."""
    fragments = folder / "fragments"
    fragments.mkdir(parents=True)
    for rank, (start, stop) in enumerate([(0, 2), (2, 7), (7, 10)]):
        path = fragments / f"rank_{rank:04d}.safetensors"
        mine = {
            f"master/w/{start}": whole[start:stop].clone(),
            f"ema/w/{start}": -whole[start:stop],
            f"master/only_{rank}/0": torch.full((4,), float(rank)),
        }
        save_file(mine, str(path))
        record = Record(
            format=FORMAT, rank=rank, world_size=3, optimizer_step=5,
            sha256=digest_file(path), progress=dataclasses.asdict(Progress(step=5)),
        )  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(record)))
    records = valid_records(folder)
    assert records is not None
    return records


def newest_valid(run: Path) -> tuple[Path, Progress] | None:
    """Return the newest valid checkpoint of `run`; broken ones are skipped with a warning."""
    for folder in reversed(step_folders(run)):
        records = valid_records(folder)
        if records:
            return folder, Progress(**records[0].progress)
    return None
