"""A run in a bucket under Ray Train: a worker and a driver are killed, a stop is asked for."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from _runs import ROOT, environment, prior_run, script
from _s3 import AWS, MortalServer
from test_training_bucket import assert_all_whole, lines_in

from cluster.base.run_dir import INCIDENTS_NAME, METRICS_NAME, TIMELINE_NAME
from ingest.store.storage import storage_of
from training.config import TrainConfig
from training.runs.worker import launch

STEPS, EVERY = 60, 10
SETTINGS = TrainConfig.of(
    num_workers=0, num_threads=1, report_every=1, num_steps=STEPS, checkpoint_every=EVERY,
    global_batch_size=8, precision="fp32", device="cpu",
)  # fmt: skip


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MortalServer]:
    import s3fs

    server = MortalServer(tmp_path)
    for name, value in {**AWS, "AWS_ENDPOINT_URL": server.door.url}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("runs")
    yield server
    server.end()
    s3fs.S3FileSystem.clear_instance_cache()


def drive(
    data: Path, url: object, scratch: Path, log: Path, num_workers: int = 2, steps: int = STEPS,
    every: int = EVERY, seconds: float = 0.5,
) -> subprocess.Popen:  # fmt: skip
    """Start a driver and its workers, slow enough to be killed in the middle."""
    command = script(
        "tests/_slow_prior.py", "--embeds", data / "embeds", "--run", url, "--scratch", scratch,
        "--train.num-workers", num_workers, "--train.num-steps", steps,
        "--train.checkpoint-every", every, "--train.max-failures", 99,
        "--train.global-batch-size", 8, "--train.precision", "fp32", "--train.device", "cpu",
        "--train.report-every", 1, "--train.num-threads", 1, "--diffusion.width", 16,
        "--diffusion.depth", 1, "--diffusion.num-heads", 2,
        "--train.validator", "python -c 'print(\"looked\")'",
    )  # fmt: skip
    path = f"{ROOT / 'tests'}:{ROOT}"
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment(PYTHONPATH=path, SECONDS_A_STEP=str(seconds)),
        )  # fmt: skip


def wait_until(true: Callable[[], object], log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)


def kill_all(driver: subprocess.Popen) -> None:
    """Kill a driver with all that it has started."""
    started = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    for process in started:
        if process.is_running():
            process.kill()


def workers_of(driver: subprocess.Popen) -> list[psutil.Process]:
    """The processes that train, of the Ray that the driver has started."""
    below = psutil.Process(driver.pid).children(recursive=True)
    return [each for each in below if "RayTrainWorker" in " ".join(each.cmdline())]


@pytest.mark.slow
def test_a_run_in_a_bucket_outlives_a_worker_and_its_driver(
    server: MortalServer, tmp_path: Path, write_data: Callable[..., Path]
):
    data = write_data(tmp_path / "data", num_shards=2, samples_per_shard=10)
    expected = prior_run(data, tmp_path / "here", train=SETTINGS)
    assert launch(expected, expected.run, "training.tasks.prior:build_prior", "prior") == 0

    url, log, storage = "s3://runs/prior", tmp_path / "log", storage_of("s3://runs/prior")

    def has_step(step: int) -> bool:
        return storage.size(f"step_{step:08d}/state.json") is not None

    def looks() -> list[str]:
        there = storage.size("validator.log") is not None
        return storage.read("validator.log").decode().splitlines() if there else []

    # A worker is killed; the launch goes on
    driver = drive(data, url, tmp_path / "scratch", log)
    wait_until(lambda: has_step(10), log)
    workers_of(driver)[0].kill()
    wait_until(lambda: has_step(30), log)

    # The driver is killed with all that it has started; another machine takes the run over
    kill_all(driver)
    driver = drive(data, url, tmp_path / "another", log)
    wait_until(lambda: has_step(40) or driver.poll() is not None, log)
    storage.replace("stop", b"")
    assert driver.wait(240) == 1, log.read_text()[-3000:]
    assert f"{url}: stopped on request, at a checkpoint" in log.read_text()
    assert storage.size("stop") is None and storage.size("final.json") is None
    before, last = looks(), max(filter(has_step, range(EVERY, STEPS + 1, EVERY)))
    assert last < STEPS
    driver = drive(data, url, tmp_path / "another", log, num_workers=1)
    assert driver.wait(240) == 0, log.read_text()[-3000:]

    # The same lines, and the weights of a run in one process but for rounding
    lines = lines_in(url, tmp_path, METRICS_NAME)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    events = [line["event"] for line in lines_in(url, tmp_path, TIMELINE_NAME)]
    assert events.count("launched") == 3 and events.count("lost") == 1
    assert events.count("restored") == 4
    kinds = [line["kind"] for line in lines_in(url, tmp_path, INCIDENTS_NAME)]
    assert kinds.count("lost") == 1

    from safetensors.torch import load, load_file

    name = f"step_{STEPS:08d}/model.safetensors"
    found, wanted = load(storage.read(name)), load_file(str(tmp_path / "here" / name))
    for key, tensor in wanted.items():
        assert (found[key] - tensor).abs().max() < 5e-5, key
    output = log.read_text()
    assert output.count("continues from step") >= 2 and "Traceback" not in output
    # A launch that is killed loses its validations; one that ends has looked at its checkpoints
    found = looks()
    assert found.count("looked") - before.count("looked") >= (STEPS - last) // EVERY, found
    assert f"--run {url} --once" in found[0]


MANY, OFTEN = 240, 5


@pytest.mark.soak
def test_twenty_kills_of_workers_driver_and_server_change_nothing(
    server: MortalServer, tmp_path: Path, write_data: Callable[..., Path]
):
    """Each while a checkpoint of two workers is uploaded."""
    data = write_data(tmp_path / "data", num_shards=2, samples_per_shard=10)
    url, log, storage = "s3://runs/prior", tmp_path / "log", storage_of("s3://runs/prior")
    kills = ["worker", "server", "driver", "server", "worker"] * 4

    def start(machine: int) -> subprocess.Popen:
        scratch = tmp_path / f"machine_{machine}"
        return drive(data, url, scratch, log, steps=MANY, every=OFTEN, seconds=0.3)

    def uploads() -> int:
        return server.record.read_bytes().count(b"/fragments/")

    def await_upload(driver: subprocess.Popen) -> None:
        before = uploads()
        wait_until(lambda: uploads() > before or driver.poll() is not None, log)
        assert driver.poll() is None, log.read_text()[-3000:]

    driver, took = start(0), []
    for number, who in enumerate(kills):
        await_upload(driver)
        begin = time.monotonic()
        if who == "server":
            server.kill_and_restart()
        elif who == "worker" and workers_of(driver):
            workers_of(driver)[number % 2].kill()
        else:
            kill_all(driver)
            driver = start(number % 2)
        await_upload(driver)
        took.append((who, round(time.monotonic() - begin, 1)))
    assert driver.wait(600) == 0, log.read_text()[-3000:]
    print(f"seconds from a kill to the next upload: {took}")

    undisturbed = drive(
        data, tmp_path / "here", tmp_path / "machine_2", tmp_path / "log_here", steps=MANY,
        every=OFTEN, seconds=0,
    )  # fmt: skip
    assert undisturbed.wait(240) == 0, (tmp_path / "log_here").read_text()[-3000:]
    for name in ("model", "ema"):
        path = f"step_{MANY:08d}/{name}.safetensors"
        assert storage.read(path) == (tmp_path / "here" / path).read_bytes()
    lines = lines_in(url, tmp_path, METRICS_NAME)
    assert [line["step"] for line in lines] == list(range(1, MANY + 1))
    assert_all_whole(storage)
