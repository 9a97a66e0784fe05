"""The autoregressive prior: image embeddings as a sequence of codes (Ramesh et al. 2022, section
2.2).

    PCA: z_i -> y, its first K components, by falling eigenvalue (319 of 1024 in the paper)
    codes: each y_k into one of C equal buckets over [-4, 4] standard deviations of component k
    sequence: [prefix of 64 | dot-product token | codes 1 ... K]; 384 in the paper

The paper conditions "on the caption and z_t as a prefix", and does not say how 256 tokens fit into
384 positions beside 319 codes. Here the prefix is z_t, and 63 tokens that one cross-attention pools
from the caption's states. The network would have to learn for each position which component of z_t
its code is of; with `tell_components` (ours, not the paper's) each position receives it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import AutoregressivePriorConfig
from models.diffusion import keyed_random
from models.networks.packing import CaptionPacking, Packing
from models.networks.transformer import (
    KeyValues,
    TextEncoder,
    attend,
    attend_packed,
    prior_blocks,
    without_autocast,
)
from models.priors.base import PackedText, PriorSampling, PriorText

RANGE = 4.0  # standard deviations; values beyond go to the outermost buckets
SMOOTH = 0.05  # of the buckets' range [-1, 1]: .2 standard deviations of a component


# -- codes -----------------------------------------------------------------------------------------


def _bucket(x: Tensor, count: int) -> Tensor:
    """Return the index, int64, of x among `count` equal buckets over [-1, 1]."""
    return ((x + 1) / 2 * count).long().clamp(0, count - 1)


def _middle(bucket: Tensor, count: int) -> Tensor:
    """Return the middle of a bucket, in [-1, 1]."""
    return (bucket.float() + 0.5) / count * 2 - 1


def _quantile(logits: Tensor, u: Tensor | float) -> Tensor:
    """Return the bucket int64 [B] below which a share u ([B], or one for all) of softmax(logits
    [B, C]) lies: a draw, for uniform u.

    Buckets are in the order of their values: u in [.5, 1] is the upper half.
    """
    mass = logits.double().softmax(-1).cumsum(-1)  # [B, C]
    share = torch.as_tensor(u, dtype=mass.dtype, device=mass.device).expand(len(mass))
    bucket = torch.searchsorted(mass, share[:, None].contiguous(), right=True)[:, 0]  # [B]
    return bucket.clamp(max=logits.shape[1] - 1)


def _expected(logits: Tensor) -> Tensor:
    """Return the bucket int64 [B] of the mean value under softmax(logits [B, C])."""
    count = logits.shape[1]
    middles = _middle(torch.arange(count, device=logits.device), count).double()
    return _bucket(logits.double().softmax(-1) @ middles, count)


class PcaCodes(nn.Module):
    """Embeddings to codes and back: uniform buckets of the principal components.

    Half a bucket, RANGE / C standard deviations, bounds the error of each component within range.
    Always in fp32: bf16 has at most 256 values per component, and would move codes.
    """

    mean: Tensor
    basis: Tensor
    std: Tensor

    def __init__(self, *, embed_dim: int, num_codes: int, codebook_size: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("basis", torch.eye(embed_dim)[:, :num_codes].clone())  # [E, K]
        self.register_buffer("std", torch.full((num_codes,), embed_dim**-0.5))

    def set(self, mean: Tensor, basis: Tensor, eigenvalues: Tensor) -> None:
        """Set the data's mean [E], PCA basis [E, E] and falling eigenvalues [E]."""
        num_codes = len(self.std)
        self.mean.copy_(mean)
        self.basis.copy_(basis[:, :num_codes])
        self.std.copy_(eigenvalues[:num_codes].sqrt().clamp(min=1e-6))

    def components(self, z: Tensor) -> Tensor:
        """Return the principal components [B, K] of z [B, E], in standard deviations."""
        with without_autocast(z):
            return (z.float() - self.mean) @ self.basis / self.std

    def encode(self, z: Tensor) -> Tensor:
        """Return codes int64 [B, K] in [0, C) of z [B, E]."""
        return _bucket(self.components(z) / RANGE, self.codebook_size)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the unit vectors [B, E] at the middles of the buckets `codes` int64 [B, K]."""
        y = _middle(codes, self.codebook_size) * RANGE * self.std  # [B, K]
        with without_autocast(y):
            return F.normalize(self.mean + y @ self.basis.T, dim=-1)


# -- the network -----------------------------------------------------------------------------------


class AttentionPool(nn.Module):
    """Pool a caption's states into `num_tokens` tokens by one cross-attention of learned
    queries."""

    outer_layers = ("query",)

    def __init__(self, *, text_width: int, width: int, num_heads: int, num_tokens: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(1, num_tokens, width) * 0.02)
        self.norm = nn.LayerNorm(text_width)
        self.kv = nn.Linear(text_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, states: Tensor, token_mask: Tensor | Packing) -> Tensor:
        """Map states [B, L, text_width] with token_mask bool [B, L], or [T, text_width] with their
        packing, to [B, n, width]."""
        k, v = self.kv(self.norm(states)).chunk(2, dim=-1)  # [B, L, W] each
        if isinstance(token_mask, Packing):
            count, heads = self.query.shape[1], (self.num_heads, -1)
            q = self.query.to(k.dtype).expand(len(token_mask.last), -1, -1).flatten(0, 1)
            q, k, v = (y.unflatten(-1, heads) for y in (q, k, v))  # [T, H, d]
            y = attend_packed(q, k, v, token_mask, count)  # [B * n, H, d]
            return self.out(y.flatten(1).unflatten(0, (-1, count)))  # [B, n, W]
        q = self.query.to(k.dtype).expand(len(states), -1, -1)  # [B, n, W]
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        mask = token_mask[:, None, None, :].expand(-1, -1, q.shape[2], -1)  # [B, 1, n, L]
        y = attend(q, k, v, mask)  # [B, H, n, d]
        return self.out(y.transpose(1, 2).flatten(2))  # [B, n, W]


class AutoregressivePrior(nn.Module):
    """A causal decoder over [z_t, pooled caption | dot product | codes]."""

    outer_layers = (
        "text_embed_in", "dot_in", "code_in", "null_prefix", "position", "dot_out", "code_out",
    )  # fmt: skip

    def __init__(
        self,
        config: AutoregressivePriorConfig,
        *,
        embed_dim: int,
        text_width: int,
        context_length: int,
        vocab_size: int = 0,
    ) -> None:
        """Build for an encoder of these sizes; see `DiffusionPrior`. config.num_codes > 0."""
        super().__init__()
        width, size = config.width, config.codebook_size
        self.config, self.embed_dim = config, embed_dim

        # The prefix
        self.text_encoder = None
        if config.text_tokens:
            self.text_encoder = TextEncoder(
                context_length=config.text_tokens, vocab_size=vocab_size,
                width=config.text_width, depth=config.text_depth, num_heads=config.text_heads,
                dropout=config.dropout, qk_norm=config.qk_norm,
            )  # fmt: skip
        self.pool = AttentionPool(
            text_width=config.text_width if config.text_tokens else text_width,
            width=width,
            num_heads=config.num_heads,
            num_tokens=config.num_prefix - 1,
        )
        self.text_embed_in = nn.Linear(embed_dim, width)
        self.null_prefix = nn.Parameter(torch.randn(1, config.num_prefix, width) * 0.02)

        # The tokens after it, and what they predict
        self.dot_in, self.dot_out = nn.Embedding(size, width), nn.Linear(width, size)
        self.code_in, self.code_out = nn.Embedding(size, width), nn.Linear(width, size)
        self.component_in = None
        if config.tell_components:
            self.component_in = nn.Parameter(torch.randn(1, config.num_codes, width) * 0.02)

        # The decoder; the last code is no input
        length = config.num_prefix + config.num_codes
        self.position = nn.Parameter(torch.randn(1, length, width) * 0.02)
        self.blocks = prior_blocks(config)
        self.norm_out = nn.LayerNorm(width)

        # Smooth tables. Buckets have an order, of which a table of independent rows would have to
        # learn each pair: here a row moves with its neighbours, within SMOOTH of the range, from
        # the first step. The codes' first distribution is the normal one.
        middles = _middle(torch.arange(size), size)  # [C]
        kernel = torch.exp(-0.5 * ((middles[:, None] - middles) / SMOOTH) ** 2)  # [C, C]
        kernel /= kernel.norm(dim=1, keepdim=True)
        for table in (self.dot_in, self.code_in, self.dot_out, self.code_out):
            table.weight.data = kernel @ torch.randn_like(table.weight) * 0.02
        nn.init.zeros_(self.dot_out.bias)
        self.code_out.bias.data = -0.5 * (middles * RANGE) ** 2
        self.codes = PcaCodes(embed_dim=embed_dim, num_codes=config.num_codes, codebook_size=size)

    def prefix(self, text: PriorText | PackedText, drop: Tensor) -> Tensor:
        """Return the tokens before the codes, [B, num_prefix, W]: z_t and the pooled caption, or
        learned nulls where `drop`, bool [B]."""
        states = text.text
        mask = text.packing.text if isinstance(text, PackedText) else text.token_mask
        if self.text_encoder is not None:
            states = self.text_encoder(states, mask)  # [B, L, text_width], or packed
        z_t = self.text_embed_in(text.text_embed * self.embed_dim**0.5)[:, None]  # [B, 1, W]
        tokens = torch.cat([z_t, self.pool(states, mask)], dim=1)  # [B, num_prefix, W]
        return torch.where(drop[:, None, None], self.null_prefix.to(tokens.dtype), tokens)

    def hints(self, text: PriorText | PackedText, drop: Tensor) -> Tensor:
        """Return what is added to the token before each code, [B, K, W or 1]: z_t's value of that
        code's component with `config.tell_components`, zeros without it or where `drop`, bool
        [B]."""
        if self.component_in is None:
            return text.text_embed.new_zeros(len(drop), self.config.num_codes, 1)
        values = self.codes.components(text.text_embed)  # [B, K]
        return values.masked_fill(drop[:, None], 0.0)[..., None] * self.component_in

    def _decode(self, h: Tensor, caches: list[KeyValues] | None = None) -> Tensor:
        """Run the decoder on n further positions of a sequence, [B, n, W] to [B, n, W]."""
        start = caches[0].length if caches else 0
        length = start + h.shape[1]
        h = h + self.position[:, start:length]  # [B, n, W]
        if caches is None:
            for block in self.blocks:
                h = block(h, "causal")  # [B, n, W]
            return self.norm_out(h)
        causal = torch.ones(length, length, dtype=torch.bool, device=h.device).tril()
        mask = causal[None, None, start:]  # [1, 1, n, length]
        for block, cache in zip(self.blocks, caches, strict=True):
            h = block(h, mask, cache=cache)  # [B, n, W]
        return self.norm_out(h)

    def forward(
        self, text: PriorText | PackedText, dot: Tensor, codes: Tensor, drop: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return float32 logits of the dot-product token [B, C] and of the codes [B, K, C], each
        given those before it.

        dot: int64 [B]; codes: int64 [B, K]; drop: bool [B], True replaces the prefix by learned
        nulls (classifier-free guidance).
        """
        prefix = self.prefix(text, drop)  # [B, P, W]
        tokens = torch.cat([self.dot_in(dot)[:, None], self.code_in(codes[:, :-1])], dim=1)
        tokens = tokens + self.hints(text, drop)  # [B, K, W]
        h = self._decode(torch.cat([prefix, tokens.to(prefix.dtype)], dim=1))  # [B, P + K, W]
        last = self.config.num_prefix - 1
        return self.dot_out(h[:, last]).float(), self.code_out(h[:, last + 1 :]).float()

    def dot_token(self, image_embed: Tensor, text_embed: Tensor) -> Tensor:
        """Return the quantised z_i . z_t, int64 [B]: equal buckets over [-1, 1]."""
        return _bucket((image_embed * text_embed).sum(1), self.config.codebook_size)

    def pack(self, lengths: Tensor, keys: Tensor) -> CaptionPacking:
        """Return how captions of `lengths` int64 [B] are packed; see `DiffusionPrior.pack`.

        Dropped ones are read: nulls take the place of what is pooled from them.
        """
        keep = torch.zeros_like(keys, dtype=torch.bool)
        return CaptionPacking.of(lengths, keep)

    def losses(
        self, keys: Tensor, image_embed: Tensor, text: PriorText | PackedText
    ) -> dict[str, Tensor]:
        """Return {"loss", "dot_loss", "code_loss": [B]} of image_embed [B, E], in nats per token.

        Dropped captions come from the sample `keys` int64 [B].
        """
        codes = self.codes.encode(image_embed)  # [B, K]
        dot = self.dot_token(image_embed, text.text_embed)  # [B]
        drop = keyed_random.uniform(keys, "text_drop") < self.config.text_drop  # [B]
        dot_logits, code_logits = self(text, dot, codes, drop)  # [B, C], [B, K, C]
        dot_loss = F.cross_entropy(dot_logits, dot, reduction="none")  # [B]
        code_loss = F.cross_entropy(code_logits.transpose(1, 2), codes, reduction="none")  # [B, K]
        return {
            "loss": (dot_loss + code_loss.sum(1)) / (1 + codes.shape[1]),
            "dot_loss": dot_loss.detach(),
            "code_loss": code_loss.mean(1).detach(),
        }

    @torch.no_grad()
    def sample(self, keys: Tensor, text: PriorText, options: PriorSampling) -> Tensor:
        """Draw z_i [B, E], unit norm, for sample `keys` int64 [B].

        The dot-product token comes from the upper part of its distribution, then code after code
        (section 2.2). With `options.mean_of` > 1 the mean of as many draws is returned.
        Raises ValueError for `mean_of` below 1.
        """
        if options.mean_of < 1:
            raise ValueError(f"mean_of: found {options.mean_of}, expected 1 or more draws")
        draws = []
        for number in range(options.mean_of):
            draw_keys = keyed_random.bits(keys, f"draw_{number}", 1)[:, 0] if number else keys
            _, codes = self.sample_codes(draw_keys, text, options)  # [B, K]
            draws.append(self.codes.decode(codes))  # [B, E]
        return draws[0] if len(draws) == 1 else F.normalize(torch.stack(draws).mean(0), dim=-1)

    @torch.no_grad()
    def sample_codes(
        self, keys: Tensor, text: PriorText, options: PriorSampling, *, cached: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the dot-product token int64 [B] and the codes int64 [B, K] of a draw.

        At temperature 0 nothing is drawn: each code is that of its expected value, and the
        dot-product token the median of its upper part. cached: keep the keys and values of earlier
        tokens instead of processing them again.
        """
        # Prefix; under guidance the rows without a condition are appended, [2B, P, W]
        guide = options.cfg_scale != 1
        drop = torch.zeros_like(keys, dtype=torch.bool)
        prefix, hints = self.prefix(text, drop), self.hints(text, drop)
        if guide:
            prefix = torch.cat([prefix, self.prefix(text, ~drop)])
            hints = torch.cat([hints, torch.zeros_like(hints)])
        caches = None
        if cached:
            heads = self.config.num_heads
            shape = (len(prefix), heads, self.position.shape[1], self.config.width // heads)
            caches = [KeyValues(shape, prefix) for _ in self.blocks]

        # Token by token: the dot product at position 0, then the codes
        sequence, h = prefix, self._decode(prefix, caches)
        tokens: list[Tensor] = []
        for i in range(1 + self.config.num_codes):
            logits = (self.code_out if i else self.dot_out)(h[:, -1]).float()  # [B, C]
            if guide:
                cond, uncond = logits.chunk(2)
                logits = uncond + options.cfg_scale * (cond - uncond)
            low = 0.0 if i else 1 - options.top_share
            if options.temperature == 0:
                token = _expected(logits) if i else _quantile(logits, low / 2 + 0.5)
            else:
                u = low + (1 - low) * keyed_random.uniform(keys, f"code_{i}")  # [B]
                token = _quantile(logits / options.temperature, u)  # [B]
            tokens.append(token)
            if i == self.config.num_codes:
                break
            new = (self.code_in if i else self.dot_in)(token)[:, None]  # [B, 1, W]
            new = new.repeat(2 if guide else 1, 1, 1) + hints[:, i : i + 1]
            new = new.to(prefix.dtype)
            sequence = new if cached else torch.cat([sequence, new], dim=1)
            h = self._decode(sequence, caches)
        return tokens[0], torch.stack(tokens[1:], dim=1)
