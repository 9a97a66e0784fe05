"""Laws of the U-Net, of the decoder's two conditions and of the upsampler."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from _networks import PLAIN, SIZE, UNET, awake, condition, decoder, images, upsampler
from torch import nn

from models.configs import UNetConfig, UpsamplerConfig
from models.decoder import Condition, ImageSampling
from models.diffusion import keyed_random
from models.diffusion.losses import draw_timesteps
from models.diffusion.samplers import SAMPLERS
from models.networks.transformer import attend
from models.networks.unet import UNet
from models.networks.unet_blocks import OuterConv, UpConv, _norm
from models.upsampler import Upsampler


def drops(*, image: bool, text: bool, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((count,), image), torch.full((count,), text)


# -- the U-Net -----------------------------------------------------------------------------------


def test_the_output_starts_at_zero():
    t = torch.tensor([0, 999])
    shown = drops(image=False, text=False)
    assert not decoder(asleep=True)(images(2), t, condition(2), *shown).any()
    up = Upsampler(UpsamplerConfig(unet=PLAIN), factor=2, crop_size=8)
    assert not up(images(2), t, images(2, 4)).any()
    refined = dataclasses.replace(UNET, patch_size=2, refine_channels=4, attn_resolutions=())
    assert not UNet(refined, image_size=8, in_channels=3, out_channels=3)(images(2), t).any()


def test_channels_filled_up_with_zeros_change_no_bit(monkeypatch: pytest.MonkeyPatch):
    """Losses and gradients of the path that a GPU takes, on a CPU."""
    runs, padded = [], OuterConv.padded
    for forward in (OuterConv.forward, padded):
        monkeypatch.setattr(OuterConv, "forward", forward)
        model = decoder()
        loss = model.losses(torch.arange(3), images(3), condition(3))["loss"]
        loss.sum().backward()
        layers = model.unet.conv_in, model.unet.conv_out
        runs.append([loss, *(layer.weight.grad for layer in layers), layers[1].bias.grad])
    for found, expected in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("refine_channels", [0, 4])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("channel_mult", [(1,), (1, 2), (1, 1, 2)])
def test_an_image_goes_in_and_an_image_comes_out(
    patch_size: int, channel_mult: tuple[int, ...], refine_channels: int
):
    config = UNetConfig(
        channels=8, channel_mult=channel_mult, num_res_blocks=2,
        attn_resolutions=(16 // patch_size,), head_channels=8, patch_size=patch_size,
        refine_channels=refine_channels,
    )  # fmt: skip
    unet = awake(UNet(config, image_size=16, in_channels=3, out_channels=5))
    out = unet(images(2, 16), torch.tensor([1, 500]))
    assert out.shape == (2, 5, 16, 16) and out.dtype == torch.float32
    assert (out[0] != out[1]).any()


@pytest.mark.parametrize(("channels", "preserving"), [(-1, False), (4, True)])
def test_refining_that_cannot_be_is_refused(channels: int, preserving: bool):
    config = UNetConfig(refine_channels=channels, magnitude_preserving=preserving)
    with pytest.raises(ValueError, match=f"refine_channels: found {channels}, expected 0 or more"):
        UNet(config, image_size=64, in_channels=3, out_channels=3)


@pytest.mark.parametrize("size", [6, 9])
def test_a_size_that_does_not_halve_is_refused(size: int):
    with pytest.raises(ValueError, match=f"image size: found {size}, expected a multiple"):
        UNet(UNetConfig(channels=8, channel_mult=(1, 2, 2)), image_size=size, in_channels=3,
             out_channels=3)  # fmt: skip


@pytest.mark.parametrize(
    ("attn_resolutions", "found"), [((4,), "4"), ((8, 5), "5"), ((32, 16, 3), "32, 3")]
)
def test_attention_where_there_is_no_such_resolution_is_refused(
    attn_resolutions: tuple[int, ...], found: str
):
    config = UNetConfig(
        channels=8, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=attn_resolutions,
        head_channels=8, patch_size=2,
    )  # fmt: skip
    expected = f"attn_resolutions: found {found}, expected some of 16, 8: .* of 32 px"
    with pytest.raises(ValueError, match=expected):
        UNet(config, image_size=32, in_channels=3, out_channels=3)


def test_heads_that_do_not_divide_their_channels_are_refused():
    config = dataclasses.replace(UNET, channels=12)
    with pytest.raises(ValueError, match="head_channels: found 8 with 12 channels at side 8"):
        UNet(dataclasses.replace(config, attn_resolutions=(8, 4)), image_size=8, in_channels=3,
             out_channels=3)  # fmt: skip
    UNet(config, image_size=8, in_channels=3, out_channels=3)  # 24 channels where it attends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_keeps_types_and_sums_in_fp32_under_autocast(dtype: torch.dtype):
    """The type comes out that went in; the sums are those of fp32, though 4,096 values of about 3
    lie far beyond bf16's 256 steps."""
    norm = _norm(32)
    nn.init.normal_(norm.weight)
    x = (torch.randn(2, 32, 64, 64) + 3).to(dtype).requires_grad_()
    weight, bias = norm.weight.to(dtype).float(), norm.bias.to(dtype).float()
    exact = F.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 2**-7
    assert torch.allclose(found.float(), exact, rtol=bound, atol=bound)
    found.float().square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and norm.weight.grad is not None


@pytest.mark.parametrize("sides", [(4, 6), (1, 3)])
def test_a_convolution_of_an_enlargement_needs_no_enlargement(sides: tuple[int, int]):
    torch.manual_seed(0)
    conv = UpConv(3, 5, 3, padding=1).double()
    x = torch.randn(2, 3, *sides, dtype=torch.float64, requires_grad=True)
    enlarged = F.interpolate(x, scale_factor=2, mode="nearest")
    expected = F.conv2d(enlarged, conv.weight, conv.bias, padding=1)
    found, dy = conv(x), torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    leaves = x, *conv.parameters()
    for f, e in zip(*(torch.autograd.grad(y, leaves, dy) for y in (found, expected)), strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mask", "causal", "none"])
def test_attention_is_its_formula(kind: str, dtype: torch.dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, dtype=torch.float64) for _ in range(3))
    keep = torch.rand(2, 1, 1, 7) < 0.6
    keep[..., 0] = True
    table = {"mask": keep, "causal": torch.ones(7, 7).tril().bool(), "none": torch.ones(7).bool()}
    logits = q @ k.transpose(-1, -2) / 8**0.5
    expected = logits.masked_fill(~table[kind], -torch.inf).softmax(-1) @ v
    mask = {"mask": keep, "causal": "causal", "none": None}[kind]
    found = attend(q.to(dtype), k.to(dtype), v.to(dtype), cast(Any, mask))
    assert found.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit)


def test_every_parameter_gets_a_gradient():
    model = decoder(embed_grid=True)
    model.losses(torch.arange(32), images(32), condition(32))["loss"].sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


# -- the decoder -----------------------------------------------------------------------------------


def changed(name: str) -> Condition:
    value = getattr(condition(2), name)
    changes: Any = {name: ~value if name == "token_mask" else value.flip(1)}
    return dataclasses.replace(condition(2), **changes)


@pytest.mark.parametrize("embed_grid", [False, True])
@pytest.mark.parametrize("name", ["image_embed", "text_states", "token_mask"])
def test_a_dropped_condition_is_not_read_and_a_kept_one_is(name: str, embed_grid: bool):
    model, t, x = decoder(embed_grid=embed_grid), torch.tensor([10, 900]), images(2)
    part = "image" if name == "image_embed" else "text"
    for dropped in (True, False):
        hidden = drops(**{"image": False, "text": False, part: dropped})
        before, after = (model(x, t, c, *hidden) for c in (condition(2), changed(name)))
        assert torch.allclose(before, after, atol=1e-5) == dropped


def test_padding_is_not_read():
    model, t, x, given = decoder(), torch.tensor([10, 900]), images(2), condition(2)
    before = model(x, t, given, *drops(image=False, text=False))
    assert given.text_states is not None and given.token_mask is not None
    given.text_states[~given.token_mask] = 1e3
    torch.testing.assert_close(model(x, t, given, *drops(image=False, text=False)), before)


def test_the_conditions_drop_at_the_papers_rates_and_independently():
    """z_i one time in ten, the caption every other time, so both one time in twenty."""
    count, seen = 4000, []
    model = decoder(unet=dataclasses.replace(PLAIN, channels=4, channel_mult=(1,)))
    model.register_forward_hook(lambda module, args, output: seen.append(args[3:]))
    with torch.no_grad():
        model.losses(torch.arange(count), images(count), condition(count))
    image, text = (drop.double() for drop in seen[0])
    for rate, expected in ((image, 0.1), (text, 0.5), (image * text, 0.05)):
        error = (expected * (1 - expected) / count) ** 0.5
        assert rate.mean().item() == pytest.approx(expected, abs=4 * error)


def test_captions_are_asked_for_where_they_were_trained_with():
    model, t = decoder(), torch.tensor([1, 2])
    bare = Condition(image_embed=condition(2).image_embed)
    with pytest.raises(ValueError, match="trained with captions, found none"):
        model(images(2), t, bare, *drops(image=False, text=False))
    free = decoder(use_text=False)
    both = [free(images(2), t, c, *drops(image=False, text=False)) for c in (bare, condition(2))]
    assert torch.equal(*both)


def test_noise_on_the_embedding_keeps_it_on_the_sphere():
    given, seen = condition(500), []
    for embed_noise in (0.5, 0.0):
        model = decoder(embed_noise=embed_noise)
        model.register_forward_hook(lambda module, args, output: seen.append(args[2].image_embed))
        with torch.no_grad():
            model.losses(torch.arange(500), images(500), given)
    torch.testing.assert_close(seen[0].norm(dim=1), torch.ones(500))
    cosine = (seen[0] * given.image_embed).sum(1)
    assert cosine.min() < 0.95 and cosine.mean() > 0.85  # up to a half of the signal's length
    assert torch.equal(seen[1], given.image_embed)


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_the_loss_of_a_silent_network_is_the_targets_energy(prediction: str):
    """A network that starts at zero pays the mean square of what it should have said."""
    model = decoder(asleep=True, prediction=prediction, weighting="simple")
    keys, x0 = torch.arange(16), images(16)
    t, eps = draw_timesteps(model.schedule, keys), keyed_random.normal(keys, "eps", (3, 8, 8))
    target = model.schedule.target(model.config.prediction, x0, t, eps)
    loss = model.losses(keys, x0, condition(16))["loss"]
    torch.testing.assert_close(loss, target.square().mean((1, 2, 3)))


# -- sampling --------------------------------------------------------------------------------------


def sample_decoder(keys: torch.Tensor, options: ImageSampling) -> torch.Tensor:
    return decoder().sample(keys, condition(4, keys), options)


def sample_upsampler(keys: torch.Tensor, options: ImageSampling) -> torch.Tensor:
    return upsampler().sample(keys, images(4, 4)[keys], options)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("sample", [sample_decoder, sample_upsampler])
def test_the_same_key_gives_the_same_image_in_any_batch(sampler: str, sample: Callable):
    options = ImageSampling(sampler=SAMPLERS[sampler], sample_steps=3, cfg_scale=2.0)
    whole = sample(torch.arange(4), options)
    alone = torch.cat([sample(torch.tensor([i]), options) for i in (3, 1)])
    torch.testing.assert_close(alone, whole[[3, 1]], atol=1e-4, rtol=0)
    assert whole.shape == (4, 3, SIZE, SIZE) and whole.abs().max() <= 1
    assert (whole[0] != whole[1]).any()


# -- the upsampler ---------------------------------------------------------------------------------



def test_an_upsampler_takes_no_attention():
    with pytest.raises(ValueError, match="attn_resolutions: found .*upsamplers take none"):
        Upsampler(UpsamplerConfig(unet=UNET), factor=2, crop_size=8)


def test_a_residual_upsampler_begins_as_the_enlargement():
    """An untrained network draws its low resolution, enlarged; prediction x0 alone has such."""
    config = UpsamplerConfig(unet=PLAIN, prediction="x0", residual=True, interpolation="bicubic")
    model = Upsampler(config, factor=2, crop_size=8)
    low_res = images(2, 4).clamp(-0.5, 0.5)
    options = ImageSampling(sampler=SAMPLERS["ddim"], sample_steps=2)
    enlarged = F.interpolate(low_res, scale_factor=2, mode="bicubic", antialias=True)
    drawn = model.sample(torch.arange(2), low_res, options)
    torch.testing.assert_close(drawn, enlarged, atol=1e-5, rtol=0)
    config = dataclasses.replace(config, prediction="v")
    with pytest.raises(ValueError, match="residual: found true with prediction v, expected x0"):
        Upsampler(config, factor=2, crop_size=8)


class Pointwise(nn.Module):
    """Looks at each pixel alone, and remembers the sizes that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: None = None) -> torch.Tensor:
        self.seen.append(tuple(x.shape[2:]))
        return 0.3 * x[:, :3] + 0.5 * x[:, 3:].tanh()


@pytest.mark.parametrize("sides", [(12, 12), (8, 20), (6, 6), (14, 6)])
def test_an_upsampler_in_parts_is_the_whole_where_it_looks_at_pixels_alone(sides: tuple[int, int]):
    model = upsampler()
    pointwise = Pointwise()
    model.unet = cast(Any, pointwise)
    keys, low_res = torch.arange(2), torch.rand(2, 3, *sides) * 2 - 1
    options = ImageSampling(sampler=SAMPLERS["ddim"], sample_steps=2)
    whole = model.sample(keys, low_res, options)
    assert {*pointwise.seen} == {(2 * sides[0], 2 * sides[1])}
    pointwise.seen.clear()
    parts = model.sample(keys, low_res, dataclasses.replace(options, tile=16))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert max(max(seen) for seen in pointwise.seen) <= 16


def test_an_upsampler_in_parts_is_near_the_whole():
    model = upsampler()
    options = ImageSampling(sampler=SAMPLERS["ddim"], sample_steps=4)
    keys, low_res = torch.arange(2), images(2, 32)
    whole = model.sample(keys, low_res, options)
    parts = model.sample(keys, low_res, dataclasses.replace(options, tile=32))
    assert (parts - whole).abs().mean() < 0.2 * whole.std() < 0.2 * (parts - whole.flip(0)).std()


def test_parts_that_do_not_halve_are_refused():
    model = upsampler()
    options = ImageSampling(sampler=SAMPLERS["ddim"], sample_steps=1, tile=7)
    with pytest.raises(ValueError, match="tile: found 7, expected a multiple of 2 px"):
        model.sample(torch.arange(1), torch.zeros(1, 3, 16, 16), options)
