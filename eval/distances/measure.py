"""Everything that is said of one set of images against another in one space of features."""

from dataclasses import dataclass
from typing import Any

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
from eval.distances.reference import Statistics
from eval.features.actor_pool import Place
from eval.features.blocks import Features
from eval.features.extractors import FD_NAMES, ExtractorSpec
from eval.sampling.image_source import ImageSet

QUOTABLE = 2049  # with fewer images a covariance of 2,048 features is singular
NUM_NEAREST = 8  # pairs of a generated image and the training image next to it
NEAR_QUANTILE = 0.05


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """The generated or the real images, or what is known of them without having them.

    statistics: by space, of a set that is given as npz files; images: None for such a set.
    """

    source: str
    images: ImageSet | None
    statistics: dict[str, Statistics]

    def measured(self, spec: ExtractorSpec, place: Place) -> tuple[Features | None, Statistics]:
        """Return features, where there are images, and statistics in the space of `spec`."""
        if self.images is not None:
            return place.measured(self.images, spec)
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


def space_scores(
    fake: tuple[Features | None, Statistics],
    real: tuple[Features | None, Statistics],
    spec: ExtractorSpec,
    num_resamples: int,
) -> dict[str, Any]:
    """Return the distances of `fake` to `real` in one space, each with its variant and counts.

    What needs features is left out where a side is statistics only. Raises ValueError for sets
    whose features were not made alike, and for fewer than 2 images.
    """
    (fake_features, fake_known), (real_features, real_known) = fake, real
    fake_known.require_alike(real_known)
    n, n_real = fake_known.moments.count, real_known.moments.count
    quotable = spec.official and min(n, n_real) >= QUOTABLE
    reference = Reference.of(real_known.moments)
    distance = reference.distance(fake_known.moments)
    scores: dict[str, Any] = {
        "name": f"{FD_NAMES[spec.space]}" if quotable else _plain_name(spec, min(n, n_real)),
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
        scores |= _certainty(fake_features, reference, distance, num_resamples)
    if fake_features is not None and real_features is not None:
        scores |= _by_features(fake_features, real_features, spec)
    return scores


def _plain_name(spec: ExtractorSpec, n: int) -> str:
    """Name a distance that must not be quoted under its published name, and say why."""
    reasons = []
    if n < QUOTABLE:
        reasons.append(f"n = {n:,} is below {QUOTABLE:,}")
    if not spec.official:
        reasons.append("not the published weights")
    kind = "CLIP" if spec.space == "clip" else spec.space.replace("_", " ")
    return f"Frechet distance in the space of {kind} ({'; '.join(reasons)})"


def _certainty(
    fake: Features, reference: Reference, distance: float, num_resamples: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    limit = fd_infinity(fake, reference)
    if limit is not None:
        found["fd_infinity"], found["fd_infinity_points"] = limit
    if num_resamples >= 2:
        low, high = interval(distance, bootstrap_error(fake, reference, num_resamples))
        found |= {"fd_ci95_low": low, "fd_ci95_high": high, "fd_resamples": num_resamples}
    return found


def _by_features(fake: Features, real: Features, spec: ExtractorSpec) -> dict[str, Any]:
    found: dict[str, Any] = dict(kernel_distance(fake, real))
    if min(len(fake), len(real)) > max(K_PRECISION, K_DENSITY):
        found |= manifold_scores(fake, real)
    if spec.space == "clip":
        found["cmmd"] = cmmd(fake, real)
    return found


def memorisation(
    fake: ImageSet, real: ImageSet | None, train: ImageSet, spec: ExtractorSpec, place: Place
) -> dict[str, Any]:
    """Hold generated images against their nearest training images, and real ones against theirs.

    A model that copies is nearer to its training set than unseen real images are. Raises
    ValueError if the real images are the training set itself.
    """
    if real is not None and real.digest == train.digest:
        raise ValueError(
            f"--train: found the very images of --real, {train.source}; expected real images that "
            "training never saw"
        )
    _, known = place.extracted(train, spec)
    found: dict[str, Any] = {
        "space": spec.space,
        "extractor": spec.name,
        "metric": "cosine distance" if spec.space == "clip" else "euclidean distance",
        "train": train.source,
        "digest_train": train.digest,
        "n_train": len(train),
        "n": len(fake),
    }
    distances, which = _distances(fake, known, spec, place)
    found |= {"mean": float(distances.mean()), "p05": _near(distances)}
    if real is not None:
        held_out, _ = _distances(real, known, spec, place)
        found |= {
            "n_real": len(real),
            "mean_real": float(held_out.mean()),
            "p05_real": _near(held_out),
            "share_closer": float((distances < _near(held_out)).mean()),
        }
    closest = distances.argsort(kind="stable")[:NUM_NEAREST].tolist()
    found["nearest"] = [
        {
            "fake": fake.name(i),
            "train": train.name(int(which[i])),
            "fake_number": i,
            "train_number": int(which[i]),
            "distance": float(distances[i]),
        }
        for i in closest
    ]
    return found


def _distances(images: ImageSet, train: Features, spec: ExtractorSpec, place: Place) -> Any:
    _, features = place.extracted(images, spec)
    distances, which = nearest_rows(features, train)
    # of unit vectors |x - y|^2 / 2 is 1 - x.y
    return (distances**2 / 2 if spec.space == "clip" else distances), which


def _near(distances: Any) -> float:
    import numpy as np

    return float(np.quantile(distances, NEAR_QUANTILE))
