"""The decoder: from a CLIP image embedding, and optionally its caption, to pixels (Ramesh et al.
2022, section 2.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import keyed_random
from models.configs import DecoderConfig
from models.losses import draw_timesteps, timestep_weight
from models.samplers import Sampler, clipped, guided
from models.schedule import NoiseSchedule
from models.unet import UNet

GRID_FEATURES = 32


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What the decoder is told: image_embed [B, E]; text_states [B, L, W] and token_mask [B, L]
    or None."""

    image_embed: Tensor
    text_states: Tensor | None = None
    token_mask: Tensor | None = None


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


class Decoder(nn.Module):
    """z_i goes into the timestep embedding and into extra tokens; the caption into tokens of its
    own."""

    def __init__(
        self, config: DecoderConfig, *, image_size: int, embed_dim: int, text_width: int
    ) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.schedule = NoiseSchedule.build(config.schedule, config.num_timesteps)
        context = config.context_width
        self.unet = UNet(
            config.unet, image_size=image_size, in_channels=3, out_channels=3, context=context
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
        self.text_in = nn.Linear(text_width, context) if config.use_text else None
        self.token_norm = nn.LayerNorm(context)

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition, image_drop: Tensor, text_drop: Tensor
    ) -> Tensor:
        """Predict `config.prediction` for x_t [B, 3, H, W] at t [B]; image_drop, text_drop: bool
        [B]."""
        z = condition.image_embed * self.embed_scale
        z = torch.where(image_drop[:, None], self.null_image_embed * self.embed_scale, z)
        tokens = self.embed_to_tokens(z).unflatten(
            1, (self.config.num_embed_tokens, -1)
        )  # [B, 4, context]
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=z.device)
        if self.text_in is not None:
            if condition.text_states is None or condition.token_mask is None:
                raise ValueError(
                    "decoder: trained with captions, found none; pass text_states and token_mask"
                )
            tokens = torch.cat(
                [tokens, self.text_in(condition.text_states).to(tokens.dtype)], dim=1
            )
            # a dropped caption is hidden, not replaced: attention then sees z_i's tokens alone
            mask = torch.cat([mask, condition.token_mask & ~text_drop[:, None]], dim=1)
        grid = None if self.embed_to_grid is None else self.embed_to_grid(z)
        cond = self.embed_to_cond(z)
        return self.unet(
            x_t, t, cond=cond, grid=grid, tokens=self.token_norm(tokens), token_mask=mask
        )

    def losses(self, keys: Tensor, image: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Return {"loss": [B]} for image [B, 3, H, W] in [-1, 1]; randomness comes from the
        sample `keys`."""
        config = self.config
        t = draw_timesteps(self.schedule, keys, config.noise_bias)
        eps = keyed_random.normal(keys, "eps", image.shape[1:])
        x_t = self.schedule.q_sample(image, t, eps)
        image_drop = keyed_random.uniform(keys, "image_embed_drop") < config.image_embed_drop
        text_drop = keyed_random.uniform(keys, "text_drop") < config.text_drop
        output = self(x_t, t, self._noised(keys, condition), image_drop, text_drop)
        error = (
            (output - self.schedule.target(config.prediction, image, t, eps))
            .square()
            .mean((1, 2, 3))
        )
        return {
            "loss": timestep_weight(self.schedule, config.weighting, config.prediction, t) * error
        }

    def _noised(self, keys: Tensor, condition: Condition) -> Condition:
        """Blur z_i a little, since at sampling it comes from a prior and not from CLIP."""
        if self.config.embed_noise == 0:
            return condition
        z = condition.image_embed
        level = self.config.embed_noise * keyed_random.uniform(keys, "embed_noise_level")[:, None]
        noise = keyed_random.normal(keys, "embed_noise", z.shape[1:]) / self.embed_scale
        z = nn.functional.normalize(z + level * noise, dim=1)
        return Condition(
            image_embed=z, text_states=condition.text_states, token_mask=condition.token_mask
        )

    @torch.no_grad()
    def sample(self, keys: Tensor, condition: Condition, options: "ImageSampling") -> Tensor:
        """Draw images [B, 3, H, W] in [-1, 1]; the same key gives the same image in any batch."""
        shape = (3, self.image_size, self.image_size)
        drops = {kept: torch.full_like(keys, not kept, dtype=torch.bool) for kept in (True, False)}

        def denoiser(kept: bool):
            def denoise(x: Tensor, t: Tensor) -> Tensor:
                output = self(x, t, condition, drops[kept], drops[kept])
                return self.schedule.to_x0(self.config.prediction, output, x, t)

            return denoise

        denoise = clipped(guided(denoiser(True), denoiser(False), options.cfg_scale), 1.0)
        x = keyed_random.normal(keys, "decoder", shape)
        noise = lambda step: keyed_random.normal(keys, f"decoder_{step}", shape)  # noqa: E731
        return options.sampler(denoise, x, self.schedule, options.sample_steps, noise).clamp(-1, 1)


@dataclass(frozen=True, kw_only=True)
class ImageSampling:
    """How to sample a decoder or an upsampler."""

    sampler: Sampler
    sample_steps: int = 20
    cfg_scale: float = 1.0
