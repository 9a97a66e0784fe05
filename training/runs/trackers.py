"""What TensorBoard, Weights & Biases and MLflow get of a run, by --train.track.

The run's own files remain its record; a tracker gets what they hold. A thread of its own reads them
for each: one that does not answer costs training nothing, and gets what it lacks when it answers
again, or by the same command, run again. A run that continues continues in its trackers.
"""

import json
import os
import re
import shutil
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from cluster.base.files import Json, write_json
from cluster.base.run_dir import CODE_NAME, TENSORBOARD_FOLDER, TRACKERS_NAME, WANDB_FOLDER
from models.weights import FINAL_NAME
from training.bucket.mirror import Mirror
from training.config import TrackerName
from training.runs.reports import Places, Report, Reports, Source

POLL_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0  # between two attempts to reach a tracker that does not answer
END_SECONDS = 30.0  # that a tracker has, after the end, to take the last reports
BATCH_REPORTS = 32  # passed on at once: MLflow takes 1,000 numbers a request
PARAMETER_LENGTH, PARAMETER_BATCH = 6000, 100  # of MLflow


class Tracker(ABC):
    """One run, open in a tracker, which constructing it reaches.

    sent: the places of the last reports that the tracker has.
    """

    sent: Places

    @classmethod
    def errors(cls) -> tuple[type[Exception], ...]:
        """Return what all calls raise where the tracker does not answer."""
        return (OSError,)

    @abstractmethod
    def send(self, reports: Sequence[Report]) -> None:
        """Pass reports on, in their order."""

    @abstractmethod
    def close(self, *, finished: bool) -> None:
        """End the session; finished: the run has done all its steps."""


class _TensorBoard(Tracker):
    """Writes <run>/tensorboard, whole at each start.

    Where the steps go back, as in a run that continues from a checkpoint, TensorBoard drops what it
    has from that step on. Events are written in the caller's thread: tensorboardX's own
    `SummaryWriter` hands them to a thread that a full disk ends, and then waits for that thread for
    ever.
    """

    def __init__(self, run: Path, config: Json) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        self.sent = {}
        folder = run / TENSORBOARD_FOLDER
        folder.mkdir(exist_ok=True)
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._events = EventsWriter(str(folder / "events"))
        self._messages = import_module("tensorboardX.proto.event_pb2")
        self._summaries = import_module("tensorboardX.proto.summary_pb2")
        self._last_step = -1

    def send(self, reports: Sequence[Report]) -> None:
        messages, summaries = self._messages, self._summaries
        for report in reports:
            if report.source == "train":
                if report.step <= self._last_step:
                    start = messages.SessionLog(status=messages.SessionLog.START)
                    self._events.write_event(
                        messages.Event(
                            wall_time=report.time, step=report.step, session_log=start
                        )
                    )
                self._last_step = report.step
            values = [
                summaries.Summary.Value(tag=f"{report.source}/{name}", simple_value=value)
                for name, value in report.scores.items()
            ]
            if report.picture:
                image = summaries.Summary.Image(encoded_image_string=report.picture.read_bytes())
                values.append(summaries.Summary.Value(tag="validation/pictures", image=image))
            event = messages.Event(
                wall_time=report.time, step=report.step, summary=summaries.Summary(value=values)
            )
            if values:
                self._events.write_event(event)
        self._events.flush()

    def close(self, *, finished: bool) -> None:
        self._events.close()


class _Wandb(Tracker):
    """A run of Weights & Biases, under the identity that the run's folder keeps.

    Online, what was handed to its client is known by a file in the run's folder: the client itself
    keeps what its server lacks. Offline, its files are written whole at each start, since `wandb
    sync` of a second session would replace the first.
    """

    def __init__(self, run: Path, config: Json) -> None:
        import wandb

        self._wandb, self._run_folder, known = wandb, run, _read(run / TRACKERS_NAME)
        self._offline = wandb_is_offline()
        if self._offline:
            for folder in (run / WANDB_FOLDER).glob(f"offline-run-*-{known['id']}"):
                shutil.rmtree(folder)
        self.sent = {} if self._offline else _places(known.get("wandb_sent", {}))
        settings = wandb.Settings(
            console="off", disable_git=True, save_code=False, silent=True, reinit="create_new"
        )
        self._session = wandb.init(
            id=known["id"], resume=None if self._offline else "allow", name=run.name,
            dir=str(run), config=config, settings=settings,
        )  # fmt: skip
        self._session.define_metric("step")
        for group in ("train/*", "validation/*"):
            self._session.define_metric(group, step_metric="step")

    @classmethod
    def errors(cls) -> tuple[type[Exception], ...]:
        import wandb

        return (wandb.Error, OSError)

    def send(self, reports: Sequence[Report]) -> None:
        for report in reports:
            row: Json = {f"{report.source}/{name}": v for name, v in report.scores.items()}
            if report.picture:
                row["validation/pictures"] = self._wandb.Image(str(report.picture))
            if row:
                self._session.log({"step": report.step, "time": report.time, **row})
            if report.checkpoint:
                artifact = self._wandb.Artifact(
                    f"checkpoint-{self._session.id}", type="model",
                    metadata={"place": report.checkpoint},
                )  # fmt: skip
                name = report.checkpoint.rpartition("/")[2]
                if report.checkpoint.startswith("file://"):  # others need their store's library
                    artifact.add_reference(report.checkpoint, name=name, checksum=False)
                self._session.log_artifact(artifact, aliases=["latest", name])
            self.sent[report.source] = report.place
        if not self._offline:
            path = self._run_folder / TRACKERS_NAME
            write_json(path, {**_read(path), "wandb_sent": self.sent})

    def close(self, *, finished: bool) -> None:
        self._session.finish(exit_code=0 if finished else 1)


class _Mlflow(Tracker):
    """A run on MLflow's server, found by the identity that the run's folder keeps.

    The server knows what it has: each request of numbers brings the places of the last as a tag.
    What a request that failed has left there is sent again, and is the same to the server.
    """

    SENT_TAG, IDENTITY_TAG = "minidalle2.sent", "minidalle2.id"

    @classmethod
    def errors(cls) -> tuple[type[Exception], ...]:
        from mlflow.exceptions import MlflowException

        return (MlflowException, OSError)

    def __init__(self, run: Path, config: Json) -> None:
        # The thread that calls tries again by itself
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient

        self._client, identity = MlflowClient(), _read(run / TRACKERS_NAME)["id"]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "minidalle2")
        experiment = self._client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([place], f"tags.`{self.IDENTITY_TAG}` = '{identity}'")
        if not found:
            tags = {self.IDENTITY_TAG: identity}
            found = [self._client.create_run(place, tags=tags, run_name=run.name)]
        self._id = found[0].info.run_id
        self.sent = _places(json.loads(found[0].data.tags.get(self.SENT_TAG, "{}")))
        self._client.update_run(self._id, status="RUNNING")
        self._describe(config, found[0].data.params)

    def _describe(self, config: Json, known: dict[str, str]) -> None:
        """Send the configuration; MLflow's parameters never change, so that an option which has
        another value now is a tag of its name as well."""
        from mlflow.entities import Param, RunTag

        texts = {name: str(value)[:PARAMETER_LENGTH] for name, value in config.items()}
        params = [Param(name, text) for name, text in texts.items() if name not in known]
        tags = [RunTag(n, text) for n, text in texts.items() if known.get(n, text) != text]
        for start in range(0, len(params), PARAMETER_BATCH):
            self._client.log_batch(self._id, params=params[start : start + PARAMETER_BATCH])
        self._client.log_batch(self._id, tags=tags)

    def send(self, reports: Sequence[Report]) -> None:
        from mlflow.entities import Metric, RunTag

        metrics, tags = [], []
        for report in reports:
            if report.picture:
                self._client.log_artifact(self._id, str(report.picture), "validation")
            if report.checkpoint:
                name = f"checkpoint.{report.checkpoint.rpartition('/')[2]}"
                tags.append(RunTag(name, report.checkpoint))
            metrics += [
                Metric(f"{report.source}/{name}", value, round(report.time * 1000), report.step)
                for name, value in report.scores.items()
            ]
            self.sent[report.source] = report.place
        tags.append(RunTag(self.SENT_TAG, json.dumps(self.sent)))
        self._client.log_batch(self._id, metrics=metrics, tags=tags)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


TRACKERS: dict[TrackerName, type[_TensorBoard] | type[_Wandb] | type[_Mlflow]] = {
    "tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow
}  # fmt: skip


def _read(path: Path) -> Json:
    return json.loads(path.read_text()) if path.is_file() else {}


def _places(stored: Json) -> Places:
    return {cast(Source, name): (place[0], place[1]) for name, place in stored.items()}


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Raise ValueError for a tracker that cannot be used as things are; reaches none."""
    for name in ("wandb", "mlflow"):
        if name in names and find_spec(name) is None:
            raise ValueError(
                f"train.track: found {name}, which is not installed, expected it: pip install "
                f"'minidalle2[{name}]'"
            )
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(
            "train.track: found mlflow without MLFLOW_TRACKING_URI, expected the address of a "
            "server, such as http://127.0.0.1:5000"
        )
    if "wandb" in names:
        import wandb

        if not wandb_is_offline() and not wandb.login(prompt=False, verify=False):
            raise ValueError(
                "train.track: found wandb without an account, expected `wandb login`, "
                "WANDB_API_KEY or WANDB_MODE=offline"
            )


def wandb_is_offline() -> bool:
    """Return whether its client is set to write files and to reach no server."""
    import wandb

    return wandb.setup().settings.mode in ("offline", "dryrun")


class Tracking:
    """Passes the reports of a run on to its trackers while the block runs."""

    def __init__(self, mirror: Mirror, names: Sequence[TrackerName], config: Json) -> None:
        """config: the options of the run by their dotted names."""
        run = mirror.folder
        if names and "id" not in _read(run / TRACKERS_NAME):
            write_json(run / TRACKERS_NAME, {"id": uuid.uuid4().hex[:16]})
        self._senders = [_Sender(mirror, name, config) for name in dict.fromkeys(names)]

    @property
    def is_pending(self) -> bool:
        """Whether a tracker has not taken the last reports."""
        return any(sender.is_alive() for sender in self._senders)

    def __enter__(self) -> "Tracking":
        for sender in self._senders:
            sender.start()
        return self

    def __exit__(self, *_: object) -> None:
        for sender in self._senders:
            sender.stopped.set()
        deadline = time.monotonic() + END_SECONDS
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))
            if sender.is_alive():
                print(
                    f"{sender.name}: has not taken the last reports; the same command sends them",
                    flush=True,
                )


class _Sender(threading.Thread):
    """Passes the reports on to one tracker, and begins where that left off once it answers again.

    A daemon: a client that hangs holds up no exit.
    """

    def __init__(self, mirror: Mirror, name: TrackerName, config: Json) -> None:
        super().__init__(name=name, daemon=True)
        run, self._place = mirror.folder, mirror.place
        self._run_folder, self._config, self._kind = run, config, TRACKERS[name]
        self._session: tuple[Tracker, Reports] | None = None
        self.stopped = threading.Event()

    def run(self) -> None:
        wait, failed = POLL_SECONDS, False
        while True:
            last = self.stopped.wait(wait)
            try:
                self._pass_on()
                if last:
                    self._close()
                    return
            except self._kind.errors() as error:
                self._session = None
                wait = POLL_SECONDS if last else min(2 * wait, LONGEST_WAIT_SECONDS)
                if last:  # the event no longer waits
                    time.sleep(wait)
                if not failed:
                    message = re.sub(r"//[^/@\s]+@", "//", " ".join(str(error).split()))[:300]
                    print(f"{self.name}: does not answer, is tried again: {message}", flush=True)
                failed = True
            else:
                if failed:
                    print(f"{self.name}: answers again, and has all reports", flush=True)
                wait, failed = POLL_SECONDS, False

    def _pass_on(self) -> None:
        if self._session is None:
            code = _read(self._run_folder / CODE_NAME)
            config = {**self._config, **{f"code.{name}": value for name, value in code.items()}}
            tracker = self._kind(self._run_folder, config)
            self._session = tracker, Reports(self._run_folder, self._place, dict(tracker.sent))
        tracker, reports = self._session
        new = reports.read()
        for start in range(0, len(new), BATCH_REPORTS):
            tracker.send(new[start : start + BATCH_REPORTS])

    def _close(self) -> None:
        assert self._session is not None, "reports were passed on a moment ago"
        self._session[0].close(finished=(self._run_folder / FINAL_NAME).is_file())
