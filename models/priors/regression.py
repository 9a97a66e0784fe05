"""The regression prior: a caption's image embedding in one pass, without diffusion.

After ECLIPSE (Patel et al. 2024): squared error to z_i, and a contrastive term that keeps it near
the caption's own embedding. It predicts a mean and draws nothing: the fast baseline.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import RegressionPriorConfig
from models.diffusion.losses import contrastive
from models.networks.packing import CaptionPacking, Packing, pack_prior
from models.networks.transformer import TextInput, prior_blocks, without_autocast
from models.priors.base import EmbedScale, PackedText, PriorSampling, PriorText

CONTRASTIVE_SCALE = 1 / 0.07  # CLIP's initial temperature
NUM_EXTRA_TOKENS = 2  # z_t, query

# From local rows [b, ...] to the rows of all workers [G, ...] and the slice that is local
Gather = Callable[[Tensor], tuple[Tensor, slice]]


class RegressionPrior(nn.Module):
    """Bidirectional transformer over [text | z_t | query] that predicts z_i."""

    outer_layers = ("text_embed_in", "query", "position", "out")

    def __init__(
        self,
        config: RegressionPriorConfig,
        *,
        embed_dim: int,
        text_width: int,
        context_length: int,
        vocab_size: int = 0,
    ) -> None:
        """Build for an encoder of these sizes; see `DiffusionPrior`."""
        super().__init__()
        width = config.width
        self.config, self.embed_dim = config, embed_dim
        length = (config.text_tokens or context_length) + NUM_EXTRA_TOKENS
        self.text_in = TextInput(
            text_width=0 if config.text_tokens else text_width, vocab_size=vocab_size, width=width
        )
        self.text_embed_in = nn.Linear(embed_dim, width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, length, width) * 0.02)
        self.blocks = prior_blocks(config)
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, embed_dim)
        self.scale = EmbedScale(embed_dim)

    def forward(self, text: PriorText | PackedText) -> Tensor:
        """Predict the scaled z_i, float32 [B, E]."""
        states = self.text_in(text.text)  # [B, L, W], or [S, W] of packed captions
        z_t = self.text_embed_in(self.scale(text.text_embed))[:, None]  # [B, 1, W]
        query = self.query.expand(len(z_t), -1, -1)  # [B, 1, W]
        further = torch.cat([z_t.to(states.dtype), query.to(states.dtype)], dim=1)  # [B, 2, W]
        if isinstance(text, PackedText):
            packing = text.packing
            assert packing.joined is not None and packing.source is not None
            assert packing.place is not None
            h = torch.cat([states, further.flatten(0, 1)]).index_select(0, packing.source)
            h = h + F.embedding(packing.place % self.position.shape[1], self.position[0])  # [T, W]
            h = self._transform(h, packing.joined)  # [B, W]
            return self.out(self.norm_out(h)).float()  # [B, E]
        h = torch.cat([states, further], dim=1)
        ends = self.position[:, : states.shape[1]], self.position[:, -NUM_EXTRA_TOKENS:]
        h = h + torch.cat(ends, dim=1)  # [B, N, W], N = L + 2
        keep = F.pad(text.token_mask, (0, NUM_EXTRA_TOKENS), value=True)  # [B, N]
        mask = keep[:, None, None, :].expand(-1, -1, h.shape[1], -1)  # [B, 1, N, N]
        h = self._transform(h, mask)  # [B, 1, W]
        return self.out(self.norm_out(h[:, -1])).float()  # [B, E]

    def _transform(self, h: Tensor, mask: Tensor | Packing) -> Tensor:
        """Run the blocks; returns the last tokens, [B, 1, W], or packed [B, W]."""
        for i, block in enumerate(self.blocks):
            h = block(h, mask, 1 if i == len(self.blocks) - 1 else 0)
        return h

    def pack(self, lengths: Tensor, keys: Tensor) -> CaptionPacking:
        """Return how captions of `lengths` int64 [B] are packed; see `DiffusionPrior.pack`."""
        keep = torch.zeros_like(keys, dtype=torch.bool)
        return pack_prior(lengths, keep, num_further=NUM_EXTRA_TOKENS, causal=False)

    def losses(
        self,
        keys: Tensor,
        image_embed: Tensor,
        text: PriorText | PackedText,
        gather: Gather = lambda rows: (rows, slice(len(rows))),
    ) -> dict[str, Tensor]:
        """Return {"loss", "mse", "accuracy": [B]} of image_embed [B, E]; `keys` are not used.

        gather: adds the rows of the other workers, which are negatives of the contrastive term.
        """
        x = self(text)  # [B, E]
        mse = (x - self.scale(image_embed)).square().mean(1)  # [B]
        (z, local), (z_t, _) = gather(self.scale.restore(x)), gather(text.text_embed)  # [G, E]
        with without_autocast(z_t):  # bf16 has no number between .996 and 1
            same = (z_t[local] @ z_t.T) > 1 - 1e-4  # [B, G]: a caption is no negative of itself
        scale = torch.full((), CONTRASTIVE_SCALE, device=x.device)
        contrastive_loss, accuracy = contrastive(z, z_t, scale, ~same, local)  # [B] each
        loss = mse + self.config.contrastive_weight * contrastive_loss
        return {"loss": loss, "mse": mse.detach(), "accuracy": accuracy.detach()}

    @torch.no_grad()
    def sample(self, keys: Tensor, text: PriorText, options: PriorSampling) -> Tensor:
        """Return z_i [B, E], unit norm: the prediction, whatever the keys and options."""
        return self.scale.restore(self(text))
