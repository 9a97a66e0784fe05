"""The stages of a preset that are trained: their models on the meta device, what a sample costs,
what an image costs to draw, and what a step keeps in memory."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import open_clip
import torch

from cluster.base.cli import parse
from cluster.planning.request import PlanRequest
from models.clip import build_clip, model_sizes
from models.costs import FLOPS_PER_MAC, forward_macs, forward_of, num_parameters, peak_bytes
from models.decoder import Decoder
from models.priors.diffusion import DiffusionPrior
from models.upsampler import Upsampler
from training.config import (
    PRESETS,
    ClipRunConfig,
    DecoderRunConfig,
    PriorRunConfig,
    RunConfig,
)
from training.tasks.clip_and_decoder import decoder_model
from training.tasks.prior import prior_model

CONFIGS: dict[str, Any] = {
    "clip": ClipRunConfig,
    "prior": PriorRunConfig,
    "decoder": DecoderRunConfig,
}


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What a preset is made of: presets of training/presets by stage, and its encoder.

    encoder: a preset of a CLIP, "clip_paper", or the name of an open_clip architecture; ar: the
    preset of its autoregressive prior; sampling: steps of prior, decoder and upsamplers.
    """

    encoder: str
    prior: str
    ar: str
    decoders: tuple[str, ...]
    sampling: tuple[int, ...] = (16, 16, 8, 8)  # eval/sampling/generate.py's
    guided: tuple[float, float] = (2, 2)  # passes a step of prior and decoder, under guidance


CHAINS = {
    "paper": Chain(
        encoder="clip_paper", prior="paper", ar="paper_ar",
        decoders=("paper", "paper_up256", "paper_up1024"),
        # table 3; guiding the prior hurt results
        sampling=(64, 250, 27, 15), guided=(1, 2),
    ),
    "karlo": Chain(
        encoder="ViT-L-14", prior="modern", ar="modern", decoders=("karlo", "karlo_up256")
    ),
    "modern": Chain(
        encoder="ViT-H-14", prior="modern", ar="modern",
        decoders=("modern", "paper_up256", "paper_up1024"),
    ),
    "mini": Chain(encoder="ViT-L-14", prior="mini", ar="mini", decoders=("mini", "mini_up")),
    "demo": Chain(encoder="clip_demo", prior="demo", ar="demo", decoders=("demo", "demo_up")),
    "debug": Chain(encoder="clip_debug", prior="debug", ar="debug", decoders=("debug", "debug_up")),
}  # fmt: skip
MOST_WORDS = 256  # of the paper's text encoders
PROBE = 8  # samples on which a step's memory is counted
BF16_BYTES = 2.0


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A frozen CLIP: its name, and its model on the meta device."""

    name: str
    model: open_clip.CLIP

    @cached_property
    def sizes(self) -> dict[str, int]:
        """embed_dim, text_width and context_length, as embeddings' manifests tell them."""
        model: Any = self.model
        return {
            "embed_dim": int(model.text_projection.shape[1]),
            "text_width": int(model.token_embedding.weight.shape[1]),
            "context_length": model_sizes(self.model)[1],
        }

    @property
    def text_parameters(self) -> int:
        """What is left of it without its vision tower, as training holds it."""
        model: Any = self.model
        return num_parameters(self.model) - num_parameters(model.visual)

    @cached_property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates of an image and of a caption."""
        size, context = model_sizes(self.model)
        self.model.eval()
        with torch.device("meta"):
            image, tokens = torch.zeros(1, 3, size, size), torch.ones(1, context, dtype=torch.long)
            return (
                forward_macs(lambda: self.model.encode_image(image)),
                forward_macs(lambda: self.model.encode_text(tokens)),
            )


def build_encoder(name: str) -> Encoder:
    """Build a preset's CLIP, or one of open_clip's architectures, on the meta device."""
    with torch.device("meta"):
        if name.startswith("clip_"):
            return Encoder(name=name, model=build_clip(read_preset("clip", name[5:]).model))
        sizes = open_clip.get_model_config(name)
        if sizes is None:
            raise ValueError(f"encoder: found {name!r}, expected an architecture of open_clip")
        vision = open_clip.CLIPVisionCfg(**sizes["vision_cfg"])
        text = open_clip.CLIPTextCfg(**sizes["text_cfg"])
        return Encoder(name=name, model=open_clip.CLIP(sizes["embed_dim"], vision, text))


def read_preset(kind: str, name: str, *more: str) -> Any:
    """Return the configuration that a training script reads from a preset and flags."""
    argv = ["--preset", name, *more]
    return parse(CONFIGS[kind], presets=PRESETS / kind, argv=argv)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that a step holds beside its state: `fixed`, and `each` for every sample of a
    micro-batch."""

    fixed: float
    each: float

    def of(self, micro_batch: int) -> float:
        return self.fixed + self.each * micro_batch


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A model that is trained. words: tokens of a caption that are read; frozen: the encoder whose
    text tower every step runs, None where the model reads its own tokens or none."""

    name: str
    kind: str
    preset: str
    config: RunConfig
    model: Any
    words: int
    frozen: Encoder | None = None

    @cached_property
    def parameters(self) -> int:
        return num_parameters(self.model)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of a forward pass on one sample, as trained."""
        self.model.eval()
        forward = forward_of(self.model, self.words)
        with torch.device("meta"):
            return forward_macs(forward)

    @property
    def network(self) -> str:
        """Which measured efficiency it takes: see cluster/planning/efficiency.py."""
        if not isinstance(self.model, (Decoder, Upsampler)):
            return "transformer"
        return "unet_channels_last" if self.model.unet.config.channels_last else "unet"

    @property
    def samples(self) -> int:
        """Samples that training sees."""
        return self.config.train.schedule.num_steps * self.config.train.batch.global_batch_size

    def flops(self, share: int = 0) -> float:
        """FLOPs of training on one sample, the frozen text tower and SAM's second look included.

        share: samples of a worker's step, of which SAM takes some twice; 0 = no SAM.
        """
        own = float(FLOPS_PER_MAC * self.macs)
        if share and isinstance(self.config, ClipRunConfig) and self.config.sam_rho:
            own *= 1 + min(self.config.sam_batch_size, share) / share
        return own + (2 * self.frozen.macs[1] if self.frozen else 0)

    @property
    def accumulates(self) -> bool:
        """Whether a worker's share may come in several micro-batches; CLIP contrasts all of it."""
        return self.kind != "clip"

    @property
    def _checkpointed(self) -> Any:
        """The module whose configuration says whether activations are computed again, or None."""
        if isinstance(self.model, DiffusionPrior):
            return self.model
        return self.model.unet if isinstance(self.model, (Decoder, Upsampler)) else None

    @property
    def checkpointing(self) -> tuple[bool, ...]:
        """What may be chosen: activations kept, or computed again; the preset's choice first."""
        if self._checkpointed is None:
            return (False,)
        chosen = self._checkpointed.config.checkpointing
        return chosen, not chosen

    @property
    def checkpointing_flag(self) -> str:
        if isinstance(self.model, DiffusionPrior):
            return "diffusion.checkpointing"
        return f"{'base' if isinstance(self.model, Decoder) else 'up'}.unet.checkpointing"

    @cached_property
    def activations(self) -> dict[bool, Activations]:
        """What a step holds, by whether activations are computed again."""
        found, choices = {}, self.checkpointing
        for choice in choices:
            if self._checkpointed is not None:
                config = self._checkpointed.config
                self._checkpointed.config = dataclasses.replace(config, checkpointing=choice)
            fixed = BF16_BYTES * self.parameters  # autocast's copies of weights, all at once
            held = peak_bytes(self.model.train(), forward_of(self.model, self.words, PROBE))
            found[choice] = Activations(fixed=fixed, each=max(0.0, held - fixed) / PROBE)
        if self._checkpointed is not None:
            config = self._checkpointed.config
            self._checkpointed.config = dataclasses.replace(config, checkpointing=choices[0])
        return found


def build_stages(request: PlanRequest) -> tuple[Encoder, list[Stage]]:
    """Build the encoder of a preset and all that it trains, in the order of the pipeline."""
    chain = CHAINS[request.chain]
    encoder = build_encoder(chain.encoder)
    words = request.caption_tokens or MOST_WORDS
    stages = []
    if request.train_clip:
        if not chain.encoder.startswith("clip_"):
            raise ValueError(
                f"train_clip: found true for the preset {request.chain}, whose encoder is a "
                f"pretrained {chain.encoder}, expected false; paper, demo and debug train one"
            )
        name = chain.encoder.removeprefix("clip_")
        config = read_preset("clip", name)
        stages.append(
            Stage(name="clip", kind="clip", preset=name, config=config, model=encoder.model,
                  words=words)
        )  # fmt: skip
    prior = chain.prior if request.prior == "diffusion" else chain.ar
    config = read_preset("prior", prior, "--prior", request.prior)
    with torch.device("meta"):
        model: Any = prior_model(config, encoder.sizes)
    stages.append(_stage("prior", "prior", prior, config, model, encoder, words))
    for preset in chain.decoders:
        config = read_preset("decoder", preset)
        with torch.device("meta"):
            model = decoder_model(config, encoder.sizes)
        stages.append(_stage(_stage_name(config), "decoder", preset, config, model, encoder, words))
    return encoder, stages


def _stage(
    name: str, kind: str, preset: str, config: Any, model: Any, encoder: Encoder, words: int
) -> Stage:
    """Describe a stage; one that reads CLIP's token states runs the frozen text tower, and reads
    no more words than it has."""
    sizes: Any = model.config
    reads = not isinstance(model, Upsampler) and getattr(sizes, "use_text", True)
    own = reads and sizes.text_tokens
    return Stage(
        name=name, kind=kind, preset=preset, config=config, model=model,
        words=min(words, own or encoder.sizes["context_length"]),
        frozen=encoder if reads and not own else None,
    )  # fmt: skip


def _stage_name(config: DecoderRunConfig) -> str:
    if config.stage == "base":
        return "base"
    return f"up{config.image_size}"
