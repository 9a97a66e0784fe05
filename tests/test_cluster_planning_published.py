"""A plan's arithmetic against published sizes, against others' counters, and against real runs."""

from typing import Any

import open_clip
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.planning import efficiency, published
from cluster.planning.published import Row
from models.configs import UNetConfig
from models.costs import forward_macs, num_parameters
from models.networks.unet import UNet


@pytest.fixture(scope="module")
def stages():
    return published.paper_stages()


def outside(rows: list[Row]) -> list[str]:
    return [f"{row.what}: {row.error:+.1%}" for row in rows if not row.holds]


def test_the_papers_sizes_are_reproduced_within_five_percent(stages):
    """Parameters, FLOPs a sample, of the whole training and of an image: A.10."""
    rows = list(published.sizes(stages))
    assert len(rows) == 28 and {row.limit for row in rows} == {0.05}
    assert outside(rows) == []


def test_the_papers_scale_is_reproduced_within_five_percent(stages):
    """Memory by ZeRO stage, activations, GPU-hours and days: E.3."""
    rows = list(published.scale(stages))
    assert len(rows) == 31 and {row.limit for row in rows} == {0.05}
    assert outside(rows) == []


def test_times_of_real_runs_are_within_a_quarter():
    """Those that efficiencies were chosen by are exact; those that test them are others."""
    rows = list(published.runs())
    roles = {role: [row for row in rows if row.role == role] for role in ("chosen", "tests")}
    assert all(row.error == pytest.approx(0, abs=1e-3) for row in roles["chosen"])
    assert len(roles["chosen"]) == 5 and len(roles["tests"]) >= 20
    assert outside(roles["tests"]) == []


def test_what_the_model_does_not_describe_says_why():
    apart = [row for row in published.runs() if row.role == "apart"]
    assert len(apart) == 2 and all(row.why and not row.holds for row in apart)


def test_a_comparison_can_fail():
    row = Row(what="x", ours=1.3, published=1.0, unit="s", source="", role="tests")
    assert not row.holds and row.error == pytest.approx(0.3)
    assert not Row(what="x", ours=1.06, published=1.0, unit="", source="").holds
    assert Row(what="x", ours=1.04, published=1.0, unit="", source="").holds


# -- the constants, counted again ------------------------------------------------------------------


def test_stable_diffusions_network_multiplies_what_is_said():
    """By diffusers' own network of its published sizes."""
    from diffusers import UNet2DConditionModel  # type: ignore[attr-defined]

    sizes: dict[str, Any] = {
        "sample_size": 64, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
        "use_linear_projection": True, "block_out_channels": (320, 640, 1280, 1280),
    }  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sizes).eval()
        assert num_parameters(unet) == published.SD2_PARAMETERS
        for side, macs in ((32, efficiency.SD2_UNET_256), (64, published.SD2_UNET_512)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                unet(torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, 77, 1024))
            assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "macs"),
    [("ViT-g-14", efficiency.CLIP_G14), ("ViT-L-14", efficiency.CLIP_L14),
     ("ViT-B-32", published.CLIP_B32)],
)  # fmt: skip
def test_clips_multiply_what_is_said(name: str, macs: float):
    sizes = open_clip.get_model_config(name)
    assert sizes is not None
    with torch.device("meta"):
        vision = open_clip.CLIPVisionCfg(**sizes["vision_cfg"])
        text = open_clip.CLIPTextCfg(**sizes["text_cfg"])
        clip = open_clip.CLIP(sizes["embed_dim"], vision, text).eval()
        image, words = torch.zeros(1, 3, 224, 224), torch.ones(1, 77, dtype=torch.long)
        found = forward_macs(lambda: (clip.encode_image(image), clip.encode_text(words)))
    assert found == pytest.approx(macs, rel=1e-3)
    if name == "ViT-g-14":
        assert num_parameters(clip) == published.G14_PARAMETERS


def test_adms_network_multiplies_what_is_said():
    """ImageNet 64: 296 M parameters published (Dhariwal & Nichol 2021, table 4)."""
    sizes = UNetConfig(
        channels=192, num_res_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.1
    )
    with torch.device("meta"):
        unet = UNet(sizes, image_size=64, in_channels=3, out_channels=3).eval()
        x, t = torch.zeros(1, 3, 64, 64), torch.zeros(1, dtype=torch.long)
        found = forward_macs(lambda: unet(x, t))
    assert num_parameters(unet) == published.ADM_PARAMETERS == pytest.approx(296e6, rel=0.01)
    assert found == pytest.approx(published.ADM_64, rel=1e-3)


def test_no_run_has_an_efficiency_of_its_own():
    """One value for each kind of network and generation, and nothing else decides a rate."""
    kinds = {network for network, _ in efficiency.PUBLISHED}
    assert kinds == {"transformer", "unet", "unet_channels_last", "encoder"}
    generations = {generation for _, generation in efficiency.PUBLISHED}
    assert len(efficiency.PUBLISHED) == len(kinds) * len(generations) == 20
    assert all(0 < one.mfu <= 0.5 and one.source for one in efficiency.PUBLISHED.values())
