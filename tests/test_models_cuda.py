"""On a GPU the networks compute what they compute on a CPU, and in bf16 what they do in fp32.

python -m pytest tests/test_models_cuda.py
"""

from dataclasses import replace
from typing import Any

import _group_norm as group_norms
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import (
    AutoregressivePriorConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    DiTConfig,
    RegressionPriorConfig,
    UNetConfig,
    UpsamplerConfig,
)
from models.convert.runs import load_clip
from models.costs import forward_of, peak_bytes
from models.decoder import Condition, Decoder, ImageSampling
from models.diffusion import keyed_random
from models.diffusion.samplers import SAMPLERS
from models.networks.packing import Packing
from models.priors.autoregressive import AutoregressivePrior
from models.priors.base import PackedText, PriorSampling, PriorText
from models.priors.diffusion import DiffusionPrior
from models.priors.regression import RegressionPrior
from models.tokenizers import token_mask
from models.upsampler import Upsampler
from training.runs.worker import compile_model

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

DRAWN = PriorSampling(sampler=SAMPLERS["ddim"])
COUNT, WORDS, DIM, SIZE = 6, 9, 64, 32
UNET = UNetConfig(
    channels=64, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=(16,), head_channels=32
)
DECODERS = {
    "as it is": UNET,
    "folded": replace(UNET, patch_size=2),
    "qk_norm": replace(UNET, qk_norm=True),
    "checkpointing": replace(UNET, checkpointing=True),
    "magnitude_preserving": replace(UNET, magnitude_preserving=True),
    "channels_last": replace(UNET, channels_last=True),
}


@pytest.fixture(autouse=True)
def exact():
    """Convolutions and products in fp32, as on the CPU, not in TF32."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [each.allow_tf32 for each in backends]
    for each in backends:
        each.allow_tf32 = False
    yield
    for each, allowed in zip(backends, before, strict=True):
        each.allow_tf32 = allowed


def decoder(unet: UNetConfig) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(unet=unet, context_width=64)
    return stirred(Decoder(config, image_size=SIZE, embed_dim=DIM, text_width=DIM))


def transformer() -> Decoder:
    torch.manual_seed(0)
    dit = DiTConfig(width=64, depth=3, num_heads=2, patch_size=4, refine_channels=8)
    config = DecoderConfig(network="dit", dit=dit, context_width=64, prediction="x0", weighting="v")
    return stirred(Decoder(config, image_size=SIZE, embed_dim=DIM, text_width=DIM))


def upsampler() -> Upsampler:
    torch.manual_seed(0)
    unet = replace(UNET, attn_resolutions=())
    return stirred(Upsampler(UpsamplerConfig(unet=unet), factor=2, crop_size=SIZE))


def prior(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {"embed_dim": DIM, "text_width": DIM, "context_length": 20}
    if kind == "diffusion":
        config = DiffusionPriorConfig(width=64, depth=2, num_heads=2)
        return stirred(DiffusionPrior(config, **sizes))
    if kind == "regression":
        return stirred(RegressionPrior(RegressionPriorConfig(width=64, depth=2), **sizes))
    config = AutoregressivePriorConfig(width=64, depth=2, num_heads=2, num_codes=24)
    return stirred(AutoregressivePrior(config, **sizes))


def stirred(model):
    """Give layers that begin at zero something to say."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.arange(WORDS) < torch.linspace(3, WORDS, COUNT).long()[:, None]
    return {
        "keys": torch.arange(COUNT),
        "image": noise(COUNT, 3, SIZE, SIZE).clamp(-1, 1),
        "image_embed": F.normalize(noise(COUNT, DIM), dim=1),
        "text_embed": F.normalize(noise(COUNT, DIM), dim=1),
        "states": noise(COUNT, WORDS, DIM) * mask[..., None],
        "mask": mask,
    }


def text_of(batch: dict[str, Tensor]) -> PriorText:
    return PriorText(text_embed=batch["text_embed"], text=batch["states"], token_mask=batch["mask"])


def condition_of(batch: dict[str, Tensor]) -> Condition:
    return Condition(
        image_embed=batch["image_embed"], text_embed=batch["text_embed"],
        text_states=batch["states"], token_mask=batch["mask"],
    )  # fmt: skip


def packed_text(model: Any, batch: dict[str, Tensor]) -> PackedText:
    """Pack on the CPU, as where batches are read, and move."""
    packing = model.pack(inputs()["mask"].sum(1), torch.arange(COUNT))
    packing = packing.apply(lambda x: x.to(batch["states"].device))
    rows = batch["states"][packing.text.sequence, packing.text.position]
    return PackedText(text_embed=batch["text_embed"], text=rows, packing=packing)


def losses(model: Any, batch: dict[str, Tensor], *, packed: bool = False) -> Tensor:
    if isinstance(model, Upsampler):
        return model.losses(batch["keys"], batch["image"])["loss"]
    if isinstance(model, Decoder):
        return model.losses(batch["keys"], batch["image"], condition_of(batch))["loss"]
    text = packed_text(model, batch) if packed else text_of(batch)
    return model.losses(batch["keys"], batch["image_embed"], text)["loss"]


def stepped(
    model: Any, device: str, *, bf16: bool = False, compiled: bool = False, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the samples' losses, and the gradient of their mean as one vector, on the CPU."""
    model.to(device).zero_grad(set_to_none=True)
    if compiled:
        compile_model(model, torch.device(device))
    batch = {name: value.to(device) for name, value in inputs().items()}
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        found = losses(model, batch, packed=packed)
    found.mean().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return found.detach().float().cpu(), torch.cat(gradients).float().cpu()


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error in norm."""
    return float((found - expected).norm() / expected.norm())


PRIORS = ("diffusion", "regression", "autoregressive")
MODELS = {
    **{f"decoder, {name}": lambda unet=unet: decoder(unet) for name, unet in DECODERS.items()},
    "decoder, transformer": transformer,
    "upsampler": upsampler,
    **{kind: lambda kind=kind: prior(kind) for kind in PRIORS},
}
# where bf16 is emulated, convolutions take a minute
ROUNDED = MODELS if torch.cuda.is_available() else ("decoder, folded", *PRIORS)


@on_gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_the_cpu(name: str):
    expected = stepped(MODELS[name](), "cpu")
    for found, wanted in zip(stepped(MODELS[name](), "cuda"), expected, strict=True):
        assert error(found, wanted) < 1e-4


@pytest.mark.parametrize("name", ROUNDED)
def test_bf16_is_fp32_up_to_rounding(name: str):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expected = stepped(MODELS[name](), device)
    found = stepped(MODELS[name](), device, bf16=True)
    assert error(found[0], expected[0]) < 0.02
    assert error(found[1], expected[1]) < 0.1


@pytest.mark.parametrize("kind", PRIORS)
def test_packed_captions_in_bf16_are_padded_ones_up_to_rounding(kind: str):
    """On a GPU by torch's kernel for sequences of unequal length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expected = stepped(prior(kind), device)
    found = stepped(prior(kind), device, bf16=True, packed=True)
    assert error(found[0], expected[0]) < 0.02
    assert error(found[1], expected[1]) < 0.1


@on_gpu
@pytest.mark.parametrize("kind", PRIORS)
def test_packed_captions_are_padded_ones(kind: str):
    """In fp32, for which there is no kernel."""
    expected = stepped(prior(kind), "cuda")
    found = stepped(prior(kind), "cuda", packed=True)
    assert max(error(*pair) for pair in zip(found, expected, strict=True)) < 1e-4


@on_gpu
@pytest.mark.parametrize("kind", PRIORS)
def test_compiled_blocks_read_packed_captions_alike(kind: str):
    expected = stepped(prior(kind), "cuda", bf16=True, packed=True)
    torch.compiler.reset()
    model = prior(kind)
    for block in model.blocks:
        block.compile(fullgraph=True)
    found = stepped(model, "cuda", bf16=True, packed=True)
    assert error(found[0], expected[0]) < 0.01 and error(found[1], expected[1]) < 0.05


@on_gpu
def test_the_frozen_tower_s_copy_in_bf16_encodes_packed_captions():
    encoder = load_clip("tiny:random")
    tokens = torch.from_numpy(encoder.tokenize(["a red cube", "", "two blue spheres and a cone"]))
    keep = token_mask(tokens)
    expected = encoder.encode_text(tokens)[1][keep]
    packing, rows = Packing.of(keep.sum(1)).apply(Tensor.cuda), tokens[keep].long().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        found = encoder.on(torch.device("cuda", 0)).encode_packed(rows, packing)
    assert found.dtype == torch.float32 and error(found.cpu(), expected) < 0.02
    again = encoder.encode_packed(rows, packing)  # the weights are as before
    assert error(again.cpu(), expected) < 1e-4


@on_gpu
@pytest.mark.parametrize("name", ["decoder, as it is", "decoder, channels_last", "diffusion"])
def test_a_compiled_network_steps_alike(name: str):
    expected = stepped(MODELS[name](), "cuda")
    for found, wanted in zip(stepped(MODELS[name](), "cuda", compiled=True), expected, strict=True):
        assert error(found, wanted) < 1e-3


@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", group_norms.CASES)
def test_the_kernel_of_group_norm_is_torch_in_float64(name: str, compiled: bool):
    case = group_norms.CASES[name]
    leaves = [each.cuda() for each in group_norms.inputs(case)]
    wanted = group_norms.evaluated(
        case, group_norms.reference, [each.double() for each in leaves]
    )
    torch.compiler.reset()
    kernel = group_norms.kernel
    kernel = torch.compile(kernel, fullgraph=True) if compiled else kernel
    found, again = (group_norms.evaluated(case, kernel, leaves) for _ in range(2))
    limit = group_norms.TOLERANCE[case.dtype] * max(1, case.mean / 10)
    for f, w, a in zip(found, wanted, again, strict=True):
        assert error(f.double(), w) < limit
        assert torch.equal(f, a), "a second run differs"


@on_gpu
def test_a_sample_s_random_numbers_are_its_own_on_every_device():
    keys = torch.arange(1000)
    here, there = keys, keys.cuda()
    assert torch.equal(keyed_random.bits(here, "a", 7), keyed_random.bits(there, "a", 7).cpu())
    uniform = [keyed_random.uniform(each, "b", (3, 5)).cpu() for each in (here, there)]
    assert torch.equal(*uniform)
    normal = [keyed_random.normal(each, "c", (3, 5)).cpu() for each in (here, there)]
    assert (normal[0] - normal[1]).abs().max() < 1e-5


@on_gpu
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "ddpm"])
def test_a_picture_is_that_of_the_cpu(sampler: str):
    options = ImageSampling(sampler=SAMPLERS[sampler], sample_steps=8, cfg_scale=2.0)
    pictures = []
    for device in ("cpu", "cuda"):
        model = decoder(UNET).to(device).eval()
        batch = {name: value.to(device) for name, value in inputs().items()}
        pictures.append(model.sample(batch["keys"], condition_of(batch), options).cpu())
    assert error(pictures[1], pictures[0]) < 1e-3


@on_gpu
@pytest.mark.parametrize("kind", ["diffusion", "regression"])
def test_a_prior_s_draw_is_that_of_the_cpu(kind: str):
    draws = []
    for device in ("cpu", "cuda"):
        model = prior(kind).to(device).eval()
        batch = {name: value.to(device) for name, value in inputs().items()}
        draws.append(model.sample(batch["keys"], text_of(batch), DRAWN).cpu())
    assert error(draws[1], draws[0]) < 1e-3


@on_gpu
def test_codes_are_drawn_alike_with_and_without_the_cache():
    model = prior("autoregressive").cuda().eval()
    batch = {name: value.cuda() for name, value in inputs().items()}
    text, options = text_of(batch), DRAWN
    cached, whole = (
        model.sample_codes(batch["keys"], text, options, cached=each)[1]
        for each in (True, False)
    )
    assert (cached == whole).float().mean() > 0.9, "but for ties that rounding breaks"


@on_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_was_counted_on_the_meta_device(checkpointing: bool):
    """Weights, gradients and activations of a bf16 step; a kernel's workspace comes on top."""
    unet = replace(
        UNET, channels=192, num_res_blocks=2, head_channels=64, checkpointing=checkpointing
    )
    count, model = 64, decoder(unet)
    with torch.device("meta"):
        twin = decoder(unet).train()
    counted = peak_bytes(twin, forward_of(twin, WORDS, count))
    model.cuda()
    batch = {
        name: value.repeat(count // COUNT + 1, *[1] * (value.ndim - 1))[:count].cuda()
        for name, value in inputs().items()
    }

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = losses(model, batch).mean()
        loss.backward()

    step()  # which allocates the gradients
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    held = torch.cuda.max_memory_allocated() - before
    assert 0.8 < held / counted < 1.25, (
        f"held {held / 2**20:.0f} MiB, counted {counted / 2**20:.0f}"
    )
