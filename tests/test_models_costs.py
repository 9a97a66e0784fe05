"""Sizes and costs of the paper's models, counted without memory, against the published figures; and
what a step holds, against what one works out by hand."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from cluster.base.cli import parse
from models.clip import build_clip
from models.configs import (
    AutoregressivePriorConfig,
    ClipConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    RegressionPriorConfig,
    UNetConfig,
)
from models.costs import (
    forward_macs,
    forward_of,
    num_parameters,
    offloaded_bytes,
    peak_bytes,
    state_bytes,
    training_flops,
)
from models.decoder import Condition, Decoder
from models.priors.base import PriorText
from models.tokenizers import VOCAB_SIZE
from models.upsampler import Upsampler
from training.config import PRESETS, ClipRunConfig, DecoderRunConfig, PriorRunConfig
from training.tasks.clip import clip_model
from training.tasks.networks import cascade_sizes, prior_model

PAPER_CLIP = {"embed_dim": 1024, "text_width": 1024, "context_length": 77}


def paper_prior(preset: str) -> Any:
    config = parse(PriorRunConfig, presets=PRESETS / "prior", argv=["--preset", preset])
    with torch.device("meta"):
        return prior_model(config, PAPER_CLIP)


def caption() -> PriorText:
    with torch.device("meta"):
        words = torch.ones(1, 256, dtype=torch.long)
        return PriorText(text_embed=torch.zeros(1, 1024), text=words, token_mask=words > 0)


def test_the_papers_diffusion_prior_has_its_size_and_cost():
    prior, text = paper_prior("paper"), caption()
    assert num_parameters(prior) == pytest.approx(1.320e9, rel=0.05)
    with torch.device("meta"):
        x, t = torch.zeros(1, 1024), torch.zeros(1, dtype=torch.long)
        macs = forward_macs(lambda: prior.eval()(x, t, text, t.bool()))
    assert prior.length == 260 and macs == pytest.approx(321e9, rel=0.05)


def test_the_papers_autoregressive_prior_has_its_size_and_cost():
    """1.312 B of text encoder and .800 B of decoder; 316 and 318 G multiply-accumulates."""
    prior, text = paper_prior("paper_ar"), caption()
    assert num_parameters(prior) == pytest.approx(2.112e9, rel=0.05)
    assert num_parameters(prior.text_encoder) == pytest.approx(1.312e9, rel=0.05)
    assert prior.config.num_prefix + 1 + prior.config.num_codes == 384  # the printed context
    with torch.device("meta"):
        dot = torch.zeros(1, dtype=torch.long)
        codes = torch.zeros(1, 319, dtype=torch.long)
        whole = forward_macs(lambda: prior(text, dot, codes, dot.bool()))
        encoder = forward_macs(lambda: prior.text_encoder(text.text, text.token_mask))
    assert encoder == pytest.approx(316e9, rel=0.05)
    assert whole - encoder == pytest.approx(318e9, rel=0.05)


def stage(preset: str) -> Any:
    """A stage of the cascade at its preset's sizes, for the paper's CLIP or Karlo's."""
    config = parse(DecoderRunConfig, presets=PRESETS / "decoder", argv=["--preset", preset])
    embed, text = (768, 768) if "karlo" in preset else (1024, 1024)
    with torch.device("meta"):
        if config.stage == "base":
            return Decoder(
                config.base, image_size=config.image_size, embed_dim=embed, text_width=text,
                vocab_size=VOCAB_SIZE,
            )  # fmt: skip
        factor, crop = cascade_sizes(config)
        return Upsampler(config.up, factor=factor, crop_size=crop)


def test_the_papers_decoder_has_its_size_and_cost():
    """2.249 B and 794 G multiply-accumulates of U-Net, 1.312 B and 316 G of text transformer."""
    decoder = stage("paper")
    assert num_parameters(decoder) == pytest.approx(3.56e9, rel=0.05)
    assert num_parameters(decoder.text_encoder) == pytest.approx(1.312e9, rel=0.05)
    with torch.device("meta"):
        words, drop = torch.ones(1, 256, dtype=torch.long), torch.zeros(1, dtype=torch.bool)
        given = Condition(image_embed=torch.zeros(1, 1024), tokens=words, token_mask=words > 0)
        x, t = torch.zeros(1, 3, 64, 64), torch.zeros(1, dtype=torch.long)
        whole = forward_macs(lambda: decoder.eval()(x, t, given, drop, drop))
        encoder = forward_macs(lambda: decoder.text_encoder(words, words > 0))
    assert encoder == pytest.approx(316e9, rel=0.05)
    assert whole - encoder == pytest.approx(794e9, rel=0.05)


@pytest.mark.parametrize(
    ("preset", "parameters", "crop", "macs"),
    [("paper_up256", 0.730e9, 64, 266e9), ("paper_up1024", 0.282e9, 256, 620e9),
     ("karlo_up256", 0.730e9, 64, 266e9)],
)  # fmt: skip
def test_upsamplers_have_their_sizes_and_costs(preset, parameters, crop, macs):
    upsampler = stage(preset)
    assert num_parameters(upsampler) == pytest.approx(parameters, rel=0.05)
    with torch.device("meta"):
        x, low = torch.zeros(1, 3, crop, crop), torch.zeros(1, 3, crop // 4, crop // 4)
        t = torch.zeros(1, dtype=torch.long)
        found = forward_macs(lambda: upsampler.eval()(x, t, low))
    assert found == pytest.approx(macs, rel=0.05)


def test_karlos_decoder_has_its_size():
    assert num_parameters(stage("karlo")) == pytest.approx(0.891e9, rel=0.05)


def test_a_clip_of_the_papers_size_costs_what_it_says():
    """ViT-H/16 at 256 px beside a text tower of 24 x 1024."""
    config = ClipConfig(
        embed_dim=1024, image_size=256, patch_size=16, vision_width=1280, vision_depth=32,
        text_width=1024, text_depth=24, head_channels=64, context_length=77, vocab_size=VOCAB_SIZE,
    )  # fmt: skip
    with torch.device("meta"):
        clip = build_clip(config)
        image, words = torch.zeros(1, 3, 256, 256), torch.ones(1, 77, dtype=torch.long)
        vision = forward_macs(lambda: clip.encode_image(image))
        text = forward_macs(lambda: clip.encode_text(words))
    assert num_parameters(clip.visual) == pytest.approx(0.632e9, rel=0.05)
    assert num_parameters(clip) == pytest.approx(0.985e9, rel=0.05)
    assert vision == pytest.approx(167e9, rel=0.05) and text == pytest.approx(23.5e9, rel=0.05)


def test_multiplications_are_counted_as_one_would():
    with torch.device("meta"):
        layer, x = torch.nn.Linear(30, 7), torch.zeros(5, 11, 30)
        conv, image = torch.nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 16, 16)
    assert forward_macs(lambda: layer(x)) == 5 * 11 * 30 * 7
    assert forward_macs(lambda: conv(image)) == 2 * 16 * 16 * 8 * 3 * 9


def test_each_stage_shares_out_more_of_the_state_than_the_one_before():
    """20 bytes a parameter in all, or 28 where a rank has copies of its part of weights and
    gradients; stage 3 partitions all, and what is offloaded is not kept beside the weights."""
    with torch.device("meta"):
        model = torch.nn.Linear(100, 10, bias=False)
    sizes = [state_bytes(model, stage, 4) for stage in range(4)]
    assert sizes == [17_000, 13_000, 10_000, 5_000]
    assert state_bytes(model, 3, 1) == 20_000
    assert [state_bytes(model, stage, 4, offload=True) for stage in (2, 3)] == [4_000, 1_000]
    assert offloaded_bytes(model, 4) == 5_000


# -- a training step -------------------------------------------------------------------------------


def test_flops_are_six_a_multiplication_of_the_model_itself():
    """A residual block more adds six times its convolutions; nothing is allocated or changed."""
    dims = {"image_size": 8, "embed_dim": 8, "text_width": 12}

    def flops(blocks: int) -> float:
        unet = UNetConfig(channels=8, channel_mult=(1,), num_res_blocks=blocks, attn_resolutions=())
        return training_flops(Decoder(DecoderConfig(unet=unet, context_width=8), **dims))

    block = 2 * 64 * 8 * 8 * 9 + 32 * 16  # two convolutions, and the map of the condition
    up = block + 64 * 8 * 8 * 9 + 64 * 16 * 8  # on the way up with a skip joined, through a map
    assert flops(2) - flops(1) == 6 * (block + up)
    with pytest.raises(ValueError, match="costs: found a Linear, expected a model of this project"):
        training_flops(nn.Linear(1, 1))


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive", "regression"])
@pytest.mark.parametrize("own", [0, 16])
def test_a_prior_of_short_captions_has_a_cost(kind: Any, own: int):
    """Fewer words than are counted by default; more cost more."""
    sizes = {"embed_dim": 16, "text_width": 12, "context_length": 20}
    config = PriorRunConfig(
        prior=kind, diffusion=DiffusionPriorConfig(width=32, num_heads=2, text_tokens=own),
        autoregressive=AutoregressivePriorConfig(
            width=32, num_heads=2, text_tokens=own, text_width=32, text_heads=2, num_codes=4
        ),
        regression=RegressionPriorConfig(width=32, num_heads=2, text_tokens=own),
    )  # fmt: skip
    model = prior_model(config, sizes)
    assert training_flops(model) > training_flops(model, 4) > 0


def test_a_clip_has_a_cost():
    config = ClipRunConfig(model=ClipConfig())
    assert training_flops(clip_model(config)) > 6 * 1e7


# -- memory of a step, counted on the meta device -------------------------------------------------


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
