"""Blocks of work, here or on Ray's actors: each is committed once, whoever does it.

An actor that dies is replaced and its block is done again; a driver that dies leaves what was
committed. Nothing that a block leaves behind depends on who did it, or on how many there are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from eval.sampling.image_source import Incomplete

MAX_DEATHS = 3  # of actors, under one block, before the block is held to be at fault


class Work(Protocol):
    """What can be built in any process, and then does one block after another."""

    def build(self) -> Callable[[int], int]:
        """Load what the work needs; what is returned does a block and tells its images."""
        ...


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Who works. number: of Ray actors, 0 = this process; num_threads: of each, on the CPU."""

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

    def run(self, what: str, work: Work, blocks: Sequence[int], num_images: int) -> int:
        """Do `blocks`; returns their images. Errors are the work's own, or Incomplete."""
        from cluster.base.progress import progress

        if not blocks:
            return 0
        made = 0
        with progress(what, num_images, unit="images") as advance:
            for count in self._counts(work, blocks):
                made += count
                advance(count)
        return made

    def _counts(self, work: Work, blocks: Sequence[int]) -> Iterator[int]:
        if self.number == 0:
            do = work.build()
            yield from map(do, blocks)
            return
        from cluster.base.ray_session import ending_with_own_node, ensure_ray

        ensure_ray()
        with ending_with_own_node():
            yield from _Crew(self, work, list(reversed(blocks))).counts()


@dataclass
class _Crew:
    """Ray actors, each with one block in hand. blocks: to be done, the next one last."""

    workers: Workers
    work: Work
    blocks: list[int]
    busy: dict[Any, tuple[Any, int]] = field(default_factory=dict)  # result -> (actor, block)
    deaths: dict[int, int] = field(default_factory=dict)
    have: dict[str, float] = field(default_factory=dict)  # what the actors share out

    def counts(self) -> Iterator[int]:
        """Yield the images of each block as it is done; leaves no actor behind."""
        import ray

        try:
            for _ in range(min(self.workers.number, len(self.blocks))):
                self._give(self._hire())
            while self.busy:
                (done, *_), _ = ray.wait(list(self.busy), num_returns=1)
                actor, block = self.busy.pop(done)
                count = self._result(done, block)
                if self.blocks:
                    self._give(actor if count is not None else self._hire())
                if count is not None:
                    yield count
        finally:
            for actor, _ in self.busy.values():
                ray.kill(actor)

    def _give(self, actor: Any) -> None:
        block = self.blocks.pop()
        self.busy[actor.do.remote(block)] = (actor, block)

    def _hire(self) -> Any:
        """Start an actor where the cluster has evaluation: on its GPU group, if it has groups."""
        import ray

        from cluster.base.ray_session import placed_on

        self.have, number = self.have or _room(), self.workers.number
        cpus, gpus = (min(1.0, self.have[kind] / number) for kind in ("CPU", "GPU"))
        group = placed_on("gpu_group")
        if self.workers.device == "cpu":
            gpus = 0.0
        elif group and not self.have["GPU"]:  # an autoscaler starts what is asked for
            gpus = 1.0
        worker = ray.remote(_Worker).options(
            num_cpus=_share(cpus), num_gpus=_share(gpus), resources=group, max_restarts=0
        )
        return worker.remote(self.work, self.workers.num_threads)

    def _result(self, done: Any, block: int) -> int | None:
        """Return the images of a block; None if its actor died, and the block is to be done."""
        import ray
        import ray.exceptions

        try:
            return ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise _own(error) from None
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            self.deaths[block] = self.deaths.get(block, 0) + 1
            reason = " ".join(str(error).split())[:200]
            if self.deaths[block] >= MAX_DEATHS:
                raise Incomplete(
                    f"block {block}: {MAX_DEATHS} workers died under it ({reason})"
                ) from None
            print(f"a worker died; block {block} is done again", flush=True)
            self.blocks.append(block)
            return None


def _room() -> dict[str, float]:
    """Return the CPUs and GPUs that are free now: a job may hold some itself, which its actors
    would wait for without end. Where there are some and none is free, all of them, and says so."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    found = {}
    for kind in ("CPU", "GPU"):
        found[kind] = free.get(kind, 0.0) or total.get(kind, 0.0)
        if total.get(kind) and not free.get(kind):
            print(
                f"workers: wait for a {kind}: all {total[kind]:g} are held, maybe by this very job "
                "(--entrypoint-num-gpus)",
                flush=True,
            )
    return found


def _share(amount: float) -> float:
    """Round down to what Ray can hand out: whole ones, or ten-thousandths."""
    return 1 if amount >= 1 else int(amount * 10_000) / 10_000


def _own(error: Any) -> BaseException:
    """Return what the work itself raised, without Ray's account of where."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, (ValueError, OSError)) else error


class _Worker:
    """The actor."""

    def __init__(self, work: Work, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._work, self._do = work, None

    def do(self, block: int) -> int:
        """Do a block; the work is built here, where an error in it is the call's."""
        self._do = self._do or self._work.build()
        return self._do(block)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Features of images, block by block."""

    store: Any
    device: str

    def build(self) -> Callable[[int], int]:
        from eval.features.devices import device_named

        extractor = self.store.spec.build(device_named(self.device))
        return lambda block: self.store.make(block, extractor)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where features are kept, who computes them, and how many images a block has (None: 256)."""

    folder: Path
    workers: Workers
    block_size: int | None = None

    def extracted(self, images: Any, spec: Any) -> tuple[Any, Any]:
        """Return the store of `images` and its features; only what is missing is made."""
        from eval.features.blocks import BLOCK_SIZE
        from eval.features.store import open_store

        store = open_store(self.folder, images, spec, self.block_size or BLOCK_SIZE)
        if images.parent is not None:
            store.take_from(self.extracted(images.parent, spec)[1], images.numbers)
        blocks = store.pending()
        count = sum(len(store.numbers(block)) for block in blocks)
        work = Extraction(store=store, device=self.workers.device)
        self.workers.run(f"{spec.space} features of {images.source}", work, blocks, count)
        return store, store.features()

    def measured(self, images: Any, spec: Any) -> tuple[Any, Any]:
        """Return the features of `images` and their statistics."""
        store, features = self.extracted(images, spec)
        return features, store.statistics(features)
