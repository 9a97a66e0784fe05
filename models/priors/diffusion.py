"""The diffusion prior: a caption's image embeddings (Ramesh et al. 2022, section 2.2).

With `image_tokens` k > 1 it draws z_i and k tokens of the image together: the sequence then ends in
1 + k noised vectors and 1 + k queries, and embeddings are [B, 1 + k, E] wherever shapes say [B, E].
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.configs import DiffusionPriorConfig, token_side
from models.diffusion import keyed_random
from models.diffusion.losses import draw_timesteps, timestep_weight
from models.diffusion.samplers import Denoised, clipped, gaussian_posterior_variance, guided
from models.diffusion.schedule import NoiseSchedule
from models.networks.packing import CaptionPacking, Packing, pack_prior
from models.networks.transformer import (
    TRIM_MULTIPLE,
    KeyValues,
    TextInput,
    TimestepMLP,
    causal_mask,
    prior_blocks,
)
from models.priors.base import EmbedScale, PackedText, PriorSampling, PriorText, vector_of

NUM_EXTRA_TOKENS = 4  # z_t, t, noised z_i, query; of each of an image's tokens two more


@dataclass(frozen=True, kw_only=True)
class TextCache:
    """The P tokens [text | z_t] as every block processed them, for all steps of a sample: they
    attend to nothing that comes after.

    caches: their keys and values in each block; mask: bool [B, 1, S, P + S], True where the S
    tokens of a step may read: t, noised z_i and query; dtype: of the tokens.
    """

    caches: list[KeyValues]
    mask: Tensor
    dtype: torch.dtype


class DiffusionPrior(nn.Module):
    """Causal transformer over [text | z_t | t | noised z_i | query] that predicts x0 = z_i."""

    null_length: Tensor
    outer_layers = (
        "text_embed_in", "time_in", "x_in", "query", "null_text", "null_text_embed", "position",
        "out", "token_in", "token_out",
    )  # fmt: skip

    def __init__(
        self,
        config: DiffusionPriorConfig,
        *,
        embed_dim: int,
        text_width: int,
        context_length: int,
        vocab_size: int = 0,
    ) -> None:
        """Build for an encoder of these sizes.

        embed_dim: E; text_width, context_length: channels and tokens of CLIP's states. With
        `config.text_tokens` the prior has its own table of `vocab_size` tokens instead.
        """
        super().__init__()
        width = config.width
        self.config, self.embed_dim = config, embed_dim
        self.schedule = NoiseSchedule.build(
            config.schedule, config.num_timesteps, zero_terminal=config.zero_terminal
        )
        num_tokens = config.text_tokens or context_length
        self.num_drawn = 1 if token_side(config.image_tokens) == 1 else 1 + config.image_tokens
        self.num_extra = 2 + 2 * self.num_drawn  # z_t, t, what is noised, queries
        self.length = num_tokens + self.num_extra
        self.text_in = TextInput(
            text_width=0 if config.text_tokens else text_width, vocab_size=vocab_size, width=width
        )
        self.text_embed_in = nn.Linear(embed_dim, width)
        self.time_in = TimestepMLP(config.time_channels or min(width, 256), width)
        self.x_in = nn.Linear(embed_dim, width)
        self.query = nn.Parameter(torch.randn(1, self.num_drawn, width) * 0.02)
        num_nulls = min(TRIM_MULTIPLE, num_tokens)  # the shortest length that captions are cut to
        self.null_text = nn.Parameter(torch.randn(1, num_nulls, width) * 0.02)
        self.null_text_embed = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, self.length, width) * 0.02)
        self.blocks = prior_blocks(config)
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, embed_dim)
        self.scale, self.token_scale = EmbedScale(embed_dim), None
        if self.num_drawn > 1:
            self.token_scale = EmbedScale(embed_dim)
            self.token_in = nn.Linear(embed_dim, width)
            self.token_out = nn.Linear(width, embed_dim)
        # number of valid tokens of the null caption: all of a learned one
        self.register_buffer("null_length", torch.tensor([num_nulls]))

    def encode_text(self, text: PriorText, drop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the caption's tokens [B, L, W], z_t's [B, 1, W], and bool [B, L], True = keep.

        drop: bool [B], True for learned nulls in place of the caption and z_t.
        """
        states = self.text_in(text.text)  # [B, L, W]
        num_padded = states.shape[1] - self.null_text.shape[1]
        null = F.pad(self.null_text, (0, 0, 0, num_padded)).to(states.dtype)  # [1, L, W]
        states = torch.where(drop[:, None, None], null, states)  # [B, L, W]
        z_t = self._text_embed_token(text.text_embed, drop)  # [B, 1, W]
        null_mask = torch.arange(states.shape[1], device=drop.device) < self.null_length  # [L]
        keep = torch.where(drop[:, None], null_mask, text.token_mask)  # [B, L]
        return states, z_t.to(states.dtype), keep

    def _text_embed_token(self, text_embed: Tensor, drop: Tensor) -> Tensor:
        z_t = self.scale(text_embed) if self.config.scale_text else text_embed
        z_t = self.text_embed_in(z_t)[:, None]  # [B, 1, W]
        return torch.where(drop[:, None, None], self.null_text_embed, z_t)

    def _step_tokens(self, x_t: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the tokens [B, S, W] that change from step to step."""
        query = self.query.expand(len(x_t), -1, -1)
        noised = [self.x_in(vector_of(x_t))[:, None]]  # [B, 1, W]
        if self.token_scale is not None:
            noised.append(self.token_in(x_t[:, 1:]))  # [B, k, W]
        tokens = self.time_in(t)[:, None], *noised, query
        return torch.cat([token.to(dtype) for token in tokens], dim=1)

    def _predicted(self, h: Tensor) -> Tensor:
        """Return the prediction, float32 [B, E] or [B, 1 + k, E], of the queries [B, 1 + k, W]."""
        h = self.norm_out(h[:, -self.num_drawn :])
        if self.token_scale is None:
            return self.out(h[:, 0]).float()
        return torch.cat([self.out(h[:, :1]), self.token_out(h[:, 1:])], dim=1).float()

    def _scaled(self, z: Tensor) -> Tensor:
        """Return embeddings in the units in which the network sees them."""
        if self.token_scale is None:
            return self.scale(z)
        return torch.cat([self.scale(z[:, :1]), self.token_scale(z[:, 1:])], dim=1)

    def _restored(self, x: Tensor) -> Tensor:
        """Return what `_scaled` makes x of, tokens of unit norm."""
        unit_norm = self.config.unit_norm
        if self.token_scale is None:
            return self.scale.restore(x, unit_norm=unit_norm)
        z = self.scale.restore(x[:, :1], unit_norm=unit_norm)
        return torch.cat([z, self.token_scale.restore(x[:, 1:])], dim=1)

    def forward(
        self, x_t: Tensor, t: Tensor, text: PriorText | PackedText | TextCache, drop: Tensor
    ) -> Tensor:
        """Predict the clean, scaled z_i, float32 [B, E].

        x_t: [B, E], scaled; t: int64 [B]; drop: bool [B], True replaces caption and z_t by learned
        nulls (classifier-free guidance); a `TextCache` has it applied already, and a `PackedText`
        says itself which they are.
        """
        if isinstance(text, TextCache):
            return self.decode_step(text, x_t, t)
        if isinstance(text, PackedText):
            h, packing = self._packed_tokens(x_t, t, text)  # [T, W]
            h = self._transform(h, packing)  # [B, W], or [T, W]
            if self.num_drawn > 1:
                before = torch.arange(self.num_drawn, device=h.device).flip(0)
                h = h[(packing.last[:, None] - before).flatten()]  # [B (1 + k), W]
            return self._predicted(h.unflatten(0, (len(t), -1)))  # [B, E]
        states, z_t, keep = self.encode_text(text, drop)  # [B, L, W], [B, 1, W], [B, L]
        h = torch.cat([states, z_t, self._step_tokens(x_t, t, states.dtype)], dim=1)
        ends = self.position[:, : states.shape[1]], self.position[:, -self.num_extra :]
        h = h + torch.cat(ends, dim=1)  # [B, N, W], N = L + 4
        keep = F.pad(keep, (0, self.num_extra), value=True)  # [B, N]
        return self._predicted(self._transform(h, causal_mask(h.shape[1], keep)))  # [B, E]

    def _packed_tokens(self, x_t: Tensor, t: Tensor, text: PackedText) -> tuple[Tensor, Packing]:
        """Return the tokens of all sequences, [T, W], and their packing."""
        packing = text.packing
        assert packing.joined is not None and packing.source is not None
        assert packing.place is not None
        states = self.text_in(text.text)  # [S, W]
        nulls = self.null_text.expand(packing.num_dropped, -1, -1).flatten(0, 1).to(states.dtype)
        z_t = self._text_embed_token(text.text_embed, packing.drop).to(states.dtype)  # [B, 1, W]
        further = torch.cat([z_t, self._step_tokens(x_t, t, states.dtype)], dim=1)  # [B, S + 1, W]
        h = torch.cat([states, nulls, further.flatten(0, 1)]).index_select(0, packing.source)
        position = F.embedding(packing.place % self.length, self.position[0])  # [T, W]
        return h + position, packing.joined

    def _transform(self, h: Tensor, mask: Tensor | Packing) -> Tensor:
        """Run the blocks on [B, N, W] or packed [T, W]; returns the last tokens, [B, 1, W] or
        [B, W], or with tokens of an image all."""
        for i, block in enumerate(self.blocks):
            if self.config.checkpointing and self.training:
                h = checkpoint(block, h, mask, self.num_queries(i), use_reentrant=False)
            else:
                h = block(h, mask, self.num_queries(i))
        return h

    def num_queries(self, block: int) -> int:
        """Return how many of a block's last tokens are computed, 0 for all: one of the last block,
        where one is drawn."""
        return 1 if block == len(self.blocks) - 1 and self.num_drawn == 1 else 0

    def prefill(self, text: PriorText, drop: Tensor) -> TextCache:
        """Process captions, or learned nulls where `drop`, bool [B], once for all steps."""
        states, z_t, keep = self.encode_text(text, drop)  # [B, L, W], [B, 1, W], [B, L]
        ends = self.position[:, : states.shape[1]], self.position[:, [-self.num_extra]]
        h = torch.cat([states, z_t], dim=1) + torch.cat(ends, dim=1)  # [B, P, W], P = L + 1
        prefix, length = h.shape[1], h.shape[1] + self.num_extra - 1
        mask = causal_mask(length, F.pad(keep, (0, self.num_extra), value=True))
        heads = self.config.num_heads
        shape = (len(h), heads, length, self.config.width // heads)
        caches = [KeyValues(shape, states) for _ in self.blocks]
        for i, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            h = block(h, mask[:, :, :prefix, :prefix], self.num_queries(i), cache)
        return TextCache(caches=caches, mask=mask[:, :, prefix:], dtype=states.dtype)

    def decode_step(self, text: TextCache, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict as `forward`, float32 [B, E], after a caption that is in the cache."""
        h = self._step_tokens(x_t, t, text.dtype)  # [B, S, W]
        prefix, h = text.mask.shape[-1] - h.shape[1], h + self.position[:, -h.shape[1] :]
        for i, (block, cache) in enumerate(zip(self.blocks, text.caches, strict=True)):
            cache.truncate(prefix)
            h = block(h, text.mask, self.num_queries(i), cache)  # [B, S, W], at last [B, 1, W]
        return self._predicted(h)  # [B, E]

    def pack(self, lengths: Tensor, keys: Tensor) -> CaptionPacking:
        """Return how captions of `lengths` int64 [B] are packed for `losses` under sample `keys`
        int64 [B], all on the CPU."""
        rows = min(TRIM_MULTIPLE, self.length - self.num_extra)  # of null_text, even partitioned
        nulls = self.num_nulls, rows
        drop = self._dropped(keys)
        return pack_prior(lengths, drop, num_further=self.num_extra, nulls=nulls)

    @cached_property
    def num_nulls(self) -> int:
        """Number of tokens that are read in place of a dropped caption; of trained weights."""
        return int(self.null_length)

    def _dropped(self, keys: Tensor) -> Tensor:
        return keyed_random.uniform(keys, "text_drop") < self.config.text_drop  # [B]

    def losses(
        self, keys: Tensor, image_embed: Tensor, text: PriorText | PackedText
    ) -> dict[str, Tensor]:
        """Return {"loss": [B]}, the weighted MSE on x0, of image_embed [B, E].

        Timesteps, noise and dropped captions come from the sample `keys` int64 [B]. With tokens the
        loss is the mean of "embed_loss" and "token_loss": z_i counts as much as all tokens.
        """
        x0 = self._scaled(image_embed)  # [B, E]
        t = draw_timesteps(self.schedule, keys)  # [B]
        drop = self._dropped(keys)  # [B]
        x_t = self.schedule.q_sample(x0, t, keyed_random.normal(keys, "eps", x0.shape[1:]))
        x0_pred = self(x_t, t, text, drop)  # [B, E]
        weight = timestep_weight(self.schedule, self.config.weighting, "x0", t)  # [B]
        error = (x0_pred - x0).square()  # [B, E], or [B, 1 + k, E]
        if self.token_scale is None:
            return {"loss": weight * error.mean(1)}
        embed, tokens = weight * error[:, 0].mean(1), weight * error[:, 1:].mean((1, 2))
        loss = (embed + tokens) / 2
        return {"loss": loss, "embed_loss": embed.detach(), "token_loss": tokens.detach()}

    def _x0_variance(self) -> Tensor:
        """Return the mean of Var(x0 | x_t) over what is drawn, float64 [T]; tokens count as if
        each were drawn by itself, so that theirs is an upper bound."""
        variance = gaussian_posterior_variance(self.schedule, self.scale.spectrum.clamp(min=0))
        if self.token_scale is None:
            return variance
        spectrum = self.token_scale.spectrum.clamp(min=0)
        of_tokens = gaussian_posterior_variance(self.schedule, spectrum)
        return variance.lerp(of_tokens, 1 - 1 / self.num_drawn)

    @torch.no_grad()
    def sample(self, keys: Tensor, text: PriorText, options: PriorSampling) -> Tensor:
        """Draw z_i [B, E], of unit norm if `config.unit_norm`, for sample `keys` int64 [B]; with
        tokens [B, 1 + k, E].

        Of `best_of` draws, the one with the largest z_i . z_t is returned (section 2.2).
        """
        # Denoiser: the network after the cached caption, guided away from the null caption
        keep = torch.zeros_like(keys, dtype=torch.bool)
        cached = self.prefill(text, keep)
        null = cached if options.cfg_scale == 1 else self.prefill(text, ~keep)
        network = guided(
            lambda x, t: self(x, t, cached, keep),
            lambda x, t: self(x, t, null, ~keep),
            options.cfg_scale,
        )
        x0_variance = self._x0_variance().to(keys.device)  # [T]

        def denoise(x: Tensor, t: Tensor) -> Denoised:
            return Denoised(network(x, t), x0_variance=x0_variance[t])

        bound, schedule = self.config.clip_x0, self.schedule.spaced(options.spacing)
        denoiser = clipped(denoise, bound) if bound else denoise

        # Draws, and the best of each sample
        draws, shape = [], (self.embed_dim,)
        if self.num_drawn > 1:
            shape = self.num_drawn, self.embed_dim
        for draw in range(options.best_of):
            x = keyed_random.normal(keys, f"prior_{draw}", shape)  # [B, E]
            noise = keyed_random.step_noise(keys, f"prior_{draw}", shape)
            x0 = options.sampler(denoiser, x, schedule, options.sample_steps, noise)  # [B, E]
            draws.append(self._restored(x0))
        z = torch.stack(draws)  # [D, B, E]
        cosines = [(vector_of(draw) * text.text_embed).sum(-1) for draw in draws]  # [B] each
        best = torch.stack(cosines).argmax(0)  # [B]
        return z[best, torch.arange(len(keys), device=keys.device)]  # [B, E]
