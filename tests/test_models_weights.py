"""Weights on disk, and what joins finished runs into a chain."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from models.clip import FrozenClip
from models.convert.runs import load_clip, load_model
from models.decoder import ImageSampling
from models.diffusion.samplers import SAMPLERS
from models.priors.base import PriorSampling
from models.unclip import Sampling, UnClip
from models.weights import digest, exported, load_config, load_weights, save_weights

WriteChain = Callable[..., dict[str, Path]]


@pytest.fixture(scope="module")
def clip() -> FrozenClip:
    return load_clip("tiny:random")


def test_weights_come_back_as_they_were(tmp_path: Path):
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    save_weights(tmp_path / "w.safetensors", first.state_dict())
    assert load_weights(second, tmp_path / "w.safetensors") is second and not second.training
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (nn.Linear(3, 4), r"tensor bias: found \[2\], expected \[4\]"),
        (nn.Linear(3, 2, bias=False), r"tensor bias: found \[2\], expected nothing"),
        (nn.Sequential(nn.Linear(3, 2)), r"tensor 0.bias: found nothing, expected \[2\]"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(
    model: nn.Module, problem: str, tmp_path: Path
):
    save_weights(tmp_path / "w.safetensors", nn.Linear(3, 2).state_dict())
    with pytest.raises(ValueError, match=problem):
        load_weights(model, tmp_path / "w.safetensors")


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="w.safetensors: found no weights file"):
        load_weights(nn.Linear(1, 1), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="config.json: found no file"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match="none: found no such folder"):
        exported(tmp_path / "none")
    with pytest.raises(ValueError, match="found an unfinished run, expected final.json"):
        exported(tmp_path)


def test_the_digest_knows_names_shapes_types_and_bits():
    tensor = torch.arange(6.0)
    others = [
        {"b": tensor}, {"a": tensor.reshape(2, 3)}, {"a": tensor.double()}, {"a": tensor + 1},
        {"a": tensor, "b": tensor},
    ]  # fmt: skip
    digests = {digest(tensors) for tensors in [{"a": tensor}, *others]}
    assert len(digests) == 6
    assert digest({"a": tensor, "b": others[3]["a"]}) == digest(
        {"b": others[3]["a"], "a": tensor.clone()}
    )


# -- runs ------------------------------------------------------------------------------------------


IMAGE = ImageSampling(sampler=SAMPLERS["ddim"], sample_steps=2)
PRIOR = PriorSampling(sampler=SAMPLERS["ddim"], sample_steps=2)
SAMPLING = Sampling(prior=PRIOR, decoder=IMAGE, upsampler=IMAGE)
KEYS, CAPTIONS = torch.arange(2), ["a red cube", "a blue cone"]


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive", "regression"])
def test_finished_runs_join_into_a_chain_from_caption_to_image(
    kind: str, tmp_path: Path, clip: FrozenClip, write_chain: WriteChain
):
    """And a prior alone draws what it draws in the chain, and no image."""
    runs = {name: str(path) for name, path in write_chain(tmp_path, clip, kind=kind).items()}
    chain = UnClip.load(clip, runs["prior"], runs["decoder"], (runs["upsampler"],))
    embed = chain.sample_prior(KEYS, CAPTIONS, SAMPLING)
    assert embed.shape == (2, clip.embed_dim)
    assert chain.render(KEYS, CAPTIONS, embed, SAMPLING).shape == (2, 3, 16, 16)
    alone = UnClip.load(clip, runs["prior"])
    assert torch.equal(alone.sample_prior(KEYS, CAPTIONS, SAMPLING), embed)
    with pytest.raises(ValueError, match="decoder: found none"):
        alone.render(KEYS, CAPTIONS, embed, SAMPLING)
    with pytest.raises(ValueError, match="found an upsampler without a decoder"):
        UnClip.load(clip, runs["prior"], upsamplers=(runs["upsampler"],))


@pytest.mark.parametrize("part", ["prior", "decoder"])
def test_a_part_of_another_encoder_is_refused_by_name(
    part: str, tmp_path: Path, clip: FrozenClip, write_chain: WriteChain
):
    runs = write_chain(tmp_path, clip)
    path = runs[part] / "step_00000004" / "config.json"
    path.write_text(path.read_text().replace(clip.encoder_id, "another"))
    with pytest.raises(ValueError, match=f"{part}: found a {part} trained on encoder another"):
        UnClip.load(clip, str(runs["prior"]), str(runs["decoder"]))


def test_stages_that_do_not_fit_together_are_refused(
    tmp_path: Path, clip: FrozenClip, write_chain: WriteChain
):
    small, large = write_chain(tmp_path / "a", clip, 8), write_chain(tmp_path / "b", clip, 16)
    parts = (str(small["prior"]), str(small["decoder"]))
    with pytest.raises(ValueError, match="from 16 px, expected one from the 8 px"):
        UnClip.load(clip, *parts, (str(large["upsampler"]),))
    whole = UnClip.load(clip, *parts, (str(small["upsampler"]), str(large["upsampler"])))
    assert len(whole.upsamplers) == 2


def test_a_run_of_another_kind_is_refused(
    tmp_path: Path, clip: FrozenClip, write_chain: WriteChain
):
    runs = write_chain(tmp_path, clip)
    with pytest.raises(ValueError, match="found a run of kind decoder, expected diffusion_prior"):
        load_model(runs["decoder"], "diffusion_prior")
