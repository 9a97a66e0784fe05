"""The folder of a run: created, opened again, cleared, and locked against a second process."""

import dataclasses
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from cluster.base.cli import (
    flattened,
    options_of,
    read_yaml,
    require_local,
    to_yaml,
    with_options,
)
from cluster.base.files import try_lock, write_text
from cluster.base.run_dir import CONFIG_NAME, LAUNCH_LOCK, LOCKS, TRAIN_LOCK
from models.weights import FINAL_NAME
from training.config import RunConfig
from training.runs.events import report_refusal

EXTENSION = ("train.num_steps", "train.extend", "train.extended")  # what a longer run changes
RETIRED = ("train.tensorboard",)  # options of before, whose value changes nothing: train.track
LAUNCH_SECONDS = 2.0  # cluster/runs.py holds the lock for a moment when it looks for its owner
TRAIN_SECONDS = 180.0  # a lost node's lock on a shared folder lasts as long as its lease there


def open_run(run_folder: str) -> Path:
    """Return the absolute path of a run; ValueError for a file or a folder of something else."""
    require_local("--run", run_folder)  # locks, renames and hard links are a file system's
    run = Path(run_folder).absolute()
    if run.exists() and not run.is_dir():
        raise ValueError(f"--run: found a file {run}, expected a folder, or nothing yet")
    others = run.is_dir() and any(path.name not in LOCKS for path in run.iterdir())
    if others and not _is_run(run):
        raise ValueError(
            f"{run}: found a folder without {CONFIG_NAME}, expected a run or nothing; name "
            f"another --run"
        )
    return run


def prepare_run(config: RunConfig, run_folder: str) -> Path:
    """Create or reopen the folder of a run and write its configuration.

    A run of more steps than before is finished no longer, before its configuration says so: it has
    no end meanwhile, and the same command continues. Raises ValueError where the run has other
    options, of those that may not change.
    """
    run = open_run(run_folder)
    if config.fresh and _is_run(run):
        with train_lock(run):
            for path in run.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name not in LOCKS:
                    path.unlink()
    elif _is_run(run):
        pair = (config, type(config)())
        now, defaults = (flattened(yaml.safe_load(to_yaml(each))) for each in pair)
        before = {**defaults, **recorded_options(run)}  # the run may be older than an option
        options, extends = options_of(type(config)), is_extension(config, run)
        for key in sorted(before.keys() | now.keys()):
            may_change = (key in options and options[key].option.may_change) or key in RETIRED
            may_change |= extends and key in EXTENSION
            may_change |= key == "train.extend" and not before.get("train.extended")
            fixed = not may_change and not key.endswith(".checkpointing")  # computes the same
            if fixed and before.get(key) != now.get(key):
                finished = "the run has finished, and another value changes nothing; "
                hint = finished if (run / FINAL_NAME).is_file() else ""
                raise ValueError(
                    f"{run}: {key}: found {before.get(key)!r} in the run, expected "
                    f"{now.get(key)!r}; {hint}rerun with the run's own configuration (--config "
                    "config.yaml) or start over with --fresh"
                )
        if extends:
            (run / FINAL_NAME).unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    # Without --fresh: the file is itself a --config, to continue with
    stored = dataclasses.replace(config, fresh=False, dry_run=False)
    write_text(run / CONFIG_NAME, to_yaml(stored))
    return run


def is_extension(config: RunConfig, run: Path) -> bool:
    """Return whether a run has fewer steps so far than its configuration now asks for."""
    recorded = None if config.fresh else recorded_options(run).get("train.num_steps")
    return isinstance(recorded, int) and recorded < config.train.schedule.num_steps


def with_extensions(config: RunConfig, run: Path) -> RunConfig:
    """Return the configuration with the ends of the run that were extended, and are now: the
    learning rate before an end stays what it was."""
    recorded = {} if config.fresh else recorded_options(run)
    ends = recorded.get("train.extended") or []
    assert isinstance(ends, list)
    if is_extension(config, run):
        schedule, end = config.train.schedule, recorded["train.num_steps"]
        ends = [*ends, f"{end}:{schedule.extend}"]
        rate = "warmed up again" if schedule.extend == "rewarm" else "as at its last step"
        print(
            f"{run}: extended from {end} to {schedule.num_steps} steps, the learning rate {rate} "
            "(--train.extend)", flush=True,
        )  # fmt: skip
    return with_options(config, **{"train.extended": tuple(ends)})


def recorded_options(run: Path) -> dict[str, object]:
    """Return the options that a run began with, by their dotted names; {} for a new one."""
    path = run / CONFIG_NAME
    return flattened(read_yaml(path)) if path.is_file() else {}


def _is_run(run: Path) -> bool:
    """Return whether a folder is a run, which --fresh may delete: config.yaml is a common name,
    and only ours has this section."""
    return (run / CONFIG_NAME).is_file() and "train" in read_yaml(run / CONFIG_NAME)


@contextmanager
def launch_lock(run: Path) -> Iterator[None]:
    """Hold the folder of a run; ValueError where another driver holds it.

    Two would mix what they write, and --fresh would delete what the other trains on.
    """
    error = ValueError(f"{run}: another process trains here; wait for it or end it")
    with ExitStack() as stack:
        try:
            stack.enter_context(_held(run / LAUNCH_LOCK, LAUNCH_SECONDS, error))
        except ValueError:
            if _is_run(run):
                report_refusal(run)
            raise
        yield


@contextmanager
def train_lock(run: Path) -> Iterator[None]:
    """Hold the checkpoints of a run: a worker may outlive its killed driver by a moment.

    Raises OSError where it does not end, so that Ray tries again.
    """
    error = OSError(f"{run}: a worker of an earlier launch still trains here; end it")
    with _held(run / TRAIN_LOCK, TRAIN_SECONDS, error):
        yield


@contextmanager
def _held(lock: Path, seconds: float, error: Exception) -> Iterator[None]:
    with lock.open("w") as file:
        deadline = time.monotonic() + seconds
        while not try_lock(file):
            if time.monotonic() > deadline:
                raise error
            time.sleep(0.1)
        yield
