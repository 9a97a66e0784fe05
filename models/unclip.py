"""unCLIP as a whole: caption -> image embedding -> small image -> large image (Ramesh et al.
2022, figure 2)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from models.clip import VOCAB_SIZE, FrozenClip, token_mask, tokenizer
from models.configs import (
    AutoregressivePriorConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    RegressionPriorConfig,
    UNetConfig,
    UpsamplerConfig,
)
from models.decoder import Condition, Decoder, ImageSampling
from models.priors.autoregressive import AutoregressivePrior
from models.priors.base import Prior, PriorSampling, PriorText
from models.priors.diffusion import DiffusionPrior
from models.priors.regression import RegressionPrior
from models.upsampler import Upsampler
from models.weights import exported, load_config, load_weights


def _with_unet(model: dict[str, Any]) -> dict[str, Any]:
    """Rebuild the nested sizes; JSON knows lists only."""
    unet: dict[str, Any] = dict(model["unet"])
    for name in ("channel_mult", "attn_resolutions"):
        unet[name] = tuple(unet[name])
    return {**model, "unet": UNetConfig(**unet)}


def _prior(model_class: Any, config_class: Any, config: dict) -> nn.Module:
    sizes = {key: config[key] for key in ("embed_dim", "text_width", "context_length")}
    return model_class(config_class(**config["model"]), **sizes, vocab_size=VOCAB_SIZE)


def _decoder(config: dict) -> Decoder:
    sizes = {key: config[key] for key in ("image_size", "embed_dim", "text_width")}
    return Decoder(DecoderConfig(**_with_unet(config["model"])), **sizes, vocab_size=VOCAB_SIZE)


def _upsampler(config: dict) -> Upsampler:
    model = UpsamplerConfig(**_with_unet(config["model"]))
    return Upsampler(model, factor=config["factor"], crop_size=config["crop_size"])


_BUILDERS: dict[str, Callable[[dict], nn.Module]] = {
    "diffusion_prior": partial(_prior, DiffusionPrior, DiffusionPriorConfig),
    "autoregressive_prior": partial(_prior, AutoregressivePrior, AutoregressivePriorConfig),
    "regression_prior": partial(_prior, RegressionPrior, RegressionPriorConfig),
    "decoder": _decoder,
    "upsampler": _upsampler,
}


def load_model(run: Path | str, kind: str) -> tuple[nn.Module, dict]:
    """Load the averaged weights of a finished run, and its config.json.

    kind: "decoder", "upsampler", "diffusion_prior" or any other prior's, or "prior" for any.
    Raises ValueError for an unfinished run or one of another kind.
    """
    step = exported(Path(run))
    config = load_config(step)
    if not config["kind"].endswith(kind):
        raise ValueError(f"{run}: found a run of kind {config['kind']}, expected {kind}")
    return load_weights(_BUILDERS[config["kind"]](config), step / "ema.safetensors"), config


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample each part of the chain; precision: of the networks, the samples stay fp32."""

    prior: PriorSampling
    decoder: ImageSampling
    upsampler: ImageSampling
    precision: Literal["bf16", "fp32"] = "fp32"

    def autocast(self, like: Tensor) -> torch.autocast:
        """Return the context in which the networks run on the device of `like`."""
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.precision == "bf16")


@dataclass(frozen=True, kw_only=True)
class UnClip:
    """The parts of a chain, made for one encoder; any mixture of encoders is refused.

    decoder: None for a prior alone, which imagines but does not render; prior: None for a decoder
    of images' own embeddings; guide: a weaker decoder that guidance leads away from, None for the
    decoder's own without a condition.
    """

    clip: FrozenClip
    prior: Prior | None
    decoder: Decoder | None = None
    upsamplers: tuple[Upsampler, ...] = ()
    guide: Decoder | None = None

    @classmethod
    def load(
        cls,
        clip: FrozenClip,
        prior: str,
        decoder: str = "",
        upsamplers: tuple[str, ...] = (),
        guide: str = "",
    ) -> "UnClip":
        """Load finished runs; `decoder` empty loads the prior alone, `prior` empty no prior.

        Raises ValueError naming the part that was trained on another encoder or from another size.
        """
        if upsamplers and not decoder:
            raise ValueError(f"{upsamplers[0]}: found an upsampler without a decoder, expected one")
        parts: dict[str, Any] = {"prior": None}
        for part, run in (("prior", prior), ("decoder", decoder), ("guide", guide)):
            if not run:
                continue
            name = "decoder" if part == "guide" else part
            parts[part], config = load_model(run, name)
            if config["encoder_id"] != clip.encoder_id:
                raise ValueError(
                    f"{run}: found a {name} trained on encoder {config['encoder_id']}, expected "
                    f"{clip.encoder_id}; "
                    "join only parts that were trained on one encoder"
                )
        if guide and decoder:
            parts["decoder"].require_guide(parts["guide"])
        raised, size = [], parts["decoder"].image_size if decoder else 0
        for run in upsamplers:
            upsampler, config = load_model(run, "upsampler")
            if config["image_size"] != size * config["factor"]:
                source = config["image_size"] // config["factor"]
                raise ValueError(
                    f"{run}: found an upsampler from {source} px, "
                    f"expected one from the {size} px that the stage before it draws"
                )
            raised.append(upsampler)
            size = config["image_size"]
        return cls(clip=clip, **parts, upsamplers=tuple(raised))

    @property
    def device(self) -> torch.device:
        """Where all parts are; what goes in is brought here, what comes out is left here."""
        return self.clip.device

    def to(self, device: torch.device | str) -> "UnClip":
        """Move every part."""
        for part in (self.clip, self.prior, self.decoder, self.guide, *self.upsamplers):
            if isinstance(part, nn.Module):
                part.to(device)
        return self

    def describe(self, captions: list[str]) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
        """Return tokens, text_embed [B, E], text_states [B, L, W] and token_mask [B, L] of
        captions."""
        tokens = self.clip.tokenize(captions)
        words = torch.from_numpy(tokens).to(self.device)
        embed, states = self.clip.encode_text(words)
        return tokens, embed, states, token_mask(words)

    def imagine(self, keys: Tensor, captions: list[str], sampling: Sampling) -> Tensor:
        """Draw an image embedding [B, E] for each caption from the prior."""
        if self.prior is None:
            raise ValueError("prior: found none, expected the finished run of a prior")
        text = self.prior_text(captions, self.prior.config.text_tokens)
        keys = keys.to(self.device)
        with sampling.autocast(keys):
            return self.prior.sample(keys, text, sampling.prior)

    def prior_text(self, captions: list[str], own_tokens: int = 0) -> PriorText:
        """Return what a prior is told of captions: CLIP's states, or so many tokens of its own."""
        _, embed, states, mask = self.describe(captions)
        if not own_tokens:
            return PriorText(text_embed=embed, text=states, token_mask=mask).trimmed()
        words = torch.from_numpy(tokenizer(own_tokens)(captions)).to(self.device)
        return PriorText(text_embed=embed, text=words, token_mask=token_mask(words)).trimmed()

    @property
    def base(self) -> Decoder:
        """The base decoder; ValueError if the chain has none."""
        if self.decoder is None:
            raise ValueError("decoder: found none, expected the finished run of a base decoder")
        return self.decoder

    def condition(self, captions: list[str], image_embed: Tensor) -> Condition:
        """Return what the decoder is told: embeddings [B, E], and as many captions."""
        decoder = self.base
        _, embed, states, mask = self.describe(captions)
        words: dict[str, Any] = {"text_states": states}
        if decoder.config.text_tokens:
            found = tokenizer(decoder.config.text_tokens)(captions)
            tokens = torch.from_numpy(found).to(self.device)
            words, mask = {"tokens": tokens}, token_mask(tokens)
        z = image_embed.to(self.device)
        return Condition(image_embed=z, text_embed=embed, token_mask=mask, **words)

    def wordless(self, image_embed: Tensor) -> Condition:
        """Return what the decoder is told of embeddings [B, E] alone, as where training dropped the
        caption: no caption, or the empty one of a decoder with `empty_caption`."""
        if self.base.config.empty_caption:
            return self.condition([""] * len(image_embed), image_embed)
        return Condition(image_embed=image_embed.to(self.device), without_text=True)

    def render(
        self, keys: Tensor, captions: list[str], image_embed: Tensor, sampling: Sampling
    ) -> Tensor:
        """Draw images [B, 3, H, W] in [-1, 1] of given embeddings, through every stage of the
        cascade; ValueError if the chain has no decoder."""
        image = self.draw(keys, self.condition(captions, image_embed), sampling)
        return self.enlarge(keys, image, sampling)

    def draw(
        self,
        keys: Tensor,
        condition: Condition,
        sampling: Sampling,
        *,
        start: Tensor | None = None,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Draw images [B, 3, S, S] in [-1, 1] by the base decoder alone; see `Decoder.sample`."""
        keys = keys.to(self.device)
        known = known and (known[0].to(self.device), known[1].to(self.device))
        empty = None
        if self.base.config.empty_caption:
            empty = self.wordless(condition.image_embed)
        with sampling.autocast(keys):
            return self.base.sample(
                keys, condition, sampling.decoder, start=start, empty=empty, guide=self.guide,
                known=known,
            )  # fmt: skip

    def enlarge(self, keys: Tensor, image: Tensor, sampling: Sampling) -> Tensor:
        """Raise the base decoder's images through every upsampler there is."""
        keys, image = keys.to(self.device), image.to(self.device)
        with sampling.autocast(keys):
            for upsampler in self.upsamplers:
                image = upsampler.sample(keys, image, sampling.upsampler)
        return image
