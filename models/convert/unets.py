"""Decoders and upsamplers to and from the folders of diffusers' `UnCLIPPipeline`: Karlo's layout.

    <folder>/decoder          UNet2DConditionModel    <folder>/text_proj       UnCLIPTextProjModel
    <folder>/super_res_first  UNet2DModel             <folder>/super_res_last  its last step's

each with config.json and diffusion_pytorch_model.safetensors. diffusers itself is not needed. Its
decoder is ours with the options of the preset `karlo`; it guides away from the empty caption and a
learned z_i, which `Decoder.sample` takes as `empty`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.configs import DecoderConfig, UNetConfig, UpsamplerConfig
from models.convert.files import (
    option,
    read_folder,
    require,
    require_option,
    require_used,
    taken,
    write_folder,
)
from models.decoder import Decoder
from models.networks.unet import UNet
from models.upsampler import Upsampler

DECODER, TEXT_PROJECTION = "UNet2DConditionModel", "UnCLIPTextProjModel"
UPSAMPLER = "UNet2DModel"
PLAIN = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
ATTENDING = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")
MIDDLE = "UNetMidBlock2DSimpleCrossAttn"
_LAYERS = {
    "norm_1": "norm1", "conv_1": "conv1", "cond": "time_emb_proj", "norm_2": "norm2",
    "conv_2": "conv2", "skip": "conv_shortcut",
}  # fmt: skip
_ENDS = {
    "conv_in": "conv_in", "time_in.0": "time_embedding.linear_1",
    "time_in.2": "time_embedding.linear_2", "norm_out": "conv_norm_out", "conv_out": "conv_out",
}  # fmt: skip
_FUSED = {"qkv": ("to_q", "to_k", "to_v"), "context": ("add_k_proj", "add_v_proj")}


# of diffusers' own constructors, which its configurations may leave out
_DEFAULTS = {
    "resnet_time_scale_shift": "default", "class_embed_type": None, "add_attention": True,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}  # fmt: skip


# -- the decoder -----------------------------------------------------------------------------------


def decoder_from_diffusers(folder: Path | str) -> Decoder:
    """Load a pipeline's decoder with its projections.

    Raises ValueError for other classes, networks of another shape, or tensors without a place.
    """
    folder = Path(folder)
    told, tensors = read_folder(folder / "decoder", DECODER)
    projection, projections = read_folder(folder / "text_proj", TEXT_PROJECTION)
    wanted = {"class_embed_type": "identity", "mid_block_type": MIDDLE}
    require(folder / "decoder", told, wanted, **_DEFAULTS)
    of_decoder, of_projection = folder / "decoder", folder / "text_proj"
    config = DecoderConfig(
        unet=_unet_config(of_decoder, told),
        num_embed_tokens=option(of_projection, projection, "clip_extra_context_tokens"),
        context_width=option(of_decoder, told, "cross_attention_dim"),
        norm_embed_tokens=False,
        text_embed_cond=True,
        empty_caption=True,
        schedule="cosine",
        prediction="eps",
        weighting="simple",
        learned_variance=told.get("out_channels") == 2 * told.get("in_channels", 3),
    )
    dim = option(of_projection, projection, "clip_embeddings_dim")
    size = option(of_decoder, told, "sample_size")
    decoder = Decoder(config, image_size=size, embed_dim=dim, text_width=dim)
    _require_norms(decoder.unet, folder / "decoder", told)
    state = {f"unet.{n}": v for n, v in _from_diffusers(decoder.unet, tensors, folder).items()}
    state |= _projections(decoder, projections, folder / "text_proj")
    decoder.load_state_dict(state)
    return decoder.eval()


def decoder_to_diffusers(decoder: Decoder, folder: Path | str) -> None:
    """Write a decoder as `decoder` and `text_proj` of a pipeline.

    Raises ValueError naming the option that a pipeline does not have.
    """
    config, folder = decoder.config, Path(folder)
    text_width = 0 if decoder.text_in is None else decoder.text_in.in_features
    for name, found, wanted in (
        ("text_width", text_width, decoder.null_image_embed.shape[0]),
        ("text_embed_cond", config.text_embed_cond, True),
        ("norm_embed_tokens", config.norm_embed_tokens, False),
        ("embed_grid", config.embed_grid, False),
        ("prediction", config.prediction, "eps"),
        ("schedule", (config.schedule, config.zero_terminal), ("cosine", False)),
    ):
        require_option(folder, DECODER, name, found, wanted)
    told = _unet_settings(decoder.unet, decoder.image_size, folder)
    told |= {
        "_class_name": DECODER,
        "in_channels": 3,
        "out_channels": 6 if config.learned_variance else 3,
        "cross_attention_dim": config.context_width,
        "class_embed_type": "identity",
        "mid_block_type": MIDDLE,
    }
    write_folder(folder / "decoder", told, _to_diffusers(decoder.unet))
    told = {
        "_class_name": TEXT_PROJECTION,
        "clip_extra_context_tokens": config.num_embed_tokens,
        "clip_embeddings_dim": text_width,
        "time_embed_dim": decoder.unet.cond_width,
        "cross_attention_dim": config.context_width,
    }
    write_folder(folder / "text_proj", told, _projections_back(decoder))


_PROJECTIONS = {
    "caption_to_cond": "embedding_proj",
    "text_in": "encoder_hidden_states_proj",
    "token_norm": "text_encoder_hidden_states_norm",
    "embed_to_cond": "clip_image_embeddings_project_to_time_embeddings",
    "embed_to_tokens": "clip_extra_context_tokens_proj",
}
_NULL = "learned_classifier_free_guidance_embeddings"


def _projections(decoder: Decoder, found: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return our projections: of z_i in units of 1 / sqrt(E), and token by token."""
    state = {"null_image_embed": taken(folder, found, _NULL)}
    count = decoder.config.num_embed_tokens
    for name, other in _PROJECTIONS.items():
        for kind in ("weight", "bias"):
            value = taken(folder, found, f"{other}.{kind}")
            if name == "embed_to_tokens":  # theirs are interleaved
                value = value.unflatten(0, (-1, count)).transpose(0, 1).flatten(0, 1)
            if name.startswith("embed_to") and kind == "weight":
                value = value / decoder.embed_scale
            state[f"{name}.{kind}"] = value
    require_used(folder, found)
    return state


def _projections_back(decoder: Decoder) -> dict[str, Tensor]:
    state, count = decoder.state_dict(), decoder.config.num_embed_tokens
    tensors = {_NULL: state["null_image_embed"]}
    for name, other in _PROJECTIONS.items():
        for kind in ("weight", "bias"):
            value = state[f"{name}.{kind}"]
            if name == "embed_to_tokens":
                value = value.unflatten(0, (count, -1)).transpose(0, 1).flatten(0, 1)
            if name.startswith("embed_to") and kind == "weight":
                value = value * decoder.embed_scale
            tensors[f"{other}.{kind}"] = value
    return tensors


# -- upsamplers ------------------------------------------------------------------------------------


def upsampler_from_diffusers(folder: Path | str, factor: int = 4) -> Upsampler:
    """Load `super_res_first` or `super_res_last` of a pipeline; ValueError as the decoder's.

    factor: by which it enlarges, which its folder does not say.
    """
    folder = Path(folder)
    told, tensors = read_folder(folder, UPSAMPLER)
    wanted = {"in_channels": 6, "out_channels": 3, "add_attention": False}
    require(folder, told, wanted, **_DEFAULTS)
    config = UpsamplerConfig(
        unet=_unet_config(folder, told), schedule="cosine", prediction="eps", weighting="simple",
        interpolation="bicubic",
    )  # fmt: skip
    crop = option(folder, told, "sample_size") // factor
    upsampler = Upsampler(config, factor=factor, crop_size=crop)
    _require_norms(upsampler.unet, folder, told)
    upsampler.unet.load_state_dict(_from_diffusers(upsampler.unet, tensors, folder))
    return upsampler.eval()


def upsampler_to_diffusers(upsampler: Upsampler, folder: Path | str, image_size: int) -> None:
    """Write an upsampler to images of `image_size` px as one UNet2DModel; ValueError naming the
    option that it does not have."""
    config, folder = upsampler.config, Path(folder)
    for name, found, wanted in (
        ("prediction", config.prediction, "eps"),
        ("interpolation", config.interpolation, "bicubic"),
        ("tell_noise", config.tell_noise, False),
        ("schedule", (config.schedule, config.zero_terminal), ("cosine", False)),
    ):
        require_option(folder, UPSAMPLER, name, found, wanted)
    told = _unet_settings(upsampler.unet, image_size, folder)
    told |= {"_class_name": UPSAMPLER, "in_channels": 6, "out_channels": 3}
    told |= {"add_attention": False, "downsample_type": "resnet", "upsample_type": "resnet"}
    write_folder(folder, told, _to_diffusers(upsampler.unet))


# -- U-Nets ----------------------------------------------------------------------------------------


def _unet_config(folder: Path, told: dict[str, Any]) -> UNetConfig:
    """Return the sizes of our U-Net; ValueError for a network that ours cannot be."""
    wanted = {"resnet_time_scale_shift": "scale_shift", "center_input_sample": False}
    require(folder, told, wanted | {"flip_sin_to_cos": True, "freq_shift": 0}, **_DEFAULTS)
    channels, down, up_types, layers, size = (
        option(folder, told, name)
        for name in ("block_out_channels", "down_block_types", "up_block_types",
                     "layers_per_block", "sample_size")
    )  # fmt: skip
    attends = [kind == ATTENDING[0] for kind in down]
    up = [(ATTENDING if each else PLAIN)[1] for each in reversed(attends)]
    if list(up_types) != up or set(down) - {PLAIN[0], ATTENDING[0]}:
        raise ValueError(f"{folder}: blocks: found {down}, expected {PLAIN[0]} or {ATTENDING[0]}")
    if any(attends) and not attends[-1]:
        raise ValueError(f"{folder}: found a last block without attention, expected one with it")
    if any(count % channels[0] for count in channels):
        raise ValueError(f"{folder}: block_out_channels: found {channels}, expected multiples")
    sides = [size // 2**i for i in range(len(channels))]
    return UNetConfig(
        channels=channels[0],
        channel_mult=tuple(count // channels[0] for count in channels),
        num_res_blocks=layers,
        attn_resolutions=tuple(side for side, each in zip(sides, attends, strict=True) if each),
        head_channels=option(folder, told, "attention_head_dim") if any(attends) else 64,
        dropout=told.get("dropout", 0.0),
    )


def _unet_settings(unet: UNet, image_size: int, folder: Path) -> dict[str, Any]:
    config = unet.config
    name = "magnitude_preserving"
    require_option(folder, UPSAMPLER, name, config.magnitude_preserving, False)
    require_option(folder, UPSAMPLER, "patch_size", config.patch_size, 1)
    require_option(folder, UPSAMPLER, "qk_norm", config.qk_norm, False)
    sides = [unet.grid // 2**i for i in range(len(config.channel_mult))]
    attends = [side in config.attn_resolutions for side in sides]
    if any(attends):
        require_option(folder, UPSAMPLER, "attention at the lowest resolution", attends[-1], True)
    return {
        "sample_size": image_size,
        "block_out_channels": [config.channels * mult for mult in config.channel_mult],
        "layers_per_block": config.num_res_blocks,
        "down_block_types": [(ATTENDING if each else PLAIN)[0] for each in attends],
        "up_block_types": [(ATTENDING if each else PLAIN)[1] for each in reversed(attends)],
        "attention_head_dim": config.head_channels,
        "norm_num_groups": unet.norm_out.num_groups,
        "norm_eps": unet.norm_out.eps,
        "resnet_time_scale_shift": "scale_shift",
        "dropout": config.dropout,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


def _blocks(unet: UNet) -> Iterator[tuple[str, str, int]]:
    """Yield our name of each level, diffusers' of its block, and its number there; -1 for the
    resamplers, which have none."""
    config, last = unet.config, len(unet.config.channel_mult) - 1
    number = 0
    for i in range(last + 1):
        for j in range(config.num_res_blocks):
            yield f"down.{number}", f"down_blocks.{i}", j
            number += 1
        if i < last:
            yield f"down.{number}", f"down_blocks.{i}.downsamplers.0", -1
            number += 1
    for j in range(2):
        yield f"middle.{j}", "mid_block", j
    number = 0
    for i in range(last + 1):
        for j in range(config.num_res_blocks + 1):
            yield f"up.{number}", f"up_blocks.{i}", j
            number += 1
        if i < last:
            yield f"up.{number}", f"up_blocks.{i}.upsamplers.0", -1
            number += 1


def _places(unet: UNet) -> dict[str, list[str]]:
    """Return for each of the network's tensors diffusers', one after the other."""
    layers = {name: [other] for name, other in _ENDS.items()}
    for ours, block, number in _blocks(unet):
        resnet = block if number < 0 else f"{block}.resnets.{number}"
        for name, other in _LAYERS.items():
            layers[f"{ours}.block.{name}"] = [f"{resnet}.{other}"]
        attention = f"{block}.attentions.{number}"
        layers[f"{ours}.attention.norm"] = [f"{attention}.group_norm"]
        layers[f"{ours}.attention.out"] = [f"{attention}.to_out.0"]
        for name, others in _FUSED.items():
            layers[f"{ours}.attention.{name}"] = [f"{attention}.{each}" for each in others]
    named = [(name, *name.rpartition(".")[::2]) for name in unet.state_dict()]
    return {name: [f"{other}.{kind}" for other in layers[layer]] for name, layer, kind in named}


def _from_diffusers(unet: UNet, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    _require_groups(unet, folder)
    state = {}
    for name, others in _places(unet).items():
        state[name] = torch.cat([taken(folder, tensors, other) for other in others])
    require_used(folder, tensors)
    return state


def _to_diffusers(unet: UNet) -> dict[str, Tensor]:
    state, tensors = unet.state_dict(), {}
    for name, others in _places(unet).items():
        tensors.update(zip(others, state[name].chunk(len(others)), strict=True))
    return tensors


def _require_norms(unet: UNet, folder: Path, told: dict[str, Any]) -> None:
    """Refuse normalisations and activations that are not ours: their weights would fit all the
    same."""
    wanted = {"norm_num_groups": unet.norm_out.num_groups, "norm_eps": unet.norm_out.eps}
    require(folder, told, wanted | {"act_fn": "silu"}, norm_num_groups=32, norm_eps=1e-5)


def _require_groups(unet: UNet, folder: Path) -> None:
    """Refuse channels whose groups are not the same everywhere, which diffusers' are."""
    groups = {module.num_groups for module in unet.modules() if isinstance(module, nn.GroupNorm)}
    if len(groups) > 1:
        raise ValueError(
            f"{folder}: norm groups: found channels that ours normalises in {sorted(groups)} "
            "groups, expected multiples of 128"
        )
