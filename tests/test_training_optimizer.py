"""The optimizer against torch's AdamW and linear algebra, and the learning rate's shape."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from models.clip import build_clip, is_clip_outer
from models.configs import AutoregressivePriorConfig, ClipConfig, UNetConfig
from models.networks.unet import UNet
from training.checkpoints import checkpointer
from training.config import PriorRunConfig, TrainConfig
from training.engine.optimizer import (
    build_optimizer,
    learning_rate_ratio,
    orthogonalise,
    set_learning_rate,
)
from training.tasks.networks import prior_model


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(24, 4))


def gradients(model: nn.Module, step: int) -> None:
    rng = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=rng)


def trained(config: TrainConfig, steps: int = 5) -> nn.Module:
    model = network()
    optimizer = build_optimizer(model, config)
    optimizer.prepare()
    for step in range(steps):
        gradients(model, step)
        set_learning_rate(optimizer.param_groups, 1.0)
        optimizer.step()
    return model


def test_adamw_is_torchs_adamw():
    config = TrainConfig.of(learning_rate=3e-3, beta2=0.95, weight_decay=0.1)
    found, expected = trained(config), network()
    matrices = [p for p in expected.parameters() if p.ndim == 2]
    vectors = [p for p in expected.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    for step in range(5):
        gradients(expected, step)
        oracle.step()
    for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 16), (32, 8), (8, 32), (3, 12, 20)])
def test_orthogonalising_leaves_singular_values_near_one(shape: tuple[int, ...], dtype):
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    found = orthogonalise(update, dtype=dtype)
    values = torch.linalg.svdvals(found.float())
    assert found.shape == update.shape and values.min() > 0.5 and values.max() < 1.3
    u, _, vh = torch.linalg.svd(update, full_matrices=False)
    cosine = (
        (found * (u @ vh)).sum((-2, -1)) / found.norm(dim=(-2, -1)) / (u @ vh).norm(dim=(-2, -1))
    )
    assert cosine.min() > 0.95  # the same directions


def test_muon_moves_matrices_by_its_own_rate_and_vectors_by_adamws():
    config = TrainConfig.of(optimizer="muon", matrix_learning_rate=0.01, learning_rate=3e-3)
    start, found = network(), trained(config, 1)
    adamw = trained(TrainConfig.of(learning_rate=3e-3), 1)
    for (name, before), after, other in zip(
        start.named_parameters(), found.parameters(), adamw.parameters(), strict=True
    ):
        if before.ndim == 1:
            torch.testing.assert_close(after, other)
            continue
        tall = max(1, before.shape[0] / before.shape[1]) ** 0.5
        values = torch.linalg.svdvals((before - after) / (0.01 * tall))
        assert values.min() > 0.5 and values.max() < 1.3, name


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive", "regression"])
def test_muon_leaves_tables_and_outer_layers_of_priors_alone(kind: Any):
    """What reads or gives codes, embeddings or text, and every table, is AdamW's."""
    sizes = {"embed_dim": 16, "text_width": 12, "context_length": 5}
    config = PriorRunConfig(
        prior=kind, autoregressive=AutoregressivePriorConfig(width=32, num_heads=2)
    )
    model = prior_model(config, sizes)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, TrainConfig.of(optimizer="muon")).param_groups
    hidden = {names[p].split(".")[0] for p in groups[0]["params"]}
    assert hidden <= {"blocks", "pool", "component_in"}, hidden


def test_muon_leaves_tables_and_outer_layers_of_a_clip_alone():
    """Both projections into the joint space, the patches, the places and the words are AdamW's."""
    clip = build_clip(ClipConfig(embed_dim=32, vision_depth=1, text_depth=1, vocab_size=512))
    names = {parameter: name for name, parameter in clip.named_parameters()}
    groups = build_optimizer(clip, TrainConfig.of(optimizer="muon")).param_groups
    hidden, others = ({names[p] for p in group["params"]} for group in groups)
    assert all("resblocks.0" in name for name in hidden) and len(hidden) == 2 * 4
    outer = {"text_projection", "visual.proj", "visual.conv1.weight", "token_embedding.weight"}
    assert outer | {"positional_embedding", "visual.positional_embedding"} <= others


@pytest.mark.parametrize(("name", "is_outer"), [
    ("visual.layer1.0.conv1.weight", True), ("visual.attnpool.positional_embedding", True),
    ("visual.trunk.patch_embed.proj.weight", True), ("visual.layer1.0.conv2.weight", False),
    ("transformer.resblocks.0.mlp.c_fc.weight", False),
])  # fmt: skip
def test_every_tower_of_open_clip_has_outer_layers(name: str, is_outer: bool):
    """Runs that Muon began continue with the same groups."""
    assert is_clip_outer(name) is is_outer


def test_a_matrix_that_was_muons_begins_with_its_momentum_squared():
    """A checkpoint from before a parameter was AdamW's has no second moment of it."""
    stored = {"master/w": 3.0, "exp_avg/w": -2.0}
    state = {"exp_avg_sq": torch.zeros(2), "exp_avg": torch.zeros(2)}
    fragment: Any = SimpleNamespace(name="w", offset=0, master=torch.zeros(2), state=state)
    held: Any = SimpleNamespace(
        folder="run", holds=stored.__contains__,
        read=lambda name, offset, target: target.fill_(stored[name]),
    )  # fmt: skip
    checkpointer.restore_fragment(held, fragment, {})
    assert fragment.master.tolist() == [3, 3] and state["exp_avg"].tolist() == [-2, -2]
    assert state["exp_avg_sq"].tolist() == [4, 4]


def test_muon_takes_the_same_matrices_of_every_kind_of_unet():
    """Gains are AdamW's, as are the first, the last and the timestep's layers; both groups step,
    channels-last too."""
    found = []
    for mine in (False, True):
        config = UNetConfig(
            channels=8, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,),
            head_channels=8, magnitude_preserving=mine, channels_last=True,
        )  # fmt: skip
        torch.manual_seed(0)
        unet = UNet(config, image_size=8, in_channels=3, out_channels=3, context=8)
        names = {parameter: name for name, parameter in unet.named_parameters()}
        optimizer = build_optimizer(unet, TrainConfig.of(optimizer="muon"))
        optimizer.prepare()
        found.append({names[p] for p in optimizer.param_groups[0]["params"]})
        assert not {name for name in found[-1] if name.startswith(("time_in", "conv_", "norm_"))}
        before = {name: p.detach().clone() for p, name in names.items()}
        set_learning_rate(optimizer.param_groups, 1.0)
        x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 900])
        mask = torch.ones(2, 3, dtype=torch.bool)
        for _ in range(3):  # what starts at zero keeps the rest still at first
            out = unet(x, t, tokens=torch.randn(2, 3, 8), token_mask=mask)
            optimizer.zero_grad()
            (out - 1).square().mean().backward()
            optimizer.step()
        assert [n for p, n in names.items() if torch.equal(p, before[n])] == []
    assert found[0] == found[1] and len(found[0]) > 20


def test_a_parameter_without_gradient_stays():
    model = network()
    optimizer = build_optimizer(model, TrainConfig.of(weight_decay=0.5))
    optimizer.prepare()
    set_learning_rate(optimizer.param_groups, 1.0)
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_where_the_gradient_is_not_finite_nothing_moves(kind: Any):
    """Neither weights nor moments nor the count of steps, and no host looks; else it is a step."""
    config = TrainConfig.of(optimizer=kind, weight_decay=0.1, beta2=0.95)
    model, again = network(), network()
    ours, theirs = build_optimizer(model, config), build_optimizer(again, config)
    for step in range(4):
        gradients(model, step)
        gradients(again, step)
        set_learning_rate(ours.param_groups, 1.0)
        set_learning_rate(theirs.param_groups, 1.0)
        if step == 2:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad[0] = math.nan
            ours.found_inf = torch.ones(())
            ours.step()
            continue
        ours.found_inf = torch.zeros(())
        ours.step()
        theirs.step()
    assert ours.num_steps == theirs.num_steps == 3
    for mine, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other)
        states = ours.state[mine], theirs.state[other]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_state_is_there_before_the_first_step_and_moves_nothing():
    """A checkpoint is read into it, so it must be what the first step would have made."""
    for optimizer_name in ("adamw", "muon"):
        config = TrainConfig.of(optimizer=optimizer_name)
        prepared, lazy = (build_optimizer(network(), config) for _ in range(2))
        prepared.prepare()
        for optimizer in (prepared, lazy):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.ones_like(parameter)
            set_learning_rate(optimizer.param_groups, 1.0)
            optimizer.step()
        pairs = zip(prepared.param_groups[0]["params"], lazy.param_groups[0]["params"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    config = TrainConfig.of(num_steps=100, warmup=0.1)
    ratio = [learning_rate_ratio(config, step) for step in range(101)]
    assert ratio[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert ratio[10] == 1 and ratio[100] == pytest.approx(0)
    for step in (20, 55, 80):
        assert ratio[step] == pytest.approx((1 + math.cos(math.pi * (step - 10) / 90)) / 2)
    flat = TrainConfig.of(num_steps=100, warmup=0.1, decay="constant")
    assert {learning_rate_ratio(flat, step) for step in range(10, 200)} == {1.0}


def test_the_learning_rate_falls_as_one_over_the_root_of_the_step():
    """From the peak, where the warm-up ends, on: a quarter of the rate at 16 times that step."""
    config = TrainConfig.of(num_steps=1000, warmup=0.01, decay="inverse_sqrt")
    ratio = [learning_rate_ratio(config, step) for step in range(1000)]
    assert ratio[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert ratio[10] == 1 and ratio[160] == pytest.approx(0.25)
    for step in (11, 40, 999):
        assert ratio[step] * math.sqrt(step) == pytest.approx(math.sqrt(10))


@pytest.mark.parametrize("decay", ["cosine", "constant", "inverse_sqrt"])
def test_a_run_without_warm_up_starts_at_its_peak(decay: Any):
    assert learning_rate_ratio(TrainConfig.of(num_steps=10, warmup=0.0, decay=decay), 0) == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"global_batch_size": 10, "num_workers": 4}, "expected a multiple of 4 workers"),
        ({"global_batch_size": 12, "num_workers": 2, "micro_batch_size": 4},
         "train.micro_batch_size: found 4, expected a divisor of a worker's 6 samples"),
        ({"optimizer": "muon", "zero_stage": 1}, "found muon with zero_stage 1, expected adamw"),
        ({"optimizer": "muon", "zero_stage": 3}, "found muon with zero_stage 3, expected adamw"),
        ({"zero_stage": 3, "compile": True}, "train.zero_stage: found 3 with compile true"),
        ({"offload": "cpu", "zero_stage": 0}, "train.offload: found cpu with zero_stage 0"),
        ({"offload": "cpu", "zero_stage": 1}, "train.offload: found cpu with zero_stage 1"),
        ({"offload": "cpu", "zero_stage": 2, "num_workers": 0},
         "train.offload: found cpu with num_workers 0, expected none"),
        ({"num_steps": 0}, "train.num_steps: found 0, expected at least 1"),
        ({"keep_checkpoints": 0}, "train.keep_checkpoints: found 0, expected at least 1"),
        ({"hang_seconds": -1.0}, "train.hang_seconds: found -1.0, expected at least 0"),
        ({"learning_rate": -1e-3}, "train.learning_rate: found -0.001, expected at least 0"),
        ({"learning_rate": float("nan")}, "train.learning_rate: found nan, expected at least 0"),
        ({"ema_decay": 2.0}, "train.ema_decay: found 2.0, expected 0 to 1"),
        ({"warmup": 5.0}, "train.warmup: found 5.0, expected 0 to 1"),
        ({"report_every": 0}, "train.report_every: found 0"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(changes: dict, problem: str):
    with pytest.raises(ValueError, match=problem):
        TrainConfig.of(**changes)
