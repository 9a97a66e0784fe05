"""What a step holds, counted on the meta device, against what one works out by hand."""

import dataclasses

import pytest
import torch
from torch import nn

from models.clip import build_clip
from models.configs import ClipConfig, DecoderConfig, UNetConfig
from models.costs import forward_of, peak_bytes
from models.decoder import Decoder


def held(layer: nn.Module, *shape: int) -> int:
    with torch.device("meta"):
        x = torch.zeros(*shape)
    return peak_bytes(layer, lambda: layer(x))


def on_meta(build) -> nn.Module:
    with torch.device("meta"):
        return build().train()


def test_a_chain_of_layers_keeps_its_inputs_in_bf16():
    """Linear layers under autocast keep bf16 inputs and bf16 copies of their weights. The most
    there is: all of these, an output, and what the first step of the backward pass makes."""
    width, depth = 256, 12
    chain = on_meta(lambda: nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))))
    one, two = (held(chain, 1024 * n, width) for n in (1, 2))
    each = 1024 * width
    kept = depth * 2 * each  # inputs of all layers, the first one's cast as well
    # beside them the loss's own: the fp32 output, its gradient, and a gradient under way
    assert kept < two - one < kept + 3 * 4 * each
    copies = depth * 2 * width * width
    assert copies <= 2 * one - two + 4 * width * width < 2 * copies


def test_norms_keep_the_fp32_casts_of_their_inputs():
    plain = on_meta(lambda: nn.Sequential(*(nn.Conv2d(64, 64, 1) for _ in range(8))))
    normed = on_meta(
        lambda: nn.Sequential(
            *(nn.Sequential(nn.GroupNorm(8, 64), nn.Conv2d(64, 64, 1)) for _ in range(8))
        )
    )
    elements = 16 * 64 * 32 * 32
    more = held(normed, 16, 64, 32, 32) - held(plain, 16, 64, 32, 32)
    # each norm but the first, whose input is fp32 as it is, keeps a cast of its bf16 input
    assert more == pytest.approx(7 * 4 * elements, rel=0.01)


def small(checkpointing: bool) -> Decoder:
    unet = UNetConfig(
        channels=32, channel_mult=(1,), num_res_blocks=2, attn_resolutions=(16,),
        head_channels=16, checkpointing=checkpointing,
    )  # fmt: skip
    config = DecoderConfig(unet=unet, context_width=32)
    with torch.device("meta"):
        return Decoder(config, image_size=16, embed_dim=16, text_width=16).train()


def test_memory_is_a_line_in_the_batch_that_checkpointing_flattens():
    slopes = {}
    for checkpointing in (False, True):
        model = small(checkpointing)
        points = {n: peak_bytes(model, forward_of(model, 8, n)) for n in (8, 16, 32)}
        first, second = points[16] - points[8], points[32] - points[16]
        assert second == pytest.approx(2 * first, rel=0.02)
        slopes[checkpointing] = first / 8
    assert slopes[True] < 0.5 * slopes[False]


def test_attention_keeps_no_table_of_all_pairs():
    """Twice the cells a side are four times the memory, where a table would make it sixteen."""
    unet = UNetConfig(channels=16, channel_mult=(1,), num_res_blocks=1, head_channels=16)
    found = []
    for side in (16, 32):
        config = DecoderConfig(
            unet=dataclasses.replace(unet, attn_resolutions=(side,)), context_width=16
        )
        with torch.device("meta"):
            model = Decoder(config, image_size=side, embed_dim=16, text_width=16).train()
        found.append(peak_bytes(model, forward_of(model, 8, 8)))
    assert found[1] < 4.5 * found[0]


def test_a_clips_own_attention_is_counted_as_ours():
    config = ClipConfig(vision_depth=6, text_depth=1, image_size=64, patch_size=4)
    clip = on_meta(lambda: build_clip(config))
    one, two = (peak_bytes(clip, forward_of(clip, 8, n)) for n in (4, 8))
    tokens, width = 1 + 16 * 16, config.vision_width
    # a pre-norm block keeps some 30 to 60 bytes a token and channel; a table of all pairs in fp32
    # would be 4 * 257 * heads more, eight times as much
    assert 20 < (two - one) / 4 / (tokens * width * config.vision_depth) < 80


def test_gradients_are_left_as_they_were():
    layer = on_meta(lambda: nn.Linear(4, 4))
    held(layer, 8, 4)
    assert all(parameter.grad is None for parameter in layer.parameters())
