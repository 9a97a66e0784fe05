"""Where work is placed: on its group where the head says that there are groups, else anywhere."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from cluster.base.cli import JOB_VARIABLE, require_lasting, require_local
from cluster.base.ray_session import GROUPS, ensure_ray, group_resources, has_gpus
from ingest.embedding.ray_encoders import cpu_share
from training.config import TrainConfig
from training.runs.ray_train import worker_device


def cluster(monkeypatch: pytest.MonkeyPatch, **resources: float) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)


def test_work_asks_for_its_group_only_where_the_head_has_groups(monkeypatch):
    for group in ("cpu_group", "gpu_group"):
        cluster(monkeypatch, CPU=4.0, GPU=1.0)
        assert group_resources(group) == {}
        cluster(monkeypatch, **{GROUPS: 1.0})  # all nodes are scaled away
        assert group_resources(group) == {group: 0.001}


def test_encoders_leave_a_share_of_the_cpus_to_a_reader(monkeypatch):
    for cpus, num_actors in ((1.0, 1), (4.0, 4), (8.0, 1), (2.0, 1), (3.0, 6)):
        cluster(monkeypatch, CPU=cpus)
        share = cpu_share(num_actors)
        assert share * (num_actors + 1) <= cpus and share <= 1
        assert share == 1 or share * (num_actors + 1) > cpus - 0.001, "no more is lost"
    cluster(monkeypatch, **{GROUPS: 1.0})  # all nodes are scaled away
    assert cpu_share(8) == 1


@pytest.mark.parametrize(
    ("device", "resources", "found"),
    [
        ("auto", {"CPU": 4.0}, False),
        ("auto", {"CPU": 4.0, "GPU": 2.0}, True),
        ("auto", {GROUPS: 1.0}, True),
        ("cpu", {"CPU": 4.0, "GPU": 2.0}, False),
        ("cpu", {GROUPS: 1.0}, False),
        ("cuda", {GROUPS: 1.0, "GPU": 1.0}, True),
    ],
)
def test_workers_get_gpus_where_there_are_or_will_be_any(device, resources, found, monkeypatch):
    cluster(monkeypatch, **resources)
    expected = "GPU" if found else "CPU"
    assert worker_device(TrainConfig.of(device=device, num_workers=2)) == expected
    if device == "auto":
        assert has_gpus() is found


@pytest.mark.parametrize(
    ("device", "gpus"), [("auto", 1.0), ("cuda", 0.0), ("cuda", 1.0)]
)  # fmt: skip
def test_too_few_gpus_are_refused_where_no_more_will_come(device, gpus, monkeypatch):
    cluster(monkeypatch, CPU=4.0, GPU=gpus)
    with pytest.raises(ValueError, match=f"num_workers: found 2 for {gpus:.0f} GPUs"):
        worker_device(TrainConfig.of(device=device, num_workers=2))


def test_what_a_job_writes_must_outlast_its_copy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    require_lasting("--out", "data/images")
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    for path in ("/data/images", "s3://bucket/images"):
        require_lasting("--out", path)
    for path in ("data/images", "../images", ""):
        with pytest.raises(ValueError, match="--out: found the relative path"):
            require_lasting("--out", path)


def test_what_needs_a_file_system_is_offered_no_url(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    require_local("--run", "/data/runs/base")
    with pytest.raises(ValueError) as caught:
        require_local("--run", "runs/base")
    assert "expected an absolute one: a Ray job's folder" in str(caught.value)
    with pytest.raises(ValueError, match="--run: found s3://bucket/runs/base, expected a local"):
        require_local("--run", "s3://bucket/runs/base")


def private_ray(monkeypatch: pytest.MonkeyPatch, home: Path, *errors: str) -> list[dict]:
    """Let a private Ray fail with `errors`, then start; return the options of each start."""
    starts: list[dict] = []

    def init(**options: object) -> None:
        starts.append(options)
        if len(starts) <= len(errors):
            raise Exception(errors[len(starts) - 1])

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr("cluster.base.metrics.export_to_ray", lambda: None)
    monkeypatch.setenv("HOME", str(home))
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # restored at the end, even where it was not set
        monkeypatch.delenv(name)
    return starts


SLOW = "The current node timed out during startup. This could happen because some ..."


def test_a_ray_that_is_slow_to_start_is_started_again(monkeypatch, tmp_path, capsys):
    starts = private_ray(monkeypatch, tmp_path, SLOW, SLOW)
    ensure_ray()
    assert [start["address"] for start in starts] == ["local"] * 3
    assert "attempt 2 of 3" in capsys.readouterr().err
    assert "RAY_AUTH_TOKEN" not in os.environ, "Ray keeps its own in a home that can be written to"


def test_a_ray_that_never_starts_is_one_line_and_another_error_its_own(monkeypatch, tmp_path):
    private_ray(monkeypatch, tmp_path, SLOW, SLOW, SLOW)
    with pytest.raises(OSError, match="Ray did not start: found a load of .* expected"):
        ensure_ray()
    private_ray(monkeypatch, tmp_path, "another")
    with pytest.raises(Exception, match="^another$"):
        ensure_ray()


def test_a_full_disk_for_ray_s_files_is_named_before_it_starts(monkeypatch, tmp_path):
    starts = private_ray(monkeypatch, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    with pytest.raises(OSError, match="/tmp: found 5 MB free, expected 64 for Ray's files"):
        ensure_ray()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "absent"))
    with pytest.raises(OSError, match="absent: found 0 MB free"):
        ensure_ray()
    assert starts == []


def test_a_machine_without_shared_memory_is_told_what_to_mount(monkeypatch, tmp_path):
    starts = private_ray(monkeypatch, tmp_path)
    monkeypatch.setattr("cluster.base.ray_session.SHARED_MEMORY", str(tmp_path / "shm"))
    with pytest.raises(OSError, match="shm: found no such folder, .* mount -t tmpfs tmpfs"):
        ensure_ray()
    assert starts == []


def test_a_read_only_home_gets_a_token_that_lives_as_long_as_its_ray(monkeypatch, tmp_path):
    private_ray(monkeypatch, tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    ensure_ray()
    assert re.fullmatch("[0-9a-f]{64}", os.environ["RAY_AUTH_TOKEN"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_no_cluster_listens_is_one_line_and_ray_never_tries(
    scheme: str, monkeypatch, tmp_path
):
    starts = private_ray(monkeypatch, tmp_path)
    monkeypatch.setattr("cluster.base.ray_session.CONNECT_SECONDS", 0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        ensure_ray()
        assert [start["address"] for start in starts] == [address]
    with pytest.raises(OSError, match=f"^RAY_ADDRESS: found no cluster at {address} ") as caught:
        ensure_ray()
    assert len(starts) == 1 and "\n" not in str(caught.value)


def test_lines_of_rays_own_code_stay_off_stderr_and_the_last_words_of_a_crash_do_not():
    ray = "[2026-11-30 11:43:05,776 {} 24377 24377] core_worker.cc:2465: Actor"
    told = [ray.format("E"), "error: plain", ray.format("C"), ray.format("W"), "[3/5] done", "last"]
    code = (
        "import os; from cluster.base import ray_session; ray_session._filter_stderr(); "
        f"os.write(2, {chr(10).join(told).encode()!r}); os.abort()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == -signal.SIGABRT
    assert found.stderr.splitlines() == [told[1], told[2], told[4], told[5]]
