"""Blocks of images, made in this process or by Ray actors; each is committed once.

The block of an actor that dies is made again; a driver that dies leaves what was committed. What a
block contains depends neither on the worker that made it nor on the number of workers.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from eval.sampling.image_source import IncompleteError
from ingest.store.shard_runner import MAX_TRIES, Unit, WorkerDiedError, WorkerPool, run_units


class BlockWork(Protocol):
    """Work in blocks; picklable."""

    def build(self) -> Callable[[int], int]:
        """Load models; return a function that makes a block and returns its number of images."""
        ...


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Where blocks are made. number: of Ray actors, 0 = this process; num_threads: of an actor, on
    the CPU."""

    number: int = 0
    num_threads: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, value, least in (
            ("workers", self.number, 0),
            ("threads", self.num_threads, 1),
        ):
            if value < least:
                raise ValueError(f"--num-{name}: found {value}, expected {least} or more")

    def run(self, what: str, work: BlockWork, blocks: Sequence[int], num_images: int) -> int:
        """Make `blocks`; return their number of images.

        Raises what the work raises, and IncompleteError for a block under which every worker died.
        """
        from cluster.base.progress import progress

        if not blocks:
            return 0
        count = 0
        pool = self.pool(len(blocks))
        make = _MakeBlock(work, self.num_threads if pool.number else None)
        units = (Unit(name=str(block), payload=block) for block in blocks)
        with (
            progress(what, num_images, unit="images") as advance,
            closing(run_units(make, units, pool)) as results,
        ):
            for result in results:
                if isinstance(result.error, WorkerDiedError):
                    raise IncompleteError(
                        f"block {result.name}: {MAX_TRIES} workers died under it ({result.error})"
                    )
                if result.error is not None:
                    raise result.error
                count += result.value
                advance(result.value)
        return count

    def pool(self, num_blocks: int) -> WorkerPool:
        """Return the actors, which share the free CPUs and GPUs; on the GPU group, if it exists."""
        if self.number == 0:
            return WorkerPool(number=0)
        from cluster.base.ray_session import ensure_ray, group_resources

        ensure_ray()
        free = free_resources()
        gpus = free["GPU"] / self.number
        if group_resources("gpu_group") and not free["GPU"]:
            gpus = 1.0  # an autoscaler starts what is requested
        return WorkerPool(
            number=min(self.number, num_blocks),
            actors=True,
            num_cpus=min(1.0, _divisible(free["CPU"] / self.number)),
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
    """Round down to ten-thousandths, Ray's smallest part of a CPU or GPU."""
    return int(amount * 10_000) / 10_000


class _MakeBlock:
    """Makes blocks. Models are loaded with the first one, and kept."""

    def __init__(self, work: BlockWork, num_threads: int | None) -> None:
        self._work, self._num_threads = work, num_threads
        self._make: Callable[[int], int] | None = None

    def __call__(self, unit: Unit) -> int:
        if self._make is None:
            if self._num_threads is not None:
                import torch

                torch.set_num_threads(self._num_threads)
            self._make = self._work.build()
        return self._make(unit.payload)
