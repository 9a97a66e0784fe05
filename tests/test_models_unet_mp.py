"""Laws of the U-Net that keeps magnitudes, and of either kind channels-last in memory."""

import copy
import dataclasses
import json
from typing import Any

import _networks
import pytest
import torch
from _networks import EMBED, LENGTH, SIZE, TEXT, awake
from torch import Tensor, nn

from models.configs import DecoderConfig, UNetConfig
from models.convert.runs import build_model
from models.costs import forward_macs, meta_copy, num_parameters
from models.decoder import Decoder, ImageSampling
from models.diffusion.samplers import SAMPLERS
from models.networks.unet import UNet
from models.networks.unet_blocks import cells_of, image_of
from models.networks.unet_mp import (
    MPAttentionBlock,
    MPConv,
    MPFirstConv,
    MPLinear,
    MPResBlock,
    MPTimestep,
    mp_cat,
    mp_silu,
    mp_sum,
    unit,
)

CONTEXT = 8
PLAIN = dataclasses.replace(_networks.UNET, channels=16)
UNET = dataclasses.replace(PLAIN, magnitude_preserving=True)
KINDS = pytest.mark.parametrize("config", [PLAIN, UNET], ids=["adm", "magnitude_preserving"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def magnitude(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def network(config: UNetConfig = UNET, *, asleep: bool = False, **sizes: int) -> UNet:
    """Build a U-Net; asleep: as it is before training."""
    torch.manual_seed(0)
    wanted = {"image_size": SIZE, "in_channels": 3, "out_channels": 3, "context": CONTEXT, **sizes}
    unet = UNet(config, **wanted)
    return unet if asleep else awake(unet).train()


def asked(count: int = 4, size: int = SIZE, width: int = 16) -> dict[str, Any]:
    """What a decoder hands to its U-Net; the last two tokens of all are padding."""
    return {
        "x": normal(count, 3, size, size, seed=1),
        "t": torch.linspace(0, 999, count).long(),
        "cond": normal(count, 4 * width, seed=2),
        "grid": normal(count, width, size, size, seed=3),
        "tokens": normal(count, LENGTH, CONTEXT, seed=4),
        "token_mask": (torch.arange(LENGTH) < LENGTH - 2).expand(count, -1),
    }


# -- magnitudes ------------------------------------------------------------------------------------


def test_the_functions_keep_unit_magnitude():
    a, b = normal(64, 24, 8, 8, seed=1), normal(64, 40, 8, 8, seed=2)
    assert magnitude(mp_silu(a)) == pytest.approx(1, abs=0.01)
    for t in (0.0, 0.3, 0.5, 1.0):
        assert magnitude(mp_sum(a, normal(*a.shape, seed=3), t)) == pytest.approx(1, abs=0.01)
        assert magnitude(mp_cat(a, b, t)) == pytest.approx(1, abs=0.01)
    cells = unit(7 * a + 1).square().mean(dim=1)
    torch.testing.assert_close(cells, torch.ones_like(cells), atol=1e-3, rtol=0)


def test_a_sum_and_a_join_give_each_part_its_share():
    """What a next layer sees of each part of a join does not depend on its channels."""
    a, b = normal(64, 8, 8, 8, seed=1), normal(64, 56, 8, 8, seed=2)
    joined = mp_cat(a, b, 0.5)
    one, other = (part.square().sum() for part in (joined[:, :8], joined[:, 8:]))
    assert (one / other).item() == pytest.approx(1, abs=0.05)
    assert torch.equal(mp_sum(a, a.flip(0), 0.0), a)
    torch.testing.assert_close(mp_sum(a, a.flip(0), 1.0), a.flip(0))


@pytest.mark.parametrize(
    "layer",
    [lambda: MPLinear(200, 300), lambda: MPTimestep(64, 300)],
    ids=["linear", "timestep"],
)
def test_linear_layers_keep_unit_magnitude(layer: Any):
    made = layer()
    x = torch.arange(1000) if isinstance(made, MPTimestep) else normal(1000, 200)
    assert magnitude(made(x)) == pytest.approx(1, abs=0.1)


BLOCKS = {
    "conv": lambda: MPConv(32, 48),
    "first": lambda: MPFirstConv(32, 48),
    "same": lambda: MPResBlock(channels=32, out=32, cond=16, dropout=0.0),
    "wider": lambda: MPResBlock(channels=32, out=48, cond=16, dropout=0.0),
    "entry": lambda: MPResBlock(channels=32, out=48, cond=16, dropout=0.0, norm=True),
    "down": lambda: MPResBlock(channels=32, out=32, cond=16, dropout=0.0, resample="down",
                               norm=True),
    "up": lambda: MPResBlock(channels=32, out=32, cond=16, dropout=0.0, resample="up"),
    "attention": lambda: MPAttentionBlock(channels=32, head_channels=8, context=CONTEXT),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_keep_unit_magnitude(name: str):
    """Within what zeros beyond the border, and a mean over independent values, take from it."""
    torch.manual_seed(0)
    block, x = BLOCKS[name](), normal(8, 32, 16, 16)
    if isinstance(block, MPAttentionBlock):
        out = block(x, normal(8, LENGTH, CONTEXT), torch.ones(8, LENGTH, dtype=torch.bool))
    else:
        out = block(x, normal(8, 16)) if isinstance(block, MPResBlock) else block(x)
    assert 0.88 < magnitude(out) < 1.05


def magnitudes(unet: UNet, given: dict[str, Any]) -> list[float]:
    """What each level of the network gives, in order."""
    seen: list[float] = []
    for level in (*unet.down, *unet.middle, *unet.up):
        level.register_forward_hook(lambda module, args, out: seen.append(magnitude(out)))
    unet(**given)
    return seen


def test_magnitudes_stay_over_a_deep_network_and_adms_do_not():
    """ADM's with values in the layers that start at zero, as training gives them."""
    sizes: dict[str, Any] = {"num_res_blocks": 5, "channels": 32}
    found = magnitudes(network(dataclasses.replace(UNET, **sizes), asleep=True), asked(width=32))
    assert len(found) == 26 and all(0.7 < each < 1.1 for each in found), found
    other = magnitudes(network(dataclasses.replace(PLAIN, **sizes)), asked(width=32))
    assert max(other) > 2, other


def test_conditions_of_any_magnitude_weigh_the_same():
    """Their layers are outside, and know of no magnitudes: direction and contrast count."""
    unet, given = network(), asked()
    before = unet(**given)
    for name in ("cond", "grid", "tokens"):
        found = unet(**{**given, name: 100 * given[name]})
        torch.testing.assert_close(found, before, atol=2e-3, rtol=2e-3)


# -- weights ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_weights_scale_reaches_the_output():
    unet, given = network(), asked()
    before, scaled = unet(**given), 0
    for name, parameter in unet.named_parameters():
        if name.endswith("weight"):
            parameter.mul_(37.0)
            scaled += 1
        else:
            assert name.endswith("gain") and parameter.ndim == 0, name  # and no bias
    assert scaled > 20 and before.std() > 0.1
    torch.testing.assert_close(unet(**given), before, atol=1e-4, rtol=1e-4)


def test_it_has_no_norms_and_a_loss_pulls_all_its_weights_and_across_only():
    """A gradient along a weight would change a scale that nothing reads."""
    unet = network()
    assert not [m for m in unet.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))]
    (unet(**asked()) - 1).square().sum().backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        if name.endswith("weight"):
            weight, gradient = parameter.detach().flatten(1), parameter.grad.flatten(1)
            along = (weight * gradient).sum(1) / (weight.norm(dim=1) * gradient.norm(dim=1) + 1e-9)
            assert along.abs().max() < 1e-3, name


def test_the_channel_of_ones_is_a_bias():
    conv = MPFirstConv(3, 4)
    nothing = conv(torch.zeros(1, 3, 5, 5))
    assert (nothing[0, :, 2, 2] != 0).all()


def test_the_output_starts_at_zero_and_the_condition_unread():
    unet, given = network(asleep=True), asked()
    assert not unet(**given).any()
    seen: list[Tensor] = []
    unet.conv_out.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    unet(**given)
    unet(**{**given, "cond": -given["cond"], "t": given["t"].flip(0)})
    torch.testing.assert_close(seen[0], seen[1])



@pytest.mark.parametrize(("config", "checkpointing"), [(PLAIN, False), (UNET, True)])
def test_it_learns_a_fixed_batch(config: UNetConfig, checkpointing: bool):
    """At a learning rate that ADM's blocks learn it with as well."""
    unet = network(dataclasses.replace(config, checkpointing=checkpointing), asleep=True)
    given, target = asked(4), normal(4, 3, SIZE, SIZE, seed=9)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        loss = (unet(**given) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(target.square().mean().item()) and losses[-1] < 0.3


def test_bf16_is_near_fp32():
    unet, given = network(), asked()
    with torch.no_grad():
        exact = unet(**given)
        with torch.autocast("cpu", torch.bfloat16):
            found = unet(**given)
    assert found.dtype == torch.float32 and (found != exact).any()
    assert (found - exact).square().mean().sqrt() < 0.03 * exact.std()


# -- what it reads ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["x", "t", "cond", "grid", "tokens"])
def test_what_is_given_is_read(name: str):
    unet, given = network(), asked()
    before = unet(**given)
    assert not torch.allclose(unet(**{**given, name: given[name].flip(0)}), before, atol=1e-3)


@torch.no_grad()
def test_padding_is_not_read_and_no_token_need_be_there():
    unet, given = network(), asked()
    before, mask = unet(**given), given["token_mask"]
    spoilt = given["tokens"].masked_fill(~mask[..., None], 1e3)
    torch.testing.assert_close(unet(**{**given, "tokens": spoilt}), before)
    unread = unet(**{**given, "token_mask": torch.zeros_like(mask)})
    none = unet(**{**given, "tokens": None, "token_mask": None})
    torch.testing.assert_close(unread, none)
    assert not torch.allclose(unread, before, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2])
def test_it_runs_at_other_sizes(patch_size: int):
    config = dataclasses.replace(UNET, patch_size=patch_size, attn_resolutions=(4 // patch_size,))
    unet = network(config, out_channels=5)
    for height, width in ((8, 8), (16, 16), (12, 20)):
        out = unet(normal(2, 3, height, width), torch.tensor([1, 500]))
        assert out.shape == (2, 5, height, width) and out.dtype == torch.float32


def test_a_decoder_and_an_upsampler_with_it_sample():
    model, cond = _networks.decoder(unet=UNET, embed_grid=True), _networks.condition(2)
    model.losses(torch.arange(2), _networks.images(2), cond)["loss"].sum()
    how = ImageSampling(sampler=SAMPLERS["ddim"], sample_steps=3, cfg_scale=2.0)
    unet = dataclasses.replace(UNET, attn_resolutions=())
    up = _networks.upsampler(unet=unet, low_res_noise=0.1, tell_noise=True)
    with torch.no_grad():
        for each in (model.unet, up.unet):
            assert isinstance(each.conv_out, MPConv) and each.conv_out.gain is not None
            each.conv_out.gain.fill_(0.05)
    small = model.sample(torch.arange(2), cond, how)
    large = up.sample(torch.arange(2), small, dataclasses.replace(how, cfg_scale=1.0))
    assert large.shape == (2, 3, 2 * SIZE, 2 * SIZE) and large.abs().max() <= 1
    assert (small[0] != small[1]).any() and (large[0] != large[1]).any()


def test_a_text_transformer_beside_it_normalises_queries_and_keys():
    for unet, normed in ((PLAIN, False), (UNET, True)):
        own: Any = {"text_tokens": 4, "text_depth": 1, "text_heads": 2}
        config = DecoderConfig(unet=unet, context_width=CONTEXT, **own)
        model = Decoder(config, image_size=SIZE, embed_dim=EMBED, text_width=TEXT, vocab_size=9)
        assert any(isinstance(module, nn.RMSNorm) for module in model.modules()) == normed


# -- configurations and costs ----------------------------------------------------------------------


def test_a_norm_that_would_do_nothing_is_refused():
    config = dataclasses.replace(UNET, qk_norm=True)
    with pytest.raises(ValueError, match="qk_norm: found true with magnitude_preserving, expected"):
        network(config)


@pytest.mark.parametrize("unet", [PLAIN, UNET])
def test_a_configuration_from_before_the_options_builds_what_it_did(unet: UNetConfig):
    sizes = {"kind": "decoder", "image_size": SIZE, "embed_dim": EMBED, "text_width": TEXT}
    model = json.loads(json.dumps({"unet": dataclasses.asdict(unet)}))
    built: Any = build_model({**sizes, "model": model})
    assert built.unet.config == unet
    if unet == PLAIN:
        del model["unet"]["magnitude_preserving"], model["unet"]["channels_last"]
        built = build_model({**sizes, "model": model})
        assert built.unet.config == unet


def test_its_parameters_and_multiplications_are_counted():
    """ADM's, less the second layer of the timestep, shifts, biases and norms; plus the ones."""
    plain, mine = (dataclasses.replace(each, channel_mult=(1, 1)) for each in (PLAIN, UNET))
    one, other = network(plain), network(mine)
    # as on a GPU: a CPU takes fewer products for the convolution of an enlargement
    given = {name: value.to("meta") for name, value in asked(1).items()}
    twins = [meta_copy(unet) for unet in (one, other)]
    macs = [forward_macs(lambda unet=unet: unet(**given)) for unet in twins]
    blocks, cond = len(one.down) + len(one.middle) + len(one.up), 4 * 16
    fewer = cond**2 + blocks * cond * 16
    assert macs[0] - macs[1] == fewer - 9 * 16 * SIZE**2
    matrices = sum(p.numel() for p in one.parameters() if p.ndim > 1)
    assert num_parameters(other) == matrices - fewer + 9 * 16 + blocks + 1  # gains, one a block


# -- channels-last ---------------------------------------------------------------------------------


def formats(unet: UNet, given: dict[str, Any]) -> tuple[Tensor, set[bool]]:
    """Run, and return whether what each convolution and level gave is channels-last."""
    seen = set()

    def look(module: nn.Module, args: Any, out: Tensor) -> None:
        if out.ndim == 4 and min(out.shape[1:]) > 1:
            last = out.is_contiguous(memory_format=torch.channels_last)
            seen.add(last and not out.is_contiguous())

    hooks = [module.register_forward_hook(look) for name, module in unet.named_modules() if name]
    out = unet(**given)
    for hook in hooks:
        hook.remove()
    return out, seen


@KINDS
def test_channels_last_is_the_same_network(config: UNetConfig, monkeypatch: pytest.MonkeyPatch):
    unet, given = network(config), asked()
    last = copy.deepcopy(unet)
    last.channels_last = True
    expected, seen = formats(unet, given)
    assert seen == {False}
    x = given["x"].contiguous(memory_format=torch.channels_last)
    assert formats(unet, {**given, "x": x})[1] == {False}, "the memory of the image decides nothing"
    group_norm = torch.nn.functional.group_norm
    for undo in (lambda y: y, lambda y: y.contiguous()):  # the second as torch's on GPUs does
        monkeypatch.setattr(
            "torch.nn.functional.group_norm", lambda *args, f=undo: f(group_norm(*args))
        )
        found, seen = formats(last, given)
        assert seen == {True} and found.is_contiguous()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    for (name, one), other in zip(unet.named_parameters(), last.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        # ZeRO flattens gradients, and Muon views them as matrices
        assert other.is_contiguous() and other.grad.is_contiguous(), name
        torch.testing.assert_close(other.grad, one.grad, atol=1e-3, rtol=1e-3)



def test_cells_of_channels_last_images_are_not_copied():
    x = normal(2, 6, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert image_of(cells_of(last), like=last).data_ptr() == last.data_ptr()
    for each in (x, last):
        back = image_of(cells_of(each), like=each)
        assert torch.equal(back, x) and back.stride() == each.stride()
