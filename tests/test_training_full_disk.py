"""A disk that is full while a run writes: one line, nothing half written, and what there was stays.

The disk is a real one of a few hundred KB, mounted for the test, which takes root; errors of the
system that need none are raised in its place.
"""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from _line import CONFIG, run, squared_error
from _records import newest_valid
from _runs import debug_prior, done
from safetensors import SafetensorError
from torch import Tensor, nn

from cluster.base.cli import with_options
from cluster.base.jsonl import read_lines
from cluster.base.run_dir import step_folder
from training.checkpoints import checkpointer
from training.checkpoints.checkpointer import atomic_tensors
from training.checkpoints.records import valid_records
from training.data.dataloader import Batch

DISK_BYTES = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill a disk but for some bytes; return the file that does."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(bytes(free - leave))
    return filler


def test_a_disk_that_fills_up_ends_the_run_and_loses_nothing(disk: Path, tmp_path: Path):
    """Full from the fifth step on, for the checkpoint of the sixth; then there is room again."""
    config = with_options(CONFIG, checkpoint_every=2, report_every=3, async_checkpoints=False)
    calls = iter(range(100))

    def filling(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if next(calls) == 4:
            fill(disk)
        return squared_error(model, batch)

    with pytest.raises(OSError) as caught:
        run(disk / "run", config, filling)
    assert caught.value.errno == errno.ENOSPC
    found = newest_valid(disk / "run")
    assert found is not None and found[1].step == 4
    assert not list((disk / "run").rglob("*.part"))
    with pytest.raises(OSError) as caught:  # still full: said again, and nothing is lost by that
        run(disk / "run", config)
    assert caught.value.errno == errno.ENOSPC and valid_records(step_folder(disk / "run", 4))
    assert read_lines(disk / "run" / "metrics.jsonl"), "what was reported stays as well"
    (disk / "filler").unlink()
    mended, _ = run(disk / "run", config)
    whole, _ = run(tmp_path / "whole", config)
    assert torch.equal(mended.get_parameter("weight"), whole.get_parameter("weight"))


def test_a_full_disk_is_one_line_of_the_script(disk: Path, tmp_path: Path, write_data: Callable):
    data = write_data(tmp_path, num_shards=1, samples_per_shard=16)
    fill(disk, leave=64 << 10)  # for all but the weights
    ended = done(debug_prior(data, disk / "run", 4, "--train.checkpoint-every", "2"))
    assert ended.returncode == 1, ended.stderr[-2000:]
    (line,) = [line for line in ended.stderr.splitlines() if "error" in line.lower()]
    assert "No space left on device" in line and line.endswith("rerun the same command when that "
                                                               "is mended")  # fmt: skip
    assert not list((disk / "run").rglob("*.part"))


def test_a_file_is_whole_or_absent(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    for error in (OSError(errno.ENOSPC, "no space"), SafetensorError("I/O: full (os error 28)")):
        with pytest.raises(OSError) as caught, atomic_tensors(path) as part:
            part.write_text("half")
            raise error
        assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []
    with pytest.raises(SafetensorError, match="of another kind"), atomic_tensors(path):
        raise SafetensorError("of another kind")
    with atomic_tensors(path) as part:
        part.write_text("whole")
        assert not path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


@pytest.mark.parametrize("call", range(4))
def test_a_disk_that_is_full_at_any_file_of_a_checkpoint(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Fragments, weights, averages; whatever was written before, the run ends as if undisturbed."""
    config = with_options(CONFIG, checkpoint_every=2)
    calls = iter(range(100))

    def failing(real: Callable) -> Callable:
        def save(*arguments, **more) -> None:
            if next(calls) == 3 + call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(*arguments, **more)

        return save

    for name in ("save_file", "save_weights", "write_json"):
        monkeypatch.setattr(checkpointer, name, failing(getattr(checkpointer, name)))
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "full", config)
    monkeypatch.undo()
    mended, _ = run(tmp_path / "full", config)
    whole, _ = run(tmp_path / "whole", config)
    assert torch.equal(whole.get_parameter("weight"), mended.get_parameter("weight"))
    last = step_folder(tmp_path / "full", CONFIG.schedule.num_steps)
    expected = step_folder(tmp_path / "whole", CONFIG.schedule.num_steps)
    for file in ("model.safetensors", "ema.safetensors"):
        assert (last / file).read_bytes() == (expected / file).read_bytes()
