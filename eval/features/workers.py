"""Blocks of images, made in this process or by Ray actors; each is committed once.

The block of an actor that dies is made again; a driver that dies leaves what was committed. What a
block contains depends neither on the worker that made it nor on the number of workers.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from cluster.base.cli import require_at_least
from eval.sampling.image_source import IncompleteError
from ingest.shards import shard_name
from ingest.store.commits import committed, recover, withdraw_damaged
from ingest.store.shard_runner import MAX_TRIES, Unit, WorkerDiedError, WorkerPool, run_units

MakeBlock = Callable[[int], int]  # makes and commits a block; returns its number of images


@dataclass(frozen=True, kw_only=True)
class ImageBlocks:
    """A folder of `count` images, or of their features, in committed blocks of `size`."""

    root: Path
    count: int
    size: int

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def numbers(self, block: int) -> range:
        """Return the numbers of the images of a block."""
        return range(block * self.size, min((block + 1) * self.size, self.count))

    def repair(self, what: str) -> None:
        """Finish interrupted commits, and withdraw damaged blocks, to be made again."""
        recover(self.root)
        for name, problem in withdraw_damaged(self.root).items():
            print(f"{what}: block {name} is made again: {problem}", flush=True)

    def pending(self) -> list[int]:
        """Return the blocks that are not committed."""
        done = committed(self.root)
        return [block for block in range(len(self)) if shard_name(block) not in done]

    def num_committed(self) -> int:
        """Return the number of images in committed blocks."""
        return sum(commit.num_samples for commit in committed(self.root).values())


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Where blocks are made. num_workers: Ray actors, 0 = this process; num_threads: of an actor,
    on the CPU."""

    num_workers: int = 0
    num_threads: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        require_at_least(self, num_workers=0, num_threads=1)

    def run(self, what: str, load: Callable[[], MakeBlock], blocks: ImageBlocks) -> int:
        """Make the blocks that are missing; return their number of images.

        load: picklable; loads models and returns what makes a block. Raises what the work raises,
        and IncompleteError for a block under which every worker died.
        """
        from cluster.base.progress import progress

        pending, made = blocks.pending(), 0
        if not pending:
            return 0
        pool = self.pool(len(pending))
        make = _LoadOnce(load, self.num_threads if pool.number else None)
        units = (Unit(name=str(block), payload=block) for block in pending)
        num_images = sum(len(blocks.numbers(block)) for block in pending)
        with (
            progress(what, num_images, unit="images") as advance,
            closing(run_units(make, units, pool)) as results,
        ):
            for result in results:
                if isinstance(result.error, WorkerDiedError):
                    raise IncompleteError(
                        f"block {result.name}: {MAX_TRIES} workers died under it ({result.error})"
                    )
                made += result.get()
                advance(result.get())
        return made

    def pool(self, num_blocks: int) -> WorkerPool:
        """Return the actors, which share the free CPUs and GPUs; on the GPU group, if it exists."""
        if self.num_workers == 0:
            return WorkerPool(number=0)
        from cluster.base.ray_session import ensure_ray, group_resources

        ensure_ray()
        free = free_resources()
        gpus = free["GPU"] / self.num_workers
        if group_resources("gpu_group") and not free["GPU"]:
            gpus = 1.0  # an autoscaler starts what is requested
        return WorkerPool(
            number=min(self.num_workers, num_blocks),
            actors=True,
            num_cpus=min(1.0, _divisible(free["CPU"] / self.num_workers)),
            num_gpus=0.0 if self.device == "cpu" else min(1.0, _divisible(gpus)),
            group="gpu_group",
        )


def free_resources() -> dict[str, float]:
    """Return the free CPUs and GPUs; where all are in use, all of them, with a message.

    A job may hold some itself (--entrypoint-num-gpus), for which its actors would wait forever.
    """
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    for kind in ("CPU", "GPU"):
        if total.get(kind) and not free.get(kind):
            print(
                f"workers: wait for a {kind}: all {total[kind]:g} are held, maybe by this very job "
                "(--entrypoint-num-gpus)",
                flush=True,
            )
    return {kind: free.get(kind, 0.0) or total.get(kind, 0.0) for kind in ("CPU", "GPU")}


def _divisible(amount: float) -> float:
    """Round down to ten-thousandths, Ray's smallest share of a CPU or GPU."""
    return int(amount * 10_000) / 10_000


class _LoadOnce:
    """Makes blocks. Models are loaded with the first one, and kept."""

    def __init__(self, load: Callable[[], MakeBlock], num_threads: int | None) -> None:
        self._load, self._num_threads = load, num_threads
        self._make: MakeBlock | None = None

    def __call__(self, unit: Unit) -> int:
        if self._make is None:
            if self._num_threads is not None:
                import torch

                torch.set_num_threads(self._num_threads)
            self._make = self._load()
        return self._make(unit.payload)
