"""Features on disk: one committed block after another, whoever computed it.

    <root>/_manifest.json            extractor, resize, images and their digest, block size
    <root>/000000.features.npy       float32 [B, D] of images 0 ... B - 1
    <root>/_commits/000000.json      from here on the block exists

A block is the unit of work, of batches and of sums: what a score is made of depends neither on the
number of workers nor on who did what.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.base.files import digest_of
from eval.distances.reference import ANY_SIZE, Statistics
from eval.features.blocks import BLOCK_SIZE, Features
from eval.features.extractors import BATCH_SIZE, Extractor, ExtractorSpec
from eval.sampling.image_source import ImageSet, Incomplete
from ingest.shards import shard_name
from ingest.store.commits import Attempt, committed, recover, withdraw_damaged
from ingest.store.snapshots import write_manifest


@dataclass(frozen=True, kw_only=True)
class Store:
    """The blocks of one set of images in one space."""

    root: Path
    images: ImageSet
    spec: ExtractorSpec
    block_size: int = BLOCK_SIZE

    @property
    def num_blocks(self) -> int:
        return -(-len(self.images) // self.block_size)

    def numbers(self, block: int) -> range:
        """Return the numbers of the images of a block."""
        start = block * self.block_size
        return range(start, min(start + self.block_size, len(self.images)))

    def pending(self) -> list[int]:
        """Return the blocks that are still to be made."""
        done = committed(self.root)
        return [block for block in range(self.num_blocks) if shard_name(block) not in done]

    def make(self, block: int, extractor: Extractor) -> int:
        """Compute and commit a block; returns its number of images.

        Raises ValueError naming the image that cannot be read, is of another size, or whose
        features are not finite.
        """
        numbers = self.numbers(block)
        found = np.concatenate([
            self._extract(numbers[i : i + BATCH_SIZE], extractor)
            for i in range(0, len(numbers), BATCH_SIZE)
        ])  # fmt: skip
        self.commit(block, found)
        return len(found)

    def take_from(self, features: Features, numbers: Sequence[int]) -> None:
        """Commit what is pending from the features of a larger set, of which image i is
        `numbers`[i]."""
        rows = np.asarray(numbers)
        for block in self.pending():
            self.commit(block, features.take(rows[list(self.numbers(block))]))

    def commit(self, block: int, features: np.ndarray) -> None:
        """Commit the features [B, D] of a block; those of whoever came first stay."""
        with Attempt(self.root, shard_name(block)) as attempt:
            path = attempt.path / f"{shard_name(block)}.features.npy"
            np.save(path, features.astype(np.float32), allow_pickle=False)
            attempt.commit(num_samples=len(features), counts={}, config_hash="")

    def _extract(self, numbers: range, extractor: Extractor) -> np.ndarray:
        images = []
        for number in numbers:
            if not extractor.any_size:
                self._require_size(number)
            images.append(self.images[number])
        features = extractor(images)
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{self.images.name(numbers[bad[0]])}: found features that are not finite by "
                f"{self.spec.name}, expected numbers; look at the image, or at the weights"
            )
        return features

    def _require_size(self, number: int) -> None:
        expected, size = self.images.size(0), self.images.size(number)
        if size != expected:
            found, first = (f"{width} x {height} px" for width, height in (size, expected))
            raise ValueError(
                f"{self.images.source}: found image {number} of {found} after images of {first}, "
                "expected one size; crop and resize them alike by --image-size, or take "
                "--features clip"
            )

    def features(self) -> Features:
        """Return the features of all images; Incomplete if there are fewer than images."""
        commits = committed(self.root)
        names = [shard_name(block) for block in range(self.num_blocks)]
        sizes = [commits[name].num_samples if name in commits else 0 for name in names]
        if sizes != [len(self.numbers(block)) for block in range(self.num_blocks)]:
            raise Incomplete(
                f"{self.root}: found features of {sum(sizes)} images, expected {len(self.images)}"
            )
        return Features(parts=[self.root / f"{n}.features.npy" for n in names], sizes=sizes)

    def statistics(self, features: Features) -> Statistics:
        """Return the moments of all features, with what they are of."""
        width, height = self.images.size(0)
        resolution = f"{width} x {height} px, {self.images.fit}"
        if self.spec.any_size and not self.images.side:
            resolution = ANY_SIZE
        return Statistics(
            moments=features.moments(),
            space=self.spec.space,
            extractor=self.spec.name,
            resize=self.spec.resize,
            resolution=resolution,
            source=self.images.source,
            digest=self.images.digest,
        )


def open_store(
    folder: Path, images: ImageSet, spec: ExtractorSpec, block_size: int = BLOCK_SIZE
) -> Store:
    """Create or reopen the store of these very images and this extractor below `folder`.

    What was interrupted is settled, and damaged blocks are withdrawn, to be made again.
    """
    about = {
        "space": spec.space,
        "extractor": spec.name,
        "resize": spec.resize,
        "digest": images.digest,
        "fit": images.fit,
        "n": len(images),
        "block_size": block_size,
        "batch_size": BATCH_SIZE,
    }
    root = folder / f"{spec.space}-{digest_of(about)[:16]}"
    root.mkdir(parents=True, exist_ok=True)
    write_manifest(root, "features", about)
    recover(root)
    for name, problem in withdraw_damaged(root).items():
        print(f"features: block {name} is made again: {problem}", flush=True)
    return Store(root=root, images=images, spec=spec, block_size=block_size)
