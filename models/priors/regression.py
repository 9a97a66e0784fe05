"""The regression prior: a caption's image embedding in one pass, without diffusion.

After ECLIPSE (Patel et al. 2024): squared error to z_i, and a contrastive term that keeps it near
the caption's own embedding. It gives a mean, not a draw: the fast baseline.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import RegressionPriorConfig
from models.diffusion.losses import contrastive
from models.networks.autocast import without_autocast
from models.networks.text_encoder import TextInput
from models.networks.transformer import Block
from models.priors.base import EmbedScale, PriorSampling, PriorText

CONTRASTIVE_SCALE = 1 / 0.07  # CLIP's initial temperature
Gathered = Callable[[Tensor], tuple[Tensor, slice]]


def _alone(rows: Tensor) -> tuple[Tensor, slice]:
    return rows, slice(len(rows))


class RegressionPrior(nn.Module):
    """Bidirectional transformer over [text | z_t | query] that predicts z_i."""

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
        num_words = config.text_tokens or context_length
        self.text_in = TextInput(
            text_width=0 if config.text_tokens else text_width, vocab_size=vocab_size, width=width
        )
        self.text_embed_in = nn.Linear(embed_dim, width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, num_words + 2, width) * 0.02)
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

    def forward(self, text: PriorText) -> Tensor:
        """Predict the scaled z_i, [B, E]."""
        words = self.text_in(text.text)  # [B, L, width]
        z_t = self.text_embed_in(self.scale(text.text_embed))[:, None]
        query = self.query.expand(len(z_t), -1, -1)
        h = torch.cat([words, z_t.to(words.dtype), query.to(words.dtype)], dim=1)
        ends = self.position[:, : words.shape[1]], self.position[:, -2:]
        h = h + torch.cat(ends, dim=1)
        mask = F.pad(text.token_mask, (0, 2), value=True)[:, None, None, :].expand(
            -1, -1, h.shape[1], -1
        )
        for i, block in enumerate(self.blocks):
            h = block(h, mask, last=1 if i == len(self.blocks) - 1 else 0)
        return self.out(self.norm_out(h[:, -1])).float()

    def losses(
        self, keys: Tensor, image_embed: Tensor, text: PriorText, gathered: Gathered = _alone
    ) -> dict[str, Tensor]:
        """Return {"loss", "mse", "accuracy": [B]}.

        gathered: adds the rows of other workers and says which are this one's: all of them are the
        contrastive term's negatives.
        """
        x = self(text)
        mse = (x - self.scale(image_embed)).square().mean(1)
        (z, mine), (z_t, _) = gathered(self.scale.restore(x)), gathered(text.text_embed)
        with without_autocast(z_t):  # bf16 has no number between .996 and 1
            same = (z_t[mine] @ z_t.T) > 1 - 1e-4  # one caption twice is no negative
        scale = torch.tensor(CONTRASTIVE_SCALE, device=x.device)
        told, accuracy = contrastive(z, z_t, scale, ~same, mine)
        loss = mse + self.config.contrastive_weight * told
        return {"loss": loss, "mse": mse.detach(), "accuracy": accuracy.detach()}

    @torch.no_grad()
    def sample(self, keys: Tensor, text: PriorText, options: PriorSampling) -> Tensor:
        """Return z_i [B, E], unit norm; the same for every key."""
        return self.scale.restore(self(text))
