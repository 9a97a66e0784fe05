"""Clusters of Ray's launcher: valid, refused where they lack something, and startable."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import ray
from test_cluster_manifests import RAY_UP, ROOT, load, name_of

RAY_SCHEMA = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"


@pytest.mark.parametrize("path", RAY_UP, ids=name_of)
def test_every_cluster_is_what_rays_launcher_admits(path: Path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config, schema = load(path), json.loads(RAY_SCHEMA.read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "head_start_commands": []}, schema)


@pytest.mark.parametrize("path", RAY_UP, ids=name_of)
def test_a_machine_without_the_shared_folder_is_refused(path: Path, tmp_path: Path):
    [command] = [c for c in load(path)["initialization_commands"] if "mountpoint" in c]

    def run(folder: Path | str) -> subprocess.CompletedProcess[str]:
        here = command.replace("/data", str(folder))
        return subprocess.run(["bash", "-c", here], capture_output=True, text=True)

    done = run("/proc")
    assert done.returncode == 0 and not done.stderr
    for folder in (tmp_path, tmp_path / "none"):
        done = run(folder)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert re.search(r": found no mount, expected .*; mount it first$", done.stderr)
    assert not (tmp_path / "none").exists()


def test_every_machine_of_ec2_has_its_image_and_disk():
    """Ray would take an AMI of its own choice, whose driver is too old for the lock's wheels."""
    path = ROOT / "cluster" / "ray-up" / "aws.yaml"
    for node in load(path)["available_node_types"].values():
        assert node["node_config"]["ImageId"] == "ami-FILL-IN", "EC2's refusal has this name"
        assert node["node_config"]["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 100
    [driver] = re.findall(r"driver (\d+) or later", path.read_text())
    lock = (ROOT / "requirements.lock").read_text()
    assert re.search(r"^cuda-toolkit==13\.", lock, re.MULTILINE) and int(driver) >= 580


def start_commands(path: Path) -> list[str]:
    config = load(path)
    return [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]


@pytest.mark.parametrize("path", RAY_UP, ids=name_of)
def test_every_start_command_can_be_run_dry(path: Path, tmp_path: Path):
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("a token")
    starts = [command for command in start_commands(path) if command != "ray stop"]
    assert len(starts) == 2
    bin_folder = Path(sys.executable).parent
    for command, kind in zip(starts, ("--head", "--address=10.0.0.5:6379"), strict=True):
        here = command.replace("/opt/minidalle2", str(ROOT)) + " --dry-run"
        env = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
        env |= {"HOME": str(tmp_path), "PATH": f"{bin_folder}:{env['PATH']}"}
        env |= {"RAY_HEAD_IP": "10.0.0.5"}
        done = subprocess.run(["bash", "-c", here], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "RAY_AUTH_MODE=token ray start" in done.stdout and kind in done.stdout
    assert token.stat().st_mode & 0o077 == 0
    mounts = load(path)["file_mounts"]
    assert mounts == {"/home/minidalle2/.ray/auth_token": "~/.ray/auth_token"}
