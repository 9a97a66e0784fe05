"""Where a run happens: in this process, or in workers that Ray Train places and restarts."""

import dataclasses
import errno
import os
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import yaml

from cluster.base.cli import (
    DONE,
    INCOMPLETE,
    flattened,
    options_of,
    read_yaml,
    require_local,
    to_yaml,
    with_options,
)
from cluster.base.run_dir import CONFIG_NAME, LAUNCH_LOCK, LOCKS, TRAIN_LOCK
from models.weights import FINAL_NAME
from training.config import RunConfig, TrainConfig
from training.engine.precision import compute_whole_fp32, device_of_run, native_bf16, settled
from training.runs.cards import ensure_cards, record_code
from training.runs.events import record_event
from training.runs.signals import forget_stop, stopping_on_sigterm

if TYPE_CHECKING:
    import torch
    from torch import nn

LAUNCH_SECONDS = 2.0  # cluster/runs.py holds the lock for a moment where it looks who has it
LOCK_SECONDS = 180  # a lost node's lock on a shared folder lasts as long as its lease there
ERROR_NAMES = "error_*.txt"  # why a rank stopped, by rank
HANG_UP_SECONDS = 5
# A wrong request, or a training that diverges: the same in every attempt. A subclass of ValueError
# such as UnicodeDecodeError is told as a ValueError, by its message.
TOLD = (ValueError, FloatingPointError, OSError)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of what a disk says, the same in every attempt


def launch(config: RunConfig, run_folder: str, build: Callable, model_name: str) -> int:
    """Train what `build(config) -> Task` describes, or continue it; returns the exit code.

    A finished run is left as it is. Raises ValueError when the folder holds another configuration.
    """
    run = _folder_of(run_folder)
    run.mkdir(parents=True, exist_ok=True)
    with _launched_alone(run):  # before anything in it is touched
        return _launch(config, run, build, model_name)


def _launch(config: RunConfig, run: Path, build: Callable, model_name: str) -> int:
    """Train in a folder that no other driver has."""
    config = with_precision(config, run)
    prepare_run(config, str(run))
    config = dataclasses.replace(config, run=str(run))  # workers have folders of their own
    if (run / FINAL_NAME).is_file():
        print(f"{run}: finished already; --fresh starts over")
        ensure_cards(run)
        return 0
    record_code(run)
    from training.runs.follower import Follower
    from training.runs.profiling import window

    window(config.train.logging.profile)  # a slip of the pen is told before workers start
    forget_stop(run)
    record_event(run, "launched")
    workers = config.train.workers
    if workers.num_workers == 0 and workers.zero_stage:
        print(f"zero_stage: {workers.zero_stage} has no effect in one process, which keeps all")
    with Follower(run, model_name, tensorboard=config.train.logging.tensorboard):
        if workers.num_workers == 0:
            train_here(config, run, build)
        else:
            _train_under_ray(config, run, build)
    if (run / FINAL_NAME).is_file():
        ensure_cards(run)
        return DONE
    forget_stop(run)
    print(f"{run}: stopped, as was wished, at a checkpoint; rerun the same command to continue")
    return INCOMPLETE


def with_precision(config: RunConfig, run: Path) -> RunConfig:
    """Return the configuration with a precision in the place of "auto".

    That is what the run began with, else bf16 where the workers' device computes in it.
    """
    if config.train.workers.precision != "auto":
        return config
    began = run / CONFIG_NAME
    kept = flattened(read_yaml(began)).get("train.precision") if began.is_file() else None
    here = _device(config.train)
    elsewhere = _gpus_elsewhere(config.train)
    settles = "bf16" if elsewhere else settled("auto", here)
    found = kept if kept and not config.fresh else settles
    note = ""
    if found == "bf16" and not elsewhere and not native_bf16(here):
        note = ", as the run began; this device only emulates it, many times slower"
    print(f"precision: {found}{note}", flush=True)
    return with_options(config, **{"train.precision": found})


def _device(settings: TrainConfig) -> str:
    """Return the kind of device that this process would train on."""
    return "cuda" if settings.workers.device != "cpu" and _has_cuda() else "cpu"


def _gpus_elsewhere(settings: TrainConfig) -> bool:
    """Say whether the workers have GPUs of a cluster, of which this machine may have none."""
    workers = settings.workers
    if not workers.num_workers or workers.device == "cpu" or not os.environ.get("RAY_ADDRESS"):
        return False
    from cluster.base.ray_session import ensure_ray, has_gpus

    ensure_ray()
    return has_gpus()


def prepare_run(config: RunConfig, run_folder: str) -> Path:
    """Create or reopen the folder of a run and write its configuration."""
    run = _folder_of(run_folder)
    ours = _is_ours(run)
    if config.fresh and ours:
        _clear(run)
        ours = False
    if ours:
        _require_same(run, config)
    run.mkdir(parents=True, exist_ok=True)
    part = run / f"{CONFIG_NAME}.part"
    # without the wish to start over: the file is itself a --config, to continue with
    part.write_text(to_yaml(dataclasses.replace(config, fresh=False, dry_run=False)))
    part.replace(run / CONFIG_NAME)
    return run


def _folder_of(run_folder: str) -> Path:
    """Return the folder of a run; ValueError for one that holds something else, or a file."""
    require_local("--run", run_folder)  # locks, renames and hard links are a file system's
    run = Path(run_folder).absolute()
    if run.exists() and not run.is_dir():
        raise ValueError(f"--run: found a file {run}, expected a folder, or nothing yet")
    others = run.is_dir() and any(path.name not in LOCKS for path in run.iterdir())
    if others and not _is_ours(run):
        raise ValueError(
            f"{run}: found a folder without {CONFIG_NAME}, expected a run or nothing; name "
            f"another --run"
        )
    return run


def _is_ours(run: Path) -> bool:
    """Say whether a folder is a run: config.yaml is a common name, and only one with our section
    marks a folder that --fresh may delete."""
    return (run / CONFIG_NAME).is_file() and "train" in read_yaml(run / CONFIG_NAME)


def _clear(run: Path) -> None:
    """Delete all of a run but its locks, once no worker of a killed driver writes there."""
    with _locked(run, 0):
        for path in run.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in LOCKS:
                path.unlink()


@contextmanager
def _launched_alone(run: Path):
    """Hold a run's folder; ValueError where another driver does: two would mix what they write, and
    --fresh would delete what the other trains on."""
    with (run / LAUNCH_LOCK).open("w") as file:
        deadline = time.monotonic() + LAUNCH_SECONDS
        while not _try_lock(file):
            if time.monotonic() > deadline:
                raise ValueError(f"{run}: another process trains here; wait for it or end it")
            time.sleep(0.05)
        yield


def _require_same(run: Path, config: RunConfig) -> None:
    """Refuse a configuration that differs from the run's in more than what may change."""
    now, defaults = (flattened(yaml.safe_load(to_yaml(each))) for each in (config, type(config)()))
    before = {**defaults, **flattened(read_yaml(run / CONFIG_NAME))}  # may be older than an option
    options = options_of(type(config))
    may_change = {name for name, field in options.items() if field.option.may_change}
    for key in sorted(before.keys() | now.keys()):
        if key not in may_change and before.get(key) != now.get(key):
            raise ValueError(
                f"{run}: {key}: found {before.get(key)!r} in the run, expected {now.get(key)!r}; "
                "rerun with the run's own configuration (--config config.yaml) or start over "
                "with --fresh"
            )


@contextmanager
def _locked(run: Path, rank: int):
    """Hold the run: a worker that outlives its killed driver by a moment must not write beside
    its successor. OSError where it does not go away, so that Ray tries again."""
    if rank:
        yield
        return
    with (run / TRAIN_LOCK).open("w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _try_lock(file):
            if time.monotonic() > deadline:
                raise OSError(f"{run}: a worker of an earlier launch still trains here; end it")
            time.sleep(0.5)
        yield


def _try_lock(file: IO[str]) -> bool:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def train_here(config: RunConfig, run: Path, build: Callable) -> None:
    """Train in this very process with the plain engine."""
    from training.engine.engines import PlainEngine

    with stopping_on_sigterm(run):
        _train(config, run, build, PlainEngine, rank=0, world_size=1)


def _train(
    config: RunConfig, run: Path, build: Callable, engine_class: type, *, rank: int, world_size: int
) -> None:
    import torch

    from training.engine.allocator import ALL, KEPT_BYTES, keep_freed_memory
    from training.loop import train
    from training.runs.reporting import Reporter
    from training.runs.watchdog import Watchdog

    if not rank:
        record_event(run, "placed")
    settings: TrainConfig = config.train
    kind = _device(settings)
    if settings.workers.device not in ("auto", kind):
        raise ValueError(
            f"train.device: found {settings.workers.device} without a GPU, expected cpu"
        )
    device = device_of_run(settings.workers.device)
    compute_whole_fp32()
    keep_freed_memory(ALL if device.type == "cpu" else KEPT_BYTES)
    if device.type == "cpu":
        torch.set_num_threads(settings.workers.num_threads)
    watchdog = Watchdog(run, rank, world_size, settings.faults.hang_seconds)
    with _locked(run, rank), watchdog:
        torch.manual_seed(settings.seed)  # every rank draws the same initial weights
        task = build(config)
        if settings.validator.command:
            from training.runs.validator import hand_over

            task = dataclasses.replace(task, on_checkpoint=partial(hand_over, rank=rank))
        peak = world_size * _peak_samples(task.model, settings, device)
        if settings.workers.compile:
            compile_model(task.model)
        engine = engine_class(task.model, task.objective, settings, device)
        reporter = Reporter(run, settings, rank, watchdog=watchdog, peak_samples_per_second=peak)
        train(task, config, engine, run, reporter)


def _peak_samples(model: "nn.Module", settings: TrainConfig, device: "torch.device") -> float:
    """Return the samples a second that one device would train on at its peak; 0 where its peak is
    not known, or is not of this precision."""
    from models.costs import training_flops
    from training.runs.profiling import peak_tflops

    known = peak_tflops(device) if settings.workers.precision == "bf16" else 0.0
    peak = settings.logging.peak_tflops or known
    return peak * 1e12 / training_flops(model) if peak else 0.0


def compile_model(model: "nn.Module") -> None:
    """Compile a network in place: what its objective calls, which for CLIP is its two towers."""
    from open_clip import CLIP

    parts = (model.visual, model.transformer) if isinstance(model, CLIP) else (model,)
    for part in parts:
        part.compile()


def _train_under_ray(config: RunConfig, run: Path, build: Callable) -> None:
    from training.runs.ray_train import fit

    for told in run.glob(ERROR_NAMES):
        told.unlink()
    try:
        fit(_worker, {"config": config, "run": str(run), "build": build}, config.train, run)
    finally:  # where a rank told why, that is what matters, not what Ray made of the others
        _raise_told(run)


def _raise_told(run: Path) -> None:
    for told in sorted(run.glob(ERROR_NAMES))[:1]:
        name, message = told.read_text().split(" ", 1)
        kind = next((kind for kind in TOLD if kind.__name__ == name), ValueError)
        raise kind(message)


def _worker(arguments: dict) -> None:
    """Train as one rank; Ray Train has set up torch.distributed.

    What would go wrong again in every attempt is left for the driver to tell, and the worker
    returns, since Ray would restart one that raises.
    """
    import torch.distributed as dist

    run, config, build = Path(arguments["run"]), arguments["config"], arguments["build"]
    os.environ.setdefault("DS_ACCELERATOR", _device(config.train))
    from training.engine.engines import ZeroEngine

    if any(run.glob(ERROR_NAMES)):  # Ray tries again what no attempt can do
        return
    try:
        ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
        _train(config, run, build, ZeroEngine, **ranks)
    except TOLD as error:
        if isinstance(error, OSError) and error.errno not in FULL:
            raise  # a storage may answer the next attempt
        _tell(run, error, dist.get_rank())
        if not _all_told(run, dist.get_world_size()):
            # The others may wait for this rank in a collective, for longer than anyone would watch
            # and whatever it says: only closed connections reach them there.
            os._exit(1)


def _tell(run: Path, error: Exception, rank: int) -> None:
    """Leave `error`, one of `TOLD`, for the driver."""
    part = run / f"error_{rank:05d}.part"
    part.write_text(f"{type(error).__name__} {error}")
    part.replace(part.with_suffix(".txt"))


def _all_told(run: Path, world_size: int) -> bool:
    """Wait a moment for the other ranks; say whether all met an error, as with a wrong request."""
    deadline = time.monotonic() + HANG_UP_SECONDS
    while len(list(run.glob(ERROR_NAMES))) < world_size:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
