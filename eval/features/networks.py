"""The networks of published scores, built from verified tensors and arranged for inference."""

import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

INCEPTION_SIDE = 299  # px
INCEPTION_DIM = 2048
DINOV2_SIDE = 224  # px
DINOV2_MODEL = "vit_large_patch14_dinov2"  # of timm; Stein et al. 2023 take this size
DINOV2_OFFSET = 0.1  # that the original adds to a resampled grid's size, against rounding
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for DINOv2


def _first_of(error: RuntimeError) -> str:
    """Return the first tensor of which load_state_dict complains."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[min(1, len(lines) - 1)][:200]


class InceptionPool(nn.Module):
    """Pool-3 features: uint8 or float [B, 3, H, W] in [0, 255] to float32 [B, 2048].

    The network is torch-fidelity's, with these tensors; `where` names them in errors. Batch norms
    are folded into their convolutions and pixels stay together in memory (channels_last): features
    differ by 1e-6 of their size, in 0.6 of the time on a CPU.
    """

    def __init__(self, state: dict[str, Tensor], where: str) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import (
            BasicConv2d,
            FeatureExtractorInceptionV3,
        )

        ours = io.BytesIO()  # torch-fidelity unpickles what it is given: only what we pickled
        torch.save(state, ours)
        ours.seek(0)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=ours
            )
        except RuntimeError as error:
            raise ValueError(f"{where}: {_first_of(error)}; expected the FID's Inception") from None
        for layer in list(network.modules()):
            if isinstance(layer, BasicConv2d):
                layer.conv = fuse_conv_bn_eval(layer.conv, layer.bn)
                setattr(layer, "bn", nn.Identity())  # noqa: B010 - its annotation says BatchNorm2d
        self.network: Any = network.eval().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features of pixels of any size; both are described at the class."""
        x = pixels.float()                          # [B, 3, H, W]
        if x.shape[2:] != (INCEPTION_SIDE, INCEPTION_SIDE):
            x = tf1_bilinear(x, INCEPTION_SIDE)
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)
        network = self.network                      # [B, 3, 299, 299]
        for name in (
            "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1",
            "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
            "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d",
            "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c",
        ):  # fmt: skip
            x = getattr(network, name)(x)
        return network.AvgPool(x).flatten(1)        # [B, 2048]


def tf1_bilinear(x: Tensor, side: int) -> Tensor:
    """Resize float [B, C, H, W] as TensorFlow 1 did: out pixel i reads at i H / side.

    Its grids are not aligned (no half-pixel centres) and nothing is antialiased; the 2015 network's
    scores were all taken so. As torch-fidelity, but as two products with sparse-in-effect matrices
    rather than eight gathers.
    """
    rows, columns = (_tf1_matrix(size, side, x) for size in x.shape[2:])
    return rows @ (x @ columns.T)


def _tf1_matrix(size: int, side: int, like: Tensor) -> Tensor:
    """Return [side, size]: the weights of each input pixel in each output pixel."""
    place = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
    low = place.long()
    high = (low + 1).clamp(max=size - 1)
    share = place - low
    weights = torch.zeros(side, size)
    weights.scatter_add_(1, low[:, None], (1 - share)[:, None])
    weights.scatter_add_(1, high[:, None], share[:, None])
    return weights.to(like)


class DinoV2(nn.Module):
    """Class token of DINOv2: uint8 [B, 3, 224, 224] to float32 [B, 1024]."""

    def __init__(self, state: dict[str, Tensor], where: str, model: str = DINOV2_MODEL) -> None:
        super().__init__()
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn

        self.network: Any = timm.create_model(
            model, pretrained=False, num_classes=0, img_size=DINOV2_SIDE
        )
        tensors = dict(state)
        grid = self.network.patch_embed.grid_size[0]
        if "pos_embed" in tensors:
            tensors["pos_embed"] = resampled(tensors["pos_embed"], grid)
        try:
            self.network.load_state_dict(checkpoint_filter_fn(tensors, self.network))
        except RuntimeError as error:
            raise ValueError(f"{where}: {_first_of(error)}; expected {model}") from None
        self.network.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return the class tokens; shapes are given at the class."""
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (PIXEL_MEAN, PIXEL_STD)
        )
        x = (pixels.float() / 255 - mean) / std     # [B, 3, 224, 224]
        return self.network(x).float()              # [B, 1024]


def resampled(pos_embed: Tensor, grid: int) -> Tensor:
    """Resample position embeddings [1, 1 + G G, W] to a grid of another side as the original does:
    bicubic, not antialiased, by the scale (grid + 0.1) / G."""
    first, rest = pos_embed[:, :1], pos_embed[:, 1:]
    old = round(rest.shape[1] ** 0.5)
    if old == grid:
        return pos_embed
    plane = rest.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (grid + DINOV2_OFFSET) / old
    plane = F.interpolate(plane, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([first, plane.permute(0, 2, 3, 1).flatten(1, 2).to(first)], dim=1)
