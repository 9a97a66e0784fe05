"""Models from the folders of finished runs, and encoders by their names."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from models.architectures import FOLDER, HUB, find_architecture
from models.clip import LOGITS, RAW, FrozenClip, build_clip
from models.configs import (
    AutoregressivePriorConfig,
    ClipConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    DiTConfig,
    RegressionPriorConfig,
    UNetConfig,
    UpsamplerConfig,
)
from models.convert import efficientnet
from models.convert.remote_runs import is_remote_run
from models.decoder import Decoder
from models.priors.autoregressive import AutoregressivePrior
from models.priors.base import Prior
from models.priors.diffusion import DiffusionPrior
from models.priors.regression import RegressionPrior
from models.tokenizers import VOCAB_SIZE, Tokenizer
from models.unclip import UnClip
from models.upsampler import Upsampler
from models.weights import (
    EMA_NAME,
    JsonObject,
    exported,
    load_config,
    load_state,
    load_weights,
    read_checkpoint,
)

HARMLESS = ("attn_mask", "position_ids")  # buffers that are computed

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
    if "dit" in model:  # not in older runs
        model["dit"] = DiTConfig(**model["dit"])
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
    step = exported(run)
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
    drawn = getattr(chain.prior.config, "image_tokens", 1) if chain.prior else 1
    read = chain.decoder.config.image_tokens if chain.decoder else 1
    if 1 not in (drawn, read) and drawn != read:
        raise ValueError(f"{prior}: found {drawn} image tokens, expected {read} as {decoder}, or 1")

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
    """Return the name of an encoder with the path of its run folder, of its folder of open_clip's
    layout (local-dir:), or of its file of weights (ARCH:FILE), made absolute, for processes that
    have another working directory."""
    name = spec.removesuffix(RAW)
    raw = spec[len(name) :]
    if name and Path(name).is_dir():
        return str(Path(name).absolute()) + raw
    arch, colon, weights = name.partition(":")
    if colon and (Path(weights).is_file() or name.startswith(FOLDER)):
        return f"{arch}:{Path(weights).absolute()}{raw}"
    return spec


def load_clip(spec: str) -> FrozenClip:
    """Load the encoder that `spec` names: see docs/encoders.md.

    A run of training/clip.py, by its folder or URL; ARCHITECTURE:TAG, one of open_clip's pretrained
    weights; hf-hub:REPOSITORY or local-dir:FOLDER, as open_clip reads them; ARCHITECTURE:random,
    seeded, for tests; or ARCHITECTURE:FILE. Any of these followed by "+raw" keeps the length of
    embeddings.
    Raises ValueError when it names none of these, or something that is not on this machine.
    """
    unit_norm, spec = not spec.endswith(RAW), spec.removesuffix(RAW)
    if is_remote_run(spec) or Path(spec).is_dir():
        step = exported(spec)
        config = load_config(step)
        if config["kind"] != "clip":
            raise ValueError(f"{spec}: found a run of kind {config['kind']}, expected clip")
        tower, identity = config.get("image_tower", ""), config.get("image_tower_identity", "")
        if tower and identity != efficientnet.IDENTITY:
            raise ValueError(
                f"{spec}: image_tower: found {identity}, expected the installed weights, "
                f"{efficientnet.IDENTITY}; install the version that it was trained on"
            )
        clip = build_clip(ClipConfig(**config["model"]), tower)
        load_weights(clip, step / EMA_NAME)
        name = f"clip-{clip.visual.output_dim}{'-' if tower else ''}{identity}"
        return FrozenClip(clip, name, unit_norm=unit_norm)

    name, colon, weights = spec.partition(":")
    if spec.startswith((HUB, FOLDER)):
        name, weights = spec, ""
    elif not colon or not weights:
        raise ValueError(
            f"clip {spec}: found no such folder, expected a "
            "finished run of training/clip.py, ARCHITECTURE:TAG, ARCHITECTURE:FILE or "
            "hf-hub:REPOSITORY; train one with: python training/clip.py"
        )
    text, file = None, Path(weights) if is_file_of_weights(weights) else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "tiny":
            clip = build_clip(clip_config_named(name))
        else:
            architecture = find_architecture(name)
            if weights and weights != "random" and file is None:
                architecture = architecture.pretrained(weights)
            name, text = architecture.name, Tokenizer(architecture.tokenizer)
            file = file or architecture.weights
            clip = architecture.create()
    if file is not None:
        load_clip_weights(clip, file)
    return FrozenClip(clip, name, unit_norm=unit_norm, text=text)


def is_file_of_weights(name: str) -> bool:
    """Return whether what follows ARCHITECTURE: is a file's name, rather than a tag's."""
    return name.endswith((".safetensors", ".pt", ".pth", ".bin")) or Path(name).is_file()


def load_clip_weights(clip: nn.Module, path: Path) -> None:
    """Load a file of weights into an untrained model of open_clip's.

    What does not affect embeddings may be missing, or left over, with a message: buffers of older
    versions, and what scales logits. Raises ValueError as `load_weights` does.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state: dict[str, Tensor] = convert_state_dict(clip, read_checkpoint(path))  # pyright: ignore
    expected: dict[str, Tensor] = clip.state_dict()
    if "positional_embedding" not in expected:  # the text tower is a module of its own
        state = convert_to_custom_text_state_dict(state)
    ignored = [
        name for name in state
        if name not in expected and name.rpartition(".")[2] in (*HARMLESS, *LOGITS)
    ]  # fmt: skip
    missing = [name for name in LOGITS if name in expected and name not in state]
    for names, what in ((ignored, "ignores"), (missing, "lacks")):
        if names:
            text = f"{path}: {what} {', '.join(names)}, which no embedding depends on"
            print(text, file=sys.stderr, flush=True)
    state = {name: value for name, value in state.items() if name not in ignored}
    for name in (name for name in LOGITS if name in expected):
        # open_clip saves a scalar; see build_clip for why ours is not one
        state[name] = state.get(name, expected[name]).reshape(expected[name].shape)
    load_state(clip, state, path)


def clip_config_named(architecture: str) -> ClipConfig:
    """Return the configuration of an open_clip architecture, or of our own `tiny` (tests,
    debugging)."""
    if architecture == "tiny":
        return ClipConfig(
            embed_dim=32, vision_width=32, vision_depth=1, text_width=32, text_depth=1
        )
    return ClipConfig(architecture=architecture)
