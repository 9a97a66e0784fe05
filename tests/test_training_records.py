"""Checkpoints on disk: any number of ranks reads what others wrote, what is not whole is none, and
older ones go."""

import dataclasses
import errno
import itertools
import json
from pathlib import Path

import pytest
import torch
from _records import write_by_three_ranks

from cluster.base.run_dir import step_folder
from training.bucket.mirror import Mirror
from training.checkpoints import checkpointer
from training.checkpoints.records import FragmentReader, Progress, valid_records

# -- other world sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 10])
def test_any_number_of_ranks_reads_what_three_wrote(world_size: int, tmp_path: Path):
    whole = torch.arange(10.0)
    stored = FragmentReader(tmp_path, len(write_by_three_ranks(tmp_path, whole)))
    cuts = [10 * rank // world_size for rank in range(world_size + 1)]
    for section, expected in (("master", whole), ("ema", -whole)):
        parts = [torch.full((b - a,), torch.nan) for a, b in itertools.pairwise(cuts)]
        for start, part in zip(cuts, parts, strict=False):
            stored.read(f"{section}/w", start, part)
        assert torch.equal(torch.cat(parts), expected)
    for rank in range(3):
        target = torch.empty(4)
        stored.read(f"master/only_{rank}", 0, target)
        assert (target == rank).all()


def test_a_missing_rank_makes_a_checkpoint_invalid(tmp_path: Path):
    write_by_three_ranks(tmp_path, torch.arange(10.0))
    (tmp_path / "fragments" / "rank_0001.json").unlink()
    with pytest.warns(UserWarning, match="found the records of 2 ranks, incomplete"):
        assert valid_records(tmp_path) is None


def test_ranks_that_disagree_make_a_checkpoint_invalid(tmp_path: Path):
    write_by_three_ranks(tmp_path, torch.arange(10.0))
    path = tmp_path / "fragments" / "rank_0001.json"
    other = {**json.loads(path.read_text()), "progress": dataclasses.asdict(Progress(step=4))}
    path.write_text(json.dumps(other))
    with pytest.warns(UserWarning, match="disagree about their progress"):
        assert valid_records(tmp_path) is None


def test_a_stored_parameter_that_the_model_lacks_is_refused(tmp_path: Path):
    stored = FragmentReader(tmp_path, len(write_by_three_ranks(tmp_path, torch.arange(10.0))))
    own = {"w", "only_0", "only_1", "only_2"}
    stored.require(own, {"ema"})
    with pytest.raises(ValueError, match="parameter only_1: found it stored.*--fresh"):
        stored.require(own - {"only_1"}, {"ema"})


@pytest.mark.parametrize(("name", "found"), [("master/w", 10), ("master/v", 0)])
def test_tensors_of_another_model_are_refused(name: str, found: int, tmp_path: Path):
    stored = FragmentReader(tmp_path, len(write_by_three_ranks(tmp_path, torch.arange(10.0))))
    with pytest.raises(ValueError, match=f"{name}: found {found} of 11 elements from 0"):
        stored.read(name, 0, torch.empty(11))


# -- pruning ---------------------------------------------------------------------------------------



def test_a_checkpoint_that_a_kill_cut_short_is_not_one_of_those_kept(tmp_path: Path):
    for step in (4, 8, 10, 12):
        write_by_three_ranks(step_folder(tmp_path, step), torch.arange(10.0))
    (step_folder(tmp_path, 10) / "fragments" / "rank_0000.json").unlink()
    with pytest.warns(UserWarning, match="found the records of 2 ranks, incomplete"):
        checkpointer.prune(Mirror(tmp_path), 2, step_folder(tmp_path, 12))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000008", "step_00000012"]


def test_a_checkpoint_that_cannot_be_deleted_is_reported_and_is_none_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    for step in (1, 2, 3):
        write_by_three_ranks(step_folder(tmp_path, step), torch.arange(10.0))

    def busy(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(checkpointer.shutil, "rmtree", busy)
    checkpointer.prune(Mirror(tmp_path), 1, step_folder(tmp_path, 3))
    assert capsys.readouterr().out.count("not deleted, the next checkpoint tries again") == 2
    with pytest.warns(UserWarning, match="found the records of 0 ranks"):
        assert valid_records(step_folder(tmp_path, 2)) is None
    monkeypatch.undo()
    with pytest.warns(UserWarning):
        checkpointer.prune(Mirror(tmp_path), 1, step_folder(tmp_path, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
