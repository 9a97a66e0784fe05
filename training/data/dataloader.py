"""The batches of a run: the samples that its plan names, read ahead of the step."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from models.diffusion.keyed_random import sample_keys
from training.data.sampler import Plan, Slice


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one micro-batch.

    keys: int64 [B], the samples' random keys; weight: float32 [B], 0 for padding; num_real:
    samples of weight 1 in the whole global batch; columns: name -> [B, ...] (image, image_embed,
    text_embed, tokens) as stored, until `to` brings them to a device.
    """

    keys: Tensor
    weight: Tensor
    num_real: int
    columns: dict[str, Tensor]

    def __getitem__(self, column: str) -> Tensor:
        return self.columns[column]

    def part(self, count: int) -> "Batch":
        """Return neighbouring samples, `count` at most, from where the first one's key says on.

        Neighbours, since the hard negatives of a data set stand together; not the first ones, since
        a batch comes by index.
        """
        start = int(self.keys[0]) % len(self.keys)
        rows = (start + torch.arange(min(count, len(self.keys)))) % len(self.keys)
        columns = {name: value[rows] for name, value in self.columns.items()}
        keys, weight = self.keys[rows], self.weight[rows]
        return replace(self, keys=keys, weight=weight, columns=columns)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; what is stored in half precision is float32 there."""
        columns = {
            name: value.to(device, non_blocking=True) for name, value in self.columns.items()
        }
        for name, value in columns.items():
            columns[name] = value.float() if value.dtype == torch.float16 else value
        keys, weight = self.keys.to(device), self.weight.to(device)
        return Batch(keys=keys, weight=weight, num_real=self.num_real, columns=columns)


class Reader(Protocol):
    """Reads columns of samples, as they are stored, by their index.

    data_sets: for each data set that it reads, the sizes of its shards; the index runs through
    one after the other.
    """

    data_sets: tuple[tuple[int, ...], ...]

    def read(self, index: np.ndarray) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Reads a rank's batches ahead of the step, in a thread."""

    plan: Plan
    reader: Reader
    rank: int = 0
    world_size: int = 1
    grad_accum_steps: int = 1
    prefetch: int = 3

    def columns(self, step: int) -> dict[str, np.ndarray]:
        """Read this rank's samples of `step`, as they are stored."""
        return self.reader.read(self._slice(step).index)

    def step_batches(self, step: int) -> list[Batch]:
        """Read the micro-batches of `step`."""
        part = self._slice(step)
        return self._assembled(part, self.reader.read(part.index))

    def assemble(self, step: int, columns: dict[str, np.ndarray]) -> list[Batch]:
        """Return the micro-batches of `step` whose columns have been read."""
        return self._assembled(self._slice(step), columns)

    def _slice(self, step: int) -> Slice:
        """Return what this rank reads at `step`, by index: neighbours on the disk are neighbours
        here, and a sum over a batch asks for no other order.

        Where the ranks' shares of the global batch differ, the smaller are padded: all take as many
        micro-batches, of the same size.
        """
        part = self.plan.slice(step, self.rank, self.world_size)
        parts = self.grad_accum_steps
        samples = -(-self.plan.global_batch_size // (self.world_size * parts)) * parts
        part = part.padded(samples)
        order = np.argsort(part.index, kind="stable")
        return replace(
            part, epoch=part.epoch[order], index=part.index[order], weight=part.weight[order]
        )

    def _assembled(self, part: Slice, columns: dict[str, np.ndarray]) -> list[Batch]:
        epoch, index = torch.from_numpy(part.epoch), torch.from_numpy(part.index)
        keys = sample_keys(self.plan.seed, epoch, index)
        whole = as_batch(columns, keys)
        weight = torch.from_numpy(part.weight)
        whole = replace(whole, weight=weight, num_real=part.num_real)
        return _split(whole, self.grad_accum_steps)

    def iterate(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of steps [start, stop), reading ahead."""
        ahead: queue.Queue = queue.Queue(self.prefetch)
        stopped = threading.Event()

        def work() -> None:
            try:
                for step in range(start, stop):
                    _put(ahead, self.step_batches(step), stopped)
                    if stopped.is_set():
                        return
            except BaseException as error:  # handed to the consumer, who raises it
                _put(ahead, error, stopped)

        threading.Thread(target=work, name="feed", daemon=True).start()
        try:
            for _ in range(start, stop):
                item = ahead.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()


def as_batch(columns: dict[str, np.ndarray], keys: Tensor) -> Batch:
    """Return the columns of real samples, and their random keys, as a batch."""
    return Batch(
        keys=keys,
        weight=torch.ones(len(keys)),
        num_real=len(keys),
        columns={name: torch.from_numpy(value) for name, value in columns.items()},
    )


def _put(target: queue.Queue, item: object, stopped: threading.Event) -> None:
    while not stopped.is_set():
        try:
            return target.put(item, timeout=0.2)
        except queue.Full:
            continue


def _split(batch: Batch, parts: int) -> list[Batch]:
    if parts == 1:
        return [batch]
    pieces = []
    for rows in torch.arange(len(batch.keys)).chunk(parts):
        columns = {name: value[rows] for name, value in batch.columns.items()}
        keys, weight = batch.keys[rows], batch.weight[rows]
        pieces.append(Batch(keys=keys, weight=weight, num_real=batch.num_real, columns=columns))
    return pieces


class Cached:
    """Keeps what a slow reader (JPEG decoding) gave, up to `limit_bytes`; beyond it reads again.

    num_threads: samples read side by side; 0 = in the calling thread.
    """

    def __init__(
        self,
        read_one: Callable[[int], np.ndarray],
        *,
        limit_bytes: int = 1 << 30,
        num_threads: int = 0,
    ) -> None:
        self._read_one, self._limit = read_one, limit_bytes
        self._map: Callable = map
        if num_threads:
            self._map = ThreadPoolExecutor(num_threads, thread_name_prefix="decode").map
        self.clear()

    def clear(self) -> None:
        """Keep nothing of what was read so far."""
        self._left, self._kept = self._limit, dict[int, np.ndarray]()

    def read(self, index: np.ndarray) -> np.ndarray:
        """Return the samples of an index, stacked: [n, ...]."""
        numbers = index.tolist()
        missing = [i for i in dict.fromkeys(numbers) if i not in self._kept]
        fresh = dict(zip(missing, self._map(self._read_one, missing), strict=True))
        found = np.stack([fresh[i] if i in fresh else self._kept[i] for i in numbers])
        for i, value in fresh.items():
            if value.nbytes <= self._left:
                self._left -= value.nbytes
                self._kept[i] = value
        return found
