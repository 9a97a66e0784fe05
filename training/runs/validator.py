"""Validation beside a training under Ray Train, by a command that the caller hands in.

    python training/decoder.py --train.num-workers 4 \\
        --train.validator "python eval/watch.py --prior runs/prior --captions data/test/images" ...

After each checkpoint Ray Train starts `COMMAND --run RUN --once` as a task of its own (its
ValidationConfig), one at a time, while the workers train on; the last one is waited for. Training
knows a command, and nothing of evaluation. This module imports no torch: Ray's controller does it.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.config import TrainConfig
from training.runs.events import record_event

if TYPE_CHECKING:
    from ray.train import Checkpoint, ValidationConfig

LOG_NAME = "validator.log"
POINTER_NAME = "checkpoint.json"  # {"folder"}: ours, which Ray is only told of


def validation_config(
    settings: TrainConfig, run: Path, group: dict[str, float]
) -> "ValidationConfig | None":
    """Return what Ray Train is to do with each checkpoint; None where no command is handed in.

    group: resources by which the task is placed among the workers' nodes. It asks for no CPU: where
    workers hold them all, it would wait for the run to end.
    """
    if not settings.validator.command:
        return None
    _words(settings.validator.command)  # a slip of the pen is told before workers start
    from ray.train import ValidationConfig, ValidationTaskConfig

    told = {
        "command": settings.validator.command, "run": str(run), "here": os.getcwd(),
        "seconds": settings.validator.seconds,
    }  # fmt: skip
    fn: Any = validate  # Ray's type wants any keyword; ours are those of fn_kwargs
    return ValidationConfig(
        fn=fn,
        task_config=ValidationTaskConfig(fn_kwargs=told),
        ray_remote_kwargs={
            "num_cpus": 0, "num_gpus": settings.validator.num_gpus, "resources": group,
        },
    )  # fmt: skip


def _words(command: str) -> list[str]:
    """Return the words of a command; ValueError where a quotation does not end, or none is
    there."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"train.validator: found {command!r} ({error})") from error
    if not words:
        raise ValueError(f"train.validator: found {command!r}, expected a command")
    return words


def hand_over(folder: Path, rank: int) -> None:
    """Tell Ray Train of a checkpoint; every rank calls this, and waits a moment for the others.

    Ray is given a pointer: the fragments stay where they are, and are ours to prune.
    """
    import ray.train

    if rank:
        ray.train.report({})
        return
    with tempfile.TemporaryDirectory() as pointer:
        (Path(pointer) / POINTER_NAME).write_text(json.dumps({"folder": str(folder)}))
        ray.train.report(
            {"step": folder.name},
            checkpoint=ray.train.Checkpoint.from_directory(pointer),
            checkpoint_dir_name=folder.name,
            validation=True,
        )


def validate(
    checkpoint: "Checkpoint", *, command: str, run: str, here: str, seconds: float
) -> dict[str, Any]:
    """Run the command on a run's checkpoints; its words go to <run>/validator.log.

    Raises OSError where it is not found, fails or takes longer than `seconds`: the driver prints
    that, from the timeline, and training goes on.
    """
    with (Path(run) / LOG_NAME).open("a") as log:
        log.write(f"$ {command} --run {run} --once\n")
        log.flush()
        words = [*_words(command), "--run", run, "--once"]
        try:
            code = _run(words, seconds, cwd=here, stdout=log, stderr=log)
            told = f"exit code {code}" if code is not None else f"no end after {seconds:g} s"
        except OSError as error:  # no such program or folder on the node of this task
            code, told = None, str(error)
    if code != 0:
        told = f"{told}; see {LOG_NAME}"
        record_event(Path(run), "validator failed", message=told)
        raise OSError(f"{run}: validator: {told}")
    return {"exit_code": code}


def _run(words: list[str], seconds: float, **options: Any) -> int | None:
    """Run a command and return its exit code; None where it took longer, and was killed."""
    words[0] = sys.executable if words[0] in ("python", "python3") else words[0]
    with subprocess.Popen(words, start_new_session=True, **options) as child:
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # with what it started itself
            return None
