"""Models from the folders of finished runs, and encoders by their names."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from models.clip import RAW, VOCAB_SIZE, FrozenClip, build_clip
from models.configs import (
    AutoregressivePriorConfig,
    ClipConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    RegressionPriorConfig,
    UNetConfig,
    UpsamplerConfig,
)
from models.convert import efficientnet
from models.decoder import Decoder
from models.priors.autoregressive import AutoregressivePrior
from models.priors.base import Prior
from models.priors.diffusion import DiffusionPrior
from models.priors.regression import RegressionPrior
from models.unclip import UnClip
from models.upsampler import Upsampler
from models.weights import EMA_NAME, JsonObject, exported, load_config, load_weights

# -- models ----------------------------------------------------------------------------------------


def build_model(config: JsonObject) -> nn.Module:
    """Build the untrained model that a run's config.json describes."""
    kind, model = config["kind"], dict(config["model"])
    if "unet" in model:
        # JSON has no tuples
        unet: JsonObject = dict(model["unet"])
        for name in ("channel_mult", "attn_resolutions"):
            unet[name] = tuple(unet[name])
        model["unet"] = UNetConfig(**unet)
    if kind == "upsampler":
        sizes = {"factor": config["factor"], "crop_size": config["crop_size"]}
        return Upsampler(UpsamplerConfig(**model), **sizes)
    sizes = {name: config[name] for name in ("embed_dim", "text_width")}
    sizes["vocab_size"] = VOCAB_SIZE
    if kind == "decoder":
        return Decoder(DecoderConfig(**model), image_size=config["image_size"], **sizes)
    sizes["context_length"] = config["context_length"]
    if kind == "diffusion_prior":
        return DiffusionPrior(DiffusionPriorConfig(**model), **sizes)
    if kind == "autoregressive_prior":
        return AutoregressivePrior(AutoregressivePriorConfig(**model), **sizes)
    assert kind == "regression_prior", kind
    return RegressionPrior(RegressionPriorConfig(**model), **sizes)


def load_model(run: Path | str, kind: str) -> tuple[nn.Module, JsonObject]:
    """Load the averaged weights of a finished run, and its config.json.

    kind: "decoder", "upsampler", "diffusion_prior" or another kind of prior, or "prior" for any.
    Raises ValueError for an unfinished run or one of another kind.
    """
    step = exported(Path(run))
    config = load_config(step)
    if not config["kind"].endswith(kind):
        raise ValueError(f"{run}: found a run of kind {config['kind']}, expected {kind}")
    return load_weights(build_model(config), step / EMA_NAME), config


def load_chain(
    clip: FrozenClip, prior: str, decoder: str, upsamplers: tuple[str, ...], guide: str
) -> UnClip:
    """Load a chain; see `UnClip.load`."""
    if upsamplers and not decoder:
        raise ValueError(f"{upsamplers[0]}: found an upsampler without a decoder, expected one")

    def load(run: str, kind: str) -> nn.Module | None:
        """Load a model of the chain's encoder; none without a name."""
        if not run:
            return None
        model, config = load_model(run, kind)
        if config["encoder_id"] != clip.encoder_id:
            raise ValueError(
                f"{run}: found a {kind} trained on encoder {config['encoder_id']}, expected "
                f"{clip.encoder_id}; join only models that were trained on one encoder"
            )
        return model

    stages: list[Upsampler] = []
    chain = UnClip(
        clip=clip,
        prior=cast("Prior | None", load(prior, "prior")),
        decoder=cast("Decoder | None", load(decoder, "decoder")),
        guide=cast("Decoder | None", load(guide, "decoder")),
    )
    if chain.guide and chain.decoder:
        chain.decoder.require_guide(chain.guide)

    # Each upsampler continues at the size of the stage before it
    size = chain.decoder.image_size if chain.decoder else 0
    for run in upsamplers:
        upsampler, config = load_model(run, "upsampler")
        if config["image_size"] != size * config["factor"]:
            source = config["image_size"] // config["factor"]
            raise ValueError(
                f"{run}: found an upsampler from {source} px, "
                f"expected one from the {size} px of the stage before it"
            )
        stages.append(cast(Upsampler, upsampler))
        size = config["image_size"]
    return replace(chain, upsamplers=tuple(stages))


# -- encoders --------------------------------------------------------------------------------------


def absolute_spec(spec: str) -> str:
    """Return the name of an encoder with the path of its run folder, or of its file of weights
    (ARCH:FILE), made absolute, for processes that have another working directory."""
    name = spec.removesuffix(RAW)
    raw = spec[len(name) :]
    if name and Path(name).is_dir():
        return str(Path(name).absolute()) + raw
    arch, colon, weights = name.partition(":")
    if colon and Path(weights).is_file():
        return f"{arch}:{Path(weights).absolute()}{raw}"
    return spec


def load_clip(spec: str) -> FrozenClip:
    """Load the encoder that `spec` names.

    A run folder of training/clip.py; ARCHITECTURE:TAG, open_clip's own pretrained weights, which
    it fetches if they are not in its cache; ARCHITECTURE:random, seeded, for tests; or
    ARCHITECTURE:FILE.safetensors. Any of these followed by "+raw" keeps the length of embeddings.
    Raises ValueError when it names none of these.
    """
    unit_norm, spec = not spec.endswith(RAW), spec.removesuffix(RAW)
    folder = Path(spec)
    if folder.is_dir():
        step = exported(folder)
        config = load_config(step)
        if config["kind"] != "clip":
            raise ValueError(f"{folder}: found a run of kind {config['kind']}, expected clip")
        tower, identity = config.get("image_tower", ""), config.get("image_tower_identity", "")
        if tower and identity != efficientnet.IDENTITY:
            raise ValueError(
                f"{folder}: image_tower: found {identity}, expected the installed weights, "
                f"{efficientnet.IDENTITY}; install the version that it was trained on"
            )
        clip = build_clip(ClipConfig(**config["model"]), tower)
        load_weights(clip, step / EMA_NAME)
        name = f"clip-{clip.visual.output_dim}{'-' if tower else ''}{identity}"
        return FrozenClip(clip, name, unit_norm=unit_norm)
    if ":" not in spec:
        raise ValueError(
            f"clip {spec}: found no such folder, expected a finished run of training/clip.py or "
            "ARCHITECTURE:TAG; train one with: python training/clip.py"
        )
    architecture, weights = spec.split(":", 1)
    if weights == "random" or weights.endswith(".safetensors"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            clip = build_clip(clip_config_named(architecture))
        if weights != "random":
            # open_clip saves a scalar; see build_clip for why ours is not one
            clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(()))
            load_weights(clip, Path(weights))
        return FrozenClip(clip, architecture, unit_norm=unit_norm)
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in tags:
        raise ValueError(
            f"clip {spec}: found tag {weights!r}, expected one of {', '.join(tags) or 'none known'}"
        )
    clip = open_clip.create_model(architecture, pretrained=weights)
    if not isinstance(clip, open_clip.CLIP):
        raise ValueError(f"clip {spec}: found a {type(clip).__name__}, expected a CLIP")
    return FrozenClip(clip, architecture, unit_norm=unit_norm)


def clip_config_named(architecture: str) -> ClipConfig:
    """Return the configuration of an open_clip architecture, or of our own `tiny` (tests,
    debugging)."""
    if architecture == "tiny":
        return ClipConfig(
            embed_dim=32, vision_width=32, vision_depth=1, text_width=32, text_depth=1
        )
    return ClipConfig(architecture=architecture)
