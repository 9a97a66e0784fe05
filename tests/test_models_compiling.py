"""Compiled in parts: no graph breaks, equal parts share a graph, and losses are those of eager."""

import copy
import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import _networks
import _priors
import pytest
import torch
from functorch.compile import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from models.clip import build_clip
from models.configs import UNetConfig
from models.networks.compiling import compiled
from models.networks.group_norm import in_channels_last
from training.data.dataloader import Batch
from training.runs.worker import compile_model
from training.tasks.clip import clip_objective
from training.tasks.decoder import upsampler_objective

CPU = torch.device("cpu")
KEYS = torch.arange(4)
MP = dataclasses.replace(_networks.UNET, magnitude_preserving=True)
FLAT = dataclasses.replace(_networks.UNET, channel_mult=(1,), attn_resolutions=(8,))
DEEP = dataclasses.replace(_networks.UNET, num_res_blocks=4)
Step = Callable[[Any], dict[str, Tensor]]


def batch_of(**columns: Tensor) -> Batch:
    return Batch(keys=KEYS, weight=torch.ones(4), num_real=4, columns=columns)


RNG = torch.Generator().manual_seed(0)
IMAGES, CONDITION = _networks.images(4), _networks.condition(4)
EMBEDS, CAPTIONS = _priors.images(), _priors.captions()
PIXELS = torch.randint(0, 256, (4, 3, 64, 64), generator=RNG, dtype=torch.uint8)
TOKENS = torch.randint(1, 512, (4, 24), generator=RNG)


def decoder_step(model: Any) -> dict[str, Tensor]:
    return model.losses(KEYS, IMAGES, CONDITION)


def upsampler_step(side: int, model: Any) -> dict[str, Tensor]:
    return upsampler_objective(model, batch_of(image=PIXELS[:, :, :side, :side]))


def prior_step(model: Any) -> dict[str, Tensor]:
    return model.losses(KEYS, EMBEDS, CAPTIONS)


def clip_step(model: Any) -> dict[str, Tensor]:
    return clip_objective(model, batch_of(image=PIXELS, tokens=TOKENS))


def clip() -> nn.Module:
    torch.manual_seed(0)
    return build_clip(dataclasses.replace(_networks.CLIP, image_size=64, vision_depth=3))


BSR = {"degradation": "bsr", "low_res_noise": 0.2, "tell_noise": True}
STEPS: dict[str, tuple[Callable[[], nn.Module], Step]] = {
    "decoder": (_networks.decoder, decoder_step),
    "decoder, magnitude-preserving": (partial(_networks.decoder, unet=MP), decoder_step),
    "decoder, learned variance": (
        partial(_networks.decoder, learned_variance=True, embed_noise=0.1, prediction="eps"),
        decoder_step,
    ),
    "decoder of one resolution": (partial(_networks.decoder, unet=FLAT), decoder_step),
    "decoder, transformer": (
        partial(_networks.decoder, network="dit", dit=_networks.DIT, embed_grid=True),
        decoder_step,
    ),
    "upsampler, blur": (_networks.upsampler, partial(upsampler_step, 8)),
    "upsampler, bsr": (partial(_networks.upsampler, **BSR), partial(upsampler_step, 16)),
    **{
        kind: (partial(_priors.prior_of, kind), prior_step)
        for kind in ("diffusion", "autoregressive", "regression")
    },
    "clip": (clip, clip_step),
}


class Graphs:
    """A backend that counts what it compiles and runs it eagerly."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs: list[Any] = []
        torch.compiler.reset()
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=self))

    def __call__(self, graph: Any, inputs: Any) -> Callable:
        self.graphs.append(graph)
        return graph.forward


@pytest.mark.parametrize("name", STEPS)
def test_a_loss_has_no_graph_breaks(name: str):
    build, step = STEPS[name]
    model = build().train()
    expected = step(model)
    torch.compiler.reset()
    found = torch.compile(step, fullgraph=True, backend="eager")(model)
    assert found.keys() == expected.keys()
    for score, value in expected.items():
        torch.testing.assert_close(found[score], value)


@pytest.mark.parametrize("name", STEPS)
def test_parts_are_whole_graphs_and_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    build, step = STEPS[name]
    model = build().train()
    other = copy.deepcopy(model)
    expected = step(model)["loss"]
    expected.sum().backward()
    graphs = Graphs(monkeypatch)
    compile_model(other, CPU)
    assert other.state_dict().keys() == model.state_dict().keys()
    found = step(other)["loss"]
    found.sum().backward()
    assert graphs.graphs
    torch.testing.assert_close(found, expected)
    for (key, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, msg=key)
    count = len(graphs.graphs)
    step(other)
    assert len(graphs.graphs) == count, "a second step compiles nothing"


@pytest.mark.parametrize(
    ("unet", "bound"), [(_networks.UNET, 15), (DEEP, 19)]
)
def test_levels_of_equal_shapes_share_a_graph(
    unet: UNetConfig, bound: int, monkeypatch: pytest.MonkeyPatch
):
    """At most one graph for a resolution's first, other and resampling levels down, one for each
    width that a skip adds up, and those around the U-Net; however many blocks there are."""
    model = _networks.decoder(unet=unet).train()
    graphs = Graphs(monkeypatch)
    compile_model(model, CPU)
    decoder_step(model)
    assert len(graphs.graphs) <= bound


def test_no_convolution_of_a_level_copies_its_feature_maps(monkeypatch: pytest.MonkeyPatch):
    """Channels-last: what enters convolutions, forward and backward, has that format already."""
    found: list[bool] = []

    def look(graph: Any, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if "convolution" in str(node.target):
                count = 2 if "backward" in str(node.target) else 1
                maps = [each.meta["val"] for each in node.args[:count]]
                found.extend(in_channels_last(x) for x in maps if x.shape[1] > 3)  # no image
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    unet = _networks.decoder(unet=dataclasses.replace(_networks.UNET, channels=16)).train().unet
    unet.channels_last = True
    compile_model(unet, CPU)
    noise = torch.randn(4, 3, _networks.SIZE, _networks.SIZE)
    unet(noise, KEYS, tokens=torch.randn(4, 5, unet.context), token_mask=None).sum().backward()
    assert len(found) > 40 and all(found)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs the Debian package g++")
@pytest.mark.parametrize("name", ["decoder of one resolution", "diffusion", "clip"])
def test_compiled_code_computes_what_eager_does(name: str):
    build, step = STEPS[name]
    model = build().train()
    other = copy.deepcopy(model)
    torch.compiler.reset()
    compile_model(other, CPU)
    for each in (model, other):
        step(each)["loss"].sum().backward()
    expected, found = step(model)["loss"], step(other)["loss"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for (key, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None, key
        assert (two.grad - one.grad).norm() <= 1e-4 * one.grad.norm() + 1e-6, key


def test_a_graph_break_in_a_part_is_an_error(monkeypatch: pytest.MonkeyPatch):
    class Breaks(nn.Module):
        @compiled(dynamic=False)
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    Graphs(monkeypatch)
    model = Breaks()
    compile_model(model, CPU)
    with pytest.raises(Exception, match="(?i)graph break|data-dependent"):
        model(torch.ones(3))
