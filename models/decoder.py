"""The decoder: from a CLIP image embedding, and optionally its caption, to pixels (Ramesh et al.
2022, section 2.1)."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from models.configs import DecoderConfig, Spacing
from models.diffusion import keyed_random
from models.diffusion.losses import draw_timesteps, timestep_weight, variational_bound
from models.diffusion.samplers import (
    Denoiser,
    Sampler,
    clipped,
    ddim_invert,
    guided,
    inpainted,
    learned_ddpm,
)
from models.diffusion.schedule import NoiseSchedule
from models.networks.text_encoder import TextEncoder
from models.networks.unet import UNet

GRID_FEATURES = 32
WITH_GUIDE = ["use_text", "text_tokens", "prediction", "schedule", "num_timesteps", "zero_terminal"]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What the decoder is told: z_i, and of a caption whatever the decoder reads.

    image_embed [B, E]; text_states [B, L, W] of CLIP, or tokens int [B, L] of a decoder that reads
    its own, with token_mask [B, L]; text_embed [B, E], z_t. without_text: z_i alone, as where
    training dropped the caption; not of a decoder with `empty_caption`: see `UnClip.wordless`.
    """

    image_embed: Tensor
    text_states: Tensor | None = None
    tokens: Tensor | None = None
    token_mask: Tensor | None = None
    text_embed: Tensor | None = None
    without_text: bool = False


@dataclass(frozen=True, kw_only=True)
class ImageSampling:
    """How to sample a decoder or an upsampler.

    sampler: "learned_ddpm" takes the network's own variance (Ramesh et al. 2022, table 3); spacing:
    which timesteps are visited, see `NoiseSchedule.timesteps`; guidance_interval: shares [low,
    high] of the noising time in which to guide; guidance_rescale: see `guided`; tile: side in px of
    the parts in which an upsampler looks at its image, 0 for the whole.
    """

    sampler: Sampler | Literal["learned_ddpm"]
    sample_steps: int = 20
    spacing: Spacing = "trailing"
    cfg_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    tile: int = 0


@dataclass(frozen=True, kw_only=True)
class Read:
    """A condition as the network has read it, once for all steps of a sample.

    words: [B, L, context] with word_mask [B, L], None without captions; pooled: [B, cond], what
    the caption adds to the timestep embedding.
    """

    image_embed: Tensor
    words: Tensor | None = None
    word_mask: Tensor | None = None
    pooled: Tensor | None = None


class _EmbedToGrid(nn.Sequential):
    """Lay z_i out in space: [B, E] -> [B, channels, side, side].

    What is where is a product of attributes and places, which one linear map cannot tell; a few
    features a cell, widened to `channels`, keep the second map small.
    """

    def __init__(self, embed_dim: int, *, channels: int, side: int) -> None:
        hidden, features = 2 * embed_dim, min(channels, GRID_FEATURES)
        super().__init__(
            nn.Linear(embed_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, features * side**2),
            nn.Unflatten(1, (features, side, side)),
            nn.Conv2d(features, channels, 1),
        )


def dropped_captions(config: DecoderConfig, keys: Tensor) -> Tensor:
    """Say which samples' captions training drops: bool [B]."""
    return keyed_random.uniform(keys, "text_drop") < config.text_drop


def _require_sense(config: DecoderConfig) -> None:
    """Refuse options that would do nothing."""
    if config.text_embed_cond and (config.text_tokens or not config.use_text):
        raise ValueError(
            "text_embed_cond: found true for a decoder that does not read CLIP's captions, "
            "expected false: z_t comes with CLIP's token states"
        )
    if config.empty_caption and (config.text_tokens or not config.use_text):
        raise ValueError(
            "empty_caption: found true for a decoder that does not read CLIP's captions, expected "
            "false"
        )
    if config.text_tokens and not config.use_text:
        raise ValueError("text_tokens: found some with use_text false, expected 0")


class Decoder(nn.Module):
    """z_i goes into the timestep embedding and into extra tokens; the caption into tokens of its
    own."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        image_size: int,
        embed_dim: int,
        text_width: int,
        vocab_size: int = 0,
    ) -> None:
        """Build for an encoder of these sizes; vocab_size: of `config.text_tokens` own tokens."""
        super().__init__()
        _require_sense(config)
        self.config = config
        self.image_size = image_size
        self.schedule = NoiseSchedule.build(
            config.schedule,
            config.num_timesteps,
            zero_terminal=config.zero_terminal,
            prediction=config.prediction,
        )
        context = config.context_width
        self.unet = UNet(
            config.unet,
            image_size=image_size,
            in_channels=3,
            out_channels=6 if config.learned_variance else 3,
            context=context,
        )
        self.embed_scale = (
            embed_dim**0.5
        )  # unit-norm rows become unit RMS, what linear layers expect
        self.null_image_embed = nn.Parameter(torch.randn(embed_dim) * 0.02)
        self.embed_to_cond = nn.Linear(embed_dim, self.unet.cond_width)
        self.embed_to_tokens = nn.Linear(embed_dim, config.num_embed_tokens * context)
        self.embed_to_grid = (
            _EmbedToGrid(embed_dim, channels=config.unet.channels, side=self.unet.grid)
            if config.embed_grid
            else None
        )
        self._build_caption(text_width, embed_dim, vocab_size)
        self.token_norm = nn.LayerNorm(context)

    def _build_caption(self, text_width: int, embed_dim: int, vocab_size: int) -> None:
        """Make what reads captions: CLIP's states, or a text transformer of the decoder's own."""
        config, context = self.config, self.config.context_width
        self.text_in = self.text_encoder = self.caption_to_cond = None
        if not config.use_text:
            return
        if config.text_tokens:
            qk_norm = config.unet.qk_norm or config.unet.magnitude_preserving  # as the U-Net's
            self.text_encoder = TextEncoder(
                context_length=config.text_tokens, vocab_size=vocab_size, width=context,
                depth=config.text_depth, num_heads=config.text_heads, qk_norm=qk_norm,
            )  # fmt: skip
            self.caption_to_cond = nn.Linear(context, self.unet.cond_width)
        else:
            self.text_in = nn.Linear(text_width, context)
            if config.text_embed_cond:
                self.caption_to_cond = nn.Linear(embed_dim, self.unet.cond_width)

    def read(self, condition: Condition) -> Read:
        """Read the caption; ValueError if the condition lacks what this decoder was trained
        with."""
        if condition.without_text and self.config.empty_caption:
            raise ValueError(
                "decoder: found no caption for a decoder that was trained on the empty one where "
                "it was told none, expected that one; take UnClip.wordless"
            )
        if not self.config.use_text or condition.without_text:
            return Read(image_embed=condition.image_embed)
        wanted = {"token_mask": condition.token_mask}
        if self.text_encoder is not None:
            wanted["tokens"] = condition.tokens
        else:
            wanted["text_states"] = condition.text_states
            if self.caption_to_cond is not None:
                wanted["text_embed"] = condition.text_embed
        missing = [name for name, value in wanted.items() if value is None]
        if missing:
            raise ValueError(
                f"decoder: trained with captions, found none; pass {', '.join(sorted(missing))}"
            )
        mask, pooled = condition.token_mask, None
        assert mask is not None
        if self.text_encoder is not None:
            assert condition.tokens is not None and self.caption_to_cond is not None
            words = self.text_encoder(condition.tokens, mask)
            end = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
            pooled = self.caption_to_cond(words[torch.arange(len(words), device=end.device), end])
        else:
            assert self.text_in is not None and condition.text_states is not None
            words = self.text_in(condition.text_states)
            if self.caption_to_cond is not None:
                assert condition.text_embed is not None
                pooled = self.caption_to_cond(condition.text_embed)
        words = self.token_norm(words)
        return Read(image_embed=condition.image_embed, words=words, word_mask=mask, pooled=pooled)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition | Read,
        image_drop: Tensor,
        text_drop: Tensor,
    ) -> Tensor:
        """Predict `config.prediction` for x_t [B, 3, H, W] at t [B]; image_drop, text_drop: bool
        [B].

        Returns [B, 3, H, W], and with `config.learned_variance` three channels more: see
        `learned_log_variance`.
        """
        read = condition if isinstance(condition, Read) else self.read(condition)
        z = read.image_embed * self.embed_scale
        z = torch.where(image_drop[:, None], self.null_image_embed * self.embed_scale, z)
        tokens = self.embed_to_tokens(z).unflatten(
            1, (self.config.num_embed_tokens, -1)
        )  # [B, 4, context]
        tokens = self.token_norm(tokens) if self.config.norm_embed_tokens else tokens
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=z.device)
        cond = self.embed_to_cond(z)
        if read.words is not None and read.word_mask is not None:
            tokens = torch.cat([tokens, read.words.to(tokens.dtype)], dim=1)
            # a dropped caption is hidden, not replaced: attention then sees z_i's tokens alone
            mask = torch.cat([mask, read.word_mask & ~text_drop[:, None]], dim=1)
        if read.pooled is not None:
            cond = cond + read.pooled.masked_fill(text_drop[:, None], 0.0)
        grid = None if self.embed_to_grid is None else self.embed_to_grid(z)
        return self.unet(x_t, t, cond=cond, grid=grid, tokens=tokens, token_mask=mask)

    def losses(self, keys: Tensor, image: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Return {"loss": [B]} for image [B, 3, H, W] in [-1, 1]; randomness comes from the
        sample `keys`.

        With `config.empty_caption` the caller has put the empty caption where one is dropped; else
        it is hidden here. With a learned variance the loss is L_hybrid (Nichol & Dhariwal 2021,
        eq. 16), and "bound" its second part, in bits a dimension.
        """
        config = self.config
        t = draw_timesteps(self.schedule, keys, config.noise_bias)
        eps = keyed_random.normal(keys, "eps", image.shape[1:])
        x_t = self.schedule.q_sample(image, t, eps)
        image_drop = keyed_random.uniform(keys, "image_embed_drop") < config.image_embed_drop
        hidden = torch.zeros_like(image_drop)
        text_drop = hidden if config.empty_caption else dropped_captions(config, keys)
        output = self(x_t, t, self._noised(keys, condition), image_drop, text_drop)
        output, fraction = output[:, :3], output[:, 3:]
        target = self.schedule.target(config.prediction, image, t, eps)
        error = (output - target).square().mean((1, 2, 3))
        loss = timestep_weight(self.schedule, config.weighting, config.prediction, t) * error
        if not config.learned_variance:
            return {"loss": loss}
        x0 = self.schedule.to_x0(config.prediction, output, x_t, t).clamp(-1, 1)
        bound = variational_bound(self.schedule, image, x_t, t, x0, fraction)
        bound = bound * self.schedule.num_timesteps
        return {"loss": loss + config.bound_weight * bound, "bound": bound.detach()}

    def _noised(self, keys: Tensor, condition: Condition) -> Condition:
        """Blur z_i a little, since at sampling it comes from a prior and not from CLIP."""
        if self.config.embed_noise == 0:
            return condition
        z = condition.image_embed
        level = self.config.embed_noise * keyed_random.uniform(keys, "embed_noise_level")[:, None]
        noise = keyed_random.normal(keys, "embed_noise", z.shape[1:]) / self.embed_scale
        return replace(condition, image_embed=nn.functional.normalize(z + level * noise, dim=1))

    # -- sampling ----------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        keys: Tensor,
        condition: Condition,
        options: ImageSampling,
        *,
        start: Tensor | None = None,
        empty: Condition | None = None,
        guide: "Decoder | None" = None,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Draw images [B, 3, H, W] in [-1, 1]; the same key gives the same image in any batch.

        start: x_T, None for noise of the keys; empty: what guidance leads away from, None for no
        z_i and no caption; guide: a weaker decoder to lead away from instead, under the same
        condition (Karras et al. 2024, autoguidance); known: an image and a mask [B, 1, H, W], 1
        where it is to be kept.
        """
        shape = (3, self.image_size, self.image_size)
        fraction: list[Tensor] = []
        strong = self._network(condition, dropped=False, fraction=fraction)
        if options.cfg_scale == 1:
            weak = strong
        elif guide is not None:
            weak = guide._as_guide_of(self, condition)
        else:
            weak = self._network(empty or condition, dropped=True, keep_text=empty is not None)
        # what the network predicts is guided, not x0: eps moves x0 10,000-fold at the noisy end
        network = guided(
            strong,
            weak,
            options.cfg_scale,
            interval=self._timesteps(options.guidance_interval),
            rescale=options.guidance_rescale,
        )
        denoise = clipped(self._to_x0(network), 1.0)
        denoise = denoise if known is None else inpainted(denoise, *known)
        x = keyed_random.normal(keys, "decoder", shape) if start is None else start
        noise = lambda step: keyed_random.normal(keys, f"decoder_{step}", shape)  # noqa: E731
        sampler, schedule = self._sampler(options, fraction), self.schedule.spaced(options.spacing)
        return sampler(denoise, x, schedule, options.sample_steps, noise).clamp(-1, 1)

    @torch.no_grad()
    def invert(
        self, image: Tensor, condition: Condition, sample_steps: int, spacing: Spacing = "trailing"
    ) -> Tensor:
        """Return the x_T [B, 3, H, W] from which DDIM, unguided and at the same timesteps, comes
        back to an image.

        (Ramesh et al. 2022, section 3: the second half of an image's latent, beside z_i.)
        """
        denoise = clipped(self._to_x0(self._network(condition, dropped=False)), 1.0)
        return ddim_invert(denoise, image, self.schedule.spaced(spacing), sample_steps)

    def _to_x0(self, network: Denoiser) -> Denoiser:
        prediction = self.config.prediction
        return lambda x, t: self.schedule.to_x0(prediction, network(x, t), x, t)

    def require_guide(self, guide: "Decoder") -> None:
        """Raise ValueError for a decoder that cannot guide this one: it draws another size, reads
        another condition, or predicts otherwise."""
        sizes = {"image_size": (guide.image_size, self.image_size)}
        shared = {n: (getattr(guide.config, n), getattr(self.config, n)) for n in WITH_GUIDE}
        for name, (found, expected) in (shared | sizes).items():
            if found != expected:
                raise ValueError(f"guide: {name}: found {found!r}, expected {expected!r}")

    def _as_guide_of(self, other: "Decoder", condition: Condition) -> Denoiser:
        other.require_guide(self)
        return self._network(condition, dropped=False)

    def _network(
        self,
        condition: Condition,
        *,
        dropped: bool,
        keep_text: bool = False,
        fraction: list[Tensor] | None = None,
    ) -> Denoiser:
        """Return the network under a condition, or without it; `fraction` gets what it said last of
        its variance."""
        read = self.read(condition)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            image_drop = torch.full_like(t, dropped, dtype=torch.bool)
            text_drop = torch.full_like(t, dropped and not keep_text, dtype=torch.bool)
            output = self(x, t, read, image_drop, text_drop)
            if fraction is not None:
                fraction[:] = [output[:, 3:]]
            return output[:, :3]

        return predict

    def _sampler(self, options: ImageSampling, fraction: list[Tensor]) -> Sampler:
        if options.sampler != "learned_ddpm":
            return options.sampler
        if not self.config.learned_variance:
            raise ValueError(
                "sampler: found learned_ddpm for a decoder that learned no variance, expected one "
                "of the others; train with --base.learned-variance"
            )
        return learned_ddpm(lambda: fraction[0])

    def _timesteps(self, interval: tuple[float, float] | None) -> tuple[int, int] | None:
        """Return shares of the noising time as timesteps."""
        if interval is None:
            return None
        low, high = (round(share * self.schedule.num_timesteps) for share in interval)
        return low, high - 1
