"""Published pipelines become finished runs, which draw, train on and go back."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from _records import write_by_three_ranks
from safetensors.torch import load_file

from models.clip import FrozenClip
from models.configs import DecoderConfig, DiffusionPriorConfig, UNetConfig, UpsamplerConfig
from models.convert.priors import prior_to_diffusers
from models.convert.runs import load_clip, load_model
from models.convert.unets import decoder_to_diffusers, upsampler_to_diffusers
from models.decoder import Decoder
from models.priors.diffusion import DiffusionPrior
from models.unclip import UnClip
from models.upsampler import Upsampler
from training import convert
from training.convert import ConvertConfig
from training.data.inputs import start_from

PARTS = ("prior", "decoder", "upsampler")
SPEC = "tiny:random"


@pytest.fixture(scope="module")
def encoder() -> FrozenClip:
    return load_clip(SPEC)


def awake(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def pipeline(encoder: FrozenClip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of networks as diffusers has them."""
    folder, dim = tmp_path_factory.mktemp("pipeline"), encoder.embed_dim
    assert encoder.text_width == dim
    plain = DiffusionPriorConfig(
        width=32, depth=1, num_heads=2, qk_norm=False, scale_text=False, time_channels=32
    )
    prior = DiffusionPrior(
        plain, embed_dim=dim, text_width=dim, context_length=encoder.context_length
    )
    prior_to_diffusers(awake(prior), folder / "prior")
    unet = UNetConfig(
        channels=128, channel_mult=(1,), num_res_blocks=1, attn_resolutions=(8,), head_channels=32
    )
    base = DecoderConfig(
        unet=unet, context_width=16, prediction="eps", norm_embed_tokens=False, text_embed_cond=True
    )
    decoder = Decoder(base, image_size=8, embed_dim=dim, text_width=dim)
    decoder_to_diffusers(awake(decoder), folder)
    up = UpsamplerConfig(
        unet=dataclasses.replace(unet, attn_resolutions=()), prediction="eps",
        interpolation="bicubic",
    )  # fmt: skip
    upsampler = awake(Upsampler(up, factor=2, crop_size=8))
    upsampler_to_diffusers(upsampler, folder / "super_res_first", 16)
    return folder


@pytest.fixture(scope="module")
def runs(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ConvertConfig]:
    """How each part was taken in, from the pipeline to a run."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    for part in PARTS:
        found[part] = ConvertConfig(
            part=part, diffusers=str(pipeline), run=str(root / part), factor=2,
            clip="" if part == "upsampler" else SPEC,
        )  # fmt: skip
        assert convert.main(found[part]) == 0
    return found


def test_a_pipeline_becomes_a_chain(runs: dict[str, ConvertConfig], encoder: FrozenClip):
    from eval.sampling.generate import caption_keys, default_sampling

    chain = UnClip.load(encoder, runs["prior"].run, runs["decoder"].run, (runs["upsampler"].run,))
    captions, sampling = ["a red cube", "a hat"], default_sampling()
    keys = caption_keys(captions, 0)
    image = chain.render(keys, captions, chain.sample_prior(keys, captions, sampling), sampling)
    assert image.shape == (2, 3, 16, 16) and (image[0] != image[1]).any()


@pytest.mark.parametrize("part", PARTS)
def test_a_part_goes_back_as_it_came(
    part: str, runs: dict[str, ConvertConfig], pipeline: Path, tmp_path: Path
):
    back = dataclasses.replace(runs[part], diffusers=str(tmp_path), export=True)
    assert convert.main(back) == 0
    folders = {"prior": ["prior"], "decoder": ["decoder", "text_proj"],
               "upsampler": ["super_res_first"]}[part]  # fmt: skip
    for folder in folders:
        before, after = (
            load_file(str(root / folder / "diffusion_pytorch_model.safetensors"))
            for root in (pipeline, tmp_path)
        )
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    with pytest.raises(ValueError, match=f"{folders[0]}: found a folder with files, expected none"):
        convert.main(back)  # a published pipeline is never written over


def test_guidance_leads_away_from_the_empty_caption(
    runs: dict[str, ConvertConfig], encoder: FrozenClip
):
    """diffusers' prior has no null of its own: a dropped caption is read as the empty one is."""
    prior: Any = load_model(runs["prior"].run, "prior")[0]
    chain = UnClip.load(encoder, runs["prior"].run)
    empty, hat = chain.prior_text([""]), chain.prior_text(["a hat"])
    x, t = torch.randn(1, encoder.embed_dim), torch.tensor([300])
    with torch.no_grad():
        kept = prior(x, t, empty, torch.tensor([False]))
        dropped = prior(x, t, hat, torch.tensor([True]))
    torch.testing.assert_close(dropped, kept, atol=1e-5, rtol=1e-5)


def test_training_starts_from_a_run(
    runs: dict[str, ConvertConfig], encoder: FrozenClip, tmp_path: Path
):
    taken: Any = load_model(runs["decoder"].run, "decoder")[0]
    fresh: Any = Decoder(
        taken.config, image_size=8, embed_dim=encoder.embed_dim, text_width=encoder.text_width
    )
    export = {
        "kind": "decoder", "encoder_id": encoder.encoder_id,
        "model": dataclasses.asdict(taken.config),
    }  # fmt: skip
    new, init = str(tmp_path), runs["decoder"].run
    started = start_from(fresh, init, new, export)
    assert started.training
    for name, tensor in taken.state_dict().items():
        assert torch.equal(started.state_dict()[name], tensor), name
    other = {**export["model"], "prediction": "v"}
    for changes, problem in (
        ({"encoder_id": "other@1"}, "encoder_id: found 'tiny.*', expected 'other@1'"),
        ({"kind": "upsampler"}, "kind: found 'decoder', expected 'upsampler'"),
        ({"model": other}, "prediction: found 'eps', expected 'v'"),
    ):
        with pytest.raises(ValueError, match=problem):
            start_from(fresh, init, new, {**export, **changes})
    unet = {**export["model"]["unet"], "head_channels": 4}
    several = {**export["model"], "num_embed_tokens": 2, "unet": {**unet, "qk_norm": True}}
    with pytest.raises(ValueError, match="num_embed.*; unet.head_ch.*; unet.qk_norm: found False"):
        start_from(fresh, init, new, {**export, "model": several})
    free = {"weighting": "edm", "text_drop": 0.9, "unet": {**export["model"]["unet"], "dropout": 1}}
    start_from(fresh, init, new, {**export, "model": {**export["model"], **free}})
    prior: Any = load_model(runs["prior"].run, "prior")[0]
    model = {**dataclasses.asdict(prior.config), "num_heads": 1, "qk_norm": True, "clip_x0": 1.0}
    export = {"kind": "diffusion_prior", "encoder_id": encoder.encoder_id, "model": model}
    with pytest.raises(ValueError, match=": num_heads: found .*, expected 1; qk_norm: found False"):
        start_from(prior, runs["prior"].run, new, export)
    assert start_from(fresh, "", new, export) is fresh
    (tmp_path / "step_00000003").mkdir()  # of a kill before there was a checkpoint
    with pytest.warns(UserWarning, match="incomplete"), pytest.raises(ValueError, match="deleted"):
        start_from(fresh, str(tmp_path / "deleted"), new, export)
    write_by_three_ranks(tmp_path / "step_00000004", torch.zeros(10))
    # A run that goes on no longer needs what it began from
    assert start_from(fresh, str(tmp_path / "deleted"), new, export) is fresh


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"clip": ""}, "--clip: found none for decoder, expected the encoder"),
        ({"part": "upsampler"}, "--clip: found tiny:random for upsampler, expected none"),
        ({"run": ""}, "--run: found none, expected a folder"),
        ({"diffusers": "nowhere"}, "nowhere.*: found no configuration of"),
        ({"clip": "ViT-S-32-alt:random"}, "expected 256 and 256, as --clip has"),
    ],
)
def test_what_cannot_be_taken_in_is_said_in_a_line(
    changes: dict, problem: str, runs: dict[str, ConvertConfig], tmp_path: Path
):
    wanted = dataclasses.replace(runs["decoder"], **{"run": str(tmp_path / "run"), **changes})
    with pytest.raises(ValueError, match=problem):
        convert.main(wanted)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_files_is_left_alone(runs: dict[str, ConvertConfig]):
    with pytest.raises(ValueError, match="found a folder with files, expected none"):
        convert.main(runs["decoder"])
