"""What Ray Train's controller is given, and reports of lost workers; several runs in one start."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from _runs import HALF, SIX_STEPS, assert_same, base_run, done, named, prior_run, tensors_of

from cluster.base.cli import with_options
from cluster.base.files import write_json
from cluster.base.jsonl import read_lines
from cluster.base.run_dir import HEARTBEATS_FOLDER
from models.weights import exported
from training import clip, decoder, prior
from training.config import PriorRunConfig, RunConfig, WorkersConfig
from training.runs.events import read_timeline
from training.runs.ray_train import (
    RAY_TIMES,
    loss_callback,
    root_cause,
    shared_workers,
    train_ordered,
)
from training.runs.worker import launch


def test_what_is_lost_is_reported_in_one_line():
    """Ray wraps an actor's death in a failed health check, and that in an error of the group."""
    health, group = RuntimeError("A worker health check failed."), RuntimeError("of the group")
    health.__dict__["health_check_failure"] = ConnectionError("it died\n\nlast words")
    group.__dict__["worker_failures"] = {1: health}
    assert root_cause(group) == "ConnectionError: it died"
    assert len(root_cause(ValueError("word " * 1000))) <= 160


def test_rays_own_names_of_times_are_those_that_are_set():
    """A name that Ray does not know would be no setting at all."""
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    assert RAY_TIMES.keys() <= ENV_VARS_TO_PROPAGATE


UNPICKLE = """
import pickle, sys
pickle.loads(bytes.fromhex(sys.argv[1]))
print(sorted({name.partition(".")[0] for name in sys.modules} & {*sys.argv[2:]}))
"""


def test_what_rays_controller_is_given_imports_no_model(tmp_path: Path):
    """It would import it before it starts the workers, which import it again."""
    from ray import cloudpickle

    builds = [script.BUILD for script in (clip, decoder, prior)]
    arguments = {"orders": str(tmp_path), "builds": builds, "workers": WorkersConfig()}
    arguments["only"] = {"run": str(tmp_path)}
    given = cloudpickle.dumps(  # pyright: ignore[reportPrivateImportUsage]
        (train_ordered, arguments, loss_callback(tmp_path, None))
    )
    heavy = ("torch", "deepspeed", "open_clip")
    found = done([sys.executable, "-c", UNPICKLE, given.hex(), *heavy])
    assert found.returncode == 0, found.stderr
    assert found.stdout == "[]\n"


def test_a_launch_imports_no_clip_which_its_workers_may_not_need_either():
    """open_clip takes longer to import than torch, with what it imports in turn."""
    heavy = ["open_clip", "timm", "torchvision", "transformers", "wandb", "pandas", "deepspeed"]
    imports = "import sys, training.data.inputs, training.runs.worker, training.tasks.decoder\n"
    found = done([sys.executable, "-c", f"{imports}print({{*sys.modules}} & {{*{heavy}}})"])
    assert found.stdout == "set()\n", found.stderr


def test_a_loss_is_reported_and_a_heartbeat_cut_short_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    """What Ray's controller calls must not raise: it would end the training."""
    orders = tmp_path / "orders"
    orders.mkdir()
    write_json(orders / "0000.json", {"run": str(tmp_path / "before")})
    (orders / "0000.done").touch()
    write_json(orders / "0001.json", {"run": str(tmp_path)})
    heartbeat = tmp_path / HEARTBEATS_FOLDER / "rank_0000.json"
    heartbeat.parent.mkdir()
    heartbeat.write_text('{"step": 7')
    losses, context = loss_callback(orders, None), None
    losses.after_exception(context, {0: RuntimeError("its node is gone")})
    assert read_timeline(tmp_path)[-1]["message"] == "rank 0: RuntimeError: its node is gone"
    assert "lost, and not recorded" in capsys.readouterr().out
    heartbeat.write_text('{"step": 7}')
    losses.after_exception(context, {0: RuntimeError("its node is gone")})
    (incident,) = read_lines(tmp_path / "incidents.jsonl")
    assert (incident["kind"], incident["step"]) == ("lost", 7)

    (orders / "0001.done").touch()
    losses.after_exception(context, {0: RuntimeError("its node is gone")})
    assert "lost between two runs: rank 0" in capsys.readouterr().out
    assert len(read_lines(tmp_path / "incidents.jsonl")) == 1


# -- one start for several runs --------------------------------------------------------------------


def build_with_a_death(config: PriorRunConfig) -> object:
    """The worker dies once, in the step after the first checkpoint."""
    from training.tasks.prior import build_prior

    job, calls, died = build_prior(config), iter(range(1000)), Path(config.run) / "died"

    def objective(model, batch):
        if next(calls) > config.train.grad_accum_steps * HALF and not died.exists():
            died.touch()
            os._exit(1)
        return job.objective(model, batch)

    return dataclasses.replace(job, objective=objective)


def attempts(run: Path) -> list[str]:
    """Return the events of a run that its workers or their loss have made."""
    return [each["event"] for each in read_timeline(run) if each["event"] != "stepped"]


@pytest.mark.slow
def test_runs_of_one_start_end_as_those_of_their_own_and_a_death_concerns_one(
    tmp_path: Path, write_data: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    """Bit for bit; a worker that dies in the third trains neither of the others again."""
    from cluster.base.ray_session import ensure_ray

    data = write_data(tmp_path / "data", num_shards=2, samples_per_shard=20)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    ensure_ray()
    train = with_options(SIX_STEPS, num_workers=1)

    def trained(config: RunConfig, run: Path, build: str) -> dict:
        assert launch(config, str(run), build, "prior") == 0
        return tensors_of(exported(run))

    def two(folder: Path) -> list[dict]:
        of_prior = prior_run(data, folder / "prior", train)
        of_base = base_run(data, folder / "base", train)
        return [
            trained(of_prior, folder / "prior", prior.BUILD),
            trained(of_base, folder / "base", decoder.BUILD),
        ]

    try:
        alone, interrupt = two(tmp_path / "alone"), signal.getsignal(signal.SIGINT)
        builds, folder = [prior.BUILD, decoder.BUILD], tmp_path / "shared"
        runs = dict.fromkeys([folder / name for name in ("prior", "base", "third")], train)
        with shared_workers(folder, runs, builds):
            shared, third = two(folder), folder / "third"
            shared.append(trained(prior_run(data, third, train), third, named(build_with_a_death)))
            assert signal.getsignal(signal.SIGINT) is interrupt, "Ctrl-C is Python's"
    finally:
        ray.shutdown()
    for found, expected in zip(shared, [*alone, alone[0]], strict=True):
        assert_same(found, expected)
    for run in (folder / "prior", folder / "base"):
        assert attempts(run) == ["launched", "placed", "restored"]
    again = ["placed", "restored"]
    assert attempts(third) == ["launched", *again, "lost", *again] and (third / "died").exists()
    kinds = [incident["kind"] for incident in read_lines(third / "incidents.jsonl")]
    assert kinds.count("lost") == 1, kinds  # a loaded machine may have others
