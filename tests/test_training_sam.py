"""Sharpness-aware minimisation is its formula, and leaves no trace."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _runs import HERE, clip_run, forget_the_end
from safetensors.torch import load_file
from torch import nn

from cluster.base.cli import with_options
from training.config import ClipRunConfig, TrainConfig
from training.data.dataloader import Batch, make_loader
from training.engine.sam import perturbed
from training.runs.worker import launch
from training.tasks import clip as clip_task


def bowl() -> nn.Linear:
    """A layer whose loss below has the known gradient A w."""
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
    return layer


CURVATURE = torch.tensor([2.0, 0.5, 4.0])


def loss_of(layer: nn.Linear) -> torch.Tensor:
    return (CURVATURE * layer.weight.square()).sum() / 2


def test_the_gradient_is_taken_at_the_perturbed_weights_and_they_come_back():
    layer, rho = bowl(), 0.3
    w = layer.weight.detach().clone()
    gradient = CURVATURE * w
    expected = CURVATURE * (w + rho * gradient / gradient.norm())
    with perturbed(layer, lambda: loss_of(layer), rho):
        assert (layer.weight - w).norm().item() == pytest.approx(rho, rel=1e-5)
        loss_of(layer).backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, expected)
    assert torch.equal(layer.weight, w)


def test_weights_come_back_from_an_error_too():
    layer = bowl()
    w = layer.weight.detach().clone()
    with pytest.raises(KeyError), perturbed(layer, lambda: loss_of(layer), 0.3):
        raise KeyError
    assert torch.equal(layer.weight, w)


@pytest.mark.parametrize("bad", [float("nan"), 0.0])
def test_no_gradient_perturbs_nothing(bad: float):
    layer = bowl()
    w = layer.weight.detach().clone()
    with perturbed(layer, lambda: bad * loss_of(layer), 0.3):
        assert torch.equal(layer.weight, w)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_shards=2, samples_per_shard=20)


def run_of(data: Path, run: Path, rho: float) -> ClipRunConfig:
    train = TrainConfig.of(
        **HERE, num_steps=4, global_batch_size=16, precision="fp32", checkpoint_every=2
    )
    return clip_run(data, run, train, sam_rho=rho, sam_batch_size=8)


def test_partitioned_weights_are_not_perturbed():
    train = TrainConfig.of(zero_stage=3)
    assert ClipRunConfig(train=train).sam_rho == 0
    with pytest.raises(ValueError, match="^train.zero_stage: found 3 with sam_rho 0.1, expected"):
        ClipRunConfig(train=train, sam_rho=0.1)


def test_a_clip_is_perturbed_by_some_samples_contrasted_among_themselves(
    data: Path, tmp_path: Path
):
    config = run_of(data, tmp_path, 0.1)
    job = clip_task.build_clip_task(config)
    (batch,) = next(make_loader(job.build_dataset, config).steps(0, 1))
    part = batch.part(8)
    loss = clip_task.clip_objective(job.model, part)["loss"].mean()
    named = dict(job.model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    before = {name: p.detach().clone() for name, p in named.items()}
    with job.grad_context(job.model, [batch]):
        for (name, p), g in zip(named.items(), gradients, strict=True):
            torch.testing.assert_close(p, before[name] + 0.1 * g / norm, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in named.items())


def test_the_samples_that_perturb_are_neighbours_from_anywhere():
    """A batch comes by index: its first samples would always be of its first shard."""
    columns = {"row": torch.arange(16)}
    starts = set()
    for key in range(200):
        keys = torch.arange(16) + 7919 * key
        batch = Batch(keys=keys, weight=torch.ones(16), num_real=16, columns=columns)
        rows = batch.part(8)["row"].tolist()
        assert rows == [(rows[0] + step) % 16 for step in range(8)]
        starts.add(rows[0])
        assert len(batch.part(99).keys) == 16
    assert len(starts) == 16


def test_a_clip_starts_from_anothers_weights(data: Path, tmp_path: Path):
    first = run_of(data, tmp_path / "first", 0.0)
    assert launch(first, first.run, clip_task.build_clip_task, "clip") == 0
    again = dataclasses.replace(first, run=str(tmp_path / "again"), init=first.run)
    found = dict(clip_task.build_clip_task(again).model.state_dict())
    expected = load_file(str(tmp_path / "first" / "step_00000004" / "ema.safetensors"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    heads = dataclasses.replace(first.model, head_channels=16)
    with pytest.raises(ValueError, match=r"init: .*attn.num_heads: found 1, expected 2"):
        clip_task.build_clip_task(dataclasses.replace(again, model=heads))
    warmer = dataclasses.replace(first.model, temperature=0.5)
    clip_task.build_clip_task(dataclasses.replace(again, model=warmer))
    other = dataclasses.replace(again, init="tiny:random")
    with pytest.raises(ValueError, match="init: tiny:random: tensor .*: found .*, expected"):
        clip_task.build_clip_task(other)


def test_a_run_with_it_differs_repeats_itself_and_resumes(data: Path, tmp_path: Path):
    def trained(name: str, rho: float, steps: int = 4) -> bytes:
        config = run_of(data, tmp_path / name, rho)
        config = dataclasses.replace(
            config, train=with_options(config.train, decay="constant", warmup=0.0)
        )
        assert launch(config, config.run, clip_task.build_clip_task, "clip") == 0
        return (tmp_path / name / f"step_{steps:08d}" / "model.safetensors").read_bytes()

    plain, sharp = trained("plain", 0.0), trained("sharp", 0.1)
    assert plain != sharp and trained("again", 0.1) == sharp
    forget_the_end(tmp_path / "sharp")
    assert trained("sharp", 0.1) == sharp
