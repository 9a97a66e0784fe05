"""Laws of the decoder and the upsampler: keys, guidance, degradation and sizes.

The network itself, and what a condition may reach, are in test_models_unet.py.
"""

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from _networks import EMBED, PLAIN, SIZE, TEXT, UNET, awake, condition, decoder, images, upsampler

from models.configs import DecoderConfig, Spacing
from models.decoder import Condition, Decoder, ImageSampling
from models.degradation import gaussian_blur
from models.diffusion import keyed_random
from models.diffusion.samplers import SAMPLERS

# -- keys ------------------------------------------------------------------------------------------


def test_losses_depend_on_keys_and_not_on_the_batch():
    keys, part = torch.arange(6) * 31, slice(2, 5)
    base = decoder(embed_noise=0.3)
    up = upsampler(low_res_noise=0.5)
    for whole, alone in (
        (base.losses(keys, images(6), condition()),
         base.losses(keys[part], images(6)[part], condition(rows=part))),
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


@pytest.mark.parametrize("degradation", ["none", "blur", "bsr"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_upsampler_of_one_size_runs_at_others(degradation: str, interpolation: str):
    model = upsampler(degradation=degradation, interpolation=interpolation, unet=PLAIN)
    model.losses(torch.arange(3), images(3, 16))["loss"].mean().backward()
    how = ImageSampling(sampler=SAMPLERS["ddim"], sample_steps=2)
    for height, width in ((8, 8), (16, 24)):
        low_res = images(2, 32)[:, :, :height, :width]
        found = model.sample(torch.arange(2), low_res, how)
        assert found.shape == (2, 3, 2 * height, 2 * width) and torch.isfinite(found).all()


def test_without_corruption_the_low_resolution_is_the_mean_of_its_pixels():
    image = images(2)
    low_res, level = upsampler(degradation="none").degrade(image, torch.arange(2))
    expected = image.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
    torch.testing.assert_close(low_res, expected)
    assert not level.any()


def test_training_and_sampling_raise_the_low_resolution_alike():
    """The network sees the same of a low resolution, whoever made it."""
    model, seen = upsampler(), []
    model.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 3:]))
    keys, image = torch.arange(2), images(2, 16)
    model.losses(keys, image)
    low_res, _ = model.degrade(image, keys)
    model.sample(keys, low_res, ImageSampling(sampler=SAMPLERS["ddim"], sample_steps=1))
    torch.testing.assert_close(seen[0], seen[1], atol=0, rtol=0)


def test_an_upsampler_reads_the_level_of_the_noise_it_sees():
    model = upsampler(low_res_noise=0.5, tell_noise=True)
    x, t, low_res = images(2, 16), torch.tensor([3, 700]), images(2)
    clean, noisy = (model(x, t, low_res, level) for level in (None, torch.tensor([0.2, 0.4])))
    torch.testing.assert_close(model(x, t, low_res, torch.zeros(2)), clean)
    assert (noisy - clean).abs().amax((1, 2, 3)).min() > 1e-4


# -- captions of its own, and what it learns of its variance ---------------------------------------


def own_words(**changes) -> tuple[Any, Condition]:
    """A decoder with a text transformer of its own, and four captions of 3 to 6 tokens."""
    torch.manual_seed(0)
    sizes = {"text_tokens": 8, "text_depth": 2, "text_heads": 2, "context_width": 8}
    config = DecoderConfig(**{"unet": UNET, **sizes, **changes})
    sizes = {"image_size": SIZE, "embed_dim": EMBED, "text_width": TEXT, "vocab_size": 20}
    model = awake(Decoder(config, **sizes))
    mask = torch.arange(8) < torch.tensor([3, 4, 5, 6])[:, None]
    tokens = torch.randint(1, 20, (4, 8), generator=torch.Generator().manual_seed(3)) * mask
    return model, Condition(image_embed=condition().image_embed[:4], tokens=tokens, token_mask=mask)


def output(model: Decoder, given: Condition, *, image: bool = False, text: bool = False):
    drops = (torch.full((4,), each) for each in (image, text))
    return model(images(4), torch.tensor([1, 200, 500, 900]), given, *drops)


def test_an_own_text_transformer_reads_the_caption_and_nothing_behind_it():
    model, given = own_words()
    words, mask = given.tokens, given.token_mask
    assert words is not None and mask is not None
    behind = replace(given, tokens=torch.where(mask, words, 7))
    torch.testing.assert_close(output(model, behind), output(model, given))
    first = words.clone()
    first[:, 0] = words[:, 0] % 19 + 1
    changed = output(model, replace(given, tokens=first)) - output(model, given)
    assert changed.abs().amax((1, 2, 3)).min() > 1e-5
    torch.testing.assert_close(
        output(model, replace(given, tokens=first), text=True), output(model, given, text=True)
    )


def test_z_t_reaches_the_timestep_where_it_is_asked_for():
    model, given = decoder(text_embed_cond=True), condition(rows=slice(4))
    with pytest.raises(ValueError, match="found none; pass text_embed"):
        output(model, given)
    given = replace(given, text_embed=given.image_embed.flip(0))
    other = replace(given, text_embed=given.image_embed)
    assert (output(model, given) - output(model, other)).abs().amax((1, 2, 3)).min() > 1e-5
    torch.testing.assert_close(output(model, given, text=True), output(model, other, text=True))


def test_a_learned_variance_is_the_second_half_and_learns_from_the_bound_alone():
    model, _ = own_words(learned_variance=True, use_text=False, text_tokens=0)
    keys, given = torch.arange(4), condition(rows=slice(4))
    found = model.losses(keys, images(4), given)
    assert found["bound"].shape == (4,) and (found["bound"] > 0).all()
    found["loss"].sum().backward()
    last = model.unet.conv_out.weight.grad
    assert last is not None and (last.abs().flatten(1).sum(1) > 0).all()
    without, _ = own_words(learned_variance=True, use_text=False, text_tokens=0, bound_weight=0.0)
    without.load_state_dict(model.state_dict())
    without.losses(keys, images(4), given)["loss"].sum().backward()
    other = without.unet.conv_out.weight.grad
    assert other is not None and not other[3:].any()  # the variance has no other teacher
    torch.testing.assert_close(last[:3], other[:3])  # and it is no teacher of the mean


def test_the_learned_sampler_asks_for_a_learned_variance():
    how = ImageSampling(sampler=SAMPLERS["learned_ddpm"], sample_steps=3, cfg_scale=2.0)
    model, _ = own_words(learned_variance=True, use_text=False, text_tokens=0)
    keys, given = torch.arange(4), condition(rows=slice(4))
    found = model.sample(keys, given, how)
    assert found.shape == (4, 3, SIZE, SIZE) and torch.isfinite(found).all()
    alone = model.sample(keys[1:2], condition(rows=slice(1, 2)), how)
    torch.testing.assert_close(alone, found[1:2], atol=1e-5, rtol=0)
    for draw in (lambda: decoder().sample(keys, given, how),
                 lambda: upsampler().sample(keys, images(4), how)):  # fmt: skip
        with pytest.raises(ValueError, match="learned_ddpm for a model that learned no variance"):
            draw()


@pytest.mark.parametrize(
    ("changes", "option"),
    [({"text_embed_cond": True, "use_text": False}, "text_embed_cond"),
     ({"text_embed_cond": True, "text_tokens": 8}, "text_embed_cond"),
     ({"text_tokens": 8, "use_text": False}, "text_tokens"),
     ({"zero_terminal": True, "prediction": "eps"}, "zero_terminal")],
)  # fmt: skip
def test_what_would_do_nothing_or_cannot_be_is_refused(changes, option):
    with pytest.raises(ValueError, match=f"{option}: found"):
        decoder(**changes)


def test_an_upsamplers_options_fit_together():
    with pytest.raises(ValueError, match="tell_noise: found true"):
        upsampler(tell_noise=True)
    with pytest.raises(ValueError, match="zero_terminal: found true"):
        upsampler(zero_terminal=True, prediction="eps")


def test_the_end_of_a_caption_is_its_last_real_token_whatever_stands_between():
    """A word may have token 0: the end is not where the count of the others says."""
    model, given = own_words()
    words, mask = given.tokens, given.token_mask
    assert words is not None and mask is not None
    gap = mask & (torch.arange(8) != 1)
    seen = []
    model.caption_to_cond.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    states = model.text_encoder(words, gap)
    model.encode_condition(replace(given, token_mask=gap))
    torch.testing.assert_close(seen[0], states[torch.arange(4), torch.tensor([2, 3, 4, 5])])


def test_corruptions_are_computed_in_fp32_under_autocast():
    model, keys = upsampler(degradation="bsr", low_res_noise=0.1), torch.arange(4)
    exact, _ = model.degrade(images(4, 32), keys)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = model.degrade(images(4, 32), keys)
    assert found.dtype == torch.float32 and torch.equal(found, exact)


def test_recomputed_activations_give_the_same_gradient():
    grads = []
    for checkpointing in (False, True):
        model = decoder(unet=replace(UNET, checkpointing=checkpointing)).train()
        model.losses(torch.arange(6), images(6), condition())["loss"].sum().backward()
        found = [p.grad for p in model.parameters()]
        grads.append(torch.cat([grad.flatten() for grad in found if grad is not None]))
    torch.testing.assert_close(grads[0], grads[1])


# -- other ways to guide, and what is known --------------------------------------------------------


def test_a_weaker_decoder_guides_as_the_rule_says():
    """cond + (s - 1) (cond - weak), the weak one under the same condition."""
    strong, weak, keys, given = decoder(), decoder(text_drop=0.3), torch.arange(6), condition()
    with torch.no_grad():
        weak.unet.conv_out.weight.mul_(0.5)
    how = ImageSampling(sampler=SAMPLERS["ddim"], sample_steps=1, cfg_scale=1.0)
    parts = [each.sample(keys, given, how) for each in (strong, weak)]
    guided = strong.sample(keys, given, replace(how, cfg_scale=1.5), guide=weak)
    expected = (parts[1] + 1.5 * (parts[0] - parts[1])).clamp(-1, 1)
    inside = (parts[0].abs() < 1) & (parts[1].abs() < 1)
    torch.testing.assert_close(guided[inside], expected[inside], atol=1e-5, rtol=0)
    same = strong.sample(keys, given, replace(how, cfg_scale=1.5), guide=strong)
    torch.testing.assert_close(same, parts[0], atol=1e-5, rtol=0)
    for other, what in (
        (decoder(prediction="eps"), "prediction: found 'eps', expected 'v'"),
        (decoder(use_text=False), "use_text: found False, expected True"),
        (decoder(schedule="linear"), "schedule: found 'linear', expected 'cosine'"),
    ):
        with pytest.raises(ValueError, match=f"guide: {what}"):
            strong.sample(keys, given, replace(how, cfg_scale=1.5), guide=other)


def test_what_is_known_stays_and_the_rest_is_drawn():
    model, keys, given, known = decoder(), torch.arange(6), condition(), images(6)
    mask = torch.zeros(6, 1, SIZE, SIZE)
    mask[:, :, :, : SIZE // 2] = 1
    how = ImageSampling(sampler=SAMPLERS["dpmpp_2m"], sample_steps=4)
    found = model.sample(keys, given, how, known=(known, mask))
    torch.testing.assert_close(found[..., : SIZE // 2], known[..., : SIZE // 2])
    assert not torch.allclose(found[..., SIZE // 2 :], known[..., SIZE // 2 :], atol=0.1)


@pytest.mark.slow
def test_an_inverted_training_image_comes_back():
    """From its x_T a decoder that has learned six images draws each again, to 35 dB."""
    model = decoder(embed_grid=True, unet=replace(UNET, channels=16)).train()
    given, image = condition(), F.interpolate(images(6, 4), scale_factor=2, mode="bilinear") * 0.9
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(120):
        model.losses(torch.arange(6) + 6 * step, image, given)["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    for spacing in get_args(Spacing):
        how = ImageSampling(sampler=SAMPLERS["ddim"], sample_steps=50, spacing=spacing)
        start = model.invert(image, given, 50, spacing)
        back = model.sample(torch.arange(6), given, how, start=start)
        other = model.sample(torch.arange(6), given, how)
        decibels = [10 * math.log10(4 / (each - image).square().mean()) for each in (back, other)]
        assert decibels[0] > 35 > decibels[1] + 5, spacing


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 9])
def test_images_that_do_not_halve_are_refused_in_one_line(size: int):
    keys = torch.arange(2)
    with pytest.raises(ValueError, match=f"found {size} x {size}, expected a multiple") as error:
        decoder().losses(keys, images(2, size), condition(rows=slice(2)))
    assert "\n" not in str(error.value)


def test_a_low_resolution_that_does_not_halve_is_refused():
    deep = replace(PLAIN, channel_mult=(1, 1, 1))
    how = ImageSampling(sampler=SAMPLERS["ddim"], sample_steps=1)
    model = upsampler(unet=deep)
    with pytest.raises(ValueError, match="image size: found 6 x 10, expected a multiple of"):
        model.sample(torch.tensor([0]), torch.zeros(1, 3, 3, 5), how)
    assert model.sample(torch.tensor([0]), torch.zeros(1, 3, 4, 6), how).shape == (1, 3, 8, 12)


def test_an_embedding_grid_fits_the_size_it_was_trained_at_alone():
    model = decoder(embed_grid=True)
    with pytest.raises(ValueError, match="image size: found 12 x 12, expected 8 x 8"):
        model.losses(torch.arange(2), images(2, 12), condition(rows=slice(2)))
