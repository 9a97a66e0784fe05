"""The complete unCLIP chain: caption -> image embedding -> small image -> large image (Ramesh et
al. 2022, figure 2)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from models.clip import FrozenClip
from models.decoder import Condition, Decoder, ImageSampling
from models.priors.base import Prior, PriorSampling, PriorText
from models.tokenizers import token_mask, tokenizer
from models.upsampler import Upsampler


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample each stage of the chain; precision: of the networks, samples stay fp32."""

    prior: PriorSampling
    decoder: ImageSampling
    upsampler: ImageSampling
    precision: Literal["bf16", "fp32"] = "fp32"

    def autocast(self, like: Tensor) -> torch.autocast:
        """Return the context in which the networks run on the device of `like`."""
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.precision == "bf16")


@dataclass(frozen=True, kw_only=True)
class UnClip:
    """The models of a chain, trained on one encoder.

    prior: None for a decoder of given embeddings; decoder: None for a prior alone; guide: a weaker
    decoder that guidance leads away from, None for the decoder without a condition.
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
        """Load the models from folders of finished runs; an empty name loads none.

        Raises ValueError naming the run that was trained on another encoder or from another size.
        """
        from models.convert.runs import load_chain

        return load_chain(clip, prior, decoder, upsamplers, guide)

    @property
    def device(self) -> torch.device:
        """The device of all models; inputs are moved to it, and results stay on it."""
        return self.clip.device

    def to(self, device: torch.device | str) -> "UnClip":
        """Move every model to `device`."""
        for model in (self.clip, self.prior, self.decoder, self.guide, *self.upsamplers):
            if isinstance(model, nn.Module):
                model.to(device)
        return self

    @property
    def base(self) -> Decoder:
        """The base decoder; ValueError if the chain has none."""
        if self.decoder is None:
            raise ValueError("decoder: found none, expected the finished run of a base decoder")
        return self.decoder

    # -- inputs ------------------------------------------------------------------------------------

    def encode_captions(self, captions: list[str]) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
        """Return CLIP's tokens int32 [B, L], text_embed [B, E], text_states [B, L, W] and
        token_mask bool [B, L] of captions."""
        array = self.clip.tokenize(captions)
        tokens = torch.from_numpy(array).to(self.device)  # [B, L]
        text_embed, text_states = self.clip.encode_text(tokens)  # [B, E], [B, L, W]
        return array, text_embed, text_states, token_mask(tokens)

    def _own_tokens(self, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Return the tokens int [B, length] that a model's own text encoder reads, and their
        mask."""
        tokens = torch.from_numpy(tokenizer(length)(captions)).to(self.device)
        return tokens, token_mask(tokens)

    def prior_text(self, captions: list[str], own_tokens: int = 0) -> PriorText:
        """Return captions as a prior's input: CLIP's states, or `own_tokens` tokens of its own."""
        _, text_embed, text, mask = self.encode_captions(captions)
        if own_tokens:
            text, mask = self._own_tokens(captions, own_tokens)
        return PriorText(text_embed=text_embed, text=text, token_mask=mask).trimmed()

    def condition(self, captions: list[str] | None, image_embed: Tensor) -> Condition:
        """Return the decoder's input: image_embed [B, E], or with tokens [B, 1 + k, E], with B
        captions.

        captions: None for embeddings alone, as where training dropped the caption: no caption, or
        the empty one for a decoder with `empty_caption`. ValueError if the chain has no decoder.
        """
        config, image_embed = self.base.config, image_embed.to(self.device)
        if captions is None and not config.empty_caption:
            return Condition(image_embed=image_embed, without_text=True)
        captions = [""] * len(image_embed) if captions is None else captions
        _, text_embed, text_states, mask = self.encode_captions(captions)
        if config.text_tokens:
            tokens, mask = self._own_tokens(captions, config.text_tokens)
            return Condition(
                image_embed=image_embed, text_embed=text_embed, tokens=tokens, token_mask=mask
            )
        return Condition(
            image_embed=image_embed, text_embed=text_embed, text_states=text_states,
            token_mask=mask,
        )  # fmt: skip

    # -- sampling ----------------------------------------------------------------------------------

    def sample_prior(self, keys: Tensor, captions: list[str], sampling: Sampling) -> Tensor:
        """Draw an image embedding [B, E] for each caption, or [B, 1 + k, E] by a prior of k tokens;
        keys: int64 [B].

        Raises ValueError if the chain has no prior.
        """
        if self.prior is None:
            raise ValueError("prior: found none, expected the finished run of a prior")
        text = self.prior_text(captions, self.prior.config.text_tokens)
        keys = keys.to(self.device)
        with sampling.autocast(keys):
            return self.prior.sample(keys, text, sampling.prior)

    def sample_base(
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
            empty = self.condition(None, condition.image_embed)
        with sampling.autocast(keys):
            return self.base.sample(
                keys, condition, sampling.decoder, start=start, empty=empty, guide=self.guide,
                known=known,
            )  # fmt: skip

    def upsample(self, keys: Tensor, image: Tensor, sampling: Sampling) -> Tensor:
        """Raise the base decoder's images [B, 3, S, S] through all upsamplers."""
        keys, image = keys.to(self.device), image.to(self.device)
        with sampling.autocast(keys):
            for upsampler in self.upsamplers:
                image = upsampler.sample(keys, image, sampling.upsampler)
        return image

    def render(
        self, keys: Tensor, captions: list[str], image_embed: Tensor, sampling: Sampling
    ) -> Tensor:
        """Draw images [B, 3, H, W] in [-1, 1] of image_embed [B, E], through every stage of the
        cascade; ValueError if the chain has no decoder."""
        image = self.sample_base(keys, self.condition(captions, image_embed), sampling)
        return self.upsample(keys, image, sampling)
