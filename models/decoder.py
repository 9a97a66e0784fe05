"""The decoder: from a CLIP image embedding, and optionally its caption, to pixels (Ramesh et al.
2022, section 2.1)."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import DecoderConfig, Spacing, network_of, token_side
from models.diffusion import keyed_random
from models.diffusion.losses import draw_timesteps, timestep_weight, variational_bound
from models.diffusion.samplers import (
    Denoised,
    Denoiser,
    Network,
    Sampler,
    clipped,
    ddim_invert,
    guided,
    inpainted,
)
from models.diffusion.schedule import NoiseSchedule
from models.networks.compiling import compiled
from models.networks.dit import DiT
from models.networks.packing import Packing
from models.networks.transformer import TextEncoder
from models.networks.unet import UNet
from models.priors.base import vector_of

GRID_FEATURES = 32
NETWORKS: dict[str, type[UNet] | type[DiT]] = {"unet": UNet, "dit": DiT}
# The options that a guide shares with the decoder it guides
GUIDE_OPTIONS = (
    "use_text", "text_tokens", "prediction", "schedule", "num_timesteps", "zero_terminal",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A decoder's input: z_i, and what it reads of the caption.

    image_embed: z_i, [B, E], or with k tokens of the image [B, 1 + k, E], of which those of zeros
    are hidden; a decoder takes those that it reads; text_states: CLIP's, [B, L, W], or tokens: int
    [B, L] of a decoder with a text encoder of its own, or packed int [S] with their packing;
    token_mask: bool [B, L], True = keep; text_embed: z_t, [B, E].
    without_text: z_i alone, as where training dropped the caption; not for a decoder with
    `empty_caption`, see `UnClip.condition`.
    """

    image_embed: Tensor
    text_states: Tensor | None = None
    tokens: Tensor | None = None
    packing: Packing | None = None
    token_mask: Tensor | None = None
    text_embed: Tensor | None = None
    without_text: bool = False


@dataclass(frozen=True, kw_only=True)
class EncodedCondition:
    """A condition whose caption the decoder has encoded, once for all steps of a sample.

    image_embed: z_i, as of `Condition`; text: [B, L, context] with token_mask bool [B, L], None
    without a caption; pooled: [B, cond], what the caption adds to the timestep embedding.
    """

    image_embed: Tensor
    text: Tensor | None = None
    token_mask: Tensor | None = None
    pooled: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ImageSampling:
    """How to sample a decoder or an upsampler.

    sampler: one of `SAMPLERS`, `learned_ddpm` is the paper's (Ramesh et al. 2022, table 3);
    spacing: which timesteps are visited, see `NoiseSchedule.timesteps`; cfg_scale: 1 = no guidance;
    guidance_interval: shares [low, high] of the noising time in which to guide, None for all;
    guidance_rescale: see `guided`; tile: side in px of the tiles that an upsampler works on, 0 for
    the complete image.
    """

    sampler: Sampler
    sample_steps: int = 20
    spacing: Spacing = "trailing"
    cfg_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    tile: int = 0


def dropped_captions(config: DecoderConfig, keys: Tensor) -> Tensor:
    """Return which samples' captions training drops, bool [B], for sample `keys` int64 [B]."""
    return keyed_random.uniform(keys, "text_drop") < config.text_drop


def _validate(config: DecoderConfig) -> None:
    """Refuse options that would have no effect."""
    reads_clip = config.use_text and not config.text_tokens
    if config.text_embed_cond and not reads_clip:
        raise ValueError(
            "text_embed_cond: found true for a decoder that does not read CLIP's captions, "
            "expected false: z_t comes with CLIP's token states"
        )
    if config.empty_caption and not reads_clip:
        raise ValueError(
            "empty_caption: found true for a decoder that does not read CLIP's captions, expected "
            "false"
        )
    if token_side(config.image_tokens) > 1 and not 0 <= config.image_tokens_drop < 1:
        raise ValueError(
            f"image_tokens_drop: found {config.image_tokens_drop}, expected 0 or more, less than 1"
        )
    if config.text_tokens and not config.use_text:
        raise ValueError("text_tokens: found some with use_text false, expected 0")


class Decoder(nn.Module):
    """A U-Net or a transformer over images, conditioned on z_i and optionally on the caption.

    z_i goes into the timestep embedding and into extra tokens (Ramesh et al. 2022, section 2.1);
    the caption becomes tokens of its own (Nichol et al. 2021, GLIDE), and so do the image's, with
    `config.image_tokens`.
    """

    outer_layers = (
        "embed_to_cond", "embed_to_tokens", "text_in", "caption_to_cond", "image_tokens_in",
        "image_tokens_position",
    )  # fmt: skip

    def __init__(
        self,
        config: DecoderConfig,
        *,
        image_size: int,
        embed_dim: int,
        text_width: int,
        vocab_size: int = 0,
    ) -> None:
        """Build for images of image_size px and an encoder of these sizes.

        embed_dim: E; text_width: W of CLIP's states; vocab_size: number of own tokens, with
        `config.text_tokens`. Raises ValueError for options that would have no effect.
        """
        super().__init__()
        _validate(config)
        self.config, self.image_size = config, image_size
        self.schedule = NoiseSchedule.build(
            config.schedule,
            config.num_timesteps,
            zero_terminal=config.zero_terminal,
            prediction=config.prediction,
        )
        context = config.context_width
        name, sizes = network_of(config)
        network = NETWORKS[name](
            sizes,
            image_size=image_size,
            in_channels=3,
            out_channels=6 if config.learned_variance else 3,
            context=context,
        )
        self.add_module(name, network)  # whose weights are unet.* or dit.*

        # z_i: a vector, tokens and a grid. Unit-norm rows become unit RMS, as linear layers expect
        self.embed_scale = embed_dim**0.5
        self.null_image_embed = nn.Parameter(torch.randn(embed_dim) * 0.02)
        self.embed_to_cond = nn.Linear(embed_dim, network.cond_width)
        self.embed_to_tokens = nn.Linear(embed_dim, config.num_embed_tokens * context)
        self.embed_to_grid = None
        if config.embed_grid:
            # what is where is a product of attributes and places, which one linear map cannot
            # express; a few features per cell, widened to the channels, keep the second map small
            side, features = network.grid, min(network.channels, GRID_FEATURES)
            self.embed_to_grid = nn.Sequential(
                nn.Linear(embed_dim, 2 * embed_dim),
                nn.SiLU(),
                nn.Linear(2 * embed_dim, features * side**2),
                nn.Unflatten(1, (features, side, side)),
                nn.Conv2d(features, network.channels, 1),
            )

        # The image's tokens, each at its place
        self.image_tokens_in = None
        if config.image_tokens > 1:
            self.image_tokens_in = nn.Linear(embed_dim, context)
            self.image_tokens_position = nn.Parameter(torch.zeros(config.image_tokens, context))
            nn.init.normal_(self.image_tokens_position, std=1.0)  # as large as the tokens

        # The caption: CLIP's states, or a text transformer of the decoder's own
        self.text_in = self.text_encoder = self.caption_to_cond = None
        if config.use_text and config.text_tokens:
            qk_norm = network.qk_norm  # as the network
            self.text_encoder = TextEncoder(
                context_length=config.text_tokens, vocab_size=vocab_size, width=context,
                depth=config.text_depth, num_heads=config.text_heads, qk_norm=qk_norm,
            )  # fmt: skip
            self.caption_to_cond = nn.Linear(context, network.cond_width)
        elif config.use_text:
            self.text_in = nn.Linear(text_width, context)
            if config.text_embed_cond:
                self.caption_to_cond = nn.Linear(embed_dim, network.cond_width)
        self.token_norm = nn.LayerNorm(context)

    def encode_condition(self, condition: Condition) -> EncodedCondition:
        """Encode the caption, if the decoder reads one.

        Raises ValueError if the condition lacks something that the decoder was trained with.
        """
        if condition.without_text and self.config.empty_caption:
            raise ValueError(
                "decoder: found no caption for a decoder that was trained on the empty caption in "
                "place of a dropped one, expected that one; use UnClip.condition(None, ...)"
            )
        image_embed, mask = condition.image_embed, condition.token_mask
        found, expected = image_embed.shape[1:-1], self.config.image_tokens
        if found and expected > 1 and found[0] != 1 + expected:
            raise ValueError(
                f"decoder: found {found[0] - 1} tokens of each image, expected {expected}"
            )
        if not self.config.use_text or condition.without_text:
            return EncodedCondition(image_embed=image_embed)
        expected = {"token_mask": mask}
        if self.text_encoder is not None:
            expected["tokens"] = condition.tokens
        else:
            expected["text_states"] = condition.text_states
            if self.caption_to_cond is not None:
                expected["text_embed"] = condition.text_embed
        missing = sorted(name for name, value in expected.items() if value is None)
        if missing:
            raise ValueError(
                f"decoder: trained with captions, found none; pass {', '.join(missing)}"
            )

        pooled = None
        if self.text_encoder is not None:
            assert condition.tokens is not None and mask is not None
            assert self.caption_to_cond is not None
            if condition.packing is None:
                text = self.text_encoder(condition.tokens, mask)  # [B, L, context]
            else:
                packed = self.text_encoder(condition.tokens, condition.packing)  # [S, context]
                text = condition.packing.pad(packed, mask.shape[1])  # [B, L, context]
            end = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)  # [B]
            row = torch.arange(len(text), device=end.device)
            pooled = self.caption_to_cond(text[row, end])  # [B, cond]
        else:
            assert self.text_in is not None
            text = self.text_in(condition.text_states)  # [B, L, context]
            if self.caption_to_cond is not None:
                pooled = self.caption_to_cond(condition.text_embed)  # [B, cond]
        text = self.token_norm(text)
        return EncodedCondition(image_embed=image_embed, text=text, token_mask=mask, pooled=pooled)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition | EncodedCondition,
        image_drop: Tensor,
        text_drop: Tensor,
    ) -> Tensor:
        """Predict `config.prediction` for x_t [B, 3, H, W] at t int64 [B].

        image_drop, text_drop: bool [B], True hides z_i, or the caption (classifier-free guidance).
        Returns float32 [B, 3, H, W], and with `config.learned_variance` three channels more: see
        `learned_log_variance`. Raises ValueError as `encode_condition`.
        """
        if isinstance(condition, Condition):
            condition = self.encode_condition(condition)
        cond, grid, tokens, mask = self._encode(condition, image_drop, text_drop)
        return self.network(x_t, t, cond=cond, grid=grid, tokens=tokens, token_mask=mask)

    @property
    def network(self) -> UNet | DiT:
        """The network over images."""
        return self.get_submodule(self.config.network)  # pyright: ignore[reportReturnType]

    @compiled(dynamic=None)
    def _encode(
        self, condition: EncodedCondition, image_drop: Tensor, text_drop: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return the network's condition: a vector [B, cond], a grid [B, C, H/p, W/p], tokens
        [B, K + k + L, context], and their mask."""
        z = vector_of(condition.image_embed) * self.embed_scale  # [B, E]
        z = torch.where(image_drop[:, None], self.null_image_embed * self.embed_scale, z)
        tokens = self.embed_to_tokens(z)  # [B, K * context], K embed tokens
        tokens = tokens.unflatten(1, (self.config.num_embed_tokens, -1))  # [B, K, context]
        tokens = self.token_norm(tokens) if self.config.norm_embed_tokens else tokens
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=z.device)  # [B, K]
        cond = self.embed_to_cond(z)  # [B, cond]
        if self.image_tokens_in is not None:
            parts = condition.image_embed  # [B, E], or [B, 1 + k, E]
            if parts.ndim == 2:
                parts = F.pad(parts[:, None], (0, 0, 0, self.config.image_tokens))
            parts = parts[:, 1:]  # [B, k, E]
            keep = (parts != 0).any(-1) & ~image_drop[:, None]  # [B, k]
            parts = self.image_tokens_in(parts * self.embed_scale) + self.image_tokens_position
            tokens = torch.cat([tokens, self.token_norm(parts).to(tokens.dtype)], dim=1)
            mask = torch.cat([mask, keep], dim=1)  # [B, K + k]
        if condition.text is not None and condition.token_mask is not None:
            tokens = torch.cat([tokens, condition.text.to(tokens.dtype)], dim=1)  # [B, K + L, ...]
            # a dropped caption is hidden, not replaced: attention then reads z_i's tokens alone
            text_mask = condition.token_mask & ~text_drop[:, None]  # [B, L]
            mask = torch.cat([mask, text_mask], dim=1)  # [B, K + L]
        if condition.pooled is not None:
            cond = cond + condition.pooled.masked_fill(text_drop[:, None], 0.0)  # [B, cond]
        grid = None if self.embed_to_grid is None else self.embed_to_grid(z)  # [B, C, H/p, W/p]
        return cond, grid, tokens, mask

    def losses(self, keys: Tensor, image: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Return {"loss": [B]} for image [B, 3, H, W] in [-1, 1].

        Timesteps, noise and dropped conditions come from the sample `keys` int64 [B]. With
        `config.empty_caption` the caller has replaced dropped captions; otherwise they are hidden
        here. With a learned variance the loss is L_hybrid (Nichol & Dhariwal 2021, eq. 16), and
        "bound" [B] is its second part, in bits per dimension.
        """
        x_t, t, eps, z, image_drop, text_drop = self._noise(keys, image, condition.image_embed)
        condition = replace(condition, image_embed=z)
        output = self(x_t, t, condition, image_drop, text_drop)  # [B, 3 or 6, H, W]
        return self._score(output, image, x_t, t, eps)

    @compiled(dynamic=None)
    def _noise(self, keys: Tensor, image: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """Return what training draws: x_t, t and eps, z_i with its noise, and bool [B] twice, True
        where z_i or the caption is hidden."""
        config = self.config
        if config.embed_noise:
            # blur z_i a little, since at sampling it comes from a prior and not from CLIP
            level = config.embed_noise * keyed_random.uniform(keys, "embed_noise_level")[:, None]
            noise = keyed_random.normal(keys, "embed_noise", z.shape[1:]) / self.embed_scale
            level = level if z.ndim == 2 else level[:, None] * (z != 0).any(-1, keepdim=True)
            z = F.normalize(z + level * noise, dim=-1)  # [B, E]
        if z.ndim == 3:  # z_i alone: the tokens are hidden
            drop = keyed_random.uniform(keys, "image_tokens_drop") < config.image_tokens_drop
            z = torch.cat([z[:, :1], z[:, 1:].masked_fill(drop[:, None, None], 0.0)], dim=1)
        t = draw_timesteps(self.schedule, keys, config.noise_bias)  # [B]
        eps = keyed_random.normal(keys, "eps", image.shape[1:])  # [B, 3, H, W]
        x_t = self.schedule.q_sample(image, t, eps)  # [B, 3, H, W]
        image_drop = keyed_random.uniform(keys, "image_embed_drop") < config.image_embed_drop
        keep = torch.zeros_like(image_drop)
        text_drop = keep if config.empty_caption else dropped_captions(config, keys)
        return x_t, t, eps, z, image_drop, text_drop

    @compiled(dynamic=None)
    def _score(
        self, output: Tensor, image: Tensor, x_t: Tensor, t: Tensor, eps: Tensor
    ) -> dict[str, Tensor]:
        """Return `losses` of the network's output [B, 3 or 6, H, W]."""
        config = self.config
        output, fraction = output[:, :3], output[:, 3:]  # [B, 3, H, W]; the second may be empty
        target = self.schedule.target(config.prediction, image, t, eps)
        error = (output - target).square().mean((1, 2, 3))  # [B]
        loss = timestep_weight(self.schedule, config.weighting, config.prediction, t) * error
        if not config.learned_variance:
            return {"loss": loss}
        x0 = self.schedule.to_x0(config.prediction, output, x_t, t).clamp(-1, 1)
        bound = variational_bound(self.schedule, image, x_t, t, x0, fraction)  # [B]
        bound = bound * self.schedule.num_timesteps
        return {"loss": loss + config.bound_weight * bound, "bound": bound.detach()}

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
        """Draw images [B, 3, H, W] in [-1, 1] for sample `keys` int64 [B]; a key gives the same
        image in any batch.

        start: x_T [B, 3, H, W], None for noise of the keys; empty: the condition that guidance
        leads away from, None for no z_i and no caption; guide: a weaker decoder to lead away from
        instead, under the same condition (Karras et al. 2024, autoguidance); known: an image
        [B, 3, H, W] and a mask [B, 1, H, W], 1 where the image is kept (inpainting).

        Raises ValueError for a condition that lacks something, for a guide of another kind, and for
        a sampler that needs what the network did not learn.
        """
        # Denoiser. Guidance applies to the network's prediction and not to x0: at the noisy end
        # eps moves x0 10,000-fold
        network = self._network(condition, dropped=False)  # -> [B, 3 or 6, H, W]
        if options.cfg_scale != 1:
            if guide is not None:
                self.require_guide(guide)
                weak = guide._network(condition, dropped=False)
            else:
                weak = self._network(empty or condition, dropped=True, keep_text=empty is not None)
            interval = None
            if options.guidance_interval is not None:
                count = self.schedule.num_timesteps
                low, high = (round(share * count) for share in options.guidance_interval)
                interval = low, high - 1
            network = guided(
                network,
                lambda x, t: weak(x, t)[:, :3],
                options.cfg_scale,
                interval=interval,
                rescale=options.guidance_rescale,
            )
        denoise = clipped(self._denoiser(network), 1.0)
        if known is not None:
            denoise = inpainted(denoise, *known)

        # Sampler
        shape = (3, self.image_size, self.image_size)
        x = keyed_random.normal(keys, "decoder", shape) if start is None else start
        noise = keyed_random.step_noise(keys, "decoder", shape)
        schedule = self.schedule.spaced(options.spacing)
        return options.sampler(denoise, x, schedule, options.sample_steps, noise).clamp(-1, 1)

    @torch.no_grad()
    def invert(
        self, image: Tensor, condition: Condition, sample_steps: int, spacing: Spacing = "trailing"
    ) -> Tensor:
        """Return the x_T [B, 3, H, W] from which DDIM, unguided and at the same timesteps, returns
        to image [B, 3, H, W].

        (Ramesh et al. 2022, section 3: the second half of an image's latent, beside z_i.) Raises
        ValueError for a schedule of zero terminal SNR.
        """
        denoise = clipped(self._denoiser(self._network(condition, dropped=False)), 1.0)
        return ddim_invert(denoise, image, self.schedule.spaced(spacing), sample_steps)

    def require_guide(self, guide: "Decoder") -> None:
        """Raise ValueError for a decoder that cannot guide this one: of another image size, of
        another condition, or of another prediction."""
        options = {n: (getattr(guide.config, n), getattr(self.config, n)) for n in GUIDE_OPTIONS}
        options["image_size"] = (guide.image_size, self.image_size)
        for name, (found, expected) in options.items():
            if found != expected:
                raise ValueError(f"guide: {name}: found {found!r}, expected {expected!r}")
        found, expected = guide.config.image_tokens, self.config.image_tokens
        if 1 not in (found, expected) and found != expected:
            raise ValueError(f"guide: image_tokens: found {found}, expected {expected} or 1")

    def _denoiser(self, network: Network) -> Denoiser:
        def denoise(x: Tensor, t: Tensor) -> Denoised:
            prediction, fraction = network(x, t).tensor_split([3], dim=1)  # [B, 3, H, W] each
            x0 = self.schedule.to_x0(self.config.prediction, prediction, x, t)
            return Denoised(x0, fraction if self.config.learned_variance else None)

        return denoise

    def _network(self, condition: Condition, *, dropped: bool, keep_text: bool = False) -> Network:
        """Return the network under a condition, or with z_i and the caption dropped; keep_text:
        drop z_i alone."""
        encoded = self.encode_condition(condition)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            image_drop = torch.full_like(t, dropped, dtype=torch.bool)
            text_drop = torch.full_like(t, dropped and not keep_text, dtype=torch.bool)
            return self(x, t, encoded, image_drop, text_drop)

        return predict
