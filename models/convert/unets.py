"""Decoders and upsamplers to and from the folders of diffusers' `UnCLIPPipeline`: Karlo's layout.

    <folder>/decoder          UNet2DConditionModel    <folder>/text_proj       UnCLIPTextProjModel
    <folder>/super_res_first  UNet2DModel             <folder>/super_res_last  its last step's

each with config.json and diffusion_pytorch_model.safetensors. diffusers itself is not needed. Its
decoder is ours with the options of the preset `karlo`; it guides away from the empty caption and a
learned z_i, which `Decoder.sample` takes as `empty`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.configs import DecoderConfig, UNetConfig, UpsamplerConfig
from models.convert.files import DiffusersModel, require_convertible, write_folder
from models.decoder import Decoder
from models.networks.unet import UNet
from models.upsampler import Upsampler
from models.weights import JsonObject

DECODER, TEXT_PROJECTION = "UNet2DConditionModel", "UnCLIPTextProjModel"
UPSAMPLER = "UNet2DModel"
PLAIN = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
ATTENDING = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")
MIDDLE = "UNetMidBlock2DSimpleCrossAttn"
# Of diffusers' own constructors, for options that config.json may omit
_DEFAULTS = {
    "resnet_time_scale_shift": "default", "class_embed_type": None, "add_attention": True,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_num_groups": 32, "norm_eps": 1e-5,
}  # fmt: skip
_NULL = "learned_classifier_free_guidance_embeddings"
_PROJECTIONS = {
    "caption_to_cond": "embedding_proj",
    "text_in": "encoder_hidden_states_proj",
    "token_norm": "text_encoder_hidden_states_norm",
    "embed_to_cond": "clip_image_embeddings_project_to_time_embeddings",
    "embed_to_tokens": "clip_extra_context_tokens_proj",
}


# -- the decoder -----------------------------------------------------------------------------------


def decoder_from_diffusers(folder: Path | str) -> Decoder:
    """Load a pipeline's decoder with its projections.

    Raises ValueError for other classes, networks of another shape, or tensors without a place.
    """
    source = DiffusersModel(Path(folder) / "decoder", DECODER)
    source.require({"class_embed_type": "identity", "mid_block_type": MIDDLE}, **_DEFAULTS)
    projection = DiffusersModel(Path(folder) / "text_proj", TEXT_PROJECTION)
    config = DecoderConfig(
        unet=_unet_config(source),
        num_embed_tokens=projection.option("clip_extra_context_tokens"),
        context_width=source.option("cross_attention_dim"),
        norm_embed_tokens=False,
        text_embed_cond=True,
        empty_caption=True,
        schedule="cosine",
        prediction="eps",
        weighting="simple",
        learned_variance=source.config.get("out_channels")
        == 2 * source.config.get("in_channels", 3),
    )
    dim, size = projection.option("clip_embeddings_dim"), source.option("sample_size")
    decoder = Decoder(config, image_size=size, embed_dim=dim, text_width=dim)
    unet = decoder.network
    assert isinstance(unet, UNet)
    state = {f"unet.{name}": value for name, value in _unet_state(unet, source).items()}

    # The projections: ours are of z_i in units of 1 / sqrt(E), and token by token
    state["null_image_embed"] = projection.take(_NULL)
    for name, other in _PROJECTIONS.items():
        for kind in ("weight", "bias"):
            value = projection.take(f"{other}.{kind}")
            if name == "embed_to_tokens":  # theirs are interleaved
                value = value.unflatten(0, (-1, config.num_embed_tokens)).transpose(0, 1)
                value = value.flatten(0, 1)
            if name.startswith("embed_to") and kind == "weight":
                value = value / decoder.embed_scale
            state[f"{name}.{kind}"] = value
    projection.require_empty()
    decoder.load_state_dict(state)
    return decoder.eval()


def decoder_to_diffusers(decoder: Decoder, folder: Path | str) -> None:
    """Write a decoder as `decoder` and `text_proj` of a pipeline.

    Raises ValueError naming the option that a pipeline does not have.
    """
    config, folder = decoder.config, Path(folder)
    text_width = 0 if decoder.text_in is None else decoder.text_in.in_features
    options = {
        "network": (config.network, "unet"),
        "image_tokens": (config.image_tokens, 1),
        "text_width": (text_width, decoder.null_image_embed.shape[0]),
        "text_embed_cond": (config.text_embed_cond, True),
        "norm_embed_tokens": (config.norm_embed_tokens, False),
        "embed_grid": (config.embed_grid, False),
        "prediction": (config.prediction, "eps"),
        "schedule": ((config.schedule, config.zero_terminal), ("cosine", False)),
    }
    require_convertible(folder, DECODER, options)
    unet = decoder.network
    assert isinstance(unet, UNet)
    target = _unet_options(unet, decoder.image_size, folder) | {
        "_class_name": DECODER,
        "in_channels": 3,
        "out_channels": 6 if config.learned_variance else 3,
        "cross_attention_dim": config.context_width,
        "class_embed_type": "identity",
        "mid_block_type": MIDDLE,
    }
    write_folder(folder / "decoder", target, _unet_tensors(unet))

    state = decoder.state_dict()
    tensors = {_NULL: state["null_image_embed"]}
    for name, other in _PROJECTIONS.items():
        for kind in ("weight", "bias"):
            value = state[f"{name}.{kind}"]
            if name == "embed_to_tokens":
                value = value.unflatten(0, (config.num_embed_tokens, -1)).transpose(0, 1)
                value = value.flatten(0, 1)
            if name.startswith("embed_to") and kind == "weight":
                value = value * decoder.embed_scale
            tensors[f"{other}.{kind}"] = value
    target = {
        "_class_name": TEXT_PROJECTION,
        "clip_extra_context_tokens": config.num_embed_tokens,
        "clip_embeddings_dim": text_width,
        "time_embed_dim": unet.cond_width,
        "cross_attention_dim": config.context_width,
    }
    write_folder(folder / "text_proj", target, tensors)


# -- upsamplers ------------------------------------------------------------------------------------


def upsampler_from_diffusers(folder: Path | str, factor: int = 4) -> Upsampler:
    """Load `super_res_first` or `super_res_last` of a pipeline; ValueError as for the decoder.

    factor: by which it enlarges, which its folder does not state.
    """
    source = DiffusersModel(Path(folder), UPSAMPLER)
    source.require({"in_channels": 6, "out_channels": 3, "add_attention": False}, **_DEFAULTS)
    config = UpsamplerConfig(
        unet=_unet_config(source), schedule="cosine", prediction="eps", weighting="simple",
        interpolation="bicubic",
    )  # fmt: skip
    crop_size = source.option("sample_size") // factor
    upsampler = Upsampler(config, factor=factor, crop_size=crop_size)
    upsampler.unet.load_state_dict(_unet_state(upsampler.unet, source))
    return upsampler.eval()


def upsampler_to_diffusers(upsampler: Upsampler, folder: Path | str, image_size: int) -> None:
    """Write an upsampler to images of `image_size` px as one UNet2DModel; ValueError naming the
    option that it does not have."""
    config, folder = upsampler.config, Path(folder)
    options = {
        "prediction": (config.prediction, "eps"),
        "interpolation": (config.interpolation, "bicubic"),
        "tell_noise": (config.tell_noise, False),
        "residual": (config.residual, False),
        "schedule": ((config.schedule, config.zero_terminal), ("cosine", False)),
    }
    require_convertible(folder, UPSAMPLER, options)
    target = _unet_options(upsampler.unet, image_size, folder) | {
        "_class_name": UPSAMPLER,
        "in_channels": 6,
        "out_channels": 3,
        "add_attention": False,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    }
    write_folder(folder, target, _unet_tensors(upsampler.unet))


# -- U-Nets ----------------------------------------------------------------------------------------


def _unet_config(source: DiffusersModel) -> UNetConfig:
    """Return the sizes of our U-Net; ValueError for a network that ours cannot be."""
    folder, expected = source.folder, {"flip_sin_to_cos": True, "freq_shift": 0}
    expected |= {"resnet_time_scale_shift": "scale_shift", "center_input_sample": False}
    source.require(expected, **_DEFAULTS)
    channels, down = source.option("block_out_channels"), source.option("down_block_types")
    attends = [kind == ATTENDING[0] for kind in down]
    up = [(ATTENDING if each else PLAIN)[1] for each in reversed(attends)]
    if list(source.option("up_block_types")) != up or set(down) - {PLAIN[0], ATTENDING[0]}:
        raise ValueError(f"{folder}: blocks: found {down}, expected {PLAIN[0]} or {ATTENDING[0]}")
    if any(attends) and not attends[-1]:
        raise ValueError(f"{folder}: found a last block without attention, expected one with it")
    if any(count % channels[0] for count in channels):
        raise ValueError(f"{folder}: block_out_channels: found {channels}, expected multiples")
    sides = [source.option("sample_size") // 2**i for i in range(len(channels))]
    return UNetConfig(
        channels=channels[0],
        channel_mult=tuple(count // channels[0] for count in channels),
        num_res_blocks=source.option("layers_per_block"),
        attn_resolutions=tuple(side for side, each in zip(sides, attends, strict=True) if each),
        head_channels=source.option("attention_head_dim") if any(attends) else 64,
        dropout=source.config.get("dropout", 0.0),
    )


def _unet_options(unet: UNet, image_size: int, folder: Path) -> JsonObject:
    """Return diffusers' options of our U-Net; ValueError for one that it does not have."""
    config = unet.config
    sides = [unet.grid // 2**i for i in range(len(config.channel_mult))]
    attends = [side in config.attn_resolutions for side in sides]
    options = {
        "magnitude_preserving": (config.magnitude_preserving, False),
        "patch_size": (config.patch_size, 1),
        "refine_channels": (config.refine_channels, 0),
        "qk_norm": (config.qk_norm, False),
        "attention at the lowest resolution": (attends[-1], any(attends)),
    }
    require_convertible(folder, UPSAMPLER, options)
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


def _places(unet: UNet) -> dict[str, list[str]]:
    """Return for each of our tensors diffusers' tensors that it is the concatenation of."""
    # Our levels, diffusers' blocks, and their layers' numbers there; the resamplers have none
    config, levels = unet.config, []
    sides = range(len(config.channel_mult))
    for ours, theirs, extra in (("down", "downsamplers", 0), ("up", "upsamplers", 1)):
        number = 0
        for i in sides:
            for j in range(config.num_res_blocks + extra):
                levels.append((f"{ours}.{number}", f"{ours}_blocks.{i}", f"resnets.{j}", j))
                number += 1
            if i < sides[-1]:
                levels.append((f"{ours}.{number}", f"{ours}_blocks.{i}", f"{theirs}.0", 0))
                number += 1
    levels += [(f"middle.{j}", "mid_block", f"resnets.{j}", j) for j in range(2)]

    layers = {
        "conv_in": ["conv_in"],
        "time_in.0": ["time_embedding.linear_1"],
        "time_in.2": ["time_embedding.linear_2"],
        "norm_out": ["conv_norm_out"],
        "conv_out": ["conv_out"],
    }
    for ours, block, resnet, j in levels:
        for name, other in (
            ("norm_1", "norm1"), ("conv_1", "conv1"), ("cond", "time_emb_proj"),
            ("norm_2", "norm2"), ("conv_2", "conv2"), ("skip", "conv_shortcut"),
        ):  # fmt: skip
            layers[f"{ours}.block.{name}"] = [f"{block}.{resnet}.{other}"]
        for name, others in (
            ("norm", ["group_norm"]), ("qkv", ["to_q", "to_k", "to_v"]),
            ("context", ["add_k_proj", "add_v_proj"]), ("out", ["to_out.0"]),
        ):  # fmt: skip
            names = [f"{block}.attentions.{j}.{other}" for other in others]
            layers[f"{ours}.attention.{name}"] = names
    named = [(name, *name.rpartition(".")[::2]) for name in unet.state_dict()]
    return {name: [f"{other}.{kind}" for other in layers[layer]] for name, layer, kind in named}


def _unet_state(unet: UNet, source: DiffusersModel) -> dict[str, Tensor]:
    """Return our U-Net's tensors.

    Raises ValueError for a missing tensor or one without a place, and for normalisations or
    activations that are not ours, whose weights would fit all the same.
    """
    groups = {module.num_groups for module in unet.modules() if isinstance(module, nn.GroupNorm)}
    if len(groups) > 1:  # diffusers' are the same everywhere
        raise ValueError(
            f"{source.folder}: norm groups: found channels that ours normalises in "
            f"{sorted(groups)} groups, expected multiples of 128"
        )
    expected = {"norm_num_groups": unet.norm_out.num_groups, "norm_eps": unet.norm_out.eps}
    source.require({**expected, "act_fn": "silu"}, **_DEFAULTS)
    state = {}
    for name, others in _places(unet).items():
        state[name] = torch.cat([source.take(other) for other in others])
    source.require_empty()
    return state


def _unet_tensors(unet: UNet) -> dict[str, Tensor]:
    state, tensors = unet.state_dict(), {}
    for name, others in _places(unet).items():
        tensors.update(zip(others, state[name].chunk(len(others)), strict=True))
    return tensors
