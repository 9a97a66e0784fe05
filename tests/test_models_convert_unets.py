"""diffusers' unCLIP is the oracle: converted decoders and upsamplers give its outputs, there and
back, and whole chains its images."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler
from torch import Tensor

from models.configs import DecoderConfig, UNetConfig, UpsamplerConfig
from models.convert.unets import (
    decoder_from_diffusers,
    decoder_to_diffusers,
    upsampler_from_diffusers,
    upsampler_to_diffusers,
)
from models.decoder import Condition, Decoder, ImageSampling
from models.diffusion.samplers import SAMPLERS
from models.diffusion.schedule import NoiseSchedule
from models.upsampler import Upsampler

EMBED, CONTEXT, WORDS, SIZE = 20, 24, 7, 16
PLAIN, ATTENDING = "Resnet{}sampleBlock2D", "SimpleCrossAttn{}Block2D"
DOWN = (PLAIN.format("Down"), ATTENDING.format("Down"))
UP = (ATTENDING.format("Up"), PLAIN.format("Up"))


def random(model: Any) -> Any:
    """Give every parameter values: some are built as zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.5 if parameter.ndim == 1 and "norm" not in name else 0.05)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


@functools.cache
def their_decoder(
    layers: int = 1, variance: bool = True, seed: int = 0, embed: int = EMBED
) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=SIZE, in_channels=3, out_channels=6 if variance else 3,
        down_block_types=DOWN, mid_block_type="UNetMidBlock2DSimpleCrossAttn", up_block_types=UP,
        block_out_channels=(128, 256), layers_per_block=layers, cross_attention_dim=CONTEXT,
        attention_head_dim=32, resnet_time_scale_shift="scale_shift", class_embed_type="identity",
    )  # fmt: skip
    project = UnCLIPTextProjModel(
        clip_extra_context_tokens=3, clip_embeddings_dim=embed, time_embed_dim=512,
        cross_attention_dim=CONTEXT,
    )  # fmt: skip
    return random(unet), random(project)


@functools.cache
def their_upsampler(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    down, up = ((PLAIN.format(way),) * 2 for way in ("Down", "Up"))
    unet = UNet2DModel(
        sample_size=2 * SIZE, in_channels=6, out_channels=3, down_block_types=down,
        up_block_types=up, block_out_channels=(128, 256), layers_per_block=1,
        resnet_time_scale_shift="scale_shift", add_attention=False, downsample_type="resnet",
        upsample_type="resnet",
    )  # fmt: skip
    return random(unet)


def saved(folder: Path, unet: Any, project: Any) -> Path:
    unet.save_pretrained(folder / "decoder")
    project.save_pretrained(folder / "text_proj")
    return folder


def asked(count: int = 3, size: int = SIZE) -> tuple[Tensor, Tensor, Condition]:
    rng = torch.Generator().manual_seed(1)
    lengths = torch.linspace(1, WORDS, count).long()
    given = Condition(
        image_embed=F.normalize(torch.randn(count, EMBED, generator=rng), dim=1),
        text_embed=torch.randn(count, EMBED, generator=rng),
        text_states=torch.randn(count, WORDS, EMBED, generator=rng),
        token_mask=torch.arange(WORDS) < lengths[:, None],
    )
    t = torch.randint(0, 1000, (count,), generator=rng)
    return torch.randn(count, 3, size, size, generator=rng), t, given


@torch.no_grad()
def theirs(models: tuple[Any, Any], x: Tensor, t: Any, given: Condition, *, null: bool) -> Tensor:
    unet, project = models
    embed = given.image_embed
    if null:
        embed = project.learned_classifier_free_guidance_embeddings.expand(len(x), -1)
    states, cond = project(
        image_embeddings=embed, prompt_embeds=given.text_embed,
        text_encoder_hidden_states=given.text_states, do_classifier_free_guidance=False,
    )  # fmt: skip
    assert given.token_mask is not None
    mask = F.pad(given.token_mask, (project.config.clip_extra_context_tokens, 0), value=True)
    return unet(x, t, encoder_hidden_states=states, class_labels=cond, attention_mask=mask).sample


@torch.no_grad()
def ours(model: Decoder, x: Tensor, t: Tensor, given: Condition, *, null: bool) -> Tensor:
    drop = torch.full(t.shape, null)
    return model(x, t, given, drop, torch.zeros_like(drop))


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize(("layers", "variance", "size"), [(1, True, 16), (2, False, 16),
                                                          (1, True, 24)])  # fmt: skip
def test_a_converted_decoder_gives_diffusers_outputs(tmp_path, layers, variance, size, null):
    models = their_decoder(layers, variance)
    mine = decoder_from_diffusers(saved(tmp_path, *models))
    x, t, given = asked(size=size)
    expected = theirs(models, x, t, given, null=null)
    found = ours(mine, x, t, given, null=null)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.05 and mine.config.learned_variance == variance



def test_ours_is_loaded_by_diffusers(tmp_path):
    torch.manual_seed(3)
    config = DecoderConfig(
        unet=UNetConfig(channels=128, channel_mult=(1, 2), num_res_blocks=1,
                        attn_resolutions=(8,), head_channels=32),
        num_embed_tokens=4, context_width=CONTEXT, norm_embed_tokens=False, text_embed_cond=True,
        prediction="eps", learned_variance=True,
    )  # fmt: skip
    mine = random(Decoder(config, image_size=SIZE, embed_dim=EMBED, text_width=EMBED))
    decoder_to_diffusers(mine, tmp_path)
    models = (
        UNet2DConditionModel.from_pretrained(tmp_path / "decoder"),
        UnCLIPTextProjModel.from_pretrained(tmp_path / "text_proj"),
    )
    x, t, given = asked()
    expected = ours(mine, x, t, given, null=False)
    torch.testing.assert_close(
        theirs(models, x, t, given, null=False), expected, atol=1e-4, rtol=1e-4
    )


def test_a_converted_upsampler_gives_diffusers_outputs_and_comes_back(tmp_path):
    model = their_upsampler()
    model.save_pretrained(tmp_path / "a")
    mine = upsampler_from_diffusers(tmp_path / "a", factor=2)
    x, t, _ = asked(size=2 * SIZE)
    low_res = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    raised = F.interpolate(
        low_res, size=[2 * SIZE] * 2, mode="bicubic", align_corners=False, antialias=True
    )
    with torch.no_grad():
        expected = model(torch.cat([x, raised], dim=1), t).sample
        torch.testing.assert_close(mine(x, t, low_res), expected, atol=1e-4, rtol=1e-4)
    upsampler_to_diffusers(mine, tmp_path / "b", 2 * SIZE)
    back = UNet2DModel.from_pretrained(tmp_path / "b")
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    with torch.no_grad():
        found = back(torch.cat([x, raised], dim=1), t).sample
    torch.testing.assert_close(found, expected)


class Scheduler(UnCLIPScheduler):
    """diffusers' own, with noise that another sampler can draw too."""

    def run(self, steps: int, x: Tensor, output: Any) -> Tensor:
        """Sample from x with `output(x, t)`, as the pipeline does.

        Its own table is a product of a thousand float32 factors, 5e-4 off in the images: ours here.
        """
        self.set_timesteps(steps)
        self.alphas_cumprod = NoiseSchedule.build("cosine").alpha_bar
        times: Any = self.timesteps
        for i, t in enumerate(times):
            after = None if i + 1 == len(times) else times[i + 1]
            rng = torch.Generator().manual_seed(1000 + i)
            found: Any = self.step(output(x, t), t, x, prev_timestep=after, generator=rng)
            x = found.prev_sample
        return x


def test_a_decoder_and_its_upsamplers_draw_the_pipelines_images(tmp_path, monkeypatch):
    """6 guided steps with the learned variance, away from the empty caption; then 4 steps, of
    which the last is another network's."""
    models, up, last = their_decoder(), their_upsampler(1), their_upsampler(2)
    decoder = decoder_from_diffusers(saved(tmp_path, *models))
    for name, model in (("super_res_first", up), ("super_res_last", last)):
        model.save_pretrained(tmp_path / name)
    mine = [upsampler_from_diffusers(tmp_path / f"super_res_{n}", 2) for n in ("first", "last")]
    x, _, given = asked()
    embed, states = given.text_embed, given.text_states
    assert embed is not None and states is not None
    empty = Condition(
        image_embed=given.image_embed, text_embed=-embed[:1].expand(3, -1),
        text_states=states[:1].flip(1).expand(3, -1, -1),
        token_mask=(torch.arange(WORDS) < 2).expand(3, -1),
    )  # fmt: skip

    def guided(x: Tensor, t: Tensor) -> Tensor:
        without, _ = theirs(models, x, t, empty, null=True).chunk(2, dim=1)
        found, fraction = theirs(models, x, t, given, null=False).chunk(2, dim=1)
        return torch.cat([without + 3.0 * (found - without), fraction], dim=1)

    small = Scheduler(variance_type="learned_range", prediction_type="epsilon").run(6, x, guided)
    small = small.clamp(-1, 1)
    raised = F.interpolate(small, size=[2 * SIZE] * 2, mode="bicubic", align_corners=False,
                           antialias=True)  # fmt: skip
    start = torch.randn(3, 3, 2 * SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(9))

    @torch.no_grad()
    def enlarged(x: Tensor, t: Tensor) -> Tensor:
        model = last if int(t) == 0 else up
        return model(torch.cat([x, raised], dim=1), t).sample

    large = Scheduler(variance_type="fixed_small_log").run(4, start, enlarged).clamp(-1, 1)

    noise_as_theirs(monkeypatch, start)
    learned = SAMPLERS["learned_ddpm"]
    how = ImageSampling(sampler=learned, sample_steps=6, cfg_scale=3.0, spacing="strided")
    drawn = decoder.sample(torch.arange(3), given, how, start=x, empty=empty)
    torch.testing.assert_close(drawn, small, atol=1e-4, rtol=0)
    how = ImageSampling(sampler=SAMPLERS["ddpm"], sample_steps=4, spacing="strided")
    found = mine[0].sample(torch.arange(3), small, how, final=mine[1])
    torch.testing.assert_close(found, large, atol=1e-4, rtol=0)
    assert small.std() > 0.2 and large.std() > 0.2


def noise_as_theirs(monkeypatch: pytest.MonkeyPatch, start: Tensor) -> None:
    """Let steps draw what `Scheduler` draws, and an upsampler begin from `start`."""

    def normal(keys: Tensor, purpose: str, shape: Any) -> Tensor:
        step = purpose.split("_")[1:]
        if purpose.startswith("upsampler") and len(step) == 1:
            return start
        rng = torch.Generator().manual_seed(1000 + int(step[-1]))
        return torch.randn(len(keys), *shape, generator=rng)

    monkeypatch.setattr("models.diffusion.keyed_random.normal", normal)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "option", "value", "problem"),
    [
        ("decoder", "_class_name", "UNet2DModel", "found a UNet2DModel, expected a folder of"),
        ("decoder", "resnet_time_scale_shift", "default", "resnet_time_scale_shift: found"),
        ("decoder", "class_embed_type", None, "class_embed_type: found None"),
        ("decoder", "up_block_types", ["UpBlock2D", "UpBlock2D"], "blocks: found"),
        ("decoder", "layers_per_block", 2, "tensor .*: found none, expected it"),
        ("decoder", "norm_num_groups", 16, "norm_num_groups: found 16, expected 32"),
        ("decoder", "act_fn", "gelu", "act_fn: found 'gelu'"),
        ("text_proj", "_class_name", "Other", "found a Other"),
        ("text_proj", "clip_embeddings_dim", ..., "clip_embeddings_dim: found none"),
        ("decoder", "sample_size", ..., "sample_size: found none"),
    ],
)  # fmt: skip
def test_another_network_is_refused_by_name(tmp_path, part, option, value, problem):
    path = saved(tmp_path, *their_decoder()) / part / "config.json"
    found = {**json.loads(path.read_text()), option: value}
    path.write_text(json.dumps({name: v for name, v in found.items() if v is not ...}))
    with pytest.raises(ValueError, match=problem):
        decoder_from_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("changes", "option"),
    [({"norm_embed_tokens": True}, "norm_embed_tokens"), ({"prediction": "v"}, "prediction"),
     ({"embed_grid": True}, "embed_grid"), ({"schedule": "linear"}, "schedule"),
     ({"use_text": False, "text_embed_cond": False}, "text_width")],
)  # fmt: skip
def test_what_diffusers_does_not_have_is_refused_by_name(tmp_path, changes, option):
    unet = UNetConfig(channels=128, channel_mult=(1,), num_res_blocks=1, attn_resolutions=(8,))
    options = {"prediction": "eps", "norm_embed_tokens": False, "text_embed_cond": True}
    config = DecoderConfig(unet=unet, context_width=CONTEXT, **{**options, **changes})
    decoder = Decoder(config, image_size=8, embed_dim=EMBED, text_width=EMBED)
    with pytest.raises(ValueError, match=f"{option}: found"):
        decoder_to_diffusers(decoder, tmp_path)
    with pytest.raises(ValueError, match="interpolation: found 'bilinear'"):
        plain = UNetConfig(channels=128, channel_mult=(1,), num_res_blocks=1, attn_resolutions=())
        up = UpsamplerConfig(unet=plain, prediction="eps")
        upsampler_to_diffusers(Upsampler(up, factor=2, crop_size=8), tmp_path, 16)


def test_a_network_without_norms_is_refused_by_name(tmp_path):
    unet = UNetConfig(channels=128, channel_mult=(1,), num_res_blocks=1, attn_resolutions=(),
                      magnitude_preserving=True)  # fmt: skip
    config = DecoderConfig(unet=unet, context_width=CONTEXT, prediction="eps",
                           norm_embed_tokens=False, text_embed_cond=True)  # fmt: skip
    decoder = Decoder(config, image_size=8, embed_dim=EMBED, text_width=EMBED)
    up = UpsamplerConfig(unet=unet, prediction="eps", interpolation="bicubic")
    with pytest.raises(ValueError, match="magnitude_preserving: found True, expected False"):
        decoder_to_diffusers(decoder, tmp_path)
    with pytest.raises(ValueError, match="magnitude_preserving: found True, expected False"):
        upsampler_to_diffusers(Upsampler(up, factor=2, crop_size=8), tmp_path, 16)
    assert not list(tmp_path.iterdir())
