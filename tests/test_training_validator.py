"""Laws of the validator: a command of the user's runs on each checkpoint beside the steps."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
from _runs import prior_run

from cluster.base.ray_session import GROUPS
from ingest.store.storage import storage_of
from training.bucket.log_parts import LogParts
from training.config import TrainConfig, ValidatorConfig
from training.runs.events import read_timeline
from training.runs.ray_train import RayWorkers
from training.runs.validator import validate, validation_config
from training.runs.worker import launch
from training.tasks.prior import build_prior

ROOT = Path(__file__).parent.parent
SCRIPT = """import sys
from pathlib import Path
run = Path(sys.argv[sys.argv.index("--run") + 1])
assert sys.argv[-1] == "--once"
whole = sorted(step.parent.name for step in run.glob("step_*/state.json"))
with (run / "seen.txt").open("a") as file:
    file.write(f"{sys.argv[1]} {whole[-1]}\\n")
print("looked at", whole)
"""


def arguments(run: Path, command: str, seconds: float = 60.0) -> dict:
    return {"command": command, "run": str(run), "folder": str(run.parent), "seconds": seconds}


def test_a_command_runs_where_the_caller_stood_and_its_words_are_kept(tmp_path: Path):
    run = tmp_path / "run"
    (run / "step_00000002").mkdir(parents=True)
    (run / "step_00000002" / "state.json").write_text("{}")
    (tmp_path / "look.py").write_text(SCRIPT)
    checkpoint: Any = None  # what Ray hands over is a pointer that the command has no need of
    assert validate(checkpoint, **arguments(run, "python look.py 'a b'")) == {"exit_code": 0}
    assert (run / "seen.txt").read_text() == "a b step_00000002\n"
    assert "looked at ['step_00000002']" in (run / "validator.log").read_text()


@pytest.mark.parametrize(
    ("command", "seconds", "message"),
    [
        ('python -c "import sys; sys.exit(3)"', 60, "exit code 3"),
        ("pyhton eval/watch.py", 60, "No such file or directory: 'pyhton'"),
        ("python -c \"import os; os.system('sleep 60')\"", 0.5, "no end after 0.5 s"),
    ],
)
def test_a_command_that_fails_is_in_the_timeline(
    command: str, seconds: float, message: str, tmp_path: Path
):
    """It ends with another code, is not there, or does not end: it is killed with its children."""
    checkpoint: Any = None
    with pytest.raises(OSError, match=f"validator: .*{message}"):
        validate(checkpoint, **arguments(tmp_path, command, seconds))
    (line,) = read_timeline(tmp_path)
    assert line["event"] == "validator failed" and message in line["message"]


def test_its_words_and_its_failure_reach_a_run_in_a_bucket(tmp_path: Path):
    """Each time they are added to those that are there."""
    url, checkpoint = "memory://test_training_validator/run", cast(Any, None)
    storage, log = storage_of(url), ""
    for code in (0, 3):
        command = f'python -c "import sys; print({code}); sys.exit({code})"'
        with nullcontext() if code == 0 else pytest.raises(OSError, match="exit code 3"):
            validate(checkpoint, **{**arguments(tmp_path / "run", command), "run": url})
        words = f"python -c 'import sys; print({code}); sys.exit({code})'"
        log += f"$ {words} --run {url} --once\n{code}\n"
        assert storage.read("validator.log").decode() == log
    copy = LogParts(storage, tmp_path, "timeline.jsonl", "reader")
    copy.pull()
    (line,) = read_timeline(tmp_path)
    assert line["event"] == "validator failed" and "exit code 3" in line["message"]
    storage.delete("")


@pytest.mark.parametrize("command", ["python 'eval/watch.py", " "])
def test_a_command_that_is_none_is_refused_before_workers_start(command: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^train\.validator: found "):
        validation_config(ValidatorConfig(command=command), str(tmp_path), {})


def test_without_a_command_ray_validates_nothing(tmp_path: Path):
    assert validation_config(ValidatorConfig(), str(tmp_path), {}) is None
    with pytest.raises(ValueError, match=r"train\.validator: found a command with num_workers 0"):
        TrainConfig.of(validator="x", num_workers=0)


@pytest.mark.parametrize("groups", [False, True])
def test_a_validator_is_placed_where_the_workers_are(
    groups: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A head that does not work offers as many CPUs as a validator asks for: none."""
    import ray
    import ray.train.torch

    asked: dict[str, Any] = {}
    trainer = type("Trainer", (), {"__init__": lambda self, *_, **given: asked.update(given),
                                   "fit": lambda self: None})  # fmt: skip
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", trainer)
    monkeypatch.setattr("cluster.base.ray_session.ensure_ray", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {GROUPS: 1.0} if groups else {"CPU": 4.0})
    settings = TrainConfig.of(validator="x", validator_gpus=0.5, num_workers=2)
    RayWorkers(tmp_path, [settings], [], only={"run": str(tmp_path)})
    where = {"gpu_group": 0.001} if groups else {}
    options = asked["validation_config"].ray_remote_kwargs
    assert options == {"num_cpus": 0, "num_gpus": 0.5, "resources": where}
    assert where.items() <= asked["scaling_config"].resources_per_worker.items()


@pytest.mark.slow
def test_ray_train_runs_the_command_after_each_checkpoint(
    tmp_path: Path, write_data: Callable[..., Path]
):
    data = write_data(tmp_path / "data", num_shards=1, samples_per_shard=16)
    script, run = tmp_path / "look.py", tmp_path / "run"
    script.write_text(SCRIPT)
    train = TrainConfig.of(
        num_steps=4, checkpoint_every=2, global_batch_size=4, num_workers=2, num_threads=1,
        precision="fp32", validator=f"{sys.executable} {script} seen",
    )  # fmt: skip
    assert launch(prior_run(data, run, train), str(run), build_prior, "prior") == 0
    seen = (run / "seen.txt").read_text().splitlines()
    assert len(seen) == 2 and seen[-1] == "seen step_00000004"  # the last one is waited for
    assert [line for line in read_timeline(run) if line["event"] == "validator failed"] == []
