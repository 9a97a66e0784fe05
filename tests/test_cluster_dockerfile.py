"""The image: pinned, without a secret, and its commands can be run."""

import json
import re
import shlex
import subprocess
from pathlib import Path

from test_cluster_manifests import DOCKERFILE, manifest, run_dry

ROOT = Path(__file__).parent.parent


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions and their arguments."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    pairs = (line.partition(" ") for line in whole.splitlines() if line.strip())
    return [(word, rest.strip()) for word, _, rest in pairs]


def test_the_image_is_pinned_whole_and_not_roots(capsys, tmp_path: Path, monkeypatch):
    found = instructions()
    arguments = dict(rest.split("=", 1) for word, rest in found if word == "ARG" and "=" in rest)
    assert re.fullmatch(r"python:3\.1[12]\.\d+-slim-\w+", arguments["BASE"])
    bases = [rest.split()[0] for word, rest in found if word == "FROM"]
    stages = [rest.split()[-1] for word, rest in found if word == "FROM"][:-1]
    assert bases == ["${BASE}", *["debian"] * 3, "${DEVICE}"] and {"cpu", "gpu"} < set(stages)
    assert found[-2] == ("USER", "minidalle2") and found[-1][0] == "CMD"
    for word, rest in found:
        if word == "COPY" and not rest.startswith("--from"):
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
        if word == "RUN":
            command = re.sub(r"^--mount=\S+", "", rest)
            assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    output = run_dry(shlex.join(json.loads(found[-1][1])), capsys)
    assert "--dashboard-host=127.0.0.1" in output and list(tmp_path.iterdir()) == []


def test_the_image_takes_the_packages_and_no_secret():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    secrets = {"**/auth_token", "**/redis_password", "**/*.key", "**/*.pem"}
    assert {*secrets, ".git", "data", "runs"} <= set(ignored)
    needed = {"ingest", "models", "training", "eval", "cluster", "pyproject.toml", "README.md"}
    assert not needed & set(ignored)
    kept_out = (ROOT / ".gitignore").read_text().splitlines()
    for secret in manifest("kustomization.yaml")["secretGenerator"]:
        assert {f"cluster/kuberay/{file}" for file in secret["files"]} <= set(kept_out)
