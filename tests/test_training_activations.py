"""Activations are kept where the GPU's memory has room for them, as counted for the micro-batch."""

from pathlib import Path

import pytest
from _runs import SIX_STEPS, prior_run

from cluster.base.cli import with_options
from cluster.planning.counts import read_preset
from models.configs import DiffusionPriorConfig, UNetConfig
from models.costs import state_bytes
from models.networks.unet import UNet
from models.priors.diffusion import DiffusionPrior
from training.config import TrainConfig
from training.engine.activations import settle_checkpointing
from training.runs.run_folder import prepare_run


def prior(checkpointing: bool | None) -> DiffusionPrior:
    config = DiffusionPriorConfig(width=32, depth=2, num_heads=2, checkpointing=checkpointing)
    return DiffusionPrior(config, embed_dim=16, text_width=16, context_length=8)


def chosen(memory_bytes: int, micro_batch_size: int, **options) -> bool | None:
    train = TrainConfig.of(global_batch_size=256, micro_batch_size=micro_batch_size, **options)
    model = prior(None)
    line = settle_checkpointing(model, train, memory_bytes, max(1, train.workers.num_workers))
    assert line.startswith(f"checkpointing: {str(model.config.checkpointing).lower()}, ")
    return model.config.checkpointing


def test_they_are_computed_again_where_the_micro_batch_does_not_fit():
    state = state_bytes(prior(None))
    assert chosen(2**40, 256) is False
    assert chosen(state, 1) is True  # not even one sample's
    room = next(2**n for n in range(40) if chosen(2**n, 16) is False)
    assert chosen(room, 256) is True
    assert chosen(room // 2, 16) is True
    # ranks that share the state out, or the batch, leave room
    assert chosen(room, 0, num_workers=16) is False
    assert chosen(0, 1) is True  # a CPU


@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_was_asked_for_stays(checkpointing: bool):
    model = prior(checkpointing)
    assert settle_checkpointing(model, TrainConfig(), 2**40, 1) == ""
    assert model.config.checkpointing is checkpointing


def test_a_unet_is_asked_as_the_network_of_its_model():
    sizes = UNetConfig(channels=8, channel_mult=(1,), num_res_blocks=1, attn_resolutions=())
    unet = UNet(sizes, image_size=8, in_channels=3, out_channels=3)
    assert settle_checkpointing(unet, TrainConfig(), 2**40, 1) == ""


def test_the_papers_presets_leave_it_to_the_device():
    assert read_preset("decoder", "paper").base.unet.checkpointing is None
    assert read_preset("prior", "paper").diffusion.checkpointing is None


def test_a_run_continues_with_another_choice(tmp_path: Path):
    """Weights and curve do not depend on it: runs of before the choice began with true."""
    train = with_options(SIX_STEPS, num_steps=2)
    for checkpointing in (True, None, False):
        sizes = DiffusionPriorConfig(width=16, depth=1, num_heads=2, checkpointing=checkpointing)
        run = prior_run(tmp_path, tmp_path / "run", train, diffusion=sizes)
        assert prepare_run(run, run.run) == tmp_path / "run"
