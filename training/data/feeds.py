"""Where a run's batches come from: threads of its own worker, or Ray Data on any CPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from training.config import RunConfig
from training.data.dataloader import Batch, Feed, Reader
from training.data.sampler import Plan

if TYPE_CHECKING:
    from training.loop import Job

STEPS_A_SPAN = 10_000  # that one execution of Ray Data reads
STEPS_A_BLOCK = 8  # that one of its tasks reads


class StepFeed(Protocol):
    """Gives the micro-batches of consecutive steps."""

    def iterate(self, start: int, stop: int) -> Iterator[list[Batch]]: ...


def make_feed(job: "Job", config: RunConfig, rank: int, world_size: int) -> StepFeed:
    """Return the feed of a rank that `config.ingest` names; both give the same batches."""
    reader, data = job.build_reader(), config.data
    plan = Plan(
        data_sets=reader.data_sets,
        weights=data.weights,
        global_batch_size=config.train.batch.global_batch_size,
        seed=config.train.seed,
        num_streams=data.num_streams,
        window=data.window,
        block_size=job.block_size,
    )
    feed = Feed(
        plan=plan,
        reader=reader,
        rank=rank,
        world_size=world_size,
        grad_accum_steps=config.train.micro_batches(world_size),
        prefetch=data.prefetch,
    )
    if config.ingest == "native":
        return feed
    return RayFeed(feed=feed, build_reader=job.build_reader, num_readers=data.num_threads)


@dataclass(frozen=True, kw_only=True)
class RayFeed:
    """Reads a rank's batches through Ray Data: in the plan's order, on whichever CPUs are free.

    feed: says which samples; build_reader: makes the reader of each process that reads;
    num_readers: such processes at most.
    """

    feed: Feed
    build_reader: Callable[[], Reader]
    num_readers: int

    def iterate(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of steps [start, stop), reading ahead."""
        self._require_room()
        for first in range(start, stop, STEPS_A_SPAN):
            steps = range(first, min(first + STEPS_A_SPAN, stop))
            for step, row in zip(steps, self._rows(steps), strict=True):
                yield self.feed.assemble(step, row)

    def _require_room(self) -> None:
        import ray

        from cluster.base.ray_session import ensure_ray

        ensure_ray()
        cpus = ray.cluster_resources().get("CPU", 0)
        if cpus < 2 * self.feed.world_size:
            raise ValueError(
                f"ingest: found ray over {cpus:.0f} CPUs for {self.feed.world_size} workers, "
                "expected at least one more CPU for each of them to read on; use --ingest native"
            )

    def _rows(self, steps: range) -> Iterator[dict[str, Any]]:
        """Yield the columns of each step."""
        import ray.data

        from cluster.base.ray_session import placed_on

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        blocks = -(-len(steps) // STEPS_A_BLOCK)
        items = ray.data.from_items([{"step": step} for step in steps], override_num_blocks=blocks)
        read: Any = StepReader  # an actor's class, where the annotations know functions only
        rows = items.map(
            read,
            fn_constructor_args=(self._plan(), self.build_reader, self._place()),
            num_cpus=1,
            resources=placed_on("cpu_group"),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=self.num_readers),
        )
        for row in rows.iter_rows():
            yield {name: value.copy() for name, value in row.items()}  # Ray's cannot be written to

    def _plan(self) -> Plan:
        return replace(self.feed.plan)  # without what the original keeps of its windows

    def _place(self) -> tuple[int, int, int]:
        return self.feed.rank, self.feed.world_size, self.feed.grad_accum_steps


class StepReader:
    """A Ray Data actor: keeps a reader, and turns the numbers of steps into their columns."""

    def __init__(
        self, plan: Plan, build_reader: Callable[[], Reader], place: tuple[int, int, int]
    ) -> None:
        rank, world_size, parts = place
        self._feed = Feed(
            plan=plan, reader=build_reader(), rank=rank, world_size=world_size,
            grad_accum_steps=parts,
        )  # fmt: skip

    def __call__(self, row: dict[str, Any]) -> dict[str, np.ndarray]:
        return self._feed.columns(int(row["step"]))
