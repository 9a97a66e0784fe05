"""Readers of one pinned snapshot: samples by their index, whichever shard they lie in."""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np

from ingest.fetching.decode import square_pixels
from ingest.shards import EmbedShard, ImageShard, ShardEntry, Snapshot
from ingest.store.snapshots import latest_digest
from training.data.dataloader import Cached, Reader

MAX_OPEN_SHARDS = 64
LOOK_SECONDS = 10.0  # how often readers ask whether samples were forgotten
Shard = TypeVar("Shard", ImageShard, EmbedShard)


class _Shards(Generic[Shard]):
    """The shards of a snapshot, opened when first needed; the last used stay open.

    What was forgotten is no longer given within `LOOK_SECONDS`: then open shards are opened again,
    and `on_change` is called.
    """

    def __init__(
        self,
        kind: Callable[..., Shard],
        snapshot: Snapshot,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._kind, self._snapshot, self._on_change = kind, snapshot, on_change
        self._open = lru_cache(MAX_OPEN_SHARDS)(self._open_shard)
        self._seen, self._looked = latest_digest(snapshot.root), time.monotonic()

    def _open_shard(self, number: int) -> Shard:
        entry = self._snapshot.shards[number]
        return self._kind(self._snapshot.root, entry.name, digest=entry.digest)

    def __call__(self, number: int) -> Shard:
        return self._open(number)

    def look(self) -> None:
        """Honour what was forgotten since the last look."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked, found = time.monotonic(), latest_digest(self._snapshot.root)
        if found != self._seen:
            self._seen = found
            self._open.cache_clear()
            self._on_change()


class ImageReader:
    """Reads `image`, uint8 [n, 3, S, S]: the short side resized to S, the centre cropped.

    num_threads: images decoded side by side; 0 = in the calling thread. Decoded images are kept in
    memory while they fit a gigabyte: decoding then costs one epoch only.
    """

    def __init__(self, snapshot: Snapshot, size: int, num_threads: int = 0) -> None:
        self.data_sets = (_sizes(snapshot),)
        self._snapshot, self._size = snapshot, size
        self._places = _Places(snapshot)
        self._cached = Cached(self._decode, num_threads=num_threads)
        self.open_shard = _Shards(ImageShard, snapshot, self._cached.clear)

    def _decode(self, index: int) -> np.ndarray:
        shard, row = self._places.of(index)
        return square_pixels(self.open_shard(shard).image_bytes(row), self._size)

    def place_of(self, index: int) -> tuple[int, int]:
        """Return the number of the shard and the row of a sample."""
        return self._places.of(index)

    def shards_of(self, index: np.ndarray) -> set[int]:
        """Return the numbers of the shards that hold the samples of an index."""
        return set(self._places.of_many(index)[0].tolist())

    def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        self.open_shard.look()
        return {"image": self._cached.read(index)}


def short_sides(snapshot: Snapshot) -> np.ndarray:
    """Return the shorter side in px of each image of the first shard that holds any, int [n]."""
    from PIL import Image

    for entry in snapshot.shards:
        if entry.num_samples:
            shard = ImageShard(snapshot.root, entry.name, digest=entry.digest)
            opened = (Image.open(io.BytesIO(shard.image_bytes(row))) for row in range(len(shard)))
            return np.array([min(image.size) for image in opened])
    return np.array([], int)


class CaptionReader:
    """Reads `image` and `tokens` int32 [n, L] of image shards: what CLIP trains on, before any
    embedding."""

    def __init__(self, snapshot: Snapshot, size: int, tokenize: Any, num_threads: int = 0) -> None:
        self._images = ImageReader(snapshot, size, num_threads)
        self.data_sets = self._images.data_sets
        self._tokens = Cached(lambda i: tokenize([self._caption(i)])[0], limit_bytes=1 << 28)

    def _caption(self, index: int) -> str:
        shard, row = self._images.place_of(index)
        return self._images.open_shard(shard).caption(row)

    def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        return {**self._images.read(index), "tokens": self._tokens.read(index)}


class EmbedReader:
    """Reads `image_embed`, `text_embed` float16 [n, E] and `tokens` int32 [n, L], as stored.

    tokenize: captions -> int32 [n, T]; given, their tokens are read as `caption_tokens`.
    """

    def __init__(self, snapshot: Snapshot, tokenize: Callable | None = None) -> None:
        self.data_sets = (_sizes(snapshot),)
        self._tokenize = tokenize
        self._words = Cached(self._caption_tokens, limit_bytes=1 << 28)
        self._places = _Places(snapshot)
        self.open_shard = _Shards(EmbedShard, snapshot)

    def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        self.open_shard.look()
        shards, rows = self._places.of_many(index)

        def find(number: int, mine: np.ndarray) -> Found:
            shard = self.open_shard(number)
            names = ("image_embed", "text_embed", "tokens")
            return {name: (getattr(shard, name), rows[mine]) for name in names}

        columns = _gathered(shards, find)
        if self._tokenize is not None:
            columns["caption_tokens"] = self._words.read(index)
        return columns

    def _caption_tokens(self, index: int) -> np.ndarray:
        assert self._tokenize is not None
        shard, row = self._places.of(index)
        return self._tokenize([self.open_shard(shard).captions[row]])[0]


def captions_of(snapshots: Sequence[Snapshot], count: int) -> list[str]:
    """Return the captions of the first `count` samples that readers read of the embeddings."""
    captions: list[str] = []
    for snapshot in snapshots:
        for entry in snapshot.shards:
            if len(captions) >= count:
                break
            found = EmbedShard(snapshot.root, entry.name, digest=entry.digest).captions
            captions += [found[row] for row in entry.rows(np.arange(entry.num_kept))]
    return captions[:count]


class JoinedReader:
    """Reads an image and its embeddings: row i of an embedding shard belongs to row i of the
    image shard."""

    def __init__(
        self,
        images: Snapshot,
        embeds: Snapshot,
        size: int,
        num_threads: int = 0,
        tokenize: Callable | None = None,
    ) -> None:
        """Read images of `size` px by `ImageReader`, and embeddings by `EmbedReader`."""
        by_name = {entry.name: entry for entry in images.shards}
        paired: list[ShardEntry] = []
        for entry in embeds.shards:
            image = by_name.get(entry.name)
            if image is None or image.num_samples != entry.num_samples:
                found = "no such shard" if image is None else f"{image.num_samples} samples"
                raise ValueError(
                    f"{images.root}: shard {entry.name}: found {found}, expected "
                    f"{entry.num_samples} samples as in "
                    f"{embeds.root}; embed these images with: python ingest/embed.py"
                )
            paired.append(replace(image, excluded=entry.excluded))
        matched = Snapshot(root=images.root, digest=images.digest, shards=tuple(paired))
        self._images = ImageReader(matched, size, num_threads)
        self._embeds = EmbedReader(embeds, tokenize)
        self.data_sets = self._embeds.data_sets
        self._root, self._checked = images.root, set[int]()
        self._check_keys(0)  # the others when they are opened: there may be very many

    def _check_keys(self, number: int) -> None:
        embed, image = self._embeds.open_shard(number), self._images.open_shard(number)
        of_these = embed.commit.config_hash == image.commit.digest
        if not of_these or image.keys != embed.keys:
            raise ValueError(
                f"{self._root}: shard {image.name}: its embeddings are of other images; embed "
                "these with: python ingest/embed.py"
            )
        self._checked.add(number)

    def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        for number in self._images.shards_of(index) - self._checked:
            self._check_keys(number)
        return {**self._images.read(index), **self._embeds.read(index)}


class Mixture:
    """Reads several data sets, whose samples the index numbers one after the other.

    weighted: the plan keeps them apart; else their shards are dealt as those of one.
    """

    def __init__(self, readers: Sequence[Reader], *, weighted: bool) -> None:
        sizes = [sum(reader.data_sets, ()) for reader in readers]
        self.data_sets = tuple(sizes) if weighted else (sum(sizes, ()),)
        self._readers = readers
        self._starts = np.cumsum([0, *(sum(each) for each in sizes)])

    def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        which = np.searchsorted(self._starts, index, side="right") - 1

        def find(number: int, mine: np.ndarray) -> Found:
            found = self._readers[number].read(index[mine] - self._starts[number])
            return {name: (values, np.arange(len(mine))) for name, values in found.items()}

        return _gathered(which, find)


def _sizes(snapshot: Snapshot) -> tuple[int, ...]:
    return tuple(entry.num_kept for entry in snapshot.shards)


Found = dict[str, tuple[np.ndarray, np.ndarray]]  # column -> an array, and which rows of it


def _gathered(sources: np.ndarray, find: Callable[[int, np.ndarray], Found]) -> dict[str, Any]:
    """Return the columns of samples that come from several sources.

    sources: int [n], which each sample comes from; find(source, places): where the columns of
    those of the samples are that stand at these places.
    """
    order = np.argsort(sources, kind="stable")
    firsts = np.flatnonzero(np.diff(sources[order], prepend=-1))
    columns: dict[str, np.ndarray] = {}
    for mine in np.split(order, firsts[1:]):
        found = find(int(sources[mine[0]]), mine)
        columns = columns or _room_for(len(sources), {name: a for name, (a, _) in found.items()})
        first, last = int(mine[0]), int(mine[-1])
        together = last - first + 1 == len(mine)  # then rows are copied once
        for name, (array, rows) in found.items():
            if together:  # rows are in range: "raise" would copy them twice
                place = columns[name][first : last + 1]
                np.take(array, rows, axis=0, out=place, mode="clip")
            else:
                columns[name][mine] = np.take(array, rows, axis=0)
    return columns


def _room_for(count: int, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return empty columns of `count` rows, in one piece of memory.

    The allocator gives small pieces back to the system between batches, and a page that comes anew
    costs more than what is copied into it.
    """
    sizes = [count * value[:1].nbytes for value in like.values()]
    ends = np.cumsum([-(-size // 64) * 64 for size in sizes])  # each begins on a cache line
    room = np.empty(ends[-1], np.uint8)
    return {
        name: room[end - -(-size // 64) * 64 :][:size]
        .view(value.dtype)
        .reshape(count, *value.shape[1:])
        for (name, value), size, end in zip(like.items(), sizes, ends.tolist(), strict=True)
    }


class _Places:
    """Maps an index in the snapshot to (shard, row)."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._shards = snapshot.shards
        self._starts = np.cumsum([0, *(entry.num_kept for entry in snapshot.shards)])
        self._some_excluded = any(entry.excluded for entry in snapshot.shards)

    def of(self, index: int) -> tuple[int, int]:
        shards, rows = self.of_many(np.array([index]))
        return int(shards[0]), int(rows[0])

    def of_many(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards = np.searchsorted(self._starts, index, side="right") - 1
        rows = index - self._starts[shards]
        for number in np.unique(shards) if self._some_excluded else ():
            mine = shards == number
            rows[mine] = self._shards[number].rows(rows[mine])
        return shards, rows
