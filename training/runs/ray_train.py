"""Workers that Ray Train places, loses and replaces: how many, and how soon a loss is noticed.

Every waiting time of a recovery stands here. What a worker does is in training/runs/worker.py; this
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

from training.config import TrainConfig
from training.runs.events import record_event, report_incident
from training.runs.signals import stopping_on_sigterm
from training.runs.validator import validation_config
from training.runs.watchdog import last_step

RAY_TIMES = {
    # For room to place the workers. After a node's death the first decision may be made on what
    # was known before (Ray looks every 20 s), waits for room that is gone, and is then made anew:
    # a long wait would be a part of every such recovery. Waiting for an autoscaler's nodes goes on
    # in as many such rounds as it takes; they do not count as failures.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    # Between two looks at the workers, each of which takes milliseconds: half of it is what a
    # killed worker costs until it is noticed.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # Until a worker that does not answer is given up. Its answer comes from another thread than
    # the one that trains, so only a stopped process or a machine that is gone is silent for long.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
}
# Of a collective. Longer than a validation, during which the others wait for the first rank. It is
# not what ends a wait for the dead: a dead process closes its connections, Ray ends the workers
# beside a node that it has lost, and what hangs the watchdog ends.
COLLECTIVE_SECONDS = 7200
# Between two looks for room for more workers, where some are missing: as often as Ray itself looks.
RESIZE_SECONDS = 20.0
TOLD_LENGTH = 160  # of what a lost rank is told by


def fit(
    worker: Callable[[dict], None], arguments: dict[str, Any], settings: TrainConfig, run: Path
) -> None:
    """Run `worker(arguments)` in as many processes as there is room for, until it returns.

    Raises OSError where they were lost more often than `max_failures`.
    """
    for name, value in RAY_TIMES.items():
        os.environ.setdefault(name, value)
    from cluster.base.ray_session import ensure_ray, placed_on

    ensure_ray()
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = _use_gpu(settings)
    if not use_gpu:
        _require_cpus(settings)
    most = settings.workers.num_workers
    fewest = settings.workers.min_workers or most
    trainer = TorchTrainer(
        worker,
        train_loop_config=arguments,
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=COLLECTIVE_SECONDS
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=use_gpu,
            resources_per_worker={"GPU" if use_gpu else "CPU": 1, **placed_on("gpu_group")},
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            # Ray's own state of the run; ours is what counts, and a rerun continues from ours alone
            name=f"attempt_{int(time.time())}",
            storage_path=str(run / "_ray"),
            failure_config=ray.train.FailureConfig(max_failures=settings.faults.max_failures),
            callbacks=[_losses_of(run)],
        ),
        validation_config=validation_config(settings, run, placed_on("gpu_group")),
    )
    try:
        with _interruptible(), stopping_on_sigterm(run):  # Ray has set its own handlers by now
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        most_failures = settings.faults.max_failures
        often = f"lost workers more often than train.max_failures {most_failures}; last: "
        lost = isinstance(error, ray.train.WorkerGroupError)
        raise OSError(f"{run}: {often if lost else ''}{_what(error)}") from error


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt, within and afterwards.

    Ray Train takes the signal over and keeps it, for what a process does next, too: once the
    workers have ended it exits with code 0, as if the training had come to its end.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _use_gpu(settings: TrainConfig) -> bool:
    """Say whether workers get a GPU each; ValueError where there are too few, and will be."""
    import ray

    from cluster.base.ray_session import has_gpus, placed_on

    wished = settings.workers.device == "cuda" or settings.workers.device == "auto" and has_gpus()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    fewest = settings.workers.min_workers or settings.workers.num_workers
    if wished and gpus < fewest and not placed_on("gpu_group"):  # a group of nodes may grow
        raise ValueError(f"train.num_workers: found {fewest} for {gpus} GPUs, expected no more")
    return wished


def _require_cpus(settings: TrainConfig) -> None:
    """Raise ValueError where there are too few CPUs, and will be: Ray would wait for ever."""
    import ray

    from cluster.base.ray_session import placed_on

    cpus = int(ray.cluster_resources().get("CPU", 0))
    fewest = settings.workers.min_workers or settings.workers.num_workers
    if cpus < fewest and not placed_on("gpu_group"):
        raise ValueError(f"train.num_workers: found {fewest} for {cpus} CPUs, expected no more")


def _losses_of(run: Path) -> Any:
    """Return what Ray's controller calls when workers are lost: it says so in the run's folder."""
    from ray.train import UserCallback

    class Losses(UserCallback):
        def after_exception(
            self, run_context: Any, worker_exceptions: dict[int, Exception]
        ) -> None:
            message = "; ".join(
                f"rank {rank}: {_what(error)}"
                for rank, error in sorted(worker_exceptions.items(), key=_dead_first)
            )
            try:
                record_event(run, "lost", message=message)
                report_incident(run, "lost", last_step(run), message)
            except (OSError, ValueError) as error:  # the restart matters more than its record
                print(f"{run}: lost, and not noted ({error}): {message}", flush=True)

    return Losses()


def _dead_first(told: tuple[int, Exception]) -> tuple[bool, int]:
    """Order by who is to blame: a rank that lives on has met the end of its connections."""
    return getattr(told[1], "health_check_failure", None) is None, told[0]


def _what(error: BaseException) -> str:
    """Say what an error of Ray's is about, in one line: it wraps one in the other."""
    for name in ("health_check_failure", "controller_failure", "worker_failures"):
        inner = getattr(error, name, None)
        if isinstance(inner, dict):
            inner = next(iter(inner.values()), None)
        if isinstance(inner, BaseException):
            return _what(inner)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(f"{type(error).__name__}: {lines[0] if lines else ''}", TOLD_LENGTH)
