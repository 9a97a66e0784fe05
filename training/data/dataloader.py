"""The batches of a run: the samples that its plan names, read ahead of the step.

A sample's way: shard -> data set -> `KeyedDataset` -> torch's DataLoader -> `Batch` -> the loss.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cluster.base.machine import available_cpus
from models.diffusion.keyed_random import sample_keys
from models.networks.packing import PackedTokens
from training.config import RunConfig
from training.data.datasets import ColumnDataset, Columns
from training.data.sampler import BatchIndex, Plan, PlanSampler

STEPS_A_SPAN = 10_000  # that one execution of Ray Data reads
STEPS_A_BLOCK = 8  # that one of its tasks reads
RAY_READERS = 2  # a worker, each of one CPU, unless data.num_threads says otherwise


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one micro-batch.

    keys: int64 [B], the samples' random keys; weight: float32 [B], 0 for padding; num_real:
    samples of weight 1 in the complete global batch; columns: name -> [B, ...] (image, image_embed,
    text_embed, tokens) as stored, until `to` copies them to a device; captions: all of the batch's,
    packed, where its task trains on them, see `Task.collate`.
    """

    keys: Tensor
    weight: Tensor
    num_real: int
    columns: dict[str, Tensor]
    captions: PackedTokens | None = None

    def __getitem__(self, column: str) -> Tensor:
        return self.columns[column]

    def rows(self, rows: Tensor | slice) -> "Batch":
        """Return some of the samples, by their rows; their captions are not packed."""
        columns = {name: value[rows] for name, value in self.columns.items()}
        keys, weight = self.keys[rows], self.weight[rows]
        return replace(self, keys=keys, weight=weight, columns=columns, captions=None)

    def part(self, count: int) -> "Batch":
        """Return at most `count` neighbouring samples, from a row that the first key names.

        Neighbours, since the hard negatives of a data set are adjacent; not the first ones, since
        a batch is sorted by index.
        """
        start = int(self.keys[0]) % len(self.keys)
        rows = (start + torch.arange(min(count, len(self.keys)))) % len(self.keys)
        return self.rows(rows)

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory, from which a GPU copies while it computes."""
        columns = {name: value.pin_memory() for name, value in self.columns.items()}
        keys, weight = self.keys.pin_memory(), self.weight.pin_memory()
        captions = self.captions and self.captions.apply(Tensor.pin_memory)
        return replace(self, keys=keys, weight=weight, columns=columns, captions=captions)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of a batch on a GPU until what is now queued on `stream` is done."""
        for tensor in (self.keys, self.weight, *self.columns.values()):
            tensor.record_stream(stream)
        if self.captions is not None:
            self.captions.apply(lambda x: (x.record_stream(stream), x)[1])

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; what is stored in half precision is float32 there."""
        columns = {
            name: value.to(device, non_blocking=True) for name, value in self.columns.items()
        }
        for name, value in columns.items():
            columns[name] = value.float() if value.dtype == torch.float16 else value
        keys = self.keys.to(device, non_blocking=True)
        weight = self.weight.to(device, non_blocking=True)
        captions = self.captions and self.captions.apply(lambda x: x.to(device, non_blocking=True))
        return replace(self, keys=keys, weight=weight, columns=columns, captions=captions)


class Upload:
    """Copies batches to a device; to a GPU on a stream of its own, beside the step that computes.

    The host is ahead of the GPU: it asks for a copy while the step before is computed, and that is
    done when the step that needs it begins.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the device; what this thread queues from now on waits for it."""
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            copied = batch.to(self._device)
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._stream)
        copied.record_stream(compute)
        return copied


def as_batch(columns: Columns, keys: Tensor) -> Batch:
    """Return the columns of real samples, and their random keys, as a batch."""
    return Batch(
        keys=keys,
        weight=torch.ones(len(keys)),
        num_real=len(keys),
        columns={name: torch.from_numpy(value) for name, value in columns.items()},
    )


def as_it_is(batch: Batch) -> Batch:
    """Add nothing to a batch."""
    return batch


def first_batches(
    samples: ColumnDataset, count: int, size: int, device: torch.device
) -> Iterator[Batch]:
    """Yield the first `count` samples, `size` at once; their random keys are their indices."""
    for start in range(0, count, size):
        index = np.arange(start, min(start + size, count))
        yield as_batch(samples.read(index), torch.from_numpy(index)).to(device)


@dataclass(frozen=True, kw_only=True)
class KeyedDataset(Dataset[list[Batch]]):
    """A data set whose samples get random keys and weights: the micro-batches of a step.

    collate: adds to each micro-batch, on the CPU, what its objective needs, see `Task.collate`.
    """

    samples: ColumnDataset
    seed: int
    grad_accum_steps: int = 1
    collate: Callable[[Batch], Batch] = as_it_is

    def __getitems__(self, batch: BatchIndex) -> list[Batch]:
        """Read the micro-batches of a step of one rank, as torch's DataLoader asks for them."""
        keys = self.keys(batch)
        return self.assemble(batch, keys, self.samples.read(batch.index, keys))

    def keys(self, batch: BatchIndex) -> Tensor:
        """Return the random keys of samples, int64 [n]."""
        epoch, index = torch.from_numpy(batch.epoch), torch.from_numpy(batch.index)
        return sample_keys(self.seed, epoch, index)

    def assemble(self, batch: BatchIndex, keys: Tensor, columns: Columns) -> list[Batch]:
        """Return the micro-batches of samples whose columns have been read."""
        step = replace(
            as_batch(columns, keys),
            weight=torch.from_numpy(batch.weight),
            num_real=batch.num_real,
        )
        parts = torch.arange(len(batch.index)).chunk(self.grad_accum_steps)
        return [self.collate(step.rows(slice(int(r[0]), int(r[-1]) + 1))) for r in parts]


class StepLoader(Protocol):
    """Returns the micro-batches of consecutive steps."""

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of steps [start, stop), read ahead."""
        ...


@dataclass(frozen=True, kw_only=True)
class ThreadedLoader:
    """torch's DataLoader, run by a thread of the training process.

    No worker processes: images are decoded by threads, outside of Python's lock, and all share the
    cache of decoded samples and the mapped files. prefetch: steps read ahead.
    """

    dataset: KeyedDataset
    sampler: PlanSampler
    prefetch: int = 3
    pin_memory: bool = False

    def read(self, step: int) -> list[Batch]:
        """Return the micro-batches of one step, read now."""
        return self.dataset.__getitems__(self.sampler.batch(step))

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of steps [start, stop), read ahead."""
        sampler: Any = self.sampler.over(range(start, stop))  # torch's type is of lists of indices
        loader = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            collate_fn=list,  # the micro-batches as they were read
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # DataLoader draws a seed, else from torch's own state
        )
        ahead: queue.Queue = queue.Queue(self.prefetch)
        stopped = threading.Event()

        def put(item: object) -> None:
            while not stopped.is_set():
                try:
                    return ahead.put(item, timeout=0.2)
                except queue.Full:
                    continue

        gpu = torch.cuda.current_device() if self.pin_memory else None

        def read() -> None:
            try:
                if gpu is not None:  # a thread starts on the first one
                    torch.cuda.set_device(gpu)
                for batches in loader:
                    put(batches)
                    if stopped.is_set():
                        return
            except BaseException as error:  # raised by the consumer
                put(error)

        threading.Thread(target=read, name="dataloader", daemon=True).start()
        try:
            for _ in range(start, stop):
                item = ahead.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()


@dataclass(frozen=True, kw_only=True)
class RayLoader:
    """Reads through Ray Data: in the plan's order, on whichever CPUs of the cluster are free.

    build_dataset: opens the data in each process that reads; num_readers: at most so many.
    """

    dataset: KeyedDataset
    sampler: PlanSampler
    build_dataset: Callable[[], ColumnDataset]
    num_readers: int

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of steps [start, stop), read ahead."""
        import ray

        from cluster.base.ray_session import ensure_ray

        ensure_ray()
        cpus, world_size = ray.cluster_resources().get("CPU", 0), self.sampler.world_size
        if cpus < 2 * world_size:
            raise ValueError(
                f"ingest: found ray over {cpus:.0f} CPUs for {world_size} workers, expected at "
                "least one more CPU for each of them to read on; use --ingest native"
            )
        for first in range(start, stop, STEPS_A_SPAN):
            steps = range(first, min(first + STEPS_A_SPAN, stop))
            for step, columns in zip(steps, self._columns(steps), strict=True):
                batch = self.sampler.batch(step)
                yield self.dataset.assemble(batch, self.dataset.keys(batch), columns)

    def _columns(self, steps: range) -> Iterator[Columns]:
        """Yield the columns of each step."""
        import ray.data

        from cluster.base.ray_session import group_resources

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        blocks = -(-len(steps) // STEPS_A_BLOCK)
        items = ray.data.from_items([{"step": step} for step in steps], override_num_blocks=blocks)
        sampler = self.sampler.without_caches()
        reader: Any = StepReader  # an actor's class, where the annotations know functions only
        rows = items.map(
            reader,
            fn_constructor_args=(sampler, self.build_dataset, self.dataset.seed),
            num_cpus=1,
            resources=group_resources("cpu_group"),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=self.num_readers),
        )
        for row in rows.iter_rows():
            yield {name: value.copy() for name, value in row.items()}  # Ray's are read-only


class StepReader:
    """An actor of Ray Data: opens a data set, and maps the number of a step to its columns."""

    def __init__(
        self, sampler: PlanSampler, build_dataset: Callable[[], ColumnDataset], seed: int
    ) -> None:
        # It reserves one CPU: its share of the machine is that of one process a core
        os.environ["LOCAL_WORLD_SIZE"] = str(available_cpus())
        self._sampler = sampler
        self._dataset = KeyedDataset(samples=build_dataset(), seed=seed)

    def __call__(self, row: dict[str, int]) -> dict[str, np.ndarray]:
        """Return the columns of the step that `row` numbers."""
        batch = self._sampler.batch(int(row["step"]))
        return self._dataset.samples.read(batch.index, self._dataset.keys(batch))


def make_loader(
    build_dataset: Callable[[], ColumnDataset],
    options: RunConfig,
    *,
    collate: Callable[[Batch], Batch] = as_it_is,
    block_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> StepLoader:
    """Return the loader of a rank that `options.ingest` names; both give the same batches.

    collate: see `KeyedDataset`; block_size: neighbouring samples that stay together.
    """
    samples, data, config = build_dataset(), options.data, options.train
    plan = Plan(
        data_sets=samples.data_sets,
        weights=data.weights,
        global_batch_size=config.batch.global_batch_size,
        seed=config.seed,
        num_streams=data.num_streams,
        window=data.window,
        block_size=block_size,
    )
    parts = config.micro_batches(world_size)
    sampler = PlanSampler(plan=plan, rank=rank, world_size=world_size, grad_accum_steps=parts)
    dataset = KeyedDataset(
        samples=samples, seed=config.seed, grad_accum_steps=parts, collate=collate
    )
    if options.ingest == "native":
        return ThreadedLoader(
            dataset=dataset, sampler=sampler, prefetch=data.prefetch, pin_memory=pin_memory
        )
    num_readers = data.num_threads or RAY_READERS
    return RayLoader(
        dataset=dataset, sampler=sampler, build_dataset=build_dataset, num_readers=num_readers
    )
