"""Sizes and costs of the paper's models, counted without memory, against the published figures."""

from typing import Any

import pytest
import torch

from cluster.base.cli import parse
from models.clip import VOCAB_SIZE, build_clip
from models.configs import ClipConfig
from models.costs import forward_macs, num_parameters, offloaded_bytes, state_bytes
from models.decoder import Condition, Decoder
from models.priors.base import PriorText
from models.upsampler import Upsampler
from training.config import PRESETS, DecoderRunConfig, PriorRunConfig
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
