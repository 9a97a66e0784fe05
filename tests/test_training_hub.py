"""A finished run goes to the Hub or a bucket, and is used from there as from its folder."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from _hub import TOKEN, Hub
from _networks import CLIP
from _s3 import AWS

from models.clip import build_clip
from models.convert.remote_runs import fetched_run
from models.convert.runs import load_clip, load_model
from models.weights import (
    EMA_NAME,
    FINAL_NAME,
    digest,
    exported,
    load_config,
    save_config,
    save_weights,
)
from training import convert
from training.convert import ConvertConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


def write_clip(run: Path) -> Path:
    """An untrained CLIP as a finished run."""
    step = run / "step_00000004"
    step.mkdir(parents=True)
    torch.manual_seed(0)
    save_weights(step / EMA_NAME, build_clip(CLIP).state_dict())
    save_config(step, {"kind": "clip", "model": dataclasses.asdict(CLIP)})
    (run / FINAL_NAME).write_text(json.dumps({"step": step.name}))
    return run


def run_script(hub: Hub, tmp_path: Path, *command: str, token: str = TOKEN) -> str:
    """Run Python in a process of its own, whose Hub is the given one; return what it printed."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token,
        "HF_HOME": str(tmp_path / "hf"), "MINIDALLE2_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    return f"{done.returncode} {done.stdout}{done.stderr}"


def test_a_pushed_run_is_used_by_its_url(
    hub: Hub, tmp_path: Path, write_chain: Callable[..., dict[str, Path]]
):
    clip = write_clip(tmp_path / "clip")
    prior = write_chain(tmp_path, load_clip(str(clip)))["prior"]
    step = exported(prior)
    save_config(step, {**load_config(step), "clip": str(clip)})
    push = ("training/convert.py", "--push")

    # Not without a token, nor a prior that nobody else could use
    output = run_script(hub, tmp_path, *push, "hf://someone/clip", "--run", str(clip), token="")
    assert output.startswith("2 error: --push: found no token of the Hub") and not hub.repositories
    wrong = (*push, "hf://someone/clip", "--run", str(clip))
    output = run_script(hub, tmp_path, *wrong, token="hf_no")
    assert output.startswith("2 error: ") and output.count("\n") == 1 and not hub.repositories
    output = run_script(hub, tmp_path, *push, "hf://someone/prior", "--run", str(prior))
    assert output.startswith("2 error: --clip: found the encoder ") and not hub.repositories

    for name, run in (("clip", clip), ("prior", prior)):
        arguments = () if name == "clip" else ("--clip", "hf://someone/clip")
        arguments = (*push, f"hf://someone/{name}", "--run", str(run), *arguments)
        output = run_script(hub, tmp_path, *arguments)
        assert output.startswith(f"0 hf://someone/{name}: "), output
    stored = hub.repositories["someone/prior"]
    assert stored.private and len(stored.commits) == 1
    weights = f"{step.name}/ema.safetensors"
    expected = {"README.md", "final.json", f"{step.name}/config.json", weights}
    assert stored.files.keys() == expected
    assert stored.files[weights] == (step / EMA_NAME).read_bytes()
    page = stored.files["README.md"].decode()
    assert page.startswith("---\npipeline_tag: ") and "# Model card: `prior`" in page
    for content in stored.files.values():
        assert TOKEN.encode() not in content

    # What reads it: the same encoder and the same model, once downloaded
    code = (
        "from models.convert.runs import load_clip, load_model\n"
        "model, config = load_model('hf://someone/prior', 'prior')\n"
        "from models.weights import digest\n"
        "print(digest(model.state_dict()), load_clip(config['clip']).encoder_id)\n"
    )
    model, _ = load_model(str(prior), "prior")
    expected = f"0 {digest(model.state_dict())} {load_clip(str(clip)).encoder_id}\n"
    for _ in range(2):
        assert run_script(hub, tmp_path, "-c", code) == expected
    assert len(list((tmp_path / "cache" / ".runs").iterdir())) == 2
    output = run_script(hub, tmp_path, "-c", code, token="hf_wrong")
    assert output.startswith("1 ") and hub.refused


def test_a_run_in_a_bucket_is_copied_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MINIDALLE2_CACHE", str(tmp_path / "cache"))
    run, url = write_clip(tmp_path / "clip"), "memory://bucket/clip"
    convert.main(ConvertConfig(run=str(run), push=url))
    folder = fetched_run(url)
    assert fetched_run(url) == folder and folder != run
    assert load_clip(url).encoder_id == load_clip(str(run)).encoder_id  # of its weights' digest
    assert load_config(exported(url)) == load_config(exported(run))
    with pytest.raises(ValueError, match=r"^--push: found a run at memory://bucket/clip, expected"):
        convert.main(ConvertConfig(run=str(run), push=url))

    import fsspec

    files = fsspec.filesystem("memory")
    name = f"/bucket/clip/{exported(run).name}/{EMA_NAME}"
    files.pipe_file(name, files.cat_file(name)[:-8])
    assert fetched_run(url) != folder

    # Unfinished, half, absent
    files.pipe_file("/bucket/clip/final.json", json.dumps({"step": "../../etc"}).encode())
    with pytest.raises(ValueError, match=r"step: found '../../etc' in final.json, expected step_"):
        fetched_run(url)
    with pytest.raises(ValueError, match=r"^memory://bucket/none: found no finished run, expected"):
        load_clip("memory://bucket/none")
    with pytest.raises(ValueError, match=r"^nosuch://bucket/run: cannot be reached: "):
        exported("nosuch://bucket/run")
    files.rm(name)
    files.pipe_file("/bucket/clip/final.json", json.dumps({"step": exported(run).name}).encode())
    with pytest.raises(ValueError, match=r"found no finished run"):
        fetched_run(url)
    assert not list((tmp_path / "cache" / ".runs").glob(".part_*"))


def test_a_storage_that_does_not_answer_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import s3fs

    for name, value in {**AWS, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ConnectionError, match=r"^s3://bucket/clip: Could not connect"):
        exported("s3://bucket/clip")
    run = write_clip(tmp_path / "clip")
    with pytest.raises(ConnectionError, match=r"^s3://bucket/clip: Could not connect"):
        convert.main(ConvertConfig(run=str(run), push="s3://bucket/clip"))
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("url", ["hf://name", "hf://a/b/c", "hf://a b/c"])
def test_a_url_that_names_no_repository_is_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = write_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="expected hf://user/name"):
        convert.main(ConvertConfig(run=str(run), push=url))
