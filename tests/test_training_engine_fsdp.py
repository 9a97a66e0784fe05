"""FSDP2 on U-Nets of both kinds, with parameters that have no rows, or fewer than ranks.

Two ranks, processes of this file, against the plain engine on both ranks' samples. Runs, resuming
and checkpoints are in test_training_engine_zero.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from _ranks import rank_main, run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.configs import UNetConfig
from models.networks.unet import UNet
from training.config import ClipRunConfig, TrainConfig
from training.engine.choices import zero_stage
from training.engine.engines import Engine, PlainEngine
from training.engine.fsdp import FsdpEngine

PLAIN = UNetConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
CASES: dict[str, tuple[UNetConfig, Any]] = {
    "adm": (PLAIN, "fp32"),
    "checkpointing": (UNetConfig(**{**vars(PLAIN), "checkpointing": True}), "fp32"),
    # its gains are scalars
    "magnitude_preserving": (UNetConfig(**{**vars(PLAIN), "magnitude_preserving": True}), "fp32"),
    "bf16": (PLAIN, "bf16"),
}
STEPS = 3


class Frozen(nn.Module):
    """A U-Net behind a layer norm, which reads fp32, and a layer that is not trained."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList([nn.LayerNorm(8)])
        self.frozen = nn.Conv2d(3, 3, 1).requires_grad_(False)
        self.unet = UNet(config, image_size=8, in_channels=3, out_channels=3)
        for parameter in self.unet.parameters():  # zero at the start, as they are, hide mistakes
            nn.init.normal_(parameter, std=0.1)


def loss(model: Any, batch: Any) -> dict[str, Tensor]:
    x, t = batch
    h = model.unet(model.frozen(model.norms[0](x)), t)
    return {"loss": (h - x).square().mean((1, 2, 3))}


def samples(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)


def config_of(precision: Any, **options: Any) -> TrainConfig:
    return TrainConfig.of(
        global_batch_size=4, precision=precision, learning_rate=1e-3, grad_clip=0.5, **options
    )


def trained(engine: Engine, rows: slice) -> tuple[dict[str, Tensor], list[float]]:
    """What a rank owns after some steps, and their norms."""
    norms = []
    for step in range(STEPS):
        batch: Any = tuple(x[rows] for x in samples(step))
        engine.backward(engine.losses(batch)["loss"].mean())
        norms.append(float(engine.step(1.0)))
    return {f"{f.name}/{f.offset}": f.master.clone() for f in engine.fragments()}, norms


def act(root: Path, calls: list) -> None:
    for name in calls:
        network, precision = CASES[name]
        config = config_of(precision, num_workers=2, engine="fsdp2")
        engine = FsdpEngine(Frozen(network), loss, config, torch.device("cpu"))
        rank = engine.rank
        found, norms = trained(engine, slice(2 * rank, 2 * rank + 2))
        save_file({**found, "norms": torch.tensor(norms)}, str(root / f"{name}_{rank}.safetensors"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fsdp")
    run_ranks(__file__, root, 2, list(CASES))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_network_steps_as_in_one_process(name: str, root: Path):
    network, precision = CASES[name]
    config = config_of(precision, num_workers=0)
    engine = PlainEngine(Frozen(network), loss, config, torch.device("cpu"))
    expected, norms = trained(engine, slice(0, 4))
    parts: dict[str, dict[int, Tensor]] = {}
    for rank in (0, 1):
        tensors = load_file(str(root / f"{name}_{rank}.safetensors"))
        rel = 1e-4 if precision == "fp32" else 2e-2
        assert tensors.pop("norms").tolist() == pytest.approx(norms, rel=rel)
        for key, value in tensors.items():
            parameter, _, offset = key.partition("/")
            assert int(offset) not in parts.setdefault(parameter, {})
            parts[parameter][int(offset)] = value
    assert len(parts) == len(expected) and not any("frozen" in key for key in parts)
    # a step of Adam is 1e-3, in whichever direction, where the gradient is about nothing
    atol = 2e-5 if precision == "fp32" else 2e-3 * STEPS
    for key, value in expected.items():
        found = torch.cat([x for _, x in sorted(parts[key.partition("/")[0]].items())])
        torch.testing.assert_close(found, value, atol=atol, rtol=0)
        if precision != "fp32":
            assert (found - value).abs().mean() < 1e-3


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_workers": 0}, "train.engine: found fsdp2 with num_workers 0, expected num_workers"),
        ({"zero_stage": 2}, "train.zero_stage: found 2 with engine fsdp2, expected null"),
        ({"offload": "cpu"}, "train.offload: found cpu with engine fsdp2, expected none"),
        ({"optimizer": "muon"}, "train.optimizer: found muon with engine fsdp2, expected adamw"),
    ],
)
def test_what_fsdp2_does_not_do_is_refused(options: dict, problem: str):
    with pytest.raises(ValueError, match=f"^{problem}"):
        TrainConfig.of(**{"num_workers": 2, "engine": "fsdp2", **options})


def test_sharpness_aware_minimisation_and_a_plain_engine_of_several_are_refused():
    with pytest.raises(ValueError, match=r"^train.engine: found fsdp2 with sam_rho 0.1, expected"):
        ClipRunConfig(sam_rho=0.1, train=TrainConfig.of(num_workers=2, engine="fsdp2"))
    with pytest.raises(ValueError, match="^train.engine: found plain with num_workers 2"):
        TrainConfig.of(num_workers=2, engine="plain")


@pytest.mark.parametrize(
    ("parameters", "device", "options", "stage"),
    [
        (10**9 - 1, "cuda", {"num_workers": 2}, 1),
        (10**9, "cuda", {"num_workers": 2}, 2),
        (10**9, "cuda", {"num_workers": 1}, 0),
        (10**9, "cpu", {"num_workers": 2}, 0),
        (10**9, "cuda", {"num_workers": 2, "optimizer": "muon"}, 0),
        (10**6, "cpu", {"num_workers": 1, "offload": "cpu"}, 2),
        (10**6, "cuda", {"num_workers": 2, "zero_stage": 3}, 3),
    ],
)
def test_the_stage_of_zero_is_by_size(parameters: int, device: str, options: dict, stage: int):
    assert zero_stage(TrainConfig.of(**options), parameters, device) == stage


if __name__ == "__main__":
    rank_main(act)
