"""The order of samples: which of them make global batch number `step`.

A `Plan` is a pure function of (snapshots, weights, seed, step), the same for any number of workers:
the state of a reader is that one number, so resuming is exact and O(1). The shards of a data set
are dealt to V virtual streams, in another way in every epoch. Slot j of a global batch reads stream
j mod V, and a rank owns the slots j = rank mod world_size: where world_size divides V, it opens the
shards of its own streams only. `PlanSampler` is the plan as a batch sampler of torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from torch.utils.data import Sampler

PATTERN = 10_000  # data sets mix by weights in steps of a ten-thousandth


@dataclass(frozen=True, kw_only=True)
class BatchIndex:
    """The samples that one rank reads for a step.

    epoch: int64 [n], of each sample's own data set; index: int64 [n] into the samples of all data
    sets, one after the other; weight: float32 [n], 0 for padding; num_real: samples of weight 1 in
    the complete global batch.
    """

    epoch: np.ndarray
    index: np.ndarray
    weight: np.ndarray
    num_real: int

    def padded(self, count: int) -> "BatchIndex":
        """Return `count` samples, those after the rank's own of weight 0."""
        room = (0, count - len(self.index))
        if not room[1]:
            return self
        epoch, index = np.pad(self.epoch, room, "edge"), np.pad(self.index, room, "edge")
        return replace(self, epoch=epoch, index=index, weight=np.pad(self.weight, room))

    def sorted(self) -> "BatchIndex":
        """Return the samples by index: neighbours on the disk are neighbours here, and a sum over a
        batch asks for no other order."""
        order = np.argsort(self.index, kind="stable")
        epoch, index, weight = self.epoch[order], self.index[order], self.weight[order]
        return replace(self, epoch=epoch, index=index, weight=weight)


class Order:
    """The endless order of one data set's samples, V at a time: one of each virtual stream.

    Each epoch gives every sample once; it ends where its longest stream does, rounded up to a
    multiple of `round_to`, and the shorter streams are padded. A stream shuffles its rows within
    windows of `window` shards; `block_size` neighbouring rows stay together.
    """

    def __init__(
        self,
        shard_sizes: tuple[int, ...],
        *,
        seed: int,
        num_streams: int,
        window: int,
        block_size: int,
        round_to: int,
    ) -> None:
        self._sizes = np.array(shard_sizes, np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._seed, self._num_streams = seed, num_streams
        self._window, self._block_size = window, block_size
        # the longest stream there can be, whatever an epoch deals it: its share of the largest
        share = -(-len(shard_sizes) // num_streams)
        longest = int(np.sort(self._sizes)[-share:].sum())
        self.length = -(-longest // round_to) * round_to
        self._dealt = lru_cache(2)(self._deal)
        self.padding = lru_cache(2 * num_streams)(self._find_padding)
        self._starts = lru_cache(4 * num_streams)(self._find_starts)
        self._window_rows = lru_cache(2 * num_streams)(self._shuffle)

    def read(self, first: int, count: int, streams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return samples [first, first + count) of the given streams, and their epochs.

        index: int64 [count, len(streams)], -1 past a stream's end; epoch: int64 [count].
        """
        index = np.full((count, len(streams)), -1, np.int64)
        epochs = (first + np.arange(count)) // self.length
        for epoch in np.unique(epochs).tolist():
            places = np.flatnonzero(epochs == epoch)
            start = first + int(places[0]) - epoch * self.length
            for column, stream in enumerate(streams.tolist()):
                rows = self._stream_rows(epoch, stream, start, len(places))
                index[places[: len(rows)], column] = rows
        return index, epochs

    def _find_padding(self, epoch: int, stream: int) -> int:
        """Return a sample that may be read in the place of none: one of the stream's own, or where
        all its shards are empty, the data set's first."""
        shards = self._dealt(epoch)[stream]
        filled = shards[self._sizes[shards] > 0]
        return int(self._firsts[filled[0] if len(filled) else np.argmax(self._sizes > 0)])

    def num_real(self, first: int, count: int) -> int:
        """Return how many samples all streams hold in [first, first + count)."""
        number, total = first, 0
        while number < first + count:
            epoch, start = divmod(number, self.length)
            stop = min(start + first + count - number, self.length)
            ends = np.array([self._starts(epoch, s)[-1] for s in range(self._num_streams)])
            total += int((ends.clip(max=stop) - start).clip(min=0).sum())
            number += stop - start
        return total

    def _rng(self, *place: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, *place])))

    def _deal(self, epoch: int) -> list[np.ndarray]:
        """Return the shards of each stream."""
        order = self._rng(epoch, 0).permutation(len(self._sizes))
        return [order[stream :: self._num_streams] for stream in range(self._num_streams)]

    def _find_starts(self, epoch: int, stream: int) -> np.ndarray:
        """Return the first row of each window of a stream, and its end."""
        ends = np.cumsum(self._sizes[self._dealt(epoch)[stream]])
        return np.concatenate([[0], ends[self._window - 1 : -1 : self._window], ends[-1:]])

    def _shuffle(self, epoch: int, stream: int, number: int) -> np.ndarray:
        """Return the shuffled samples of one window of a stream."""
        shards = self._dealt(epoch)[stream][number * self._window : (number + 1) * self._window]
        spans = zip(self._firsts[shards].tolist(), self._sizes[shards].tolist(), strict=True)
        rows = np.concatenate([np.arange(first, first + size) for first, size in spans])
        size = self._block_size
        blocks = self._rng(epoch, 1 + stream, number).permutation(-(-len(rows) // size))
        spread = (blocks[:, None] * size + np.arange(size)).ravel()
        return rows[spread[spread < len(rows)]]

    def _stream_rows(self, epoch: int, stream: int, start: int, count: int) -> np.ndarray:
        """Return rows [start, start + count) of a stream's epoch; fewer past its end."""
        starts = self._starts(epoch, stream)
        first = max(0, int(np.searchsorted(starts, start, side="right")) - 1)
        parts = [np.zeros(0, np.int64)]
        for number in range(first, len(starts) - 1):
            if starts[number] >= start + count:
                break
            rows = self._window_rows(epoch, stream, number)
            parts.append(rows[max(0, start - starts[number]) : start + count - starts[number]])
        return np.concatenate(parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The samples of every global batch, of one data set or several.

    data_sets: for each, the sizes of its shards, in its snapshot's order; weights: share of each
    in the samples, of any sum, empty only for one; num_streams: V, fixed for a run; window: shards
    shuffled together; block_size: neighbouring rows that stay together.
    """

    data_sets: tuple[tuple[int, ...], ...]
    global_batch_size: int
    seed: int
    weights: tuple[float, ...] = ()
    num_streams: int = 1
    window: int = 16
    block_size: int = 1

    def __post_init__(self) -> None:
        for sizes in self.data_sets:
            if sum(sizes) == 0:
                raise ValueError(
                    "plan: found a snapshot of 0 samples, expected at least 1; is the data set "
                    "empty?"
                )
            if self.global_batch_size % self.num_streams or self.num_streams > len(sizes):
                raise ValueError(
                    f"plan: found {self.num_streams} streams, expected a divisor of the global "
                    f"batch {self.global_batch_size} and at most {len(sizes)} shards"
                )
        if len(self.weights or [1.0]) != len(self.data_sets):
            raise ValueError(
                f"weights: found {len(self.weights)}, expected one for each of "
                f"{len(self.data_sets)} data sets"
            )
        if any(not 1 / PATTERN <= share <= 1 for share in self._shares):
            raise ValueError(
                f"weights: found {', '.join(f'{w:g}' for w in self.weights)}, expected each to be "
                f"positive and at least 1/{PATTERN} of their sum"
            )

    @cached_property
    def _shares(self) -> np.ndarray:
        weights = np.array(self.weights or [1.0], np.float64)
        return weights / weights.sum()

    @cached_property
    def _orders(self) -> list[Order]:
        lone = len(self.data_sets) == 1
        return [
            Order(
                sizes,
                seed=self.seed + (number << 64),
                num_streams=self.num_streams,
                window=self.window,
                block_size=self.block_size,
                # epochs of several end when they will; that of one ends with a global batch
                round_to=self._num_rounds if lone else 1,
            )
            for number, sizes in enumerate(self.data_sets)
        ]

    @cached_property
    def _offsets(self) -> np.ndarray:
        return np.cumsum([0, *(sum(sizes) for sizes in self.data_sets)])

    @property
    def _num_rounds(self) -> int:
        """Rounds of the streams in a global batch; each is of one data set."""
        return self.global_batch_size // self.num_streams

    @cached_property
    def _turns(self) -> tuple[np.ndarray, np.ndarray]:
        """Which data set the rounds of a pattern are of, and how many of each came before each.

        int64 [P] and [P + 1, D]. The i-th of n rounds lies in the middle of the i-th of n parts.
        """
        if len(self._shares) == 1:
            return np.zeros(1, np.int64), np.array([[0], [1]])
        exact = self._shares * PATTERN
        counts = np.floor(exact).astype(int)
        counts[np.argsort(counts - exact, kind="stable")[: PATTERN - counts.sum()]] += 1
        places = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        turns = np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]
        before = np.cumsum(turns[:, None] == np.arange(len(counts)), axis=0)
        return turns, np.concatenate([np.zeros((1, len(counts)), int), before])

    @cached_property
    def _slots(self) -> Callable[[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return the rounds and the streams of a rank's slots, and which streams those are."""

        def find(rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            slots = np.arange(rank, self.global_batch_size, world_size)
            streams = slots % self.num_streams
            return slots // self.num_streams, streams, np.unique(streams)

        return lru_cache(2)(find)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every sample of the data set that takes longest was seen once."""
        rounds = max(
            order.length / share for order, share in zip(self._orders, self._shares, strict=True)
        )
        return int(-(-rounds // self._num_rounds))

    def slice(self, step: int, rank: int = 0, world_size: int = 1) -> BatchIndex:
        """Return what `rank` of `world_size` reads at `step`; ragged ends are padded with weight
        0."""
        rounds, streams, own = self._slots(rank, world_size)
        slots = len(rounds)
        index, epoch = np.zeros((2, slots), np.int64)
        weight = np.zeros(slots, np.float32)
        first, num_real = step * self._num_rounds, 0
        turns, before = self._turns
        pattern = len(turns)
        of_round = turns[(first + np.arange(self._num_rounds)) % pattern]
        for number, order in enumerate(self._orders):
            count = int((of_round == number).sum())
            done = first // pattern * before[-1, number] + before[first % pattern, number]
            num_real += order.num_real(int(done), count)
            numbers, epochs = order.read(int(done), count, own)
            here = of_round[rounds] == number
            nth = np.cumsum(of_round == number)[rounds[here]] - 1
            rows, epoch[here] = numbers[nth, np.searchsorted(own, streams[here])], epochs[nth]
            weight[here] = rows >= 0
            gaps = np.flatnonzero(rows < 0)
            places = zip(epochs[nth[gaps]].tolist(), streams[here][gaps].tolist(), strict=True)
            rows[gaps] = [order.padding(*place) for place in places]
            index[here] = rows + self._offsets[number]
        return BatchIndex(epoch=epoch, index=index, weight=weight, num_real=num_real)


@dataclass(frozen=True, kw_only=True)
class PlanSampler(Sampler[BatchIndex]):
    """The batch sampler of one rank: yields what it reads at each of `steps`.

    Where the ranks' shares of the global batch differ, the smaller are padded: all take
    `grad_accum_steps` micro-batches of the same size.
    """

    plan: Plan
    rank: int = 0
    world_size: int = 1
    grad_accum_steps: int = 1
    steps: range = range(0)

    def batch(self, step: int) -> BatchIndex:
        """Return what this rank reads at `step`, sorted by index."""
        parts = self.grad_accum_steps
        samples = -(-self.plan.global_batch_size // (self.world_size * parts)) * parts
        return self.plan.slice(step, self.rank, self.world_size).padded(samples).sorted()

    def over(self, steps: range) -> "PlanSampler":
        """Return the sampler of other steps, by the same plan."""
        return replace(self, steps=steps)

    def without_caches(self) -> "PlanSampler":
        """Return a copy for another process, without what the plan keeps of its windows."""
        return replace(self, plan=replace(self.plan))

    def __iter__(self) -> Iterator[BatchIndex]:
        return map(self.batch, self.steps)

    def __len__(self) -> int:
        return len(self.steps)
