"""The image: pinned, without a secret, and its commands can be run."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from test_cluster_manifests import DOCKERFILE, manifest, run_dry

ROOT = Path(__file__).parent.parent
ROOTS_ONLY = ("apt-get", "useradd", "install", "rm")  # need a container of their own


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions and their arguments."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    pairs = (line.partition(" ") for line in whole.splitlines() if line.strip())
    return [(word, rest.strip()) for word, _, rest in pairs]


def test_the_image_is_pinned_whole_and_not_roots(capsys, tmp_path: Path, monkeypatch):
    found = instructions()
    arguments = dict(rest.split("=", 1) for word, rest in found if word == "ARG")
    assert re.fullmatch(r"python:3\.1[12]\.\d+-slim-\w+", arguments["BASE"])
    bases = [rest.split()[0] for word, rest in found if word == "FROM"]
    stages = [rest.split()[-1] for word, rest in found if word == "FROM"][:-1]
    assert bases == ["${BASE}", "common", "common", "${DEVICE}"] and "gpu" in stages
    assert found[-2] == ("USER", "minidalle2") and found[-1][0] == "CMD"
    for word, rest in found:
        if word == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
        if word == "RUN":
            assert subprocess.run(["bash", "-n", "-c", rest]).returncode == 0
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    output = run_dry(shlex.join(json.loads(found[-1][1])), capsys)
    assert "--dashboard-host=127.0.0.1" in output and list(tmp_path.iterdir()) == []


def test_the_image_takes_the_packages_and_no_secret():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    secrets = {"**/auth_token", "**/redis_password", "**/redis.key", "**/*.pem"}
    assert {*secrets, ".git", "data", "runs"} <= set(ignored)
    needed = {"ingest", "models", "training", "eval", "cluster", "pyproject.toml", "README.md"}
    assert not needed & set(ignored)
    kept_out = (ROOT / ".gitignore").read_text().splitlines()
    for secret in manifest("kustomization.yaml")["secretGenerator"]:
        assert {f"cluster/kuberay/{file}" for file in secret["files"]} <= set(kept_out)


@pytest.mark.slow
def test_the_images_commands_run_in_a_plain_shell(tmp_path: Path):
    """Without a container engine: pip's steps for real, in an environment of their own over the
    packages that are here; what needs a container's root is only recorded."""
    root, site = tmp_path / "root", Path(jsonschema.__file__).parent.parent
    bare = [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")]
    subprocess.run(bare, check=True)
    pip = tmp_path / "venv" / "bin" / "pip"
    pip.write_text('#!/bin/sh\nexec python -m pip "$@"\n')
    pip.chmod(0o755)
    [own] = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (own / "here.pth").write_text(str(site))
    root.mkdir()
    for folder in ("ingest", "models", "training", "eval", "cluster"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, root / folder, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.lock"):
        shutil.copy(ROOT / name, root / name)
    (tmp_path / "bin").mkdir()
    for name in ROOTS_ONLY:
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n')
        (tmp_path / "bin" / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:{tmp_path}/venv/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    for word, rest in instructions():
        if word == "RUN":
            command = ["bash", "-euc", rest]
            done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
            assert done.returncode == 0, f"{rest}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    recorded = (tmp_path / "calls").read_text()
    assert "apt-get install -y --no-install-recommends libgomp1" in recorded
    code = "import training, sys; print(training.__file__)"
    command = [str(tmp_path / "venv" / "bin" / "python"), "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(root / "training" / "__init__.py"), done.stderr
