"""The order of samples, and the batches read by it.

A `Plan` says which samples make global batch number `step`: a pure function of (snapshot, seed,
step), the
same for any number of workers. The state of the reader is that one number, so resuming is exact
and costs
nothing. Slot j of a global batch reads virtual stream j mod V; a rank owns the slots j = rank
mod world_size.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from models.keyed_random import sample_keys


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one micro-batch.

    keys: int64 [B], the samples' random keys; weight: float32 [B], 0 for padding; num_real:
    samples of
    weight 1 in the whole global batch; columns: name -> [B, ...] (image, image_embed,
    text_embed, tokens).
    """

    keys: Tensor
    weight: Tensor
    num_real: int
    columns: dict[str, Tensor]

    def __getitem__(self, column: str) -> Tensor:
        return self.columns[column]

    def to(self, device: torch.device) -> "Batch":
        columns = {
            name: value.to(device, non_blocking=True) for name, value in self.columns.items()
        }
        keys, weight = self.keys.to(device), self.weight.to(device)
        return Batch(keys=keys, weight=weight, num_real=self.num_real, columns=columns)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One rank's part of a global batch: index int64 [n] into the snapshot's samples, weight
    float32 [n]."""

    epoch: int
    index: np.ndarray
    weight: np.ndarray
    num_real: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Deals the shards of a snapshot to virtual streams and shuffles rows within windows of shards.

    shard_sizes: samples of each shard of the snapshot, in its order; num_streams: V, fixed for a
    run;
    window: shards shuffled together; block_size: neighbouring rows that stay together.
    """

    shard_sizes: tuple[int, ...]
    global_batch_size: int
    seed: int
    num_streams: int = 1
    window: int = 16
    block_size: int = 1
    _offsets: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if sum(self.shard_sizes) == 0:
            raise ValueError(
                "plan: found a snapshot of 0 samples, expected at least 1; is the data set empty?"
            )
        if self.global_batch_size % self.num_streams or self.num_streams > len(self.shard_sizes):
            raise ValueError(
                f"plan: found {self.num_streams} streams, expected a divisor of the global batch "
                f"{self.global_batch_size} and at most {len(self.shard_sizes)} shards"
            )
        object.__setattr__(self, "_offsets", np.cumsum([0, *self.shard_sizes]))

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every sample was seen once: the longest stream decides, whatever the epoch
        deals it."""
        return self._layout(0)[1]

    @lru_cache(maxsize=4)  # noqa: B019 - a plan lives as long as its run
    def _layout(self, epoch: int) -> tuple[list[np.ndarray], int]:
        """Return the shards of each stream in `epoch`, and the steps that any epoch takes."""
        order = self._rng(epoch, 0).permutation(len(self.shard_sizes))
        # the largest possible stream: its share of shards, all of the largest sizes
        share = -(-len(self.shard_sizes) // self.num_streams)
        longest = sum(sorted(self.shard_sizes)[-share:])
        slots = self.global_batch_size // self.num_streams
        return [order[s :: self.num_streams] for s in range(self.num_streams)], -(-longest // slots)

    @lru_cache(maxsize=64)  # noqa: B019
    def _window_rows(self, epoch: int, stream: int, number: int) -> np.ndarray:
        """Return the shuffled sample indices of one window of one stream."""
        shards = self._layout(epoch)[0][stream][number * self.window : (number + 1) * self.window]
        rows = np.concatenate([np.arange(self._offsets[s], self._offsets[s + 1]) for s in shards])
        blocks = self._rng(epoch, 1 + stream, number).permutation(-(-len(rows) // self.block_size))
        spread = (blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()
        return rows[spread[spread < len(rows)]]

    def _rng(self, *place: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *place])))

    def _stream_rows(self, epoch: int, stream: int, start: int, count: int) -> np.ndarray:
        """Return rows [start, start + count) of a stream's epoch; fewer past its end."""
        starts = self._window_starts(epoch, stream)
        first = max(0, int(np.searchsorted(starts, start, side="right")) - 1)
        found = [np.zeros(0, dtype=np.int64)]
        for number in range(first, len(starts) - 1):
            if starts[number] >= start + count:
                break
            rows = self._window_rows(epoch, stream, number)
            found.append(rows[max(0, start - starts[number]) : start + count - starts[number]])
        return np.concatenate(found)

    @lru_cache(maxsize=64)  # noqa: B019
    def _window_starts(self, epoch: int, stream: int) -> np.ndarray:
        """Return the first row of each window of a stream, and its end: found once an epoch."""
        shards = self._layout(epoch)[0][stream]
        ends = np.cumsum(np.array(self.shard_sizes)[shards])
        return np.concatenate([[0], ends[self.window - 1 : -1 : self.window], ends[-1:]])

    def slice(self, step: int, rank: int = 0, world_size: int = 1) -> Slice:
        """Return what `rank` of `world_size` reads at `step`; ragged ends are padded with weight
        0."""
        epoch, step = divmod(step, self.steps_per_epoch)
        streams, batch = self.num_streams, self.global_batch_size
        index = np.full(batch, -1, dtype=np.int64)
        for stream in range(streams):
            rows = self._stream_rows(epoch, stream, step * (batch // streams), batch // streams)
            index[stream::streams][: len(rows)] = rows
        weight = (index >= 0).astype(np.float32)
        index[index < 0] = self._offsets[-1] - 1 if weight.sum() == 0 else index[index >= 0][0]
        mine = np.arange(rank, batch, world_size)
        return Slice(
            epoch=epoch, index=index[mine], weight=weight[mine], num_real=int(weight.sum())
        )


class Reader(Protocol):
    """Reads columns of samples by their index in a snapshot, as they are stored."""

    shard_sizes: tuple[int, ...]

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

    def step_batches(self, step: int) -> list[Batch]:
        """Read the micro-batches of `step`."""
        part = self.plan.slice(step, self.rank, self.world_size)
        columns = self.reader.read(part.index)
        epochs = torch.full((len(part.index),), part.epoch, dtype=torch.int64)
        keys = sample_keys(self.plan.seed, epochs, torch.from_numpy(part.index))
        whole = Batch(
            keys=keys,
            weight=torch.from_numpy(part.weight),
            num_real=part.num_real,
            columns={name: _as_tensor(value) for name, value in columns.items()},
        )
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


def _as_tensor(value: np.ndarray) -> Tensor:
    """Return an array as a tensor; what is stored in half precision becomes float32."""
    tensor = torch.from_numpy(value)
    return tensor.float() if tensor.dtype == torch.float16 else tensor


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
    """Keeps what a slow reader (JPEG decoding) gave, up to `limit_bytes`; beyond it reads again."""

    def __init__(self, read_one: Callable[[int], np.ndarray], limit_bytes: int = 1 << 30) -> None:
        self._read_one, self._limit = read_one, limit_bytes
        self.clear()

    def clear(self) -> None:
        """Keep nothing of what was read so far."""
        self._left, self._kept = self._limit, dict[int, np.ndarray]()

    def read(self, index: np.ndarray) -> np.ndarray:
        return np.stack([self._get(int(i)) for i in index])

    def _get(self, i: int) -> np.ndarray:
        found = self._kept.get(i)
        if found is None:
            found = self._read_one(i)
            if found.nbytes <= self._left:
                self._left -= found.nbytes
                self._kept[i] = found
        return found
