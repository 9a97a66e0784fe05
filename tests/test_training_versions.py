"""Checkpoints of other versions of this project: continued, or refused by the version's name."""

import json
import shutil
from pathlib import Path

import pytest
from _line import CONFIG, run

from cluster.base.cli import with_options

GOLDEN = Path(__file__).parent / "golden" / "line_c63a73c"  # step 4 of _line's run, by that commit
ENDED = {"weight": 0.4270, "bias": 0.9856}  # where that commit's run ended, at step 7


def test_a_checkpoint_of_an_older_commit_goes_on_to_where_that_commit_went(tmp_path: Path):
    shutil.copytree(GOLDEN, tmp_path / "run")
    model, progress = run(tmp_path / "run", with_options(CONFIG, checkpoint_every=4))
    assert progress.step == 7
    for name, value in ENDED.items():
        assert model.get_parameter(name).item() == pytest.approx(value, abs=5e-5)
    anew, _ = run(tmp_path / "anew", CONFIG)
    for name, value in ENDED.items():
        assert anew.get_parameter(name).item() == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize(("version", "text"), [("9.1.0", "version 9.1.0"), (None, "another vers")])
def test_a_checkpoint_of_another_format_is_refused_by_its_version(
    version: str | None, text: str, tmp_path: Path
):
    """Not skipped: that would begin a long run anew."""
    shutil.copytree(GOLDEN, tmp_path / "run")
    path = tmp_path / "run" / "step_00000004" / "fragments" / "rank_0000.json"
    record = {**json.loads(path.read_text()), "format": 2, "extra": 1}
    path.write_text(json.dumps({**record, "version": version} if version else record))
    with pytest.raises(ValueError, match=f"found a checkpoint of format 2, expected 1: {text}"):
        run(tmp_path / "run", CONFIG)
    assert path.is_file()
