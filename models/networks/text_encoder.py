"""How networks read captions that CLIP has not read for them."""

import torch
from torch import Tensor, nn

from models.networks.transformer import Block, causal_mask


class TextInput(nn.Module):
    """Bring a caption to a network's width: [B, L, width] of CLIP's states, or of own tokens.

    text_width: W of the states; 0 for own tokens, of which there are `vocab_size`.
    """

    def __init__(self, *, text_width: int, vocab_size: int, width: int) -> None:
        super().__init__()
        self.states = nn.Linear(text_width, width) if text_width else None
        self.tokens = None if text_width else nn.Embedding(vocab_size, width)
        if self.tokens is not None:
            nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        if self.states is not None:
            return self.states(text)
        assert self.tokens is not None
        return self.tokens(text.long())


class TextEncoder(nn.Module):
    """A causal transformer over the caption's own tokens: [B, L] -> states [B, L, width].

    L may be less than `context_length`, as long as every caption's end is there.
    """

    def __init__(
        self,
        *,
        context_length: int,
        vocab_size: int,
        width: int,
        depth: int,
        num_heads: int,
        dropout: float = 0.0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = TextInput(text_width=0, vocab_size=vocab_size, width=width)
        self.position = nn.Parameter(torch.randn(1, context_length, width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(width=width, num_heads=num_heads, dropout=dropout, qk_norm=qk_norm)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        length = tokens.shape[1]
        h, mask = self.tokens(tokens) + self.position[:, :length], causal_mask(length, token_mask)
        for block in self.blocks:
            h = block(h, mask)
        return self.norm(h)
