"""A training run on simulated nodes of one machine, what can befall it, and what must hold then."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from _recovery import Recovery, recovery_after, trained_samples

from cluster.base.jsonl import read_lines
from cluster.base.run_dir import HEARTBEATS_FOLDER, METRICS_NAME, step_of
from training.checkpoints.records import valid_records
from training.runs.events import read_timeline

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT_EVERY = 10
HANG_SECONDS = 30.0
NUM_SAMPLES, GLOBAL_BATCH = 120, 24  # five steps an epoch
PATIENCE_SECONDS = 400.0
STORE_BYTES = 80 << 20  # of a node's object store; Ray asks for 75 MB at least


class Nodes:
    """Simulated nodes of one CPU each, beside a head that has none and holds the driver."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES,
            },
        )
        self.have(count)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def have(self, count: int) -> None:
        """Add nodes, or take some away, until there are so many that live."""
        for node in self._workers():
            if not _alive(self._raylet(node)):
                self._cluster.remove_node(node, allow_graceful=False)
        while len(self._workers()) > count:
            self._cluster.remove_node(self._workers()[-1])
        while len(self._workers()) < count:
            self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    def raylet_of(self, pid: int) -> int:
        """Return the process id of the raylet of a worker's node."""
        parent = psutil.Process(pid).ppid()
        assert parent in [self._raylet(node) for node in self._workers()], "a child of a raylet"
        return parent

    def close(self) -> None:
        self._cluster.shutdown()

    def _workers(self) -> list[Any]:
        return list(self._cluster.worker_nodes)

    @staticmethod
    def _raylet(node: Any) -> int:
        return node.all_processes["raylet"][0].process.pid


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """Start nodes; the block's end takes them away."""
    nodes = Nodes(count)
    try:
        yield nodes
    finally:
        nodes.close()


@dataclass(kw_only=True)
class Training:
    """A run of training/prior.py on the nodes, by its command."""

    run: Path
    embeds: Path
    address: str
    num_steps: int
    options: tuple[str, ...] = ()
    process: subprocess.Popen | None = field(default=None, init=False)

    def start(self) -> None:
        """Give the command, the first time or again."""
        command = [
            sys.executable, str(ROOT / "training" / "prior.py"), "--preset", "debug", "--embeds",
            str(self.embeds), "--run", str(self.run), "--train.num-workers", "2",
            "--train.num-threads", "1", "--train.zero-stage", "1", "--train.precision", "fp32",
            "--train.global-batch-size", str(GLOBAL_BATCH), "--train.num-steps",
            str(self.num_steps), "--train.checkpoint-every", str(CHECKPOINT_EVERY),
            "--train.report-every", "1", "--train.log-samples", "--train.max-failures", "100",
            "--train.hang-seconds", str(HANG_SECONDS), *self.options,
        ]  # fmt: skip
        environment = {**os.environ, "RAY_ADDRESS": self.address}
        with self.output.open("a") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment
            )

    @property
    def output(self) -> Path:
        return self.run.parent / f"{self.run.name}.txt"

    def last_output(self) -> str:
        """The end of what the driver has printed."""
        return self.output.read_text()[-3000:]

    @property
    def step(self) -> int:
        """The last step that was reported."""
        lines = read_lines(self.run / METRICS_NAME)
        return lines[-1]["step"] if lines else 0

    def await_that(self, what: str, true: Callable[[], bool], seconds: float = 0.05) -> None:
        """Wait until something is so; AssertionError with the output where the run ends first."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not true():
            assert self.process is not None
            ended = self.process.poll()
            assert ended is None, f"ended with {ended} before {what}:\n{self.last_output()}"
            assert time.monotonic() < deadline, f"waited in vain: {what}\n{self.last_output()}"
            time.sleep(seconds)

    def await_step(self, step: int) -> None:
        self.await_that(f"step {step}", lambda: self.step >= step)

    def ranks(self) -> dict[int, int]:
        """Return the process id of each rank of the present attempt, none while it is not whole."""
        pids: dict[int, int] = {}
        lines = read_timeline(self.run)
        begun = next((n for n in range(len(lines))[::-1] if lines[n]["event"] == "restored"), None)
        if begun is None or any(x["event"] in ("lost", "launched") for x in lines[begun:]):
            return {}
        for path in (self.run / HEARTBEATS_FOLDER).glob("rank_*.json"):
            beat = json.loads(path.read_text())
            if _alive(beat["pid"]):
                pids[beat["rank"]] = beat["pid"]
        return pids if len(pids) == lines[begun]["num_workers"] else {}

    def committed(self) -> int:
        """Return the step of the newest checkpoint that is whole."""
        return max(self.checkpoints(), default=0)

    def checkpoints(self) -> list[int]:
        """Return the steps of the checkpoints that are whole."""
        exported = [path.parent for path in self.run.glob("step_*/state.json")]
        return [step_of(folder) for folder in exported if valid_records(folder)]

    def recovery(self, fault: float) -> Recovery | None:
        return recovery_after(read_timeline(self.run), fault)

    def attempts(self) -> list[dict]:
        """Return where each attempt began."""
        return [line for line in read_timeline(self.run) if line["event"] == "restored"]

    def finish(self) -> None:
        """Wait for the end, which must be a good one."""
        assert self.process is not None
        code = self.process.wait(PATIENCE_SECONDS)
        assert code == 0, self.last_output()

    def stop(self) -> None:
        """End the driver, whatever it does."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    # -- faults; each returns the time by the clock ------------------------------------------------

    def kill_worker(self, dice: random.Random) -> float:
        return _signal(dice.choice(sorted(self.ranks().values())), signal.SIGKILL)

    def kill_while_it_writes(self) -> float:
        """Kill the first rank that is seen with a half-written part of a checkpoint."""
        ranks, halves = self.ranks(), list[Path]()

        def writing() -> bool:
            halves[:] = self.run.glob("step_*/fragments/rank_*.part")
            return bool(halves)

        self.await_that("a checkpoint is written", writing, seconds=0.0)
        return _signal(ranks[int(halves[0].stem.removeprefix("rank_"))], signal.SIGKILL)

    def stop_worker(self, dice: random.Random) -> float:
        """Stop a process without ending it: it holds its connections and says nothing."""
        return _signal(dice.choice(sorted(self.ranks().values())), signal.SIGSTOP)

    def kill_raylet(self, dice: random.Random, on: Nodes) -> float:
        rank = dice.choice(sorted(self.ranks().values()))
        return _signal(on.raylet_of(rank), signal.SIGKILL)

    def kill_driver(self) -> float:
        """Kill the driver and give the command again; the time is that of the command."""
        self.stop()
        now = time.time()
        self.start()
        return now

    def damage_checkpoint(self, dice: random.Random) -> float:
        """Truncate a part of the newest checkpoint, flip one of its bits or delete it; then kill a
        worker. There is another one to go on from, which may not be the one damaged before."""
        self.await_that("two checkpoints are whole", lambda: len(self.checkpoints()) > 1)
        folder = self.run / f"step_{self.committed():08d}" / "fragments"
        path = dice.choice(sorted(folder.iterdir()))
        content = bytearray(path.read_bytes())
        place = dice.randrange(len(content))
        how = dice.choice(("truncate", "flip", "delete"))
        if how == "truncate":
            path.write_bytes(content[:place])
        elif how == "flip":
            content[place] ^= 1 << dice.randrange(8)
            path.write_bytes(content)
        else:
            path.unlink()
        return self.kill_worker(dice)


def _signal(pid: int, number: int) -> float:
    now = time.time()
    os.kill(pid, number)
    return now


def write_embeds(root: Path) -> Path:
    """Draw and embed the samples; return the folder of the embeddings."""
    from training.data import demo_data

    demo_data.draw_images(root / "images", num_shards=2, samples_per_shard=NUM_SAMPLES // 2)
    demo_data.embed_here(str(root / "images"), root / "embeds", "tiny:random")
    return root / "embeds"


def check_samples(run: Path, reference: Path, num_steps: int) -> None:
    """Raise AssertionError where the committed steps of a run repeat or skip a sample: each is of
    the same samples as the undisturbed run's, and an epoch has every sample once."""
    trained, expected = (trained_samples(each, num_steps) for each in (run, reference))
    pairs = enumerate(zip(trained, expected, strict=True), 1)
    different = [step for step, (ours, theirs) in pairs if ours != theirs]
    assert not different, f"{run}: other samples than undisturbed at steps {different[:5]}"
    steps = NUM_SAMPLES // GLOBAL_BATCH
    for first in range(0, num_steps - steps + 1, steps):
        keys = [key for step in trained[first : first + steps] for key in step]
        assert len(set(keys)) == len(keys) == NUM_SAMPLES, f"{run}: epoch from step {first + 1}"


def largest_difference(run: Path, reference: Path) -> float:
    """Return the largest difference of two runs' last weights and averages."""
    from safetensors.torch import load_file

    largest = 0.0
    for name in ("model.safetensors", "ema.safetensors"):
        files = []
        for each in (run, reference):
            step = json.loads((each / "final.json").read_text())["step"]
            files.append(load_file(str(each / step / name)))
        assert files[0].keys() == files[1].keys()
        for key, tensor in files[0].items():
            other = files[1][key]
            largest = max(largest, float((tensor.double() - other.double()).abs().max()))
    return largest
