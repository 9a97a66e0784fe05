"""Where work is placed: on its group where the head says that there are groups, else anywhere."""

import pytest
import ray

from cluster.base.cli import JOB_VARIABLE, require_lasting, require_local
from cluster.base.ray_session import GROUPS, group_resources, has_gpus
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
