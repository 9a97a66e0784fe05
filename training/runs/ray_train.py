"""Workers that Ray Train places, loses and replaces: how many, for which runs, and how soon a loss
is noticed.

Every time limit of a recovery is here. What a worker does is in training/runs/worker.py; this
module, and what it gives to Ray, imports no model: Ray's controller, which starts first, would
import it too, and wait.
"""

import gc
import itertools
import json
import os
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.base.files import Json, write_json
from cluster.base.run_dir import RAY_FOLDER
from training.bucket.bucket_mirror import CONTROLLER, NODE, mirror_of
from training.bucket.mirror import Mirror
from training.config import RunConfig, TrainConfig
from training.runs.events import record_event, report_incident
from training.runs.signals import request_stop, stopping_on_sigterm
from training.runs.validator import validation_config
from training.runs.watchdog import last_step

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

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
LOOK_SECONDS = 0.1  # between two looks for a file in the folder of orders
RESIZE_SECONDS = 20.0  # between two looks for room for missing workers, as often as Ray looks
MESSAGE_LENGTH = 160  # of the error of a lost rank


class RayWorkers:
    """Processes that Ray Train places, and restarts, and that train one run after the other.

    They start in the background, while this process does something else. Orders are files, so that
    workers which are started again find them: <folder>/orders_<time>/0000.json names a run, or in
    the last one none, and 0000.done says that its training has ended, however it did.
    """

    def __init__(
        self, folder: Path, settings: Sequence[TrainConfig], builds: Sequence[str],
        only: Json | None = None,
    ) -> None:  # fmt: skip
        """settings, builds: of the runs to come, which are placed alike; only: the arguments of
        `train_as_worker` for the single one, which alone may have a validator.

        Raises ValueError where the cluster has no room for them.
        """
        for name, value in RAY_TIMES.items():
            os.environ.setdefault(name, value)
        from cluster.base.ray_session import ensure_ray, group_resources

        ensure_ray()
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        self.workers, now = settings[0].workers, time.time_ns()
        self._max_failures = sum(each.faults.max_failures for each in settings)
        self._only, self._orders, self._count = only, folder / f"orders_{now}", 0
        self._orders.mkdir(parents=True)
        self._error: Exception | None = None
        group = group_resources("gpu_group")
        device = worker_device(settings[0])
        most = self.workers.num_workers
        least = self.workers.min_workers or most
        validator = None
        if only:
            validator = validation_config(settings[0].validator, only["run"], group)
        trainer = TorchTrainer(
            train_ordered,
            train_loop_config={
                "orders": str(self._orders), "builds": list(builds), "workers": self.workers,
                "only": only,
            },
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
                name=f"attempt_{now}",  # Ray's own state, which a rerun does not read
                storage_path=str(folder),
                failure_config=ray.train.FailureConfig(max_failures=self._max_failures),
                callbacks=[loss_callback(self._orders, only)],
            ),
            validation_config=validator,
        )  # fmt: skip
        self._ended = threading.Event()  # Thread.join, once interrupted, takes the thread for ended
        threading.Thread(target=self._fit, args=(trainer,), daemon=True).start()

    def _fit(self, trainer: "TorchTrainer") -> None:
        """Keep the workers alive; outside the main thread, where Ray Train would take Ctrl-C."""
        try:
            trainer.fit()
        except Exception as error:  # raised by `train`, in the main thread
            self._error = error
        finally:
            self._ended.set()

    def _order(self, number: int) -> Path:
        return self._orders / f"{number:04d}.json"

    def train(self, run: Path, order: Json) -> None:
        """Train a run, whose folder holds its configuration, until that ends.

        order: the arguments of `train_as_worker`.
        Ctrl-C requests a checkpoint at the next step. Raises OSError where the workers were lost
        more often than `max_failures`.
        """
        path = self._order(self._count)
        if not self._only:
            self._count += 1
            write_json(path, order)
        try:
            with stopping_on_sigterm(run):  # Ray has set its own handlers by now
                while not self._ended.wait(LOOK_SECONDS) and (self._only or not is_done(path)):
                    pass
        except KeyboardInterrupt:
            request_stop(run)
            place = order["run"]
            print(f"{place}: a checkpoint at the next step; Ctrl-C again ends at once", flush=True)
            raise
        if self._error is None:
            return
        import ray.train

        if not isinstance(self._error, ray.train.TrainingFailedError):
            raise self._error
        cause = ""
        if isinstance(self._error, ray.train.WorkerGroupError):
            cause = f"lost workers more often than train.max_failures {self._max_failures}; last: "
        raise OSError(f"{order['run']}: {cause}{root_cause(self._error)}") from self._error

    def end(self) -> None:
        """Let the workers end once they have trained what is ordered; does not wait for them."""
        write_json(self._order(self._count), {})

    def close(self) -> None:
        """Let the workers end, and wait for that: a process whose Ray ends while another thread
        uses it dies of a segmentation fault."""
        self.end()
        self._ended.wait()


_shared: dict[Path, RayWorkers] = {}  # by the folder of a run


@contextmanager
def shared_workers(
    folder: Path, runs: Mapping[Path, TrainConfig], builds: Sequence[str]
) -> Iterator[None]:
    """Start workers for the runs, by their folders, that are launched within the block one after
    the other: one start for all. builds: what makes their tasks.

    Where they are not placed alike, or have validators, each run has workers of its own.
    """
    settings = list(runs.values())
    places = {
        (each.workers.num_workers, each.workers.min_workers, each.workers.device)
        for each in settings
    }
    alike = len(places) == 1 and not any(each.validator.command for each in settings)
    if not alike or not settings[0].workers.num_workers:
        yield
        return
    with closing(RayWorkers(folder, settings, builds)) as placement:
        _shared.update(dict.fromkeys(runs, placement))
        try:
            yield
        finally:
            for run in runs:
                del _shared[run]


def train_in_workers(config: RunConfig, mirror: Mirror, build: str) -> None:
    """Train a run, whose folder holds its configuration, in the shared workers or in its own."""
    run, kind = mirror.folder, type(config)
    order = {
        "run": mirror.place, "build": build, "config": f"{kind.__module__}:{kind.__qualname__}",
        "scratch": config.scratch, "token": mirror.token,
    }  # fmt: skip
    if run in _shared:
        _shared[run].train(run, order)
        return
    with closing(RayWorkers(run / RAY_FOLDER, [config.train], [build], only=order)) as placement:
        placement.train(run, order)


def is_done(order: Path) -> bool:
    """Return whether the training that a file orders has ended, however it did."""
    return order.with_suffix(".done").is_file()


def train_ordered(arguments: Json) -> None:
    """Train the runs that are ordered, in a worker; Ray Train has set up torch.distributed."""
    from training.runs.worker import prepare_worker, train_as_worker

    prepare_worker(arguments["workers"], arguments["builds"])  # before an order is there
    if arguments["only"]:
        train_as_worker(**arguments["only"])
        return
    for number in itertools.count():
        path = Path(arguments["orders"]) / f"{number:04d}.json"
        while not path.is_file():
            time.sleep(LOOK_SECONDS)
        order = json.loads(path.read_text())
        if not order:
            return
        if not is_done(path) and train_as_worker(**order) == 0:
            path.with_suffix(".done").touch()
        gc.collect()  # engines and what they own refer to each other


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


def loss_callback(orders: Path, only: Json | None) -> Any:
    """Return the callback by which Ray's controller records lost workers in the folder of the run
    that they were training: the only one, or by the orders."""
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
            order = only or current_order(orders)
            if not order:
                print(f"lost between two runs: {message}", flush=True)
                return
            run = order["run"]
            try:
                record_loss(order, message)
            except (OSError, ValueError) as error:  # the restart matters more than its record
                print(f"{run}: lost, and not recorded ({error}): {message}", flush=True)

    return LossCallback()


def current_order(orders: Path) -> Json:
    """Return what workers are training; {} where nothing is ordered, or all has ended."""
    for path in sorted(orders.glob("*.json")):
        if not is_done(path):
            return json.loads(path.read_text())
    return {}


def record_loss(order: Json, message: str) -> None:
    """Record lost workers in the timeline and the incidents of a run."""
    run, scratch, token = order["run"], order.get("scratch", ""), order.get("token", 0)
    mirror = mirror_of(run, scratch, f"{CONTROLLER}_{time.time_ns()}", token)
    mirror.folder.mkdir(parents=True, exist_ok=True)
    record_event(mirror.folder, "lost", message=message)
    step = last_step(mirror_of(run, scratch, NODE).folder)  # of this machine's workers
    report_incident(mirror.folder, "lost", step, message)
    mirror.push()
    mirror.clean()


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
