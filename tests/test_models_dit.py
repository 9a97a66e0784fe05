"""Laws of the transformer over patches, and of the decoder that it is the network of."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _networks import DIT, EMBED, LENGTH, SIZE, awake, condition, decoder, images
from torch import Tensor

from models.configs import DecoderConfig, DiTConfig, weight_options
from models.costs import num_parameters, training_flops
from models.decoder import Condition, Decoder, ImageSampling
from models.diffusion.losses import require_weights, timestep_weight
from models.diffusion.samplers import dpmpp_2m
from models.diffusion.schedule import NoiseSchedule
from models.networks.dit import DiT, DiTBlock, rotated, rotations

T = torch.tensor([3, 700])
CPU = torch.device("cpu")


def dit(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = dataclasses.replace(DIT, **changes)
    return awake(DiT(config, image_size=SIZE, in_channels=3, out_channels=5, context=8))


def dit_decoder(*, asleep: bool = False, **changes: Any) -> Any:
    return decoder(asleep=asleep, network="dit", dit=DIT, **changes)


def given(model: Any, count: int = 2, length: int = LENGTH) -> dict[str, Tensor]:
    """Return a condition of every kind, of which the last two tokens are hidden."""
    rng = torch.Generator().manual_seed(2)
    width, side = model.cond_width, model.grid
    return {
        "cond": torch.randn(count, width, generator=rng),
        "grid": torch.randn(count, width, side, side, generator=rng),
        "tokens": torch.randn(count, length, model.context, generator=rng),
        "token_mask": (torch.arange(length) < length - 2).repeat(count, 1),
    }


# -- an oracle: one sample, one head and one token at a time ---------------------------------------


def plain_turn(vector: Tensor, row: int, column: int) -> Tensor:
    """Turn a head's pairs: the first half with the row, the second half with the column."""
    half, turned = len(vector) // 2, vector.clone()
    for i in range(half):
        place, step = (row, i) if i < half // 2 else (column, i - half // 2)
        angle = place * 100.0 ** (-step / (half // 2))
        a, b = float(vector[i]), float(vector[i + half])
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def normed(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def plain_block(
    block: Any, x: Tensor, cond: Tensor, places: list[tuple[int, int] | None], keep: list[bool]
) -> Tensor:
    """Map x [N, W]; places: row and column of a token, None for one that is nowhere."""
    width, heads = x.shape[1], block.num_heads
    chunks = block.modulation(cond * torch.sigmoid(cond)).split(width)
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = chunks
    q, k, v = block.qkv(normed(x) * (1 + scale_1) + shift_1).split(width, dim=1)
    size, rows = width // heads, []
    for i in range(len(x)):
        read = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)

            def turned(y: Tensor, n: int, part: slice = part) -> Tensor:
                place = places[n]
                vector = normed(y[n, part])
                return vector if place is None else plain_turn(vector, *place)

            seen = [j for j in range(len(x)) if keep[j]]
            logits = [float(turned(q, i) @ turned(k, j)) / math.sqrt(size) for j in seen]
            weights = torch.tensor(logits).softmax(0)
            read.append(sum(w * v[j, part] for w, j in zip(weights, seen, strict=True)))
        rows.append(torch.cat(read))
    x = x + gate_1 * block.out(torch.stack(rows))
    gate, value = block.mlp_in(normed(x) * (1 + scale_2) + shift_2).chunk(2, dim=1)
    return x + gate_2 * block.mlp_out(gate * torch.sigmoid(gate) * value)


def plain_dit(model: Any, x: Tensor, t: int, options: dict[str, Tensor]) -> Tensor:
    """Map x [3, H, W] with the rows of `options` that are its own."""
    p, side = model.config.patch_size, x.shape[1] // model.config.patch_size
    half = 128
    angles = t * torch.exp(-math.log(10_000) * torch.arange(half) / half)
    first, _, last = model.time_in
    cond = first(torch.cat([angles.cos(), angles.sin()]))
    cond = last(cond * torch.sigmoid(cond)) + options["cond"]
    tokens = [model.context_in(token) for token in options["tokens"]]
    places: list[tuple[int, int] | None] = [None] * len(tokens)
    keep = options["token_mask"].tolist() + [True] * side**2
    for i in range(side):
        for j in range(side):
            patch = x[:, i * p : (i + 1) * p, j * p : (j + 1) * p].flatten()
            tokens.append(model.patch_in(patch) + options["grid"][:, i, j])
            places.append((i, j))
    h = torch.stack(tokens)
    for block in model.blocks:
        h = plain_block(block, h, cond, places, keep)
    shift, scale = model.modulation_out(cond * torch.sigmoid(cond)).chunk(2)
    out = torch.empty(5, *x.shape[1:])
    for (i, j), token in zip(places[-(side**2) :], h[-(side**2) :], strict=True):  # pyright: ignore
        patch = model.patch_out(normed(token) * (1 + scale) + shift)
        out[:, i * p : (i + 1) * p, j * p : (j + 1) * p] = patch.unflatten(0, (5, p, p))
    return out


@torch.no_grad()
@pytest.mark.parametrize("bottleneck_channels", [0, 6])
def test_it_computes_what_a_plain_one_does(bottleneck_channels: int):
    model, x = dit(bottleneck_channels=bottleneck_channels), images(2)
    options = given(model)
    found = model(x, T, **options)
    for row in range(2):
        own = {name: value[row] for name, value in options.items()}
        expected = plain_dit(model, x[row], int(T[row]), own)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


# -- the network -----------------------------------------------------------------------------------


def test_products_of_turned_vectors_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    table = rotations(6, 6, 16, CPU).unflatten(1, (6, 6))

    def product(a: tuple[int, int], b: tuple[int, int]) -> float:
        turned = (rotated(x, table[:, *at][:, None]) for x, at in ((q, a), (k, b)))
        return float((next(turned) * next(turned)).sum())

    assert product((0, 1), (2, 4)) == pytest.approx(product((3, 2), (5, 5)), abs=1e-5)
    assert product((0, 1), (2, 4)) != pytest.approx(product((0, 1), (4, 2)), abs=1e-3)


@torch.no_grad()
def test_hidden_tokens_change_nothing_and_the_others_do():
    model, x = dit(), images(2)
    options = given(model)
    expected = model(x, T, **options)
    options["tokens"][:, -2:] = 100.0
    torch.testing.assert_close(model(x, T, **options), expected, atol=0, rtol=0)
    shorter = options | {name: options[name][:, :-2] for name in ("tokens", "token_mask")}
    torch.testing.assert_close(model(x, T, **shorter), expected, atol=1e-5, rtol=1e-5)
    options["tokens"][:, 0] = 1.0
    assert (model(x, T, **options) - expected).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("sides", [(4, 10), (8, 8), (12, 2)])
def test_it_runs_at_any_sides_that_patches_fill(sides: tuple[int, int]):
    model = dit()
    x = torch.rand(2, 3, *sides, generator=torch.Generator().manual_seed(0))
    out = model(x, T)
    assert out.shape == (2, 5, *sides) and out.dtype == torch.float32
    alone = model(x[1:], T[1:])
    torch.testing.assert_close(out[1:], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"width": 18, "num_heads": 4}, 8, "width: found 18 with num_heads 4"),
        ({"width": 12, "num_heads": 2}, 8, "heads of a multiple of 4 channels"),
        ({"num_heads": 0}, 8, "num_heads: found 0, expected 1 or more"),
        ({"refine_channels": -1}, 8, "refine_channels: found -1, expected 0 or more"),
        ({"patch_size": 3}, 8, "image size: found 8, expected a multiple of patch_size = 3"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(changes: dict[str, int], size: int, message: str):
    config = dataclasses.replace(DIT, **changes)
    with pytest.raises(ValueError, match=message):
        DiT(config, image_size=size, in_channels=3, out_channels=3)


def test_a_grid_of_another_size_is_refused():
    model = dit()
    with pytest.raises(ValueError, match="image size: found 10 x 8, expected 8 x 8 as in training"):
        model(torch.zeros(2, 3, 10, 8), T, grid=torch.zeros(2, 16, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains_in_each_precision(dtype: torch.dtype):
    model, x = dit(), images(2)
    options = given(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        model.train()(x, T, **options).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.context_in.weight.grad.any()


# -- the decoder -----------------------------------------------------------------------------------


def test_the_output_starts_at_zero_and_every_parameter_learns():
    model = dit_decoder(asleep=True, prediction="x0", weighting="v")
    keep = torch.zeros(2, dtype=torch.bool)
    assert not model(images(2), T, condition(2), keep, keep).any()
    model = awake(model).train()
    model.losses(torch.arange(8), images(8), condition(8))["loss"].mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_recomputed_activations_give_the_same_gradient():
    gradients = []
    for checkpointing in (False, True):
        sizes = dataclasses.replace(DIT, checkpointing=checkpointing)
        model = decoder(network="dit", dit=sizes).train()
        model.losses(torch.arange(6), images(6), condition())["loss"].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"embed_grid": True}, {"learned_variance": True}])
def test_a_key_draws_the_same_image_in_any_batch(changes: dict[str, Any]):
    model = dit_decoder(prediction="x0", **changes)
    options = ImageSampling(sampler=dpmpp_2m, sample_steps=4, cfg_scale=2.0)
    keys = torch.arange(6)
    drawn = model.sample(keys, condition(), options)
    alone = model.sample(keys[2:3], condition(rows=slice(2, 3)), options)
    torch.testing.assert_close(drawn[2:3], alone, atol=1e-5, rtol=1e-5)
    assert drawn.shape == (6, 3, SIZE, SIZE) and (drawn[0] != drawn[1]).any()


def test_it_learns_images_of_256_px_without_a_cascade():
    torch.manual_seed(0)
    sizes = DiTConfig(width=32, depth=2, num_heads=2, patch_size=32, bottleneck_channels=16)
    config = DecoderConfig(
        network="dit", dit=sizes, context_width=16, prediction="x0", weighting="v", use_text=False
    )
    model = Decoder(config, image_size=256, embed_dim=EMBED, text_width=12)
    count = 16
    image = torch.tensor([-0.5, 0.5]).repeat(count // 2)[:, None, None, None]
    image = image.expand(count, 3, 256, 256)
    given = Condition(image_embed=condition(2).image_embed.repeat(count // 2, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss(first: int) -> Tensor:
        return model.losses(torch.arange(first, first + count), image, given)["loss"].mean()

    before = loss(0).detach()
    for step in range(1, 61):
        optimizer.zero_grad()
        loss(step * count).backward()
        optimizer.step()
    assert loss(0) < before / 4
    options = ImageSampling(sampler=dpmpp_2m, sample_steps=4)
    drawn = model.eval().sample(torch.arange(count), given, options)
    assert drawn[::2].mean() < -0.2 and drawn[1::2].mean() > 0.2


def test_a_decoder_has_one_network_alone_and_its_options():
    model = dit_decoder()
    assert model.network is model.dit and not hasattr(model, "unet")
    assert {name.split(".")[0] for name in model.state_dict()} >= {"dit", "embed_to_cond"}
    base = DecoderConfig(network="dit", dit=DIT)
    stored = dataclasses.asdict(base)
    options = weight_options(DecoderConfig, stored)
    assert options["dit.width"] == DIT.width
    assert not any(name.startswith("unet") for name in options)
    older = {name: value for name, value in stored.items() if name not in ("network", "dit")}
    assert not any(name.startswith("dit") for name in weight_options(DecoderConfig, older))
    assert weight_options(DecoderConfig, older)["network"] == "unet"


def test_it_has_the_size_and_the_cost_that_one_would_count():
    """A block of width W has 4 W^2 in attention, 8 W^2 in its MLP and 6 W^2 in its modulation."""
    width, depth, tokens, words = 96, 3, 64, 16
    config = DiTConfig(width=width, depth=depth, num_heads=4, patch_size=4)
    with torch.device("meta"):
        base = DecoderConfig(network="dit", dit=config, context_width=32, num_embed_tokens=4)
        model = Decoder(base, image_size=32, embed_dim=EMBED, text_width=12)
        blocks = [DiTBlock(width=width, num_heads=4) for _ in range(depth)]
    matrices = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)
    assert matrices == 18 * width**2 * depth

    length = tokens + 4 + words
    macs = depth * (12 * width**2 * length + 2 * width * length**2 + 6 * width**2)
    macs += 256 * width + width**2 + 2 * width**2  # timestep, last modulation
    macs += tokens * 2 * 48 * width + (4 + words) * 32 * width  # patches in and out, tokens in
    macs += EMBED * width + EMBED * 4 * 32 + words * 12 * 32  # z_i, the caption's states
    assert training_flops(model, words) == pytest.approx(6 * macs, rel=0.005)
    assert num_parameters(model) == pytest.approx(matrices, rel=0.2)


@pytest.mark.parametrize("prediction", ["x0", "v", "eps"])
def test_the_weight_of_v_makes_every_prediction_a_squared_error_of_v(prediction: Any):
    schedule = NoiseSchedule.build("cosine", 1000)
    if prediction != "eps":  # whose factor is over 1e8 where the cosine schedule ends
        require_weights(schedule, "v", prediction)
    keys, t = torch.arange(5), torch.tensor([100, 300, 500, 700, 900])
    rng = torch.Generator().manual_seed(0)
    x0, eps, error = (torch.randn(len(keys), 3, 4, 4, generator=rng) for _ in range(3))
    x_t = schedule.q_sample(x0, t, eps)
    predicted = schedule.target(prediction, x0, t, eps) + 0.01 * error
    x0_pred = schedule.to_x0(prediction, predicted, x_t, t)
    eps_pred = schedule.to_eps(x0_pred, x_t, t)
    v_pred, v = schedule.target("v", x0_pred, t, eps_pred), schedule.target("v", x0, t, eps)
    squares = (0.01 * error).square().mean((1, 2, 3))
    weighed = timestep_weight(schedule, "v", prediction, t) * squares
    torch.testing.assert_close(weighed, (v_pred - v).square().mean((1, 2, 3)), rtol=1e-3, atol=0)


def test_the_weight_of_v_is_bounded_where_there_is_no_noise():
    schedule = NoiseSchedule.build("cosine", 1000)
    weight = timestep_weight(schedule, "v", "x0", torch.arange(1000))
    assert weight.max() == 400 and weight.min() >= 1
    assert F.relu(weight.diff()).max() == 0
