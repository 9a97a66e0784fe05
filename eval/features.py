"""Features of images, by extractors that name themselves: a number is quoted with its extractor.

No weights are ever fetched here: a missing file is an error that says where it comes from.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from models.clip import FrozenClip

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256_PREFIX = "6726825d"  # the file bears the head of its own sha256
INCEPTION_SOURCE = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + INCEPTION_FILE
)


class Extractor(Protocol):
    """Maps uint8 images [B, 3, H, W] of any size to float features [B, D]."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: list[Image.Image]) -> np.ndarray: ...


@dataclass(frozen=True)
class ClipFeatures:
    """Unit-norm CLIP image embeddings, through the encoder's own preprocessing."""

    encoder: FrozenClip

    @property
    def name(self) -> str:
        return f"clip {self.encoder.encoder_id}"

    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack([self.encoder.preprocess(image) for image in images]))
        return self.encoder.encode_image(pixels).numpy()


class InceptionFeatures:
    """Pool-3 features [B, 2048] of the 2015-12-05 Inception, TF1 bilinear resize, by
    torch-fidelity."""

    @property
    def name(self) -> str:
        return "inception-2015-12-05 pool3, TF1 bilinear (torch-fidelity)"

    def __init__(self, weights_dir: Path) -> None:
        path = verified_inception(weights_dir)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self._network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        ).eval()

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        pixels = np.stack([np.asarray(image.convert("RGB")).transpose(2, 0, 1) for image in images])
        return self._network(torch.from_numpy(pixels))[0].numpy()


def verified_inception(weights_dir: Path) -> Path:
    """Return the weights file once its digest is right and it loads without unpickling objects."""
    path = weights_dir / INCEPTION_FILE
    if not path.is_file():
        raise ValueError(
            f"{path}: found no such file, expected the Inception weights (sha256 "
            f"{INCEPTION_SHA256_PREFIX}...); "
            f"get them from {INCEPTION_SOURCE}"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(INCEPTION_SHA256_PREFIX):
        raise ValueError(
            f"{path}: found sha256 {found}, expected {INCEPTION_SHA256_PREFIX}...; get it again"
        )
    torch.load(path, weights_only=True, map_location="cpu")
    return path


def in_batches(images: Iterable[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    """Group `images` into lists of at most `size`."""
    batch: list[Image.Image] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def extract(
    extractor: Extractor, images: Iterable[Image.Image], batch_size: int = 100
) -> np.ndarray:
    """Return the features [N, D] of all `images`."""
    parts = [extractor(batch) for batch in in_batches(images, batch_size)]
    if not parts:
        raise ValueError(f"{extractor.name}: found no images, expected at least 2")
    return np.concatenate(parts)
