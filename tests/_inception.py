"""Weights of the Inception's shape, drawn at random, so that its whole path runs without the
published ones."""

import hashlib
import io
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def write_inception(path: Path) -> tuple[Path, str]:
    """Write such a file; return it with its sha256."""
    torch.manual_seed(0)
    with (
        mock.patch.object(torch, "load", lambda *a, **k: {}),
        mock.patch.object(nn.Module, "load_state_dict", lambda self, state: None),
    ):
        network: Any = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path="none"
        )
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            layer.weight.data.uniform_(0.8, 1.2)
            layer.bias.data.normal_(std=0.1)
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.8, 1.2)
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    path.write_bytes(buffer.getvalue())
    return path, hashlib.sha256(buffer.getvalue()).hexdigest()
