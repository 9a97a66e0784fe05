"""All scores of one set of images against another in one space of features."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval.distances.frechet import Reference
from eval.distances.intervals import (
    bootstrap_error,
    cmmd,
    fd_infinity,
    interval,
    kernel_distance,
    real_halves,
)
from eval.distances.neighbours import K_DENSITY, K_PRECISION, manifold_scores, nearest_rows
from eval.distances.reference import Statistics, load_statistics
from eval.features.blocks import Features
from eval.features.extractors import FD_NAMES, ExtractorSpec
from eval.features.store import FeatureExtraction
from eval.html_report.formats import Scores
from eval.sampling.image_source import ImageSet, open_images

QUOTABLE = 2049  # with fewer images a covariance of 2,048 features is singular
NUM_NEAREST = 8  # pairs of a generated image and the training image next to it
NEAR_QUANTILE = 0.05


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """The generated or the real images, or only their statistics.

    statistics: by space, of a set that is given as npz files; images: None for such a set.
    """

    source: str
    images: ImageSet | None = None
    statistics: dict[str, Statistics] = field(default_factory=dict)

    def measured(
        self, spec: ExtractorSpec, extraction: FeatureExtraction
    ) -> tuple[Features | None, Statistics]:
        """Return features, where there are images, and statistics in the space of `spec`."""
        if self.images is not None:
            return extraction.measured(self.images, spec)
        if spec.space not in self.statistics:
            known = ", ".join(sorted(self.statistics))
            raise ValueError(
                f"{self.source}: found statistics of {known}, expected {spec.space}; choose by "
                "--features"
            )
        known = self.statistics[spec.space]
        for name, expected in (("extractor", spec.name), ("resize", spec.resize)):
            if getattr(known, name) != expected:
                raise ValueError(
                    f"{name}: found {getattr(known, name)!r} for {self.source}, expected "
                    f"{expected!r}; score with what the statistics were made with"
                )
        return None, known


def open_source(source: str, size: int) -> ImageSource:
    """Open images, or statistics: a file of them, or a folder of such files and nothing else."""
    path = Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else []
    if path.suffix == ".npz" or (files and all(file.suffix == ".npz" for file in files)):
        loaded = [load_statistics(file) for file in files or [path]]
        statistics = {known.space: known for known in loaded}
        if len(statistics) < len(loaded):
            spaces = ", ".join(known.space for known in loaded)
            raise ValueError(f"{source}: space: found {spaces}, expected each once")
        return ImageSource(source=source, statistics=statistics)
    images = open_images(source).fitted(size)
    if len(images) < 2:
        raise ValueError(f"{source}: found one image, expected two or more to compare their spread")
    return ImageSource(source=source, images=images)


def space_scores(
    fake: tuple[Features | None, Statistics],
    real: tuple[Features | None, Statistics],
    spec: ExtractorSpec,
    num_resamples: int,
) -> Scores:
    """Return the distances of `fake` to `real` in one space, each with its variant and counts.

    Distances that need features are left out where a set is only statistics. Raises ValueError for
    features that were made differently, and for fewer than 2 images.
    """
    (fake_features, fake_known), (real_features, real_known) = fake, real
    fake_known.require_alike(real_known)
    n, n_real = fake_known.moments.count, real_known.moments.count
    quotable = spec.official and min(n, n_real) >= QUOTABLE
    reference = Reference.of(real_known.moments)
    distance = reference.distance(fake_known.moments)
    scores: Scores = {
        "name": FD_NAMES[spec.space] if quotable else _plain_name(spec, min(n, n_real)),
        "extractor": spec.name,
        "resize": spec.resize,
        "resolution": fake_known.resolution,
        "quotable": quotable,
        "source": fake_known.source,
        "source_real": real_known.source,
        "digest": fake_known.digest,
        "digest_real": real_known.digest,
        "n": n,
        "n_real": n_real,
        "fd": distance,
    }
    if real_features is not None and n_real >= 4:
        scores |= {"fd_real_halves": real_halves(real_features), "n_real_halves": n_real // 2}
    if fake_features is not None:
        limit = fd_infinity(fake_features, reference)
        if limit is not None:
            scores["fd_infinity"], scores["fd_infinity_points"] = limit
        if num_resamples >= 2:
            error = bootstrap_error(fake_features, reference, num_resamples)
            low, high = interval(distance, error)
            scores |= {"fd_ci95_low": low, "fd_ci95_high": high, "fd_resamples": num_resamples}
    if fake_features is not None and real_features is not None:
        scores |= kernel_distance(fake_features, real_features)
        if min(n, n_real) > max(K_PRECISION, K_DENSITY):
            scores |= manifold_scores(fake_features, real_features)
        if spec.space == "clip":
            scores["cmmd"] = cmmd(fake_features, real_features)
    return scores


def _plain_name(spec: ExtractorSpec, n: int) -> str:
    """Name a distance that must not be quoted under its published name, with the reasons."""
    reasons = [f"n = {n:,} is below {QUOTABLE:,}"] if n < QUOTABLE else []
    if not spec.official:
        reasons.append("not the published weights")
    kind = "CLIP" if spec.space == "clip" else spec.space.replace("_", " ")
    return f"Frechet distance in the space of {kind} ({'; '.join(reasons)})"


def memorisation(
    fake: ImageSet,
    real: ImageSet | None,
    train: ImageSet,
    spec: ExtractorSpec,
    extraction: FeatureExtraction,
) -> Scores:
    """Compare the distances of generated and of real images to their nearest training images.

    share_closer: the share of generated images that are nearer to training than the 5 % quantile
    of real images; .05 where nothing is copied. Raises ValueError if the real images are the
    training set itself.
    """
    if real is not None and real.digest == train.digest:
        raise ValueError(
            f"--train: found the very images of --real, {train.source}; expected real images that "
            "training never saw"
        )
    _, train_features = extraction.extracted(train, spec)

    def nearest(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
        distances, rows = nearest_rows(extraction.extracted(images, spec)[1], train_features)
        # of unit vectors |x - y|^2 / 2 is 1 - x.y
        return (distances**2 / 2 if spec.space == "clip" else distances), rows  # [N], [N]

    distances, rows = nearest(fake)
    scores: Scores = {
        "space": spec.space,
        "extractor": spec.name,
        "metric": "cosine distance" if spec.space == "clip" else "euclidean distance",
        "train": train.source,
        "digest_train": train.digest,
        "n_train": len(train),
        "n": len(fake),
        "mean": float(distances.mean()),
        "p05": float(np.quantile(distances, NEAR_QUANTILE)),
    }
    if real is not None:
        held_out, _ = nearest(real)
        near = float(np.quantile(held_out, NEAR_QUANTILE))
        scores |= {
            "n_real": len(real),
            "mean_real": float(held_out.mean()),
            "p05_real": near,
            "share_closer": float((distances < near).mean()),
        }
    scores["nearest"] = [
        {
            "fake": fake.name(i),
            "train": train.name(int(rows[i])),
            "fake_number": i,
            "train_number": int(rows[i]),
            "distance": float(distances[i]),
        }
        for i in distances.argsort(kind="stable")[:NUM_NEAREST].tolist()
    ]
    return scores
