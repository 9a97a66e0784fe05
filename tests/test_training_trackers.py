"""What trackers hold of a run equals what the run's files hold, through resumes and outages.

MLflow's server is a real one, on the loopback; Weights & Biases writes files, offline.
"""

import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from cluster.base.jsonl import add_line, read_lines
from cluster.base.run_dir import METRICS_NAME, STATE_NAME, VALIDATION_NAME, step_folder
from models.weights import FINAL_NAME
from training.bucket.mirror import Mirror
from training.config import PriorRunConfig, TrainConfig
from training.runs.reports import NOT_SCORES, Reports
from training.runs.trackers import Tracking, require_trackers
from training.runs.worker import launch

START_SECONDS = 90  # of MLflow's server, on a loaded machine
OPTIONS = {"train.num_steps": 100, "train.learning_rate": 1e-3, "run": "runs/prior"}
Scores = dict[str, dict[int, float]]  # by name and step


def line(step: int, *, attempt: int = 0, **changes) -> dict:
    return {
        "step": step, "attempt": attempt, "time": 1.7e9 + step + 1000 * attempt, "num_steps": 100,
        "loss": (1 + attempt) / step, "samples_per_second": 40.0 + attempt, **changes,
    }  # fmt: skip


def report(run: Path, *steps: int, attempt: int = 0) -> None:
    """What a run writes at these steps; every twentieth is validated, with a picture, and has a
    checkpoint, the first rank's last file."""
    for step in steps:
        add_line(run / METRICS_NAME, line(step, attempt=attempt))
        if step % 20 == 0:
            folder = step_folder(run, step)
            folder.mkdir(exist_ok=True)
            (folder / STATE_NAME).write_text("{}")
            (run / "validation").mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (step, attempt, 0)).save(
                run / "validation" / f"{folder.name}.png"
            )
            scores = {"cos": 0.5 + step / 1000 + attempt / 10}
            add_line(run / VALIDATION_NAME, {**line(step, attempt=attempt), **scores})


def go_back(run: Path, step: int) -> None:
    """What `Reporter.started` does: the lines past a checkpoint are dropped."""
    for path in (run / METRICS_NAME, run / VALIDATION_NAME):
        kept = [each for each in read_lines(path) if each["step"] <= step]
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(each) + "\n" for each in kept))
        part.replace(path)


def recorded(run: Path) -> Scores:
    """What the run's files hold."""
    found: Scores = defaultdict(dict)
    for group, name in (("train", METRICS_NAME), ("validation", VALIDATION_NAME)):
        for each in read_lines(run / name):
            for key, value in each.items():
                found[f"{group}/{key}"][each["step"]] = value
    for name in [name for name in found if name.partition("/")[2] in NOT_SCORES]:
        del found[name]
    return found


# -- the reports -----------------------------------------------------------------------------------


def test_reports_are_read_once_and_again_where_a_later_attempt_makes_them(tmp_path: Path):
    reports = Reports(tmp_path, str(tmp_path), {})
    assert reports.read() == []
    report(tmp_path, 10, 20, 30)
    places = [(each.source, each.place) for each in reports.read()]
    assert places == [
        ("checkpoint", (0, 20)), *(("train", (0, step)) for step in (10, 20, 30)),
        ("validation", (0, 20)),
    ]  # fmt: skip
    assert reports.read() == []
    go_back(tmp_path, 20)  # ... and goes past the old end before anybody looks
    report(tmp_path, 30, 40, attempt=1)
    found = reports.read()
    assert [(each.source, each.place) for each in found] == [
        ("checkpoint", (0, 40)), ("train", (1, 30)), ("train", (1, 40)), ("validation", (1, 40)),
    ]  # fmt: skip
    assert found[1].scores == {"loss": 2 / 30, "samples_per_second": 41.0}
    picture = found[-1].picture
    assert picture is not None and picture.name == "step_00000040.png"
    again = Reports(tmp_path, str(tmp_path), {"train": (1, 30), "validation": (0, 20)})
    assert [(each.source, each.place) for each in again.read() if each.source != "checkpoint"] == [
        ("train", (1, 40)), ("validation", (1, 40))
    ]  # fmt: skip


# -- TensorBoard -----------------------------------------------------------------------------------


def board(run: Path) -> Scores:
    """The scalars of a run's event files as TensorBoard shows them: TFRecords (length, crc, event,
    crc) of protocol buffers; a session that starts at a step drops what is there from it on."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    found: Scores = defaultdict(dict)
    for path in sorted((run / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            first_dropped = event.step if event.HasField("session_log") else math.inf
            for tag, values in found.items():
                found[tag] = {step: v for step, v in values.items() if step < first_dropped}
            for value in event.summary.value:
                assert event.step not in found.get(value.tag, {})
                number = len(value.image.encoded_image_string) or value.simple_value
                found[value.tag][event.step] = number
            at += size + 16
    return found


def test_tensorboard_has_each_report_once_and_drops_what_a_run_went_back_from(tmp_path: Path):
    report(tmp_path, 10, 20)  # told to nobody, or to a driver that was killed
    for attempt, steps in enumerate([(30,), (30, 40)]):
        with Tracking(Mirror(tmp_path), ["tensorboard"], OPTIONS):
            go_back(tmp_path, 20)
            report(tmp_path, *steps, attempt=attempt)
        found = board(tmp_path)
        pictures = found.pop("validation/pictures")
        assert pictures.keys() == found["validation/cos"].keys()
        assert found.keys() == recorded(tmp_path).keys()
        for name, expected in recorded(tmp_path).items():
            assert found[name] == pytest.approx(expected)

    # Back to a checkpoint while it is watched: the steps after it are dropped, and told again
    with Tracking(Mirror(tmp_path), ["tensorboard"], OPTIONS):
        time.sleep(2)
        go_back(tmp_path, 20)
        report(tmp_path, 30, attempt=2)
    found = board(tmp_path)
    assert found["train/loss"] == pytest.approx({10: 0.1, 20: 0.05, 30: 0.1})
    assert found["validation/cos"].keys() == {20}


def test_a_full_disk_under_the_events_holds_up_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """A limit of the size of files stands for the disk."""
    monkeypatch.setattr("training.runs.trackers.END_SECONDS", 3.0)
    report(tmp_path, *range(10, 1000, 10))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with Tracking(Mirror(tmp_path), ["tensorboard"], OPTIONS):
            pass
        output = capsys.readouterr().out
        assert output.count("tensorboard: does not answer, is tried again: ") == 1
        assert "tensorboard: has not taken the last reports; the same command sends them" in output
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    time.sleep(2)
    assert board(tmp_path)["train/loss"].keys() == set(range(10, 1000, 10))


# -- Weights & Biases ------------------------------------------------------------------------------


def wandb_records(run: Path) -> list:
    """The records of the one offline file: blocks of 32 KiB of (crc, length, kind, data) after a
    header of 7 bytes; a record may be cut over blocks."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    data, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(part))
            part = b""
    return found


def wandb_rows(run: Path) -> Scores:
    """The numbers of its rows; of two at a step the later counts."""
    found: Scores = defaultdict(dict)
    for record in wandb_records(run):
        if record.WhichOneof("record_type") != "history":
            continue
        items = [(i.key or "/".join(i.nested_key), i.value_json) for i in record.history.item]
        (step,) = (json.loads(value) for name, value in items if name == "step")
        for name, value in items:
            if name.startswith(("train/", "validation/")):
                found[name][step] = json.loads(value)
    return found


@pytest.mark.slow
def test_what_wandb_holds_equals_the_log_after_a_kill_and_a_resume(tmp_path: Path):
    """The driver is another process each time, and the first is killed."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from training.bucket.mirror import Mirror\n"
        "from training.runs.trackers import Tracking, require_trackers\n"
        "require_trackers(['wandb'])\n"
        f"with Tracking(Mirror(Path(sys.argv[1])), ['wandb'], {OPTIONS}):\n"
        "    time.sleep(float(sys.argv[2]))\n"
    )
    environment = {**os.environ, "WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}

    def drive(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", code, str(tmp_path), str(seconds)]
        return subprocess.Popen(command, env=environment, start_new_session=True)

    report(tmp_path, 10, 20, 30)
    first = drive(60)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    identity = json.loads((tmp_path / "trackers.json").read_text())["id"]

    go_back(tmp_path, 20)
    report(tmp_path, 30, 40, attempt=1)
    (tmp_path / FINAL_NAME).write_text("{}")
    assert drive(0).wait() == 0
    found = wandb_rows(tmp_path)
    pictures = found["validation/pictures/path"]
    found = {name: values for name, values in found.items() if "pictures" not in name}
    assert found == recorded(tmp_path) and pictures.keys() == {20, 40}
    records = wandb_records(tmp_path)
    (started,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert started.run_id == identity and started.display_name == tmp_path.name
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert OPTIONS.items() <= config.items()
    artifacts = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    files = {entry.ref for each in artifacts for entry in each.manifest.contents}
    references = {file.rpartition("/")[0] for file in files}
    assert {step_folder(tmp_path, step).as_uri() for step in (20, 40)} <= references


# -- MLflow ----------------------------------------------------------------------------------------


class Server:
    """MLflow's own, with its store in a folder; it may be killed, and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._process = folder, None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port",
                 str(self.port), "--workers", "1",
                 "--backend-store-uri", f"sqlite:///{self._folder}/store.db",
                 "--artifacts-destination", str(self._folder / "artifacts")],
                stdout=log, stderr=log, start_new_session=True, cwd=self._folder,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                assert time.monotonic() < deadline, (self._folder / "server.log").read_text()
                time.sleep(0.5)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    if find_spec("mlflow.server") is None:
        pytest.skip("needs MLflow, of the extra `test`")
    folder = tmp_path / "mlflow"
    folder.mkdir()
    server = Server(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    server.start()
    yield server
    server.kill()


def mlflow_runs(run: Path) -> list:
    """What the server has of a run: one entry, or none yet."""
    from mlflow import MlflowClient

    identity = json.loads((run / "trackers.json").read_text())["id"]
    experiment = MlflowClient().get_experiment_by_name("minidalle2")
    wanted = f"tags.`minidalle2.id` = '{identity}'"
    return MlflowClient().search_runs([experiment.experiment_id], wanted) if experiment else []


def mlflow_run(run: Path):
    from mlflow import MlflowClient

    (found,) = mlflow_runs(run)
    return MlflowClient(), found


def mlflow_scores(run: Path) -> Scores:
    """The server's numbers; of two at a step the later counts, and none is there twice."""
    client, of_server = mlflow_run(run)
    found: Scores = defaultdict(dict)
    for name in of_server.data.metrics:
        history = client.get_metric_history(of_server.info.run_id, name)
        each = [(metric.timestamp, metric.step) for metric in history]
        assert len(each) == len(set(each))
        for metric in sorted(history, key=lambda metric: metric.timestamp):
            found[name][metric.step] = metric.value
    return found


def wait_for(condition) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_what_mlflow_holds_equals_the_log_after_an_outage_and_a_resume(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("training.runs.trackers.LONGEST_WAIT_SECONDS", 2.0)
    run = tmp_path / "prior"
    run.mkdir()
    with Tracking(Mirror(run), ["mlflow"], OPTIONS):
        report(run, 10, 20)
        wait_for(lambda: server_has(run, 20))
        server.kill()
        report(run, 30, 40)
        wait_for(lambda: "mlflow: does not answer" in capsys.readouterr().out)
        go_back(run, 40)
        report(run, 50, attempt=1)
        server.start()
        wait_for(lambda: "mlflow: answers again" in capsys.readouterr().out)
    assert mlflow_scores(run) == recorded(run)
    client, found = mlflow_run(run)
    assert found.info.status == "KILLED" and found.info.run_name == "prior"
    assert {name: str(value) for name, value in OPTIONS.items()} == found.data.params
    artifacts = client.list_artifacts(found.info.run_id, "validation")
    names = [Path(each.path).name for each in artifacts]
    assert names == ["step_00000020.png", "step_00000040.png"]
    for step in (20, 40):
        folder = step_folder(run, step)
        assert found.data.tags[f"checkpoint.{folder.name}"] == folder.as_uri()

    # The run continues, is longer, and ends while the server is away; the same command tells it
    server.kill()
    monkeypatch.setattr("training.runs.trackers.END_SECONDS", 2.0)
    longer = {**OPTIONS, "train.num_steps": 60}
    with Tracking(Mirror(run), ["mlflow"], longer):
        go_back(run, 40)
        report(run, 50, 60, attempt=2)
        (run / FINAL_NAME).write_text("{}")
    assert "mlflow: has not taken the last reports; the same" in capsys.readouterr().out
    server.start()
    monkeypatch.setattr("training.runs.trackers.END_SECONDS", 60.0)
    with Tracking(Mirror(run), ["mlflow"], longer):
        pass
    assert mlflow_scores(run) == recorded(run)
    _, found = mlflow_run(run)
    assert found.info.status == "FINISHED"
    assert found.data.params["train.num_steps"] == "100"
    assert found.data.tags["train.num_steps"] == "60"


def server_has(run: Path, step: int) -> bool:
    tags = [found.data.tags.get("minidalle2.sent", "{}") for found in mlflow_runs(run)]
    return any(json.loads(sent).get("train", [0, 0])[1] >= step for sent in tags)


def test_a_password_in_the_address_is_not_printed(tmp_path: Path):
    pytest.importorskip("mlflow")
    code = (
        "from pathlib import Path\nfrom training.bucket.mirror import Mirror\n"
        "from training.runs import trackers\ntrackers.END_SECONDS = 5.0\n"
        "with trackers.Tracking(Mirror(Path.cwd()), ['mlflow'], {}):\n    pass\n"
    )
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://user:sesame@127.0.0.1:9"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    output = ended.stdout + ended.stderr
    assert "mlflow: does not answer" in output and "sesame" not in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trackers.json"]


# -- before a run ----------------------------------------------------------------------------------


def test_a_tracker_that_cannot_be_used_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = PriorRunConfig(train=TrainConfig.of(track=("mlflow",)))
    with pytest.raises(ValueError, match=r"^train.track: found mlflow without MLFLOW_TRACKING_URI"):
        launch(config, str(tmp_path / "run"), "training.tasks.prior:build", "prior")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("training.runs.trackers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"found wandb, which is not installed, .*\[wandb\]"):
        require_trackers(["wandb"])


def test_nothing_is_tracked_unasked(tmp_path: Path):
    report(tmp_path, 10)
    before = sorted(tmp_path.iterdir())
    with Tracking(Mirror(tmp_path), [], OPTIONS):
        pass
    assert sorted(tmp_path.iterdir()) == before
