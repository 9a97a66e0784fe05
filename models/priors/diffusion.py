"""The diffusion prior: a caption's image embeddings (Ramesh et al. 2022, section 2.2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.configs import DiffusionPriorConfig
from models.diffusion import keyed_random
from models.diffusion.losses import draw_timesteps, timestep_weight
from models.diffusion.samplers import analytic_ddpm, clipped, gaussian_posterior_variance, guided
from models.diffusion.schedule import NoiseSchedule
from models.networks.text_encoder import TextInput
from models.networks.transformer import TRIM_MULTIPLE, Block, KeyValues, TimestepMLP, causal_mask
from models.priors.base import EmbedScale, PriorSampling, PriorText

NUM_EXTRA_TOKENS = 4  # z_t, t, noised z_i, query
NUM_STEP_TOKENS = 3  # those that a step of sampling changes: t, noised z_i, query


@dataclass(frozen=True, kw_only=True)
class Read:
    """A caption as the network has read it, once for all steps and draws of a sample: nothing of
    [text | z_t] looks at what comes after.

    caches: keys and values of these P tokens in each block; mask: bool [B, 1, 3, P + 3], what the
    three tokens after them may read; dtype: of the words.
    """

    caches: list[KeyValues]
    mask: Tensor
    dtype: torch.dtype


class DiffusionPrior(nn.Module):
    """Causal transformer over [text | z_t | t | noised z_i | query] that predicts x0 = z_i."""

    null_length: Tensor

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

        context_length: tokens of CLIP's states; with `config.text_tokens` the prior reads so many
        tokens of its own instead, of which there are `vocab_size`.
        """
        super().__init__()
        width = config.width
        self.config, self.embed_dim = config, embed_dim
        self.schedule = NoiseSchedule.build(
            config.schedule, config.num_timesteps, zero_terminal=config.zero_terminal
        )
        num_words = config.text_tokens or context_length
        self.length = num_words + NUM_EXTRA_TOKENS
        self.text_in = TextInput(
            text_width=0 if config.text_tokens else text_width, vocab_size=vocab_size, width=width
        )
        self.text_embed_in = nn.Linear(embed_dim, width)
        self.time_in = TimestepMLP(config.time_channels or min(width, 256), width)
        self.x_in = nn.Linear(embed_dim, width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        num_nulls = min(TRIM_MULTIPLE, num_words)  # as few as captions are trimmed to
        self.null_text = nn.Parameter(torch.randn(1, num_nulls, width) * 0.02)
        self.null_text_embed = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, self.length, width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(
                width=width,
                num_heads=config.num_heads,
                dropout=config.dropout,
                qk_norm=config.qk_norm,
            )
            for _ in range(config.depth)
        )
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, embed_dim)
        self.scale = EmbedScale(embed_dim)
        # tokens of the null caption that are read: all of a learned one
        self.register_buffer("null_length", torch.tensor([num_nulls]))

    def _told(self, text: PriorText, drop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return words [B, L, width] and z_t [B, 1, width], learned nulls where `drop`, and which
        of the words are read, bool [B, L]."""
        gone = drop[:, None, None]
        z_t = self.scale(text.text_embed) if self.config.scale_text else text.text_embed
        words = self.text_in(text.text)  # [B, L, width]
        spare = words.shape[1] - self.null_text.shape[1]
        null = F.pad(self.null_text, (0, 0, 0, spare)).to(words.dtype)
        words = torch.where(gone, null, words)
        z_t = torch.where(gone, self.null_text_embed, self.text_embed_in(z_t)[:, None])
        read = torch.arange(words.shape[1], device=drop.device) < self.null_length
        return words, z_t.to(words.dtype), torch.where(drop[:, None], read, text.token_mask)

    def _noised(self, x_t: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the tokens [B, 3, width] that change from step to step."""
        parts = [self.time_in(t)[:, None], self.x_in(x_t)[:, None]]
        parts.append(self.query.expand(len(x_t), -1, -1))
        return torch.cat([part.to(dtype) for part in parts], dim=1)

    def forward(self, x_t: Tensor, t: Tensor, text: PriorText | Read, drop: Tensor) -> Tensor:
        """Predict the un-noised, scaled z_i, shaped as `x_t`.

        x_t: [B, E], scaled; t: int64 [B]; drop: bool [B], True replaces caption and z_t by learned
        nulls (classifier-free guidance); of a caption that has been read, `read` was told.
        """
        if isinstance(text, Read):
            return self._after(text, x_t, t)
        words, z_t, keep = self._told(text, drop)
        h = torch.cat([words, z_t, self._noised(x_t, t, words.dtype)], dim=1)
        ends = self.position[:, : words.shape[1]], self.position[:, -NUM_EXTRA_TOKENS:]
        h = h + torch.cat(ends, dim=1)
        mask = causal_mask(h.shape[1], F.pad(keep, (0, NUM_EXTRA_TOKENS), value=True))
        for i, block in enumerate(self.blocks):
            if self.config.checkpointing and self.training:
                h = checkpoint(block, h, mask, self._asked(i), use_reentrant=False)
            else:
                h = block(h, mask, last=self._asked(i))
        return self.out(self.norm_out(h[:, -1])).float()  # [B, E]

    def _asked(self, block: int) -> int:
        """Return how many tokens of a block's are read, 0 for all: of the last one only the
        query."""
        return 1 if block == len(self.blocks) - 1 else 0

    def read(self, text: PriorText, drop: Tensor) -> Read:
        """Read captions, or the null where `drop`, bool [B], for all steps to come."""
        words, z_t, keep = self._told(text, drop)
        ends = self.position[:, : words.shape[1]], self.position[:, [-NUM_EXTRA_TOKENS]]
        h = torch.cat([words, z_t], dim=1) + torch.cat(ends, dim=1)
        count, heads = h.shape[1], self.config.num_heads
        whole = count + NUM_STEP_TOKENS
        mask = causal_mask(whole, F.pad(keep, (0, NUM_EXTRA_TOKENS), value=True))
        shape = (len(h), heads, whole, self.config.width // heads)
        caches = [KeyValues(shape, words) for _ in self.blocks]
        for i, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            h = block(h, mask[:, :, :count, :count], last=self._asked(i), cache=cache)
        return Read(caches=caches, mask=mask[:, :, count:], dtype=words.dtype)

    def _after(self, read: Read, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict as `forward` does, after a caption that has been read."""
        h = self._noised(x_t, t, read.dtype) + self.position[:, -NUM_STEP_TOKENS:]
        count = read.mask.shape[-1] - NUM_STEP_TOKENS
        for i, (block, cache) in enumerate(zip(self.blocks, read.caches, strict=True)):
            cache.back_to(count)
            h = block(h, read.mask, last=self._asked(i), cache=cache)
        return self.out(self.norm_out(h[:, -1])).float()

    def losses(self, keys: Tensor, image_embed: Tensor, text: PriorText) -> dict[str, Tensor]:
        """Return {"loss": [B]}, the weighted MSE on x0."""
        x0 = self.scale(image_embed)
        t = draw_timesteps(self.schedule, keys)
        drop = keyed_random.uniform(keys, "text_drop") < self.config.text_drop
        x_t = self.schedule.q_sample(x0, t, keyed_random.normal(keys, "eps", x0.shape[1:]))
        x0_pred = self(x_t, t, text, drop)
        weight = timestep_weight(self.schedule, self.config.weighting, "x0", t)
        return {"loss": weight * (x0_pred - x0).square().mean(1)}

    @torch.no_grad()
    def sample(self, keys: Tensor, text: PriorText, options: PriorSampling) -> Tensor:
        """Draw z_i [B, E], of unit norm if `config.unit_norm`: of `best_of` draws the one with the
        largest z_i . z_t (section 2.2)."""
        never, always = torch.zeros_like(keys, dtype=torch.bool), torch.ones_like(keys).bool()
        told = self.read(text, never)
        untold = told if options.cfg_scale == 1 else self.read(text, always)
        denoise = guided(
            lambda x, t: self(x, t, told, never),
            lambda x, t: self(x, t, untold, always),
            options.cfg_scale,
        )
        if self.config.clip_x0:
            denoise = clipped(denoise, self.config.clip_x0)
        sampler = options.sampler
        if sampler == "analytic_ddpm":
            unknown = gaussian_posterior_variance(self.schedule, self.scale.spectrum.clamp(min=0))
            sampler = analytic_ddpm(unknown)
        draws, schedule = [], self.schedule.spaced(options.spacing)
        for draw in range(options.best_of):
            x = keyed_random.normal(keys, f"prior_{draw}", (self.embed_dim,))
            noise = _fresh_noise(keys, draw, x)
            x0 = sampler(denoise, x, schedule, options.sample_steps, noise)
            draws.append(self.scale.restore(x0, unit_norm=self.config.unit_norm))
        z = torch.stack(draws)  # [D, B, E]
        best = (z * text.text_embed).sum(-1).argmax(0)  # [B]
        return z[best, torch.arange(len(keys), device=keys.device)]


def _fresh_noise(keys: Tensor, draw: int, like: Tensor):
    return lambda step: keyed_random.normal(keys, f"prior_{draw}_{step}", like.shape[1:])
