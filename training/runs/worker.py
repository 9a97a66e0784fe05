"""Where a run happens: in this process, or in workers that Ray Train places and restarts.

`launch` is the driver; `train_rank` is one rank, in this process or in a worker of Ray Train.
"""

import dataclasses
import errno
import importlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.base.cli import (
    DONE,
    INCOMPLETE,
    STOPPED_ON_REQUEST,
    merged,
    option_values,
    read_yaml,
    with_options,
)
from cluster.base.files import write_json, write_text
from cluster.base.machine import threads_for
from cluster.base.run_dir import CODE_NAME, CONFIG_NAME, error_path, error_paths
from ingest.store.storage import is_remote
from models.weights import FINAL_NAME, exported
from training.bucket.bucket_mirror import DRIVER, NODE, mirror_of
from training.bucket.mirror import Mirror
from training.config import RunConfig, TrainConfig, WorkersConfig
from training.engine.precision import compute_whole_fp32, device_of_run, native_bf16, settled
from training.runs.cards import DATA_CARD, MODEL_CARD, code_version, ensure_cards
from training.runs.events import record_event
from training.runs.run_folder import (
    launch_lock,
    open_run,
    prepare_run,
    recorded_options,
    train_lock,
    with_extensions,
)
from training.runs.signals import stopping_on_sigterm

if TYPE_CHECKING:
    import torch
    from torch import nn

    from training.loop import Task

# What makes a task of a script's configuration: a function, or "module:function", which only those
# who train import
Build = Callable[[Any], "Task"] | str

# A wrong request, or a training that diverges: the same in every attempt. The driver raises the
# error of a subclass, such as UnicodeDecodeError, as a ValueError with its message.
FINAL_ERRORS = (ValueError, FloatingPointError, OSError)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of OSErrors, these alone
HANG_UP_SECONDS = 5


def imported(name: str) -> Callable:
    """Return the function or class that "module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def launch(config: RunConfig, run_folder: str, build: Build, model_name: str) -> int:
    """Train what `build(config)` returns, or continue it; returns the exit code.

    A finished run is left as it is. Raises ValueError when the folder holds another configuration.
    """
    from training.runs.follower import Follower
    from training.runs.profiling import window
    from training.runs.trackers import Tracking, require_trackers

    require_trackers(config.train.logging.track)
    workers, logging = config.train.workers, config.train.logging
    mirror = open_mirror(config, run_folder)
    run = mirror.folder
    run.mkdir(parents=True, exist_ok=True)
    with launch_lock(run), mirror.leased():  # before anything in it is touched
        mirror.begin(fresh=config.fresh)
        config = with_extensions(resolve_precision(config, run), run)
        was_finished = (run / FINAL_NAME).is_file()
        prepare_run(config, str(run))
        config = dataclasses.replace(config, run=str(run))  # workers have folders of their own
        tracking = Tracking(mirror, logging.track, option_values(config))
        if (run / FINAL_NAME).is_file():
            print(
                f"{mirror.place}: finished already; --fresh starts over, more --train.num-steps "
                "train on"
            )
            with tracking:  # a tracker may lack the last reports
                pass
        else:
            # Whatever is wrong with the request is found before workers start
            window(logging.profile)
            if was_finished:
                mirror.remove(run / FINAL_NAME)
            if not (run / CODE_NAME).is_file():
                write_json(run / CODE_NAME, code_version())  # with which the run begins
            mirror.forget_stop()
            record_event(run, "launched")
            mirror.push()
            if workers.num_workers == 0 and workers.zero_stage:
                stage = workers.zero_stage
                print(f"zero_stage: {stage} has no effect in one process, which keeps all")
            under_ray = workers.num_workers > 0
            alike = mirror.kept_alike(collects=True) if under_ray else nullcontext()
            with Follower(run, model_name), tracking, alike:
                if under_ray:
                    _train_under_ray(config, mirror, build)
                else:
                    train_here(config, mirror, build)

        if not (run / FINAL_NAME).is_file():
            mirror.forget_stop()
            print(
                f"{mirror.place}: {STOPPED_ON_REQUEST}, at a checkpoint; rerun the same command to "
                "continue"
            )
            return INCOMPLETE
        mirror.pull_end()
        ensure_cards(run)
        mirror.push(*(exported(run) / name for name in (MODEL_CARD, DATA_CARD)))
        if not tracking.is_pending:  # else its client still writes there
            mirror.clean()
        return DONE


def open_mirror(config: RunConfig, run_folder: str) -> Mirror:
    """Return the mirror of a run, by its folder or URL, as the driver sees it.

    Raises ValueError for a file or a folder of something else.
    """
    if not is_remote(run_folder):
        return Mirror(open_run(run_folder))
    role = DRIVER if config.train.workers.num_workers else NODE
    return mirror_of(run_folder, config.scratch, role)


def resolve_precision(config: RunConfig, run: Path) -> RunConfig:
    """Return the configuration with a precision in the place of "auto".

    That is what the run began with, else bf16 where the workers' device computes in it.
    """
    workers = config.train.workers
    if workers.precision != "auto":
        return config
    cluster_gpus = False  # of which this machine may have none
    if workers.num_workers and workers.device != "cpu" and os.environ.get("RAY_ADDRESS"):
        from cluster.base.ray_session import ensure_ray, has_gpus

        ensure_ray()
        cluster_gpus = has_gpus()
    device = _device_type(workers)
    recorded = None if config.fresh else recorded_options(run).get("train.precision")
    precision = recorded or ("bf16" if cluster_gpus else settled("auto", device))
    note = ""
    if precision == "bf16" and not cluster_gpus and not native_bf16(device):
        note = ", as the run began; this device only emulates it, many times slower"
    print(f"precision: {precision}{note}", flush=True)
    return with_options(config, **{"train.precision": precision})


def _device_type(workers: WorkersConfig) -> str:
    """Return the type of device that this process would train on; uses no memory of a GPU."""
    import torch

    return "cuda" if workers.device != "cpu" and torch.cuda.is_available() else "cpu"


def train_here(config: RunConfig, mirror: Mirror, build: Build) -> None:
    """Train in this very process with the plain engine."""
    from training.engine.engines import PlainEngine

    mirror.pull()
    with stopping_on_sigterm(mirror.folder), mirror.kept_alike():
        train_rank(config, mirror, build, PlainEngine, rank=0, world_size=1)


def train_rank(
    config: RunConfig, mirror: Mirror, build: Build, engine_class: Any, *, rank: int,
    world_size: int,
) -> None:  # fmt: skip
    """Train as one rank, with an engine of that class."""
    import torch

    from models.costs import flops_of_captions
    from training.engine.activations import settle_checkpointing
    from training.engine.allocator import ALL, KEPT_BYTES, keep_freed_memory
    from training.loop import train
    from training.runs.profiling import peak_tflops
    from training.runs.reporting import Reporter
    from training.runs.watchdog import Watchdog

    # Device
    run, settings = mirror.folder, config.train
    if not rank:
        record_event(run, "placed")
    device = device_of_run(settings.workers.device)
    if settings.workers.device not in ("auto", device.type):
        raise ValueError(
            f"train.device: found {settings.workers.device} without a GPU, expected cpu"
        )
    compute_whole_fp32()
    torch.backends.cudnn.benchmark = True  # shapes are the same in every step
    keep_freed_memory(ALL if device.type == "cpu" else KEPT_BYTES)
    if device.type == "cpu":
        threads = threads_for(settings.workers.num_threads)
        torch.set_num_threads(threads)
        if not rank and settings.workers.num_threads is None:
            print(f"threads: {threads} a worker, of this machine's cores", flush=True)

    lock = nullcontext() if rank else train_lock(run)
    limit = settings.faults.hang_seconds
    with lock, Watchdog(run, rank, world_size, limit, mirror.hurry) as watchdog:
        # Model and data; every rank draws the same initial weights
        torch.manual_seed(settings.seed)
        task: Task = (imported(build) if isinstance(build, str) else build)(config)
        if settings.validator.command:
            from training.runs.validator import report_checkpoint

            task = dataclasses.replace(task, on_checkpoint=partial(report_checkpoint, rank=rank))

        # Activations are kept where they fit
        on_gpu = device.type == "cuda"
        memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else 0
        if on_gpu and world_size > 1:  # of the smallest: ranks that chose apart would wait for ever
            smallest = torch.tensor(memory, device=device)
            torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
            memory = int(smallest)
        choice = settle_checkpointing(task.model, settings, memory, world_size)
        if choice and not rank:
            print(choice, flush=True)

        # The devices' peak, in FLOP/s; 0 where it is not known, or of another precision
        known = peak_tflops(device) if settings.workers.precision == "bf16" else 0.0
        tflops = settings.logging.peak_tflops or known
        flops = flops_of_captions(task.model) if tflops else None

        # Train
        if compiles(settings, device, say=not rank):
            compile_model(task.model, device)
            if task.encoder is not None:
                compile_model(task.encoder, device)
        engine = engine_class(task.model, task.objective, settings, device)
        reporter = Reporter(
            run, settings, rank, watchdog=watchdog, flops=flops, peak=world_size * tflops * 1e12
        )
        train(task, config, engine, mirror, reporter)


def compiles(settings: TrainConfig, device: "torch.device", *, say: bool) -> bool:
    """Return whether to compile, and print the choice where the configuration leaves it open."""
    workers = settings.workers
    if workers.compile is not None:
        return workers.compile
    why_not = _why_not_compiled(settings, device)
    if say:
        print(f"compile: {f'false, {why_not}' if why_not else 'true, on a GPU'}", flush=True)
    return not why_not


def _why_not_compiled(settings: TrainConfig, device: "torch.device") -> str:
    """Return why a network is not compiled unless that is asked for; "" where it is."""
    import torch

    if device.type != "cuda":
        return "on a CPU"
    if settings.workers.zero_stage == 3:
        return "with zero_stage 3"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "on a GPU before Ampere, which has no bf16"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "without a C compiler, which Triton needs"
    return ""


def compile_model(model: "nn.Module", device: "torch.device") -> None:
    """Compile a model in place for a device, part by part: see models/networks/compiling.py.

    Feature maps of a U-Net on a GPU are channels-last then: convolutions copy none of them, and
    group norm is no longer the kernel that would.
    """
    from open_clip import CLIP
    from open_clip.transformer import ResidualAttentionBlock

    from models.degradation import jpeg_constants
    from models.diffusion.schedule import NoiseSchedule
    from models.networks.compiling import compile_parts
    from models.networks.unet import UNet

    compile_parts(model)
    for tower in (model.visual, model.transformer) if isinstance(model, CLIP) else ():
        blocks = [m for m in tower.modules() if isinstance(m, ResidualAttentionBlock)]
        for part in blocks or [tower]:
            part.compile(dynamic=False, fullgraph=bool(blocks))
    jpeg_constants(device)  # constants are there already when a graph is traced
    for module in model.modules():
        if isinstance(module, UNet) and device.type == "cuda":
            module.channels_last = True
        if isinstance(schedule := getattr(module, "schedule", None), NoiseSchedule):
            schedule.table(device)


# -- under Ray Train -------------------------------------------------------------------------------


def _train_under_ray(config: RunConfig, mirror: Mirror, build: Build) -> None:
    """Train in workers; raise the error that a rank has left, rather than what Ray makes of it."""
    from training.runs.ray_train import train_in_workers

    run = mirror.folder
    for path in error_paths(run):
        path.unlink()
    name = build if isinstance(build, str) else f"{build.__module__}:{build.__qualname__}"
    try:
        train_in_workers(config, mirror, name)
    finally:
        mirror.pull_end()
        for path in error_paths(run)[:1]:
            name, message = path.read_text().split(" ", 1)
            raise next((e for e in FINAL_ERRORS if e.__name__ == name), ValueError)(message)


def prepare_worker(workers: WorkersConfig, builds: Sequence[str]) -> None:
    """Import what the runs of this process will need."""
    os.environ.setdefault("DS_ACCELERATOR", _device_type(workers))
    if workers.engine == "deepspeed":
        importlib.import_module("deepspeed")
    for build in builds:
        imported(build)


def train_as_worker(
    run: str, build: str, config: str, scratch: str = "", token: int = 0
) -> int:
    """Train as one rank; returns its number.

    config: the class of the configuration in the run; scratch, token: of a run in a bucket, where
    a node has its copy, and the launch's lease.

    An error that every attempt would meet again is left for the driver: Ray would restart a worker
    that raises.
    """
    import ray.train
    import torch.distributed as dist

    from training.engine.engines import ZeroEngine
    from training.engine.fsdp import FsdpEngine

    mirror = mirror_of(run, scratch, NODE, token)
    folder, rank, world_size = mirror.folder, dist.get_rank(), dist.get_world_size()
    first_of_node = ray.train.get_context().get_local_rank() == 0
    group = [mirror.name_group() if rank == 0 else ""]
    dist.broadcast_object_list(group, src=0)
    mirror.join_group(group[0])
    if first_of_node:
        mirror.pull()
    dist.barrier()  # the others of a node have the same copy
    if mirror.has_errors():  # Ray tries again what no attempt can do
        return rank
    path = folder / CONFIG_NAME
    settings = merged(imported(config)(), read_yaml(path), str(path))
    settings = dataclasses.replace(settings, run=str(folder))
    engine = FsdpEngine if settings.train.workers.engine == "fsdp2" else ZeroEngine
    try:
        with mirror.kept_alike() if first_of_node else nullcontext():
            train_rank(settings, mirror, build, engine, rank=rank, world_size=world_size)
        dist.barrier()  # nobody on this node reads the copy any more
        if first_of_node and mirror.has(folder / FINAL_NAME):
            mirror.clean()
    except FINAL_ERRORS as error:
        if isinstance(error, OSError) and error.errno not in DISK_FULL:
            raise  # the storage may answer the next attempt
        mirror.push(write_text(error_path(folder, rank), f"{type(error).__name__} {error}"))
        # All ranks meet a wrong request. Where they do not, the others may wait for this one in a
        # collective: only closed connections end that.
        deadline = time.monotonic() + HANG_UP_SECONDS
        while not all(mirror.has(error_path(folder, each)) for each in range(world_size)):
            if time.monotonic() > deadline:
                os._exit(1)
            time.sleep(0.1)
    return rank
