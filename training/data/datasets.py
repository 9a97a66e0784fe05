"""Data sets over the shards of pinned snapshots: random access to samples by index.

Columns come as they are stored: `image` uint8 [n, 3, S, S], `image_embed` and `text_embed` float16
[n, E], or `image_embed` [n, 1 + k, E] with the k tokens of an image, `tokens` and
`caption_tokens` int32 [n, L].
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ingest.fetching.decode import square_pixels
from ingest.fetching.formats import open_image
from ingest.shards import IMAGE_TOKENS, EmbedShard, ImageShard, ShardEntry, Snapshot
from ingest.store.snapshots import latest_digest
from training.data.captions import CaptionDraw

MAX_OPEN_SHARDS = 64
CHECK_SECONDS = 10.0  # how often data sets check whether samples were removed
TOKENS_BYTES = 1 << 28  # of tokenised captions kept in memory
Shard = TypeVar("Shard", ImageShard, EmbedShard)
Columns = dict[str, np.ndarray]  # name -> [n, ...]
Tokenize = Callable[[list[str]], np.ndarray]  # captions -> int32 [n, L]


class ColumnDataset(Dataset[Columns]):
    """Samples by their index, several at once.

    data_sets: for each data set within, the sizes of its shards; the index runs through one after
    the other.
    """

    data_sets: tuple[tuple[int, ...], ...]

    def read(self, index: np.ndarray, keys: Tensor | None = None) -> Columns:
        """Return the columns of samples, in the order of `index`, int64 [n].

        keys: int64 [n], the samples' random keys, by which a caption is drawn where a data set has
        several; None: the main caption.
        """
        raise NotImplementedError

    def __getitems__(self, index: np.ndarray) -> Columns:
        """Read a batch, as torch's DataLoader asks for it."""
        return self.read(index)

    def __getitem__(self, index: int) -> Columns:
        """Return the columns of one sample, without a batch dimension."""
        return {name: values[0] for name, values in self.read(np.array([index])).items()}

    def __len__(self) -> int:
        return sum(sum(sizes) for sizes in self.data_sets)


class Shards(Generic[Shard]):
    """The shards of a snapshot, opened when first needed; the last used stay open.

    Samples that were removed are no longer returned within `CHECK_SECONDS`: then open shards are
    opened again, and `on_change` is called.
    """

    def __init__(
        self,
        kind: Callable[..., Shard],
        snapshot: Snapshot,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._kind, self._snapshot, self._on_change = kind, snapshot, on_change
        self.sizes = tuple(entry.num_kept for entry in snapshot.shards)
        self._starts = np.cumsum([0, *self.sizes])
        self._any_excluded = any(entry.excluded for entry in snapshot.shards)
        self.open = lru_cache(MAX_OPEN_SHARDS)(self._open)
        self._latest, self._checked = latest_digest(snapshot.root), time.monotonic()

    def _open(self, number: int) -> Shard:
        entry = self._snapshot.shards[number]
        return self._kind(self._snapshot.root, entry.name, digest=entry.digest)

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard and the row in it of each sample, int64 [n]."""
        shards = np.searchsorted(self._starts, index, side="right") - 1
        rows = index - self._starts[shards]
        for number in np.unique(shards) if self._any_excluded else ():
            here = shards == number
            rows[here] = self._snapshot.shards[number].rows(rows[here])
        return shards, rows

    def sample(self, index: int) -> tuple[Shard, int]:
        """Return the opened shard of one sample, and its row."""
        shards, rows = self.locate(np.array([index]))
        return self.open(int(shards[0])), int(rows[0])

    def check_removals(self) -> None:
        """Open the shards again where samples were removed since the last check."""
        if time.monotonic() - self._checked < CHECK_SECONDS:
            return
        self._checked, latest = time.monotonic(), latest_digest(self._snapshot.root)
        if latest != self._latest:
            self._latest = latest
            self.open.cache_clear()
            self._on_change()


class SampleCache:
    """Keeps the results of a slow function of a sample, up to `limit_bytes`.

    num_threads: samples computed in parallel; 0 = in the calling thread.
    """

    def __init__(
        self,
        compute: Callable[[int], np.ndarray],
        *,
        limit_bytes: int = 1 << 30,
        num_threads: int = 0,
    ) -> None:
        self._compute, self._limit = compute, limit_bytes
        self._map: Callable = map
        if num_threads:
            self._map = ThreadPoolExecutor(num_threads, thread_name_prefix="decode").map
        self.clear()

    def clear(self) -> None:
        """Drop all results."""
        self._room, self._kept = self._limit, dict[int, np.ndarray]()

    def read(self, index: np.ndarray) -> np.ndarray:
        """Return the results of samples, stacked: [n, ...]."""
        numbers = index.tolist()
        missing = [i for i in dict.fromkeys(numbers) if i not in self._kept]
        fresh = dict(zip(missing, self._map(self._compute, missing), strict=True))
        stacked = np.stack([fresh[i] if i in fresh else self._kept[i] for i in numbers])
        for i, value in fresh.items():
            if value.nbytes <= self._room:
                self._room -= value.nbytes
                self._kept[i] = value
        return stacked


class ImageDataset(ColumnDataset):
    """`image`: the short side resized to `size` px, the centre cropped; with `tokenize`, `tokens`.

    num_threads: images decoded in parallel; 0 = in the calling thread. captions: weights of columns
    of captions, see `CaptionDraw`; None: the main caption. encode: maps pixels [1, 3, S, S] to what
    `image` is then, [1, D]. Decoded images, or what they are encoded to, are kept in memory up to a
    gigabyte: decoding and encoding then cost one epoch only.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        size: int,
        num_threads: int = 0,
        tokenize: Tokenize | None = None,
        captions: Mapping[str, float] | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._size, self._tokenize, self._encode = size, tokenize, encode
        self._draw = CaptionDraw(captions) if captions else None
        self._images = SampleCache(self._decode, num_threads=num_threads)
        self._tokens = SampleCache(self._tokens_of, limit_bytes=TOKENS_BYTES)
        self.shards = Shards(ImageShard, snapshot, self._clear)
        self.data_sets = (self.shards.sizes,)

    def _clear(self) -> None:
        self._images.clear()
        self._tokens.clear()

    def read(self, index: np.ndarray, keys: Tensor | None = None) -> Columns:
        """Return `image`, and `tokens` of the captions."""
        self.shards.check_removals()
        columns = {"image": self._images.read(index)}
        if self._tokenize is not None and self._draw is not None and keys is not None:
            columns["tokens"] = self._tokenize(_draw_texts(self.shards, self._draw, index, keys))
        elif self._tokenize is not None:
            columns["tokens"] = self._tokens.read(index)
        return columns

    def _decode(self, index: int) -> np.ndarray:
        shard, row = self.shards.sample(index)
        pixels = square_pixels(shard.image_bytes(row), self._size)
        if self._encode is None:
            return pixels
        return self._encode(torch.from_numpy(pixels[None]))[0].numpy()

    def _tokens_of(self, index: int) -> np.ndarray:
        assert self._tokenize is not None
        shard, row = self.shards.sample(index)
        return self._tokenize([shard.caption(row)])[0]


class EmbedDataset(ColumnDataset):
    """`image_embed`, `text_embed` and `tokens`; with `tokenize`, `caption_tokens` too.

    captions: weights of columns of captions, see `CaptionDraw`; None: the main caption.
    image_tokens: read the k tokens of each image behind its `image_embed`, [n, 1 + k, E].
    """

    COLUMNS = ("image_embed", "text_embed", "tokens")

    def __init__(
        self,
        snapshot: Snapshot,
        tokenize: Tokenize | None = None,
        captions: Mapping[str, float] | None = None,
        image_tokens: bool = False,
    ) -> None:
        self._tokenize = tokenize
        self._draw = CaptionDraw(captions) if captions else None
        self._tokens = SampleCache(self._tokens_of, limit_bytes=TOKENS_BYTES)
        further = self._draw.columns if self._draw else ()
        kind = partial(EmbedShard, captions=further, image_tokens=image_tokens)
        self._columns = (*self.COLUMNS, IMAGE_TOKENS) if image_tokens else self.COLUMNS
        self.shards = Shards(kind, snapshot, self._tokens.clear)
        self.data_sets = (self.shards.sizes,)

    def read(self, index: np.ndarray, keys: Tensor | None = None) -> Columns:
        """Copy the rows of a batch from the mapped files of its shards."""
        self.shards.check_removals()
        shards, rows = self.shards.locate(index)
        draw = self._draw

        def rows_of(number: int, places: np.ndarray) -> Rows:
            shard = self.shards.open(number)
            found = {name: (getattr(shard, name), rows[places]) for name in self._columns}
            if draw is not None and keys is not None:
                found |= _draw_embeds(shard, draw, rows[places], keys[torch.from_numpy(places)])
            return found

        columns = _gather(shards, rows_of)
        if IMAGE_TOKENS in columns:
            parts = columns["image_embed"][:, None], columns.pop(IMAGE_TOKENS)
            columns["image_embed"] = np.concatenate(parts, axis=1)  # [n, 1 + k, E]
        if self._tokenize is not None and draw is not None and keys is not None:
            columns["caption_tokens"] = self._tokenize(_draw_texts(self.shards, draw, index, keys))
        elif self._tokenize is not None:
            columns["caption_tokens"] = self._tokens.read(index)
        return columns

    def _tokens_of(self, index: int) -> np.ndarray:
        assert self._tokenize is not None
        shard, row = self.shards.sample(index)
        return self._tokenize([shard.caption(row)])[0]


def _draw_embeds(shard: EmbedShard, draw: CaptionDraw, rows: np.ndarray, keys: Tensor) -> "Rows":
    """Return `text_embed` and `tokens` of a drawn caption of each of a shard's `rows`."""
    further = [shard.further(column) for column in draw.columns]
    counts = [np.ones(len(rows), np.int64), *(captions.counts[rows] for captions in further)]
    source, number = draw(keys, np.stack(counts, axis=1))
    found: Rows = {}
    for name in ("text_embed", "tokens"):
        values = getattr(shard, name)[rows]
        for k, captions in enumerate(further, start=1):
            here = source == k
            values[here] = getattr(captions, name)[captions.starts[rows[here]] + number[here]]
        found[name] = values, np.arange(len(rows))
    return found


def _draw_texts(shards: Shards, draw: CaptionDraw, index: np.ndarray, keys: Tensor) -> list[str]:
    """Return a drawn caption of each sample: the same as `_draw_embeds` draws."""
    texts: list[Sequence[Sequence[str]]] = []  # of each sample, of each source
    for number, row in zip(*(place.tolist() for place in shards.locate(index)), strict=True):
        shard = shards.open(number)
        further = (shard.further_captions(column)[row] for column in draw.columns)
        texts.append([(shard.caption(row),), *further])
    counts = np.array([[len(captions) for captions in sources] for sources in texts])
    picked = zip(texts, *(numbers.tolist() for numbers in draw(keys, counts)), strict=True)
    return [sources[source][number] for sources, source, number in picked]


class PairDataset(ColumnDataset):
    """Images with their embeddings: row i of an embedding shard belongs to row i of its image
    shard."""

    def __init__(
        self,
        images: Snapshot,
        embeds: Snapshot,
        size: int,
        num_threads: int = 0,
        tokenize: Tokenize | None = None,
        captions: Mapping[str, float] | None = None,
        image_tokens: bool = False,
    ) -> None:
        """Read images of `size` px by `ImageDataset`, and embeddings by `EmbedDataset`."""
        by_name = {entry.name: entry for entry in images.shards}
        paired: list[ShardEntry] = []
        for entry in embeds.shards:
            image = by_name.get(entry.name)
            if image is None or image.num_samples != entry.num_samples:
                stored = "no such shard" if image is None else f"{image.num_samples} samples"
                raise ValueError(
                    f"{images.root}: shard {entry.name}: found {stored}, expected "
                    f"{entry.num_samples} samples as in {embeds.root}; embed these images with: "
                    "python ingest/embed.py"
                )
            paired.append(replace(image, excluded=entry.excluded))
        matched = Snapshot(root=images.root, digest=images.digest, shards=tuple(paired))
        self._images = ImageDataset(matched, size, num_threads)
        self._embeds = EmbedDataset(embeds, tokenize, captions, image_tokens)
        self.data_sets = self._embeds.data_sets
        self._root, self._checked = images.root, set[int]()
        self._check_keys(0)  # the others when they are opened: there may be very many

    def _check_keys(self, number: int) -> None:
        embed, image = self._embeds.shards.open(number), self._images.shards.open(number)
        source = embed.commit.config_hash
        if source != image.commit.digest or image.keys != embed.keys:
            raise ValueError(
                f"{self._root}: shard {image.name}: its embeddings are of other images; embed "
                "these with: python ingest/embed.py"
            )
        self._checked.add(number)

    def read(self, index: np.ndarray, keys: Tensor | None = None) -> Columns:
        """Return the columns of both, after a check of the keys of shards read first."""
        shards, _ = self._images.shards.locate(index)
        for number in set(shards.tolist()) - self._checked:
            self._check_keys(number)
        return {**self._images.read(index), **self._embeds.read(index, keys)}


class MixedDataset(ColumnDataset):
    """Several data sets, whose samples the index numbers one after the other.

    weighted: the plan keeps them apart; else their shards are dealt as those of one.
    """

    def __init__(self, parts: Sequence[ColumnDataset], *, weighted: bool) -> None:
        sizes = [sum(each.data_sets, ()) for each in parts]
        self.data_sets = tuple(sizes) if weighted else (sum(sizes, ()),)
        self._parts = parts
        self._starts = np.cumsum([0, *(sum(each) for each in sizes)])

    def read(self, index: np.ndarray, keys: Tensor | None = None) -> Columns:
        """Return the columns of all, each sample read by its own data set."""
        sources = np.searchsorted(self._starts, index, side="right") - 1

        def rows_of(number: int, places: np.ndarray) -> Rows:
            own_keys = None if keys is None else keys[torch.from_numpy(places)]
            columns = self._parts[number].read(index[places] - self._starts[number], own_keys)
            return {name: (values, np.arange(len(places))) for name, values in columns.items()}

        return _gather(sources, rows_of)


Rows = dict[str, tuple[np.ndarray, np.ndarray]]  # column -> an array, and which rows of it


def _gather(sources: np.ndarray, rows_of: Callable[[int, np.ndarray], Rows]) -> Columns:
    """Return the columns of samples that come from several sources.

    sources: int [n], where each sample comes from; rows_of(source, places): where that source has
    the columns of the samples at these places.
    """
    order = np.argsort(sources, kind="stable")
    firsts = np.flatnonzero(np.diff(sources[order], prepend=-1))
    columns: Columns = {}
    for places in np.split(order, firsts[1:]):
        first, last = int(places[0]), int(places[-1])
        adjacent = last - first + 1 == len(places)  # as in a batch sorted by index
        for name, (array, rows) in rows_of(int(sources[places[0]]), places).items():
            if name not in columns:
                columns[name] = np.empty((len(sources), *array.shape[1:]), array.dtype)
            if adjacent:  # copied once; rows are in range, and mode "raise" would copy them twice
                room = columns[name][first : last + 1]
                np.take(array, rows, axis=0, out=room, mode="clip")
            else:
                columns[name][places] = array[rows]
    return columns


def short_sides(snapshot: Snapshot) -> np.ndarray:
    """Return the shorter side in px of each image of the first shard that holds any, int [n]."""
    for entry in snapshot.shards:
        if entry.num_samples:
            shard = ImageShard(snapshot.root, entry.name, digest=entry.digest)
            opened = (open_image(shard.image_bytes(row)) for row in range(len(shard)))
            return np.array([min(image.size) for image in opened])
    return np.array([], int)


def captions_of(snapshots: Sequence[Snapshot], count: int) -> list[str]:
    """Return the captions of the first `count` samples of these embeddings."""
    captions: list[str] = []
    for snapshot in snapshots:
        for entry in snapshot.shards:
            if len(captions) >= count:
                break
            stored = EmbedShard(snapshot.root, entry.name, digest=entry.digest).captions
            captions += [stored[row] for row in entry.rows(np.arange(entry.num_kept))]
    return captions[:count]
