"""Features on disk: one committed block after another, whoever computed it.

    <root>/_manifest.json            extractor, resize, images and their digest, block size
    <root>/000000.features.npy       float32 [B, D] of images 0 ... B - 1
    <root>/_commits/000000.json      from here on the block exists

A block is the unit of work, of batches and of sums, so a score does not depend on the number of
workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cluster.base.files import digest_of
from eval.distances.reference import ANY_SIZE, Statistics
from eval.features.blocks import BLOCK_SIZE, Features
from eval.features.devices import device_named
from eval.features.extractors import BATCH_SIZE, Extractor, ExtractorSpec
from eval.features.workers import ImageBlocks, MakeBlock, Workers
from eval.sampling.image_source import ImageSet, IncompleteError
from ingest.shards import shard_name
from ingest.store.commits import Attempt
from ingest.store.snapshots import write_manifest


@dataclass(frozen=True, kw_only=True)
class FeatureStore:
    """The blocks of one set of images in one space."""

    blocks: ImageBlocks
    images: ImageSet
    spec: ExtractorSpec

    def make(self, block: int, extractor: Extractor) -> int:
        """Compute and commit a block; return its number of images.

        Raises ValueError naming the image that cannot be read, is of another size, or whose
        features are not finite.
        """
        numbers, batches = self.blocks.numbers(block), []
        for start in range(0, len(numbers), BATCH_SIZE):
            batch = numbers[start : start + BATCH_SIZE]
            if not self.spec.any_size:
                self._require_one_size(batch)
            features = extractor([self.images[number] for number in batch])
            bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
            if len(bad):
                raise ValueError(
                    f"{self.images.name(batch[bad[0]])}: found features that are not finite by "
                    f"{self.spec.name}, expected numbers; look at the image, or at the weights"
                )
            batches.append(features)
        self.commit(block, np.concatenate(batches))
        return len(numbers)

    def _require_one_size(self, numbers: range) -> None:
        expected = self.images.size(0)
        for number in numbers:
            size = self.images.size(number)
            if size != expected:
                other, first = (f"{width} x {height} px" for width, height in (size, expected))
                raise ValueError(
                    f"{self.images.source}: found image {number} of {other} after images of "
                    f"{first}, expected one size; crop and resize them alike by --image-size, or "
                    "take --features clip"
                )

    def take_from(self, features: Features, numbers: Sequence[int]) -> None:
        """Commit what is pending from the features of a larger set; image i is its `numbers`[i]."""
        rows = np.asarray(numbers)
        for block in self.blocks.pending():
            self.commit(block, features.take(rows[list(self.blocks.numbers(block))]))

    def commit(self, block: int, features: np.ndarray) -> None:
        """Commit the features [B, D] of a block, unless another worker did so first."""
        with Attempt(self.blocks.root, shard_name(block)) as attempt:
            path = attempt.path / f"{shard_name(block)}.features.npy"
            np.save(path, features.astype(np.float32), allow_pickle=False)
            attempt.commit(num_samples=len(features), counts={}, config_hash="")

    def features(self) -> Features:
        """Return the features of all images; IncompleteError if there are fewer than images."""
        blocks = self.blocks
        if blocks.num_committed() != blocks.count:
            raise IncompleteError(
                f"{blocks.root}: found features of {blocks.num_committed()} images, expected "
                f"{blocks.count}"
            )
        return Features(
            blocks=[blocks.root / f"{shard_name(n)}.features.npy" for n in range(len(blocks))],
            sizes=[len(blocks.numbers(n)) for n in range(len(blocks))],
        )

    def statistics(self, features: Features) -> Statistics:
        """Return the moments of all features, with what they are of."""
        width, height = self.images.size(0)
        resolution = f"{width} x {height} px, {self.images.fit}"
        if self.spec.any_size and not self.images.side:
            resolution = ANY_SIZE
        return Statistics(
            moments=features.moments(), space=self.spec.space, extractor=self.spec.name,
            resize=self.spec.resize, resolution=resolution, source=self.images.source,
            digest=self.images.digest,
        )  # fmt: skip


def open_store(
    folder: Path, images: ImageSet, spec: ExtractorSpec, block_size: int = BLOCK_SIZE
) -> FeatureStore:
    """Create or reopen the store of exactly these images and this extractor below `folder`."""
    about = {
        "space": spec.space, "extractor": spec.name, "resize": spec.resize,
        "digest": images.digest, "fit": images.fit, "n": len(images),
        "block_size": block_size, "batch_size": BATCH_SIZE,
    }  # fmt: skip
    root = folder / f"{spec.space}-{digest_of(about)[:16]}"
    root.mkdir(parents=True, exist_ok=True)
    write_manifest(root, "features", about)
    blocks = ImageBlocks(root=root, count=len(images), size=block_size)
    blocks.repair("features")
    return FeatureStore(blocks=blocks, images=images, spec=spec)


def load_extractor(store: FeatureStore, device: str) -> MakeBlock:
    """Return what computes and commits a block of a store, with the weights on `device`."""
    return partial(store.make, extractor=store.spec.build(device_named(device)))


@dataclass(frozen=True, kw_only=True)
class FeatureExtraction:
    """Where features are kept, who computes them, and how many images a block has."""

    folder: Path
    workers: Workers
    block_size: int = BLOCK_SIZE

    def extracted(self, images: ImageSet, spec: ExtractorSpec) -> tuple[FeatureStore, Features]:
        """Return the store of `images` and its features; only what is missing is computed."""
        store = open_store(self.folder, images, spec, self.block_size)
        if images.parent is not None:
            store.take_from(self.extracted(images.parent, spec)[1], images.numbers)
        load = partial(load_extractor, store, self.workers.device)
        self.workers.run(f"{spec.space} features of {images.source}", load, store.blocks)
        return store, store.features()

    def measured(self, images: ImageSet, spec: ExtractorSpec) -> tuple[Features, Statistics]:
        """Return the features of `images` and their statistics."""
        store, features = self.extracted(images, spec)
        return features, store.statistics(features)
