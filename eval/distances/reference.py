"""Statistics of one set of images: the moments of its features, and how these were made.

    statistics/inception.npz   mean [D], scatter [D, D] float64, n, and the texts of `ABOUT`

Two sets are compared only if their features were made the same way.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.base.files import atomic_write
from eval.distances.frechet import Moments

FORMAT = 1
ABOUT = ("space", "extractor", "resize", "resolution", "source", "digest")
COMPARED = ("space", "extractor", "resize", "resolution")
ANY_SIZE = "any"  # resolution, where the extractor crops for itself
MAX_WIDTH = 1 << 15


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Moments of the features of one space, and how they were made.

    extractor, resize: of `ExtractorSpec`; resolution: size of the images in px before the
    extractor, and how they were resized to it; source, digest: of the images.
    """

    moments: Moments
    space: str
    extractor: str
    resize: str
    resolution: str
    source: str
    digest: str

    def require_alike(self, other: "Statistics") -> None:
        """Raise ValueError naming the first field in which the features were made differently."""
        for name in COMPARED:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                remedy = "make the statistics again, or score with what they were made with"
                if name == "resolution":
                    remedy = "give --image-size, by which both are cropped and resized"
                raise ValueError(
                    f"{name}: found {ours!r} for {self.source} and {theirs!r} for {other.source}, "
                    f"expected the same; {remedy}"
                )

    def save(self, folder: Path) -> Path:
        """Write `folder`/<space>.npz atomically; return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path, moments = folder / f"{self.space}.npz", self.moments
        texts = {name: getattr(self, name) for name in ABOUT}
        about = json.dumps({"format": FORMAT, "n": moments.count, **texts})
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, mean=moments.mean, scatter=moments.scatter, about=np.array(about))
        return path


def load_statistics(path: Path) -> Statistics:
    """Read a file of `Statistics.save`; ValueError naming what is missing or wrong in any other.

    Files of other projects hold a mean and a covariance but not what these are of.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if "about" not in file.files:
                raise ValueError(
                    f"{path}: extractor: found only {', '.join(file.files)}, expected statistics "
                    "that say what made them; make them with --save-statistics"
                )
            about = json.loads(str(file["about"]))
            mean, scatter = file["mean"], file["scatter"]
    except (OSError, zipfile.BadZipFile, KeyError, json.JSONDecodeError, EOFError) as error:
        raise ValueError(f"{path}: found no statistics ({error}), expected an npz") from None
    _check(path, about, mean, scatter)
    moments = Moments(count=int(about["n"]), mean=mean, scatter=scatter)
    return Statistics(moments=moments, **{name: about[name] for name in ABOUT})


def _check(path: Path, about: object, mean: np.ndarray, scatter: np.ndarray) -> None:
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        version = about.get("format") if isinstance(about, dict) else about
        raise ValueError(f"{path}: format: found {version!r}, expected {FORMAT}")
    for name in ABOUT:
        if not isinstance(about.get(name), str):
            raise ValueError(f"{path}: {name}: found {about.get(name)!r}, expected text")
    if type(about.get("n")) is not int or about["n"] < 2:
        raise ValueError(f"{path}: n: found {about.get('n')!r}, expected 2 or more")
    width = len(mean) if mean.ndim == 1 else 0
    if not 0 < width <= MAX_WIDTH or scatter.shape != (width, width):
        shapes = f"{list(mean.shape)} and {list(scatter.shape)}"
        raise ValueError(f"{path}: mean, scatter: found {shapes}, expected [D] and [D, D]")
    for name, array in (("mean", mean), ("scatter", scatter)):
        if array.dtype != np.float64 or not np.isfinite(array).all():
            raise ValueError(f"{path}: {name}: found {array.dtype}, expected finite float64")
