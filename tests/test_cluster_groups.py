"""Four simulated nodes in two groups, beside a head without work: every stage runs on the group
that it is for, and a node that is lost in its midst changes nothing of what comes out."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.base.ray_session import GROUPS
from ingest.shards import load_snapshot

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parent.parent
NUM_IMAGES, SHARD = 48, 6
STAGE_SECONDS = 900.0
SMALL: dict[str, Any] = {"object_store_memory": 80 << 20}
KINDS: dict[str, dict[str, Any]] = {
    "cpu": {"num_cpus": 1, "num_gpus": 0, "resources": {"cpu_group": 1}},
    "gpu": {"num_cpus": 1, "num_gpus": 1, "resources": {"gpu_group": 1}},  # a GPU in name only
}
# Runs the evaluation as the entry point of a job would be, on one GPU of the group, and again if
# its node is lost.
EVALUATE = """
import os, runpy, sys
import ray
ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False)
@ray.remote(num_cpus=0, num_gpus=1, resources={"gpu_group": 0.001}, max_retries=3)
def evaluate(arguments):
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        return end.code
sys.exit(ray.get(evaluate.remote(sys.argv[1:])))
"""


class Nodes:
    """The head, and two nodes of each kind."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "num_gpus": 0, "resources": {GROUPS: 1}, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args={**head, **SMALL})
        self.of_kind = {kind: [self.add(kind) for _ in range(2)] for kind in KINDS}

    def add(self, kind: str) -> Any:
        return self.cluster.add_node(**KINDS[kind], **SMALL)

    def replace(self, kind: str, node: Any) -> None:
        """Lose a node, without a word, and get another in its place, as from an autoscaler."""
        self.cluster.remove_node(node, allow_graceful=False)
        self.of_kind[kind].remove(node)
        self.of_kind[kind].append(self.add(kind))

    def at_work(self) -> set[tuple[str, str, int]]:
        """Return (kind of node, what runs, index of the node), as processes are named now."""
        found = set()
        for kind, nodes in self.of_kind.items():
            for index, node in enumerate(nodes):
                raylet = node.all_processes["raylet"][0].process.pid
                found |= {(kind, title, index) for title in _titles(raylet)}
        return found


def _titles(raylet: int) -> Iterator[str]:
    """Yield what the workers below a raylet call themselves while they work."""
    below: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(raylet).children(recursive=True)
    for process in below:
        title = ""
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
        if title.startswith("ray::") and not title.startswith("ray::IDLE"):
            yield title


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    try:
        yield found
    finally:
        found.cluster.shutdown()


class Stage:
    """A command under way, and where its work was seen."""

    def __init__(self, nodes: Nodes, command: list[str], output: Path) -> None:
        self.nodes, self.output, self.seen = nodes, output, set[tuple[str, str]]()
        environment = {**os.environ, "RAY_ADDRESS": nodes.cluster.address}
        with output.open("w") as file:
            self._process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT
            )

    def run(
        self, lose: tuple[str, str] | None = None, when: Callable[[], bool] = lambda: True
    ) -> None:
        """Wait for the end; lose: the kind of a node to lose, and a word of what is to run there at
        that moment, once `when` says so too."""
        deadline, lost = time.monotonic() + STAGE_SECONDS, None
        while self._process.poll() is None:
            assert time.monotonic() < deadline, self.output.read_text()[-3000:]
            at_work = self.nodes.at_work()
            self.seen |= {(kind, title) for kind, title, _ in at_work}
            if lose is not None and lost is None and when():
                kind, word = lose
                lost = next((i for k, title, i in at_work if k == kind and word in title), None)
                if lost is not None:
                    self.nodes.replace(kind, self.nodes.of_kind[kind][lost])
            time.sleep(0.03)
        assert self._process.returncode == 0, self.output.read_text()[-3000:]
        assert (lost is None) == (lose is None), f"nothing to lose was seen: {self.seen}"

    def where(self, word: str) -> set[str]:
        """Return the kinds of nodes on which something of that name ran."""
        return {kind for kind, title in self.seen if word in title}


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


class Pipeline:
    """All stages below one folder; lose: whether each loses a node."""

    def __init__(self, nodes: Nodes, root: Path, listed: Path, address: str) -> None:
        self.nodes, self.root, self.listed, self.address = nodes, root, listed, address
        root.mkdir()

    def _stage(self, name: str, command: list[str]) -> Stage:
        return Stage(self.nodes, command, self.root / f"{name}.txt")

    def download(self, lose: bool) -> str:
        stage = self._stage("download", python(
            "ingest/download.py", "--urls", self.listed, "--out", self.root / "images",
            "--image-size", 32, "--samples-per-shard", SHARD, "--num-threads", 2, "--no-robots",
            "--allow-address", self.address, "--host-rate", 0, "--host-connections", 32,
        ))  # fmt: skip
        stage.run(("cpu", "_make_in_task") if lose else None)
        assert stage.where("_make_in_task") == {"cpu"}
        return load_snapshot(str(self.root / "images")).digest

    def embed(self, lose: bool) -> str:
        stage = self._stage("embed", python(
            "ingest/embed.py", "--images", self.root / "images", "--clip", "tiny:random",
            "--out", self.root / "embeds", "--batch-size", 2, "--num-threads", 1,
        ))  # fmt: skip
        stage.run(("gpu", "Encoder") if lose else None)
        assert stage.where("Encoder") == {"gpu"} and stage.where("Reader") <= {"cpu"}
        return load_snapshot(str(self.root / "embeds")).digest

    def train(self, lose: bool) -> str:
        run = self.root / "prior"
        stage = self._stage("train", python(
            "training/prior.py", "--preset", "debug", "--embeds", self.root / "embeds",
            "--run", run, "--train.device", "cpu", "--train.num-workers", 2,
            "--train.num-threads", 1, "--train.num-steps", 150, "--train.report-every", 1,
            "--train.precision", "fp32",
        ))  # fmt: skip
        lines = run / "metrics.jsonl"
        stage.run(
            ("gpu", "TrainWorker") if lose else None,
            lambda: lines.is_file() and len(lines.read_text().splitlines()) >= 25,
        )
        assert stage.where("TrainWorker") == {"gpu"}
        step = json.loads((run / "final.json").read_text())["step"]
        return hashlib.sha256((run / step / "model.safetensors").read_bytes()).hexdigest()

    def evaluate(self, fake: Path, lose: bool) -> dict[str, Any]:
        arguments = python(
            "eval/fid.py", "--real", self.root / "images", "--fake", fake, "--clip", "tiny:random",
            "--out", self.root / "eval.json", "--num-threads", 1,
        )[1:]  # fmt: skip
        stage = self._stage("evaluate", [sys.executable, "-c", EVALUATE, *arguments])
        stage.run(("gpu", "evaluate") if lose else None)
        assert stage.where("evaluate") == {"gpu"}
        return json.loads((self.root / "eval.json").read_text())


def test_each_stage_has_its_group_and_survives_the_loss_of_a_node(nodes, site, tmp_path: Path):
    pause = threading.Event()  # never set: a picture takes its time, so that tasks are seen
    urls = []
    for number in range(NUM_IMAGES):
        urls.append(site.put(f"/{number}.png", site.picture(40, 36, 5 * number)))
        answer = site.answers[f"/{number}.png"]
        site.answers[f"/{number}.png"] = lambda h, answer=answer: (pause.wait(0.3), answer(h))
    captions = [f"caption {number}" for number in range(NUM_IMAGES)]
    pq.write_table(pa.table({"url": urls, "caption": captions}), tmp_path / "list.parquet")
    fake = tmp_path / "fake"
    fake.mkdir()
    for number in range(NUM_IMAGES):
        (fake / f"{number:06d}.png").write_bytes(site.picture(32, 32, 5 * number + 3))

    pipelines = {
        lose: Pipeline(nodes, tmp_path / f"lose_{lose}", tmp_path / "list.parquet", site.address)
        for lose in (False, True)
    }
    for stage in ("download", "embed", "train"):
        undisturbed, disturbed = (getattr(pipelines[lose], stage)(lose) for lose in (False, True))
        assert disturbed == undisturbed, stage
        print(f"{stage}: {undisturbed[:16]} with and without the loss of a node")
    undisturbed, disturbed = (pipelines[lose].evaluate(fake, lose) for lose in (False, True))
    assert disturbed == undisturbed and undisturbed["images"]["fd_clip"] > 0
