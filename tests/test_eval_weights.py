"""Weights are looked for, verified and loaded safely; nothing is fetched and nothing unpickled."""

import hashlib
import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from eval.features.weights import DINOV2, INCEPTION, VARIABLE, find_weights

ROOT = Path(__file__).resolve().parent.parent


def saved(path: Path, value: object) -> str:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


@pytest.mark.parametrize("official", [INCEPTION, DINOV2])
def test_missing_weights_say_where_they_are_given_out(official, tmp_path: Path):
    for folder in ("", str(tmp_path)):
        with pytest.raises(ValueError) as error:
            find_weights(official, folder, "inception")
        for text in (official.file, official.address, official.sha256, VARIABLE):
            assert text in str(error.value)
    assert len(official.sha256) == 64 and official.address.endswith(official.file)


def test_the_environment_names_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / INCEPTION.file).write_bytes(b"not they")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    found = find_weights(INCEPTION, "", "inception")
    assert found.official and found.label == ""
    with pytest.raises(ValueError, match="found sha256 .*, expected 6726825d.*; get it again"):
        found.load()


def test_other_weights_are_named_by_their_digest(tmp_path: Path):
    digest = saved(tmp_path / "x.pth", {"a": torch.ones(2)})
    found = find_weights(INCEPTION, "", "inception", str(tmp_path / "x.pth"), digest)
    assert not found.official and digest[:12] in found.label
    assert found.load()["a"].tolist() == [1, 1]
    (tmp_path / "x.pth").write_bytes(b"changed")
    with pytest.raises(ValueError, match="get it again"):
        found.load()


@pytest.mark.parametrize(
    ("file", "digest", "message"),
    [
        ("x.pth", "", "--inception-weights: found it without --inception-sha256"),
        ("", "0" * 64, "--inception-sha256: found it without --inception-weights"),
        ("absent.pth", "0" * 64, "--inception-weights: found no file"),
        ("x.pth", "abc", "--inception-sha256: found 'abc', expected 64 hex digits"),
    ],
)
def test_half_a_choice_is_refused(
    file: str, digest: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "x.pth", {})
    with pytest.raises(ValueError, match=message):
        find_weights(INCEPTION, "", "inception", file, digest)


def test_a_pickle_with_the_right_digest_runs_nothing(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for name, content in (("zip", None), ("bare", pickle.dumps(Evil()))):
        path = tmp_path / f"{name}.pth"
        digest = saved(path, {"a": Evil()})
        if content is not None:
            path.write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
        found = find_weights(INCEPTION, "", "inception", str(path), digest)
        with pytest.raises(ValueError, match="found no plain tensors"):
            found.load()
        assert not (tmp_path / "ran").exists()


def test_the_script_exits_2_without_weights(tmp_path: Path, monkeypatch, run_here):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    code, _, errors = run_here(
        "eval/fid.py", "--real", ".", "--fake", ".", "--features", "inception"
    )
    assert code == 2 and INCEPTION.address in errors and len(errors.strip().splitlines()) == 1
