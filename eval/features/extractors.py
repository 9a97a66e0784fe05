"""Features of images. Each extractor has a name, with which its numbers are quoted.

    clip              unit-norm CLIP image embeddings
    inception         pool-3 features of the 2015-12-05 Inception, TF1 bilinear resize: FID's
    inception_clean   the same network after clean-fid's resize (Parmar et al. 2022)
    dinov2            the class token of DINOv2 ViT-L/14: FD-DINOv2's (Stein et al. 2023)
    efficientnet_lite0  pooled features of an ImageNet classifier, whose weights are installed with
                      this project (models/convert/efficientnet.py): a judge on every machine

No weights are downloaded here: a missing file is an error with its address.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image

from eval.features.networks import DINOV2_MODEL, DINOV2_SIDE, INCEPTION_SIDE, DinoV2, InceptionPool
from eval.features.weights import WeightsFile
from eval.request import Space
from models.convert import efficientnet
from training.engine.precision import compute_whole_fp32

if TYPE_CHECKING:
    from models.clip import FrozenClip  # whose open_clip takes seconds to import

BATCH_SIZE = 64  # images a forward pass; fixed, since a product's last bits depend on it
Item = TypeVar("Item")
FD_NAMES: dict[str, str] = {  # of the distance, where the weights are the published ones
    "clip": "FD-CLIP",
    "inception": "FID",
    "inception_clean": "clean-FID",
    "dinov2": "FD-DINOv2",
    "efficientnet_lite0": "FD-EfficientNet-Lite0",
}


Extractor = Callable[[list[Image.Image]], np.ndarray]  # images to features, float [B, D]


@dataclass(frozen=True, kw_only=True)
class ExtractorSpec:
    """Builds an extractor in any process, and names its features.

    name, resize: as quoted with a score; any_size: images of a set may differ in size; official:
    the weights are the published ones, so the score may have its published name. clip or weights:
    where the weights are.
    """

    space: Space
    name: str
    resize: str
    any_size: bool
    official: bool
    clip: str = ""
    weights: WeightsFile | None = None
    model: str = DINOV2_MODEL

    def build(self, device: str | torch.device) -> Extractor:
        """Load the weights and return the extractor on `device`; ValueError for wrong weights."""
        compute_whole_fp32()  # features of one name are the same from any device
        if self.space == "clip":
            from models.convert.runs import load_clip

            return partial(clip_features, load_clip(self.clip).to(torch.device(device)))
        if self.space == "efficientnet_lite0":
            eye = efficientnet.EfficientNetLite0().to(device)
            return partial(network_features, eye, partial(_stretched, efficientnet.SIDE))
        assert self.weights is not None
        state, where = self.weights.load(), self.weights.path
        if self.space == "dinov2":
            network = DinoV2(state, where, self.model).to(device)
            return partial(network_features, network, partial(_stretched, DINOV2_SIDE))
        prepare = _clean if self.space == "inception_clean" else _plain
        return partial(network_features, InceptionPool(state, where).to(device), prepare)


def clip_spec(encoder: "FrozenClip", clip: str) -> ExtractorSpec:
    """Describe the image tower of `encoder`, which `clip` names."""
    return ExtractorSpec(
        space="clip", name=f"clip {encoder.encoder_id}", clip=clip,
        resize=f"bicubic, centre crop to {encoder.image_size} px", any_size=True, official=True,
    )  # fmt: skip


def inception_spec(weights: WeightsFile, *, clean: bool) -> ExtractorSpec:
    """Describe Inception's features after TF1's resize, or after clean-fid's."""
    how = "bicubic, antialiased (clean-fid)" if clean else "TF1 bilinear"
    return ExtractorSpec(
        space="inception_clean" if clean else "inception",
        name=f"inception-2015-12-05 pool3, {how}{weights.label}",
        resize=f"{how} to {INCEPTION_SIDE} px", any_size=False,
        official=weights.official, weights=weights,
    )  # fmt: skip


def dinov2_spec(weights: WeightsFile, model: str = DINOV2_MODEL) -> ExtractorSpec:
    """Describe DINOv2's class token; model: timm's name of the size."""
    return ExtractorSpec(
        space="dinov2", name=f"{model} class token{weights.label}", model=model,
        resize=f"bicubic, antialiased to {DINOV2_SIDE} px", any_size=False,
        official=weights.official, weights=weights,
    )  # fmt: skip


def efficientnet_spec() -> ExtractorSpec:
    """Describe the pooled features of the installed EfficientNet-Lite0."""
    return ExtractorSpec(
        space="efficientnet_lite0",
        name=f"{efficientnet.IDENTITY} pooled, ImageNet",
        resize=f"bicubic, antialiased to {efficientnet.SIDE} px", any_size=False, official=True,
    )  # fmt: skip


def clip_features(encoder: "FrozenClip", images: list[Image.Image]) -> np.ndarray:
    """Return unit-norm CLIP image embeddings [N, E], through the encoder's own preprocessing."""
    pixels = torch.from_numpy(np.stack([encoder.preprocess(image) for image in images]))
    return encoder.encode_image(pixels).cpu().numpy()


def network_features(
    network: torch.nn.Module,
    prepare: Callable[[Image.Image], np.ndarray],
    images: list[Image.Image],
) -> np.ndarray:
    """Return the features [N, D] of a published network; `prepare` maps an RGB image to [3, H, W]
    in [0, 255].

    Images are stretched to the network's square whatever their shape, so a set has one size, as in
    torch-fidelity: cropping others is the user's choice, and part of the number.
    """
    pixels = torch.from_numpy(np.stack([prepare(image) for image in images]))
    device = next(network.parameters()).device
    return network(pixels.to(device)).float().cpu().numpy()


def _plain(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def _clean(image: Image.Image) -> np.ndarray:
    """Resize each channel in float, as clean-fid does: no rounding to 8 bits afterwards."""
    side = (INCEPTION_SIDE, INCEPTION_SIDE)
    planes = np.asarray(image, np.float32).transpose(2, 0, 1)
    bicubic = Image.Resampling.BICUBIC
    resized = [np.asarray(Image.fromarray(plane).resize(side, bicubic)) for plane in planes]
    return np.stack(resized).clip(0, 255)


def _stretched(side: int, image: Image.Image) -> np.ndarray:
    square = (side, side)
    resized = image if image.size == square else image.resize(square, Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1)


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


def extract(
    extractor: Extractor, images: Iterable[Image.Image], batch_size: int = 100
) -> np.ndarray:
    """Return the features [N, D] of all `images`; ValueError if there are none."""
    parts = [extractor(batch) for batch in in_batches(images, batch_size)]
    if not parts:
        raise ValueError("found no images, expected at least 2")
    return np.concatenate(parts)
