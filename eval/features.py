"""Features of images, by extractors that name themselves: a number is quoted with its extractor.

No weights are ever fetched here: a missing file is an error that says where it comes from.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from ingest.commits import digest_file
from models.clip import FrozenClip

Item = TypeVar("Item")
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256_PREFIX = "6726825d"  # the file bears the head of its own sha256
INCEPTION_SOURCE = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + INCEPTION_FILE
)


class Extractor(Protocol):
    """Maps images to float features [B, D]; `any_size` says whether they may differ in size."""

    @property
    def name(self) -> str: ...

    @property
    def any_size(self) -> bool: ...

    def __call__(self, images: list[Image.Image]) -> np.ndarray: ...


@dataclass(frozen=True)
class ClipFeatures:
    """Unit-norm CLIP image embeddings, through the encoder's own preprocessing."""

    encoder: FrozenClip
    any_size = True

    @property
    def name(self) -> str:
        return f"clip {self.encoder.encoder_id}"

    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack([self.encoder.preprocess(image) for image in images]))
        return self.encoder.encode_image(pixels).cpu().numpy()


class InceptionFeatures:
    """Pool-3 features [B, 2048] of the 2015-12-05 Inception, TF1 bilinear resize, by
    torch-fidelity.

    Images are stretched to 299 x 299 px whatever their shape, so a set is of one size, as in
    torch-fidelity: how other pictures are cropped is the user's choice, and part of the number.
    """

    any_size = False

    @property
    def name(self) -> str:
        return "inception-2015-12-05 pool3, TF1 bilinear (torch-fidelity)"

    def __init__(self, weights_dir: Path, device: str | torch.device = "cpu") -> None:
        path = verified_inception(weights_dir)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self._network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        ).eval()
        self._device = torch.device(device)
        self._network.to(self._device)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        pixels = np.stack([np.asarray(image.convert("RGB")).transpose(2, 0, 1) for image in images])
        return self._network(torch.from_numpy(pixels).to(self._device))[0].cpu().numpy()


def verified_inception(weights_dir: Path) -> Path:
    """Return the weights file once its digest is right and it loads without unpickling objects."""
    path = weights_dir / INCEPTION_FILE
    if not path.is_file():
        raise ValueError(
            f"{path}: found no such file, expected the Inception weights (sha256 "
            f"{INCEPTION_SHA256_PREFIX}...); "
            f"get them from {INCEPTION_SOURCE}"
        )
    found = digest_file(path)
    if not found.startswith(INCEPTION_SHA256_PREFIX):
        raise ValueError(
            f"{path}: found sha256 {found}, expected {INCEPTION_SHA256_PREFIX}...; get it again"
        )
    torch.load(path, weights_only=True, map_location="cpu")
    return path


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Group `items` into lists of at most `size`."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def of_one_size(images: Iterable[Image.Image], source: str) -> Iterator[Image.Image]:
    """Pass `images` on; raises ValueError at the first whose size is not that of the first."""
    expected = None
    for number, image in enumerate(images):
        expected = expected or image.size
        if image.size != expected:
            found, first = (f"{width} x {height} px" for width, height in (image.size, expected))
            raise ValueError(
                f"{source}: found image {number} of {found} after images of {first}, expected one "
                "size; crop and resize them alike first, or take --features clip"
            )
        yield image


def extract(
    extractor: Extractor,
    images: Iterable[Image.Image],
    batch_size: int = 100,
    source: str = "images",
) -> np.ndarray:
    """Return the features [N, D] of all `images`; `source` names them in errors.

    Raises ValueError if there are none, and for several sizes where the extractor takes but one.
    """
    fitting = images if extractor.any_size else of_one_size(images, source)
    parts = [extractor(batch) for batch in in_batches(fitting, batch_size)]
    if not parts:
        raise ValueError(f"{source}: found no images, expected at least 2")
    return np.concatenate(parts)
