"""A plan's arithmetic against published sizes, against other counters, and against real runs."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cluster.plan import main
from cluster.planning import efficiency as eff
from cluster.planning import published as runs_of_others
from cluster.planning.counts import build_encoder, build_model
from cluster.planning.devices import GPUS
from cluster.planning.published import validated
from cluster.planning.report import DOWNLOAD_A_VCPU, IMAGE_BYTES_256
from cluster.planning.request import PlanRequest
from cluster.planning.stages import Stage, build_stages, image_flops
from models.configs import UNetConfig
from models.costs import forward_macs, forward_of, num_parameters
from models.networks.unet import UNet

GIB, MIB, DAY = 2**30, 2**20, 86_400.0
SIZE, RUN = 0.05, 0.25  # how near to a size, and to a run's time, a plan comes


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    """The paper's stages by name, the autoregressive prior as "ar"."""
    _, stages = build_stages(PlanRequest(chain="paper", train_clip=True))
    _, others = build_stages(PlanRequest(chain="paper", prior="autoregressive"))
    return {stage.name: stage for stage in stages} | {"ar": others[0]}


# -- sizes: the paper's, counted by others (unclip facts, A.10 and E.3) ----------------------------


def test_the_papers_parameters(stages):
    counts = {"base": 3.561e9, "prior": 1.320e9, "ar": 2.112e9, "up256": 0.730e9,
              "up1024": 0.282e9, "clip": 0.985e9}  # fmt: skip
    for name, count in counts.items():
        assert stages[name].parameters == pytest.approx(count, rel=SIZE), name


def test_the_papers_flops(stages):
    """Of training on a sample, of all training, and of sampling one image of 1024 px."""
    trained = {"base": 6.66e12, "prior": 1.92e12, "ar": 3.80e12, "up256": 1.59e12,
               "up1024": 3.72e12, "clip": 1.14e12}  # fmt: skip
    for name, flops in trained.items():
        assert stages[name].flops() == pytest.approx(flops, rel=SIZE), name
    assert stages["clip"].flops(64) == pytest.approx(2.28e12, rel=SIZE)  # SAM, 64 a worker
    for name, macs in (("up256", 4249e9), ("up1024", 9922e9)):
        assert stages[name].counts["image_macs"] == pytest.approx(macs, rel=SIZE), name
    totals = {"prior": 4.7e21, "ar": 1.56e22, "base": 1.09e22, "up256": 1.6e21, "up1024": 1.9e21}
    for name, flops in totals.items():
        assert stages[name].flops() * stages[name].samples == pytest.approx(flops, rel=SIZE), name
    chain = [stages[name] for name in ("prior", "base", "up256", "up1024")]
    found = image_flops("paper", chain)
    expected = {"prior": 82e12, "base": 794e12, "up256": 229e12, "up1024": 298e12}
    assert found == pytest.approx(expected, rel=SIZE)
    assert sum(found.values()) == pytest.approx(1.4e15, rel=SIZE)


def test_the_papers_scale(stages):
    """State by ZeRO stage with bf16 weights and gradients, 20 bytes a parameter on 64 GPUs
    (Rajbhandari et al. 2020, section 3.1, and 4 of EMA); GPU-hours and days."""
    states = {
        "base": (66.0, 14.1, 7.6, 1.0), "prior": (24.6, 5.2, 2.8, 0.4),
        "ar": (39.3, 8.4, 4.5, 0.6), "up256": (13.6, 2.9), "up1024": (5.3, 1.1),
    }  # fmt: skip
    for name, published in states.items():
        for zero, gib in enumerate(published):
            shared = (0, 16, 18, 20)[zero]
            found = stages[name].parameters * ((20 - shared) + shared / 64) / GIB
            assert round(found, 1) == pytest.approx(gib, rel=SIZE), (name, zero)
    hours = {
        "base": (15.2e3, 8.7e3), "prior": (6.6e3, 3.8e3), "ar": (21.6e3, 12.4e3),
        "up256": (2.3e3, 1.3e3), "up1024": (2.6e3, 1.5e3),
    }  # fmt: skip
    work = {name: stages[name].flops() * stages[name].samples for name in hours}
    for column, (tflops, days) in enumerate(((200, 17), (350, 10))):
        for name, published in hours.items():
            found = work[name] / (tflops * 1e12) / 3600
            assert found == pytest.approx(published[column], rel=SIZE), name
        total = sum(work.values()) - work["ar"]
        assert total / (64 * tflops * 1e12) / DAY == pytest.approx(days, rel=SIZE)


@pytest.mark.slow
def test_the_papers_activations(stages):
    """What convolutions, norms and attention projections put out for one sample, in bf16 (E.3). A
    step keeps more, which `activation_bytes` counts."""
    sizes = {"embed_dim": 1024, "text_width": 1024, "context_length": 77}
    for name, mib in (("base", 425), ("up256", 199), ("up1024", 1.14 * 1024)):
        model, total = build_model(stages[name].config, sizes).eval(), 0

        def count(_: Any, __: Any, out: torch.Tensor) -> None:
            nonlocal total
            total += 2 * out.numel()

        for layer, module in model.unet.named_modules():
            projects = layer.endswith(("attention.qkv", "attention.out"))
            if isinstance(module, (nn.Conv2d, nn.GroupNorm)) or projects:
                module.register_forward_hook(count)
        with torch.device("meta"), torch.no_grad():
            forward_of(model, stages[name].caption_tokens)()
        assert total / MIB == pytest.approx(mib, rel=SIZE), name


# -- runs: times that others measured --------------------------------------------------------------

ADM_64 = 109.6568e9  # forward multiply-accumulates of ADM's ImageNet-64 network, as our U-Net
CLIP_B32 = 4.4088e9 + 2.9798e9
SD2_PARAMETERS, ADM_PARAMETERS, G14_PARAMETERS = 865_910_724, 295_131_267, 1_366_678_273


def test_a_plan_is_within_a_quarter_of_every_published_run():
    """MLPerf's on 8, 64 and 1,024 GPUs among them; one that chose an efficiency, exactly."""
    runs = validated()
    mlperf = [(run.num_gpus, run.published) for run in runs if "MLPerf" in run.name]
    assert mlperf == [(8, 1030.2), (64, 7059.2), (1024, 49_868.8)]
    for run in runs:
        assert abs(run.error) <= RUN and not run.is_off, run
        assert not run.chosen or run.error == pytest.approx(0, abs=1e-3), run
    tests = [run for run in runs if not run.chosen]
    assert len(tests) >= 19 and any(run.num_gpus == 1024 for run in tests)


def test_validate_prints_every_run_and_says_which_is_off(capsys, monkeypatch):
    assert main(PlanRequest(validate=True)) == 0
    shown = capsys.readouterr().out
    assert "MLPerf v4.0, 1,024 x H100" in shown and "49,869" in shown and "off by" not in shown
    assert "mlcommons/training_results_v4.0" in shown
    slow = [dataclasses.replace(run, planned=0.7 * run.planned) for run in validated()]
    monkeypatch.setattr(runs_of_others, "validated", lambda: slow)
    assert main(PlanRequest(validate=True)) == 1
    assert "off by more than 25%" in capsys.readouterr().out


def test_stable_diffusion_2_trains_for_as_many_days_as_published():
    """mosaicml/diffusion, README: both resolutions, one after the other."""
    days = {8: 81.33, 16: 40.42, 32: 20.06, 64: 10.14, 128: 5.51}
    rates = {(run.name, run.num_gpus): run.planned for run in validated()}
    for gpus, expected in days.items():
        small, large = (rates[f"Stable Diffusion 2, {size} px, A100", gpus] for size in (256, 512))
        found = (1_126_400_000 / small + 1_740_800_000 / large) / DAY
        assert found == pytest.approx(expected, rel=RUN), gpus


def test_other_figures():
    """clip-retrieval's L/14 on an A100; img2dataset's 100 machines; LAION-400M's announcement of
    10 TB."""
    speed = GPUS["a100-80"].peak_tflops * 1e12 * eff.PUBLISHED["encoder", "ampere"].mfu
    assert speed / (2 * eff.CLIP_L14) == pytest.approx(312.0, rel=1e-3)
    assert speed / (2 * CLIP_B32) > 2500.0 * 1.25  # decoding bounds B/32: no description of it
    assert pytest.approx(200e3 / 9600, rel=1e-3) == DOWNLOAD_A_VCPU
    assert pytest.approx(10e12 / 413e6, rel=RUN) == IMAGE_BYTES_256


# -- the constants, counted again ------------------------------------------------------------------


@pytest.mark.slow
def test_stable_diffusions_network_multiplies_what_is_stated():
    """By diffusers' own network of its published sizes."""
    from diffusers import UNet2DConditionModel  # type: ignore[attr-defined]

    sizes: dict[str, Any] = {
        "sample_size": 64, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
        "use_linear_projection": True, "block_out_channels": (320, 640, 1280, 1280),
    }  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sizes).eval()
        assert num_parameters(unet) == SD2_PARAMETERS
        assert len(list(unet.parameters())) == eff.SD2_TENSORS
        for side, macs in ((32, eff.SD2_UNET_256), (64, eff.SD2_UNET_512)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                unet(torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, 77, 1024))
            assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "macs"),
    [("ViT-g-14", eff.CLIP_G14), ("ViT-L-14", eff.CLIP_L14), ("ViT-B-32", CLIP_B32)],
)
def test_clips_multiply_what_is_stated(name: str, macs: float):
    clip = build_encoder(name).eval()
    with torch.device("meta"):
        image, words = torch.zeros(1, 3, 224, 224), torch.ones(1, 77, dtype=torch.long)
        found = forward_macs(lambda: (clip.encode_image(image), clip.encode_text(words)))
    assert found == pytest.approx(macs, rel=1e-3)
    if name == "ViT-g-14":
        assert num_parameters(clip) == G14_PARAMETERS


def test_adms_network_multiplies_what_is_stated():
    """ImageNet 64: 296 M parameters published (Dhariwal & Nichol 2021, table 4)."""
    sizes = UNetConfig(
        channels=192, num_res_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.1
    )
    with torch.device("meta"):
        unet = UNet(sizes, image_size=64, in_channels=3, out_channels=3).eval()
        x, t = torch.zeros(1, 3, 64, 64), torch.zeros(1, dtype=torch.long)
        found = forward_macs(lambda: unet(x, t))
    assert num_parameters(unet) == ADM_PARAMETERS == pytest.approx(296e6, rel=0.01)
    assert found == pytest.approx(ADM_64, rel=1e-3)


def test_no_run_has_an_efficiency_of_its_own():
    """One value for each kind of network and generation, and nothing else decides a rate."""
    kinds = {network for network, _ in eff.PUBLISHED}
    assert kinds == {"transformer", "unet", "unet_channels_last", "encoder"}
    generations = {generation for _, generation in eff.PUBLISHED}
    assert len(eff.PUBLISHED) == len(kinds) * len(generations) == 20
    assert all(0 < each.mfu <= 0.5 and each.source for each in eff.PUBLISHED.values())
