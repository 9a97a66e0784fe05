"""Sizes and costs of the paper's models, counted without memory, against the published figures."""

from typing import Any

import pytest
import torch

from cluster.cli import parse
from models.clip import VOCAB_SIZE, build_clip
from models.configs import ClipConfig
from models.flops import forward_macs, num_parameters
from models.priors import PriorText
from training.config import PRESETS, PriorRunConfig
from training.prior_job import prior_model

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
