"""Validation beside a training under Ray Train, by a command of the user's.

    python training/decoder.py --train.num-workers 4 \\
        --train.validator "python eval/watch.py --prior runs/prior --captions data/test/images" ...

After each checkpoint Ray Train starts `COMMAND --run RUN --once` as a task of its own (its
ValidationConfig), one at a time, while the workers train on; the last one is waited for. Training
knows a command, and nothing of evaluation. This module imports no torch: Ray's controller does it.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.base.files import Json, write_json
from cluster.base.run_dir import VALIDATOR_LOG_NAME
from training.bucket.log_parts import notes_for
from training.config import ValidatorConfig
from training.runs.events import record_event

if TYPE_CHECKING:
    from ray.train import Checkpoint, ValidationConfig

POINTER_NAME = "checkpoint.json"  # {"folder"}: of the checkpoint, which stays where it is


def validation_config(
    validator: ValidatorConfig, run: str, group: dict[str, float]
) -> "ValidationConfig | None":
    """Return what Ray Train does with each checkpoint; None without a command.

    group: resources by which the task is placed among the workers' nodes. It asks for no CPU: where
    workers hold them all, it would wait for the run to end. Raises ValueError for what is no
    command.
    """
    if not validator.command:
        return None
    _split(validator.command)
    from ray.train import ValidationConfig, ValidationTaskConfig

    arguments = {
        "command": validator.command, "run": run, "folder": os.getcwd(),
        "seconds": validator.seconds,
    }  # fmt: skip
    resources = {"num_cpus": 0, "num_gpus": validator.num_gpus, "resources": group}
    fn: Any = validate  # Ray's type takes any keyword; ours takes those of fn_kwargs
    task = ValidationTaskConfig(fn_kwargs=arguments)
    return ValidationConfig(fn=fn, task_config=task, ray_remote_kwargs=resources)


def _split(command: str) -> list[str]:
    """Split a command; ValueError where a quotation does not end, or it is empty."""
    try:
        arguments = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"train.validator: found {command!r} ({error})") from error
    if not arguments:
        raise ValueError(f"train.validator: found {command!r}, expected a command")
    return arguments


def report_checkpoint(folder: Path, rank: int) -> None:
    """Report a checkpoint to Ray Train; every rank calls this, and waits a moment for the others.

    Ray is given a pointer: the fragments stay where they are, and are ours to prune.
    """
    import ray.train

    if rank:
        ray.train.report({})
        return
    with tempfile.TemporaryDirectory() as pointer:
        write_json(Path(pointer) / POINTER_NAME, {"folder": str(folder)})
        ray.train.report(
            {"step": folder.name},
            checkpoint=ray.train.Checkpoint.from_directory(pointer),
            checkpoint_dir_name=folder.name,
            validation=True,
        )


def validate(
    checkpoint: "Checkpoint", *, command: str, run: str, folder: str, seconds: float
) -> Json:
    """Run the command in `folder` on a run's checkpoints; its output goes to <run>/validator.log.

    Raises OSError where it is not found, fails or takes longer than `seconds`: the driver prints
    that, from the timeline, and training continues.
    """
    arguments = [*_split(command), "--run", run, "--once"]
    with notes_for(run) as notes:
        message = _run(arguments, folder, seconds, notes / VALIDATOR_LOG_NAME)
        if message:
            message = f"{message}; see {VALIDATOR_LOG_NAME}"
            record_event(notes, "validator failed", message=message)
            raise OSError(f"{run}: validator: {message}")
    return {"exit_code": 0}


def _run(arguments: list[str], folder: str, seconds: float, path: Path) -> str:
    """Run a command, whose output goes to the end of a file; return what went wrong, or ""."""
    program, *rest = arguments
    if program in ("python", "python3"):
        program = sys.executable
    with path.open("a") as log:
        log.write(f"$ {shlex.join(arguments)}\n")
        log.flush()
        try:
            with subprocess.Popen(
                [program, *rest], cwd=folder, stdout=log, stderr=log, start_new_session=True
            ) as child:
                try:
                    code = child.wait(seconds)
                    return f"exit code {code}" if code else ""
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, signal.SIGKILL)  # with what it started itself
                    return f"no end after {seconds:g} s"
        except OSError as error:  # no such program or folder on the node of this task
            return str(error)
