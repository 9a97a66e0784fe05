"""Workers that Ray Train places, loses and replaces: how many, and how soon a loss is noticed.

Every time limit of a recovery is here. What a worker does is in training/runs/worker.py; this
module imports no torch, since Ray's controller, which starts first, imports it.
"""

import os
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.base.files import Json
from cluster.base.run_dir import RAY_FOLDER
from training.config import TrainConfig
from training.runs.events import record_event, report_incident
from training.runs.signals import stopping_on_sigterm
from training.runs.validator import validation_config
from training.runs.watchdog import last_step

RAY_TIMES = {
    # For room to place the workers. After a node's death the first decision may rest on what was
    # known before (Ray looks every 20 s), wait for room that is gone, and then be made again: a
    # long wait would delay every such recovery. Waiting for the nodes of an autoscaler takes as
    # many such rounds as it needs; they do not count as failures.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    # Between two checks of the workers, each of which takes milliseconds: half of it is the time
    # until a killed worker is noticed.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # Until a worker that does not answer is given up. Another thread than the one that trains
    # answers, so only a stopped process or a machine that is gone is silent for long.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
}
# Of a collective. Longer than a validation, during which the others wait for the first rank. It
# does not end the wait for a dead rank: a dead process closes its connections, Ray ends the workers
# beside a node that it has lost, and the watchdog ends what hangs.
COLLECTIVE_SECONDS = 7200
RESIZE_SECONDS = 20.0  # between two looks for room for missing workers, as often as Ray looks
MESSAGE_LENGTH = 160  # of the error of a lost rank


def fit(
    worker: Callable[[Json], None],
    arguments: Json,
    settings: TrainConfig,
    run: Path,
) -> None:
    """Run `worker(arguments)` in as many processes as there is room for, until it returns.

    Raises OSError where they were lost more often than `max_failures`.
    """
    for name, value in RAY_TIMES.items():
        os.environ.setdefault(name, value)
    from cluster.base.ray_session import ensure_ray, group_resources

    ensure_ray()
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    group = group_resources("gpu_group")
    device = worker_device(settings)
    most, max_failures = settings.workers.num_workers, settings.faults.max_failures
    least = settings.workers.min_workers or most
    trainer = TorchTrainer(
        worker,
        train_loop_config=arguments,
        torch_config=TorchConfig(
            backend="nccl" if device == "GPU" else "gloo", timeout_s=COLLECTIVE_SECONDS
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=device == "GPU",
            resources_per_worker={device: 1, **group},
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt_{int(time.time())}",  # Ray's own state, which a rerun does not read
            storage_path=str(run / RAY_FOLDER),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            callbacks=[loss_callback(run)],
        ),
        validation_config=validation_config(settings.validator, run, group),
    )
    try:
        with interruptible(), stopping_on_sigterm(run):  # Ray has set its own handlers by now
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        cause = ""
        if isinstance(error, ray.train.WorkerGroupError):
            cause = f"lost workers more often than train.max_failures {max_failures}; last: "
        raise OSError(f"{run}: {cause}{root_cause(error)}") from error


def worker_device(settings: TrainConfig) -> str:
    """Return the resource that a worker gets, "GPU" or "CPU".

    Raises ValueError where the cluster has too few of them, and will have: Ray would wait for ever.
    """
    import ray

    from cluster.base.ray_session import group_resources, has_gpus

    workers = settings.workers
    use_gpu = workers.device == "cuda" or (workers.device == "auto" and has_gpus())
    device = "GPU" if use_gpu else "CPU"
    available = int(ray.cluster_resources().get(device, 0))
    least = workers.min_workers or workers.num_workers
    if available < least and not group_resources("gpu_group"):  # a group of nodes may grow
        raise ValueError(
            f"train.num_workers: found {least} for {available} {device}s, expected at most "
            f"{available}"
        )
    return device


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt, within the block and afterwards.

    Ray Train handles the signal itself and keeps doing so: once the workers have ended, the process
    exits with code 0, as if the training were complete.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def loss_callback(run: Path) -> Any:
    """Return the callback by which Ray's controller records lost workers in the run's folder."""
    from ray.train import UserCallback

    class LossCallback(UserCallback):
        def after_exception(
            self, run_context: Any, worker_exceptions: dict[int, Exception]
        ) -> None:
            # The dead first: a rank that lives has met the end of its connections
            causes = sorted(
                worker_exceptions.items(),
                key=lambda item: (getattr(item[1], "health_check_failure", None) is None, item[0]),
            )
            message = "; ".join(f"rank {rank}: {root_cause(error)}" for rank, error in causes)
            try:
                record_event(run, "lost", message=message)
                report_incident(run, "lost", last_step(run), message)
            except (OSError, ValueError) as error:  # the restart matters more than its record
                print(f"{run}: lost, and not recorded ({error}): {message}", flush=True)

    return LossCallback()


def root_cause(error: BaseException) -> str:
    """Return one line on an error of Ray's, which wraps one in the other."""
    for name in ("health_check_failure", "controller_failure", "worker_failures"):
        inner = getattr(error, name, None)
        if isinstance(inner, dict):
            inner = next(iter(inner.values()), None)
        if isinstance(inner, BaseException):
            return root_cause(inner)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(f"{type(error).__name__}: {lines[0] if lines else ''}", MESSAGE_LENGTH)
