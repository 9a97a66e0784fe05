"""Laws of the decoder and the upsampler: keys, guidance, degradation and sizes.

The network itself, and what a condition may reach, are in test_models_unet.py.
"""

import pytest
import torch
import torch.nn.functional as F

from models import keyed_random
from models.configs import DecoderConfig, UNetConfig, UpsamplerConfig
from models.decoder import Condition, Decoder, ImageSampling
from models.degrade import gaussian_blur
from models.samplers import SAMPLERS
from models.upsampler import Upsampler

EMBED, TEXT, LENGTH, SIZE = 8, 12, 5, 8
ATTENDING = UNetConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), head_channels=8
)
PLAIN = UNetConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=())


def awake(model: torch.nn.Module) -> None:
    """Give the layers that start at zero values, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    model.eval()


def decoder(**changes) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(**{"unet": ATTENDING, "context_width": 8, **changes})
    model = Decoder(config, image_size=SIZE, embed_dim=EMBED, text_width=TEXT)
    awake(model)
    return model


def upsampler(**changes) -> Upsampler:
    torch.manual_seed(0)
    model = Upsampler(UpsamplerConfig(**{"unet": PLAIN, **changes}), factor=2, crop_size=SIZE)
    awake(model)
    return model


def condition(rows: slice = slice(6)) -> Condition:
    rng = torch.Generator().manual_seed(0)
    image_embed = F.normalize(torch.randn(6, EMBED, generator=rng), dim=1)
    mask = (torch.arange(LENGTH) < 3).expand(6, -1)
    states = torch.randn(6, LENGTH, TEXT, generator=rng)
    return Condition(image_embed=image_embed[rows], text_states=states[rows], token_mask=mask[rows])


def images(count: int, size: int = SIZE) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# -- keys ------------------------------------------------------------------------------------------


def test_losses_depend_on_keys_and_not_on_the_batch():
    keys, part = torch.arange(6) * 31, slice(2, 5)
    base = decoder(embed_noise=0.3)
    up = upsampler(low_res_noise=0.5)
    for whole, alone in (
        (base.losses(keys, images(6), condition()),
         base.losses(keys[part], images(6)[part], condition(part))),
        (up.losses(keys, images(6)), up.losses(keys[part], images(6)[part])),
    ):  # fmt: skip
        torch.testing.assert_close(alone["loss"], whole["loss"][part], atol=1e-5, rtol=1e-5)
        assert len(whole["loss"].unique()) == 6
    other = up.losses(keys + 1, images(6))["loss"]
    assert (other != up.losses(keys, images(6))["loss"]).all()


# -- guidance --------------------------------------------------------------------------------------


def drawn(model: Decoder, cfg_scale: float) -> torch.Tensor:
    how = ImageSampling(sampler=SAMPLERS["ddim"], sample_steps=3, cfg_scale=cfg_scale)
    return model.sample(torch.arange(6), condition(), how)


def test_guidance_of_one_is_the_conditional_model():
    """Without guidance neither null is even asked, and sampling never drops a condition."""
    model = decoder(image_embed_drop=1.0, text_drop=1.0)
    before, guided = drawn(model, 1.0), drawn(model, 3.0)
    with torch.no_grad():
        model.null_image_embed.add_(1.0)
    assert torch.equal(drawn(model, 1.0), before)
    assert not torch.allclose(guided, before, atol=1e-3)
    assert not torch.allclose(drawn(model, 3.0), guided, atol=1e-3)


# -- the upsampler's low resolution ----------------------------------------------------------------


def test_an_upsampler_trains_on_the_blurred_average():
    model, seen = upsampler(), []
    model.register_forward_hook(lambda module, args, output: seen.append(args[2]))
    model.losses(torch.arange(2), images(2))
    torch.testing.assert_close(seen[0], gaussian_blur(F.avg_pool2d(images(2), 2)))


def test_noise_on_the_low_resolution_has_a_level_of_its_own_per_sample():
    count, seen = 400, []
    model = upsampler(low_res_noise=0.5)
    model.register_forward_hook(lambda module, args, output: seen.append(args[2]))
    with torch.no_grad():
        model.losses(torch.arange(count), torch.zeros(count, 3, SIZE, SIZE))
    level = 0.5 * keyed_random.uniform(torch.arange(count), "low_res_level")
    ratio = seen[0].square().mean((1, 2, 3)).sqrt() / level  # 48 normals: sd about .1
    assert ratio.mean().item() == pytest.approx(1, abs=0.03)
    assert level.max() > 0.45 and level.min() < 0.05


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 9])
def test_images_that_do_not_halve_are_refused_in_one_line(size: int):
    keys = torch.arange(2)
    with pytest.raises(ValueError, match=f"found {size} x {size}, expected a multiple") as error:
        decoder().losses(keys, images(2, size), condition(slice(2)))
    assert "\n" not in str(error.value)


def test_a_low_resolution_that_does_not_halve_is_refused():
    deep = UNetConfig(channels=8, channel_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=())
    how = ImageSampling(sampler=SAMPLERS["ddim"], sample_steps=1)
    model = upsampler(unet=deep)
    with pytest.raises(ValueError, match="image size: found 6 x 10, expected a multiple of"):
        model.sample(torch.tensor([0]), torch.zeros(1, 3, 3, 5), how)
    assert model.sample(torch.tensor([0]), torch.zeros(1, 3, 4, 6), how).shape == (1, 3, 8, 12)


def test_an_embedding_grid_fits_the_size_it_was_trained_at_alone():
    model = decoder(embed_grid=True)
    with pytest.raises(ValueError, match="image size: found 12 x 12, expected 8 x 8"):
        model.losses(torch.arange(2), images(2, 12), condition(slice(2)))
