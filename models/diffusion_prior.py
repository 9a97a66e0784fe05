"""The diffusion prior: from a caption to a CLIP image embedding (Ramesh et al. 2022, section
2.2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import keyed_random
from models.configs import DiffusionPriorConfig
from models.losses import draw_timesteps, timestep_weight
from models.samplers import Sampler, guided
from models.schedule import NoiseSchedule
from models.transformer import Block, TimestepMLP, causal_mask

EMBED_RMS = (
    0.5375  # the paper's 17.2 / sqrt(1024): per-coordinate RMS of ImageNet pixels in [-1, 1]
)
NUM_EXTRA_TOKENS = 4  # z_t, t, noised z_i, query


class DiffusionPrior(nn.Module):
    """Causal transformer over [text states | z_t | t | noised z_i | query] that predicts x0 = z_i.

    Inside, embeddings are standardised: x = (z - mean) / std, buffers of the checkpoint.
    """

    embed_mean: Tensor
    embed_std: Tensor

    def __init__(
        self, config: DiffusionPriorConfig, *, embed_dim: int, text_width: int, context_length: int
    ) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.embed_dim = embed_dim
        self.schedule = NoiseSchedule.build(config.schedule, config.num_timesteps)
        self.length = context_length + NUM_EXTRA_TOKENS
        self.text_in = nn.Linear(text_width, width)
        self.text_embed_in = nn.Linear(embed_dim, width)
        self.time_in = TimestepMLP(min(width, 256), width)
        self.x_in = nn.Linear(embed_dim, width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.null_text = nn.Parameter(torch.randn(1, context_length, width) * 0.02)
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
        self.register_buffer("embed_mean", torch.zeros(embed_dim))
        self.register_buffer(
            "embed_std", torch.full((embed_dim,), 1 / (EMBED_RMS * embed_dim**0.5))
        )

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Whiten per dimension with the data's mean and standard deviation, both [E], instead of
        one scale."""
        self.embed_mean.copy_(mean)
        self.embed_std.copy_(std.clamp(min=1e-6))

    def standardise(self, z: Tensor) -> Tensor:
        return (z - self.embed_mean) / self.embed_std

    def restore(self, x: Tensor) -> Tensor:
        """Undo `standardise` and return to the unit sphere, where CLIP embeddings live."""
        return F.normalize(x * self.embed_std + self.embed_mean, dim=-1)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        text_embed: Tensor,
        text_states: Tensor,
        token_mask: Tensor,
        drop: Tensor,
    ) -> Tensor:
        """Predict the un-noised, standardised z_i, shaped as `x_t`.

        x_t, text_embed: [B, E]; t: int64 [B]; text_states: [B, L, W]; token_mask: bool [B, L],
        True = keep;
        drop: bool [B], True replaces caption and z_t by learned nulls (classifier-free guidance).
        """
        gone = drop[:, None, None]
        text = torch.where(
            gone, self.null_text.to(text_states.dtype), self.text_in(text_states)
        )  # [B, L, width]
        z_t = torch.where(
            gone, self.null_text_embed, self.text_embed_in(text_embed)[:, None]
        )  # [B, 1, width]
        time = self.time_in(t)[:, None]
        noised = self.x_in(x_t)[:, None]
        query = self.query.expand(len(x_t), -1, -1)
        h = torch.cat(
            [text, z_t.to(text.dtype), time.to(text.dtype), noised.to(text.dtype), query], dim=1
        )
        h = h + self.position

        keep = F.pad(token_mask | drop[:, None], (0, NUM_EXTRA_TOKENS), value=True)
        mask = causal_mask(self.length, keep)
        for i, block in enumerate(self.blocks):  # of the last one only the query is read
            h = block(h, mask, last=1 if i == len(self.blocks) - 1 else 0)
        return self.out(self.norm_out(h[:, -1])).float()  # [B, E]

    def losses(
        self,
        keys: Tensor,
        image_embed: Tensor,
        text_embed: Tensor,
        text_states: Tensor,
        token_mask: Tensor,
    ) -> dict[str, Tensor]:
        """Return {"loss": [B]}, the weighted MSE on x0; all randomness comes from the sample
        `keys` [B]."""
        x0 = self.standardise(image_embed)
        t = draw_timesteps(self.schedule, keys)
        drop = keyed_random.uniform(keys, "text_drop") < self.config.text_drop
        x_t = self.schedule.q_sample(x0, t, keyed_random.normal(keys, "eps", x0.shape[1:]))
        x0_pred = self(x_t, t, self.standardise(text_embed), text_states, token_mask, drop)
        weight = timestep_weight(self.schedule, self.config.weighting, "x0", t)
        return {"loss": weight * (x0_pred - x0).square().mean(1)}

    @torch.no_grad()
    def sample(
        self,
        keys: Tensor,
        text_embed: Tensor,
        text_states: Tensor,
        token_mask: Tensor,
        options: "PriorSampling",
    ) -> Tensor:
        """Draw z_i [B, E], unit norm: of `best_of` draws the one with the largest z_i . z_t
        (section 2.2)."""
        text = self.standardise(text_embed)
        never, always = (
            torch.zeros_like(keys, dtype=torch.bool),
            torch.ones_like(keys, dtype=torch.bool),
        )
        denoise = guided(
            lambda x, t: self(x, t, text, text_states, token_mask, never),
            lambda x, t: self(x, t, text, text_states, token_mask, always),
            options.cfg_scale,
        )
        draws = []
        for draw in range(options.best_of):
            x = keyed_random.normal(keys, f"prior_{draw}", text_embed.shape[1:])
            noise = _fresh_noise(keys, draw, x)
            draws.append(
                self.restore(
                    options.sampler(denoise, x, self.schedule, options.sample_steps, noise)
                )
            )
        z = torch.stack(draws)  # [D, B, E]
        best = (z * text_embed).sum(-1).argmax(0)  # [B]
        return z[best, torch.arange(len(keys), device=keys.device)]


def _fresh_noise(keys: Tensor, draw: int, like: Tensor):
    return lambda step: keyed_random.normal(keys, f"prior_{draw}_{step}", like.shape[1:])


@dataclass(frozen=True, kw_only=True)
class PriorSampling:
    """How to sample a prior."""

    sampler: Sampler
    sample_steps: int = 16
    best_of: int = 2
    cfg_scale: float = 1.0
