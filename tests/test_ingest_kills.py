"""Ingest that is killed, worker, driver or raylet, at any moment: run again, it ends alike."""

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from _lists import ROOT, digests, download_command, finished, is_whole, write_list

from ingest.shards import load_snapshot
from training.data import demo_data

NUM_ROWS, SHARD = 160, 8
SECONDS_A_RUN = 300.0  # of which some 25 are usual; what starts Ray is slow on a machine in use
VICTIMS = ("worker", "driver", "raylet")


@dataclass(frozen=True, kw_only=True)
class Work:
    """A command that fills a folder with commits.

    command: from the folder to its words; worker: how the titles of its workers end.
    """

    command: Callable[[Path], list[str]]
    num_commits: int
    worker: str
    whole: Path


@pytest.fixture
def download(site, tmp_path) -> Work:
    """A download from a site that answers after 20 to 60 ms, each path always alike: pictures, and
    now and then a 404, a 503 or a page."""
    others = [(404, b""), (503, b""), (200, b"<html>")]
    for i in range(NUM_ROWS):
        status, body = others[i % 3] if i % 10 == 9 else (200, site.picture(40 + i, 40, i))
        site.put(f"/{i}.png", body, status=status)
        site.answers[f"/{i}.png"] = slowed(site.answers[f"/{i}.png"], 0.02 + 0.04 * (i % 7) / 6)
    urls = [site.url(f"/{i}.png") for i in range(NUM_ROWS)]
    listed, whole = write_list(tmp_path / "list.parquet", urls), tmp_path / "whole"

    def spell(out: Path, num_processes: int = 2) -> list[str]:
        return download_command(
            site, listed, out, "--image-size", 32, "--samples-per-shard", SHARD, "--num-threads", 2,
            "--num-processes", num_processes, "--host-connections", 8,
        )  # fmt: skip

    finished(spell(whole, 0))
    commits = NUM_ROWS // SHARD
    return Work(command=spell, num_commits=commits, worker="ray::_make_in_task", whole=whole)


@pytest.fixture
def embed(tmp_path) -> Work:
    """The embedding of 24 shards of drawings, in chunks smaller than a shard."""
    images = tmp_path / "images"
    demo_data.draw_images(images, num_shards=24, samples_per_shard=48)

    def spell(out: Path) -> list[str]:
        return [
            sys.executable, str(ROOT / "ingest" / "embed.py"), "--images", str(images),
            "--clip", "tiny:random", "--out", str(out), "--batch-size", "20", "--num-threads", "1",
        ]  # fmt: skip

    whole = tmp_path / "whole"
    finished(spell(whole))
    worker = "ray::MapWorker(Map(ClipEncoder))"
    return Work(command=spell, num_commits=24, worker=worker, whole=whole)


def slowed(answer, seconds: float):
    def later(handler) -> None:
        time.sleep(seconds)
        answer(handler)

    return later


def family(driver: subprocess.Popen) -> dict[psutil.Process, str]:
    """Return a driver's running children with their titles."""
    found = {}
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # zombies too
            found[process] = " ".join(process.cmdline()[:1])
    return found


def find(driver: subprocess.Popen, victim: str) -> list[psutil.Process]:
    """Return the processes of a driver whose title has `victim` in it; "driver" is itself."""
    if victim == "driver":
        return [psutil.Process(driver.pid)]
    return [process for process, title in family(driver).items() if victim in title]


def kill_once(work: Work, out: Path, victim: str, draw: random.Random) -> str:
    """Start a run, kill one process of it after some commits, and wait for the end of the rest;
    return what was killed and when."""
    commits = draw.randrange(work.num_commits - 4)
    log = out.parent / "killed.log"
    title = {"worker": work.worker, "raylet": "/raylet/raylet", "driver": "driver"}[victim]
    with log.open("w") as file:
        driver = subprocess.Popen(work.command(out), stdout=file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + SECONDS_A_RUN
        while len(list(out.glob("_commits/[!.]*"))) < commits or not find(driver, title):
            assert driver.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        children = family(driver)
        targets = find(driver, title)
        if targets:
            draw.choice(targets).send_signal(signal.SIGKILL)
        killed = time.monotonic()
        ended = driver.wait(SECONDS_A_RUN)
        lived = time.monotonic() - killed
    # Nothing of the dead run may write any more; Ray's agents, which write nothing, stay a minute.
    writing = [one for one, title in children.items() if not title.endswith("Agent")]
    assert psutil.wait_procs(writing, timeout=60)[1] == []
    return f"{victim} killed after {commits} commits: exit {ended} after {lived:.1f} s"


def campaign(work: Work, tmp_path: Path, kills: list[tuple[str, int]]) -> list[str]:
    """Kill runs one after the other, each in a folder of its own; return what happened."""
    reports = []
    for number, (victim, seed) in enumerate(kills):
        out = tmp_path / f"killed{number}"
        reports.append(kill_once(work, out, victim, random.Random(seed)))
        finished(work.command(out))
        assert digests(out) == digests(work.whole) and is_whole(out), reports[-1]
        assert load_snapshot(out).digest == load_snapshot(work.whole).digest
        assert list((out / "_attempts").iterdir()) == []
    return reports


@pytest.mark.slow
@pytest.mark.parametrize("name", ["download", "embed"])
def test_killed_once_each_it_ends_as_if_undisturbed(name, request, tmp_path):
    work = request.getfixturevalue(name)
    reports = campaign(work, tmp_path, [(victim, seed) for seed, victim in enumerate(VICTIMS)])
    print(*reports, sep="\n")


@pytest.mark.soak
@pytest.mark.parametrize("name", ["download", "embed"])
def test_killed_twenty_times_it_ends_as_if_undisturbed(name, request, tmp_path):
    work = request.getfixturevalue(name)
    reports = campaign(work, tmp_path, [(VICTIMS[i % 3], 100 + i) for i in range(20)])
    print(*reports, sep="\n")
