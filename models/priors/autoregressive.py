"""The autoregressive prior: image embeddings as a sequence of codes (Ramesh et al. 2022, section
2.2).

    PCA: z_i -> y, its first K components, by falling eigenvalue (319 of 1024 in the paper)
    codes: each y_k into one of C equal buckets over [-4, 4] standard deviations of component k
    sequence: [prefix of 64 | dot-product token | codes 1 ... K]; 384 in the paper

The paper conditions "on the caption and z_t as a prefix", and does not say how 256 words fit into
384 positions beside 319 codes: here the prefix is z_t, and 63 tokens that one cross-attention pools
from the caption's states. Which of z_t's components a code is of, the network would have to learn
place by place: with `tell_components` (ours, not the paper's) each place is told its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import AutoregressivePriorConfig
from models.diffusion import keyed_random
from models.networks.autocast import without_autocast
from models.networks.text_encoder import TextEncoder
from models.networks.transformer import Block, KeyValues, attend
from models.priors.base import PriorSampling, PriorText

RANGE = 4.0  # standard deviations; what lies beyond goes to the outermost buckets
SMOOTH = 0.05  # of the buckets' range [-1, 1]: .2 standard deviations of a component


class PcaCodes(nn.Module):
    """Embeddings to codes and back: uniform buckets of the principal components.

    Half a bucket, RANGE / C standard deviations, bounds the error of each component within range.
    Always in fp32: bf16 tells at most 256 values of a component apart, and would move codes.
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
        """Take the data's mean [E], PCA basis [E, E] and eigenvalues [E], falling."""
        num_codes = len(self.std)
        self.mean.copy_(mean)
        self.basis.copy_(basis[:, :num_codes])
        self.std.copy_(eigenvalues[:num_codes].sqrt().clamp(min=1e-6))

    def components(self, z: Tensor) -> Tensor:
        """Return the principal components [B, K] of z [B, E], in standard deviations."""
        with without_autocast(z):
            return (z.float() - self.mean) @ self.basis / self.std

    def encode(self, z: Tensor) -> Tensor:
        """Return codes int64 [B, K] of z [B, E]."""
        return _bucket(self.components(z) / RANGE, self.codebook_size)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the unit vectors [B, E] at the buckets' middles."""
        y = _middle(codes, self.codebook_size) * RANGE * self.std
        with without_autocast(y):
            return F.normalize(self.mean + y @ self.basis.T, dim=-1)


def _bucket(x: Tensor, count: int) -> Tensor:
    """Return which of `count` equal buckets over [-1, 1] holds x, int64."""
    return ((x + 1) / 2 * count).long().clamp(0, count - 1)


def _middle(bucket: Tensor, count: int) -> Tensor:
    """Return the middle of a bucket, in [-1, 1]."""
    return (bucket.float() + 0.5) / count * 2 - 1


class Pool(nn.Module):
    """Pool states [B, L, W] into n tokens [B, n, width] by one cross-attention of n queries."""

    def __init__(self, *, text_width: int, width: int, num_heads: int, num_tokens: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(1, num_tokens, width) * 0.02)
        self.norm = nn.LayerNorm(text_width)
        self.kv = nn.Linear(text_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, states: Tensor, token_mask: Tensor) -> Tensor:
        k, v = self.kv(self.norm(states)).chunk(2, dim=-1)
        q = self.query.to(k.dtype).expand(len(states), -1, -1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        mask = token_mask[:, None, None, :].expand(-1, -1, q.shape[2], -1)
        return self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class AutoregressivePrior(nn.Module):
    """A causal decoder over [z_t, pooled caption | dot product | codes]."""

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
        self.text_encoder = None
        if config.text_tokens:
            self.text_encoder = TextEncoder(
                context_length=config.text_tokens, vocab_size=vocab_size,
                width=config.text_width, depth=config.text_depth, num_heads=config.text_heads,
                dropout=config.dropout, qk_norm=config.qk_norm,
            )  # fmt: skip
        self.pool = Pool(
            text_width=config.text_width if config.text_tokens else text_width,
            width=width,
            num_heads=config.num_heads,
            num_tokens=config.num_prefix - 1,
        )
        self.text_embed_in = nn.Linear(embed_dim, width)
        self.null_prefix = nn.Parameter(torch.randn(1, config.num_prefix, width) * 0.02)
        self.dot_in, self.dot_out = nn.Embedding(size, width), nn.Linear(width, size)
        self.code_in, self.code_out = nn.Embedding(size, width), nn.Linear(width, size)
        self.component_in = None
        if config.tell_components:
            self.component_in = nn.Parameter(torch.randn(1, config.num_codes, width) * 0.02)
        length = config.num_prefix + config.num_codes  # the last code is not read
        self.position = nn.Parameter(torch.randn(1, length, width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(width=width, num_heads=config.num_heads, dropout=config.dropout,
                  qk_norm=config.qk_norm)
            for _ in range(config.depth)
        )  # fmt: skip
        self.norm_out = nn.LayerNorm(width)
        self._start_smooth()
        self.codes = PcaCodes(embed_dim=embed_dim, num_codes=config.num_codes, codebook_size=size)

    def _start_smooth(self) -> None:
        """Let neighbouring buckets start alike, and the codes at a normal distribution.

        Buckets have an order, of which a table of independent rows would have to learn each pair:
        here a row moves with its neighbours, within some SMOOTH of the range, from the first step.
        """
        size = self.config.codebook_size
        x = _middle(torch.arange(size), size)
        kernel = torch.exp(-0.5 * ((x[:, None] - x) / SMOOTH) ** 2)
        kernel /= kernel.norm(dim=1, keepdim=True)
        for table in (self.dot_in, self.code_in, self.dot_out, self.code_out):
            table.weight.data = kernel @ torch.randn_like(table.weight) * 0.02
        nn.init.zeros_(self.dot_out.bias)
        self.code_out.bias.data = -0.5 * (x * RANGE) ** 2

    def prefix(self, text: PriorText, drop: Tensor) -> Tensor:
        """Return what stands before the codes, [B, num_prefix, width]; a learned null where `drop`,
        bool [B]."""
        states = text.text
        if self.text_encoder is not None:
            states = self.text_encoder(states, text.token_mask)
        z_t = self.text_embed_in(text.text_embed * self.embed_dim**0.5)[:, None]
        told = torch.cat([z_t, self.pool(states, text.token_mask)], dim=1)
        return torch.where(drop[:, None, None], self.null_prefix.to(told.dtype), told)

    def hints(self, text: PriorText, drop: Tensor) -> Tensor:
        """Return what the token before each code adds to itself, [B, K, width or 1]: z_t's value of
        that code's component, and nothing where `drop`, bool [B]."""
        if self.component_in is None:
            return text.text_embed.new_zeros(len(drop), self.config.num_codes, 1)
        told = self.codes.components(text.text_embed).masked_fill(drop[:, None], 0.0)
        return told[..., None] * self.component_in

    def _blocks(self, h: Tensor, caches: list[KeyValues] | None = None) -> Tensor:
        """Run the decoder on further positions [B, n, width] of a sequence."""
        start = caches[0].length if caches else 0
        h = h + self.position[:, start : start + h.shape[1]]
        length = start + h.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=h.device).tril()
        mask = causal[None, None, start:]
        for i, block in enumerate(self.blocks):
            h = block(h, mask, cache=caches[i] if caches else None)
        return self.norm_out(h)

    def forward(
        self, text: PriorText, dot: Tensor, codes: Tensor, drop: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return logits of the dot-product token [B, C] and of the codes [B, K, C], each given
        those before it. dot: int64 [B]; codes: int64 [B, K]."""
        before = self.prefix(text, drop)
        tokens = torch.cat([self.dot_in(dot)[:, None], self.code_in(codes[:, :-1])], dim=1)
        tokens = tokens + self.hints(text, drop)
        h = self._blocks(torch.cat([before, tokens.to(before.dtype)], dim=1))
        last = self.config.num_prefix - 1
        return self.dot_out(h[:, last]).float(), self.code_out(h[:, last + 1 :]).float()

    def dot_token(self, image_embed: Tensor, text_embed: Tensor) -> Tensor:
        """Return the quantised z_i . z_t, int64 [B]: equal buckets over [-1, 1]."""
        return _bucket((image_embed * text_embed).sum(1), self.config.codebook_size)

    def losses(self, keys: Tensor, image_embed: Tensor, text: PriorText) -> dict[str, Tensor]:
        """Return {"loss", "dot_loss", "code_loss": [B]}: nats a token."""
        codes, dot = self.codes.encode(image_embed), self.dot_token(image_embed, text.text_embed)
        drop = keyed_random.uniform(keys, "text_drop") < self.config.text_drop
        dot_logits, code_logits = self(text, dot, codes, drop)
        dot_loss = F.cross_entropy(dot_logits, dot, reduction="none")
        code_loss = F.cross_entropy(code_logits.transpose(1, 2), codes, reduction="none")
        total = dot_loss + code_loss.sum(1)
        return {
            "loss": total / (1 + codes.shape[1]),
            "dot_loss": dot_loss.detach(),
            "code_loss": code_loss.mean(1).detach(),
        }

    @torch.no_grad()
    def sample(self, keys: Tensor, text: PriorText, options: PriorSampling) -> Tensor:
        """Draw z_i [B, E], unit norm: the dot-product token from the top of its distribution, then
        code after code (section 2.2); with `options.mean_of` > 1 the mean of as many draws."""
        if options.mean_of < 1:
            raise ValueError(f"mean_of: found {options.mean_of}, expected 1 or more draws")
        draws = [self._draw(keys, text, options)]
        for number in range(1, options.mean_of):
            others = keyed_random.bits(keys, f"draw_{number}", 1)[:, 0]
            draws.append(self._draw(others, text, options))
        return draws[0] if len(draws) == 1 else F.normalize(torch.stack(draws).mean(0), dim=-1)

    def _draw(self, keys: Tensor, text: PriorText, options: PriorSampling) -> Tensor:
        return self.codes.decode(self.sample_codes(keys, text, options)[1])

    @torch.no_grad()
    def sample_codes(
        self, keys: Tensor, text: PriorText, options: PriorSampling, *, cached: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the dot-product token int64 [B] and codes int64 [B, K] of a draw.

        At temperature 0 each code is that of its expected value, and the dot-product token the
        median of its top part: nothing is drawn.

        cached: keep the keys and values of what was read, instead of reading it again.
        """
        guide = options.cfg_scale != 1
        drop = torch.zeros_like(keys, dtype=torch.bool)
        before, hints = self.prefix(text, drop), self.hints(text, drop)
        if guide:
            before = torch.cat([before, self.prefix(text, ~drop)])
            hints = torch.cat([hints, torch.zeros_like(hints)])
        caches = self._caches(len(before), before) if cached else None
        h, read = self._blocks(before, caches), before
        tokens: list[Tensor] = []
        for place in range(1 + self.config.num_codes):
            head = self.code_out if place else self.dot_out
            logits = head(h[:, -1]).float()
            if guide:
                told, untold = logits.chunk(2)
                logits = untold + options.cfg_scale * (told - untold)
            above = 0.0 if place else 1 - options.top_share
            if options.temperature == 0:
                drawn = _expected(logits) if place else _at(logits, above / 2 + 0.5)
            else:
                u = above + (1 - above) * keyed_random.uniform(keys, f"code_{place}")
                drawn = _at(logits / options.temperature, u)
            tokens.append(drawn)
            if place == self.config.num_codes:
                break
            table = self.code_in if place else self.dot_in
            new = table(drawn)[:, None].repeat(2 if guide else 1, 1, 1)
            new = (new + hints[:, place : place + 1]).to(before.dtype)
            read = new if cached else torch.cat([read, new], dim=1)
            h = self._blocks(read, caches)
        return tokens[0], torch.stack(tokens[1:], dim=1)

    def _caches(self, batch: int, like: Tensor) -> list[KeyValues]:
        head = self.config.width // self.config.num_heads
        shape = (batch, self.config.num_heads, self.position.shape[1], head)
        return [KeyValues(shape, like) for _ in self.blocks]


def _at(logits: Tensor, u: Tensor | float) -> Tensor:
    """Return the bucket int64 [B] below which a share u ([B], or one for all) of softmax(logits
    [B, C]) lies: a draw, for uniform u.

    Buckets are in the order of their values: u in [.5, 1] are the top half.
    """
    mass = logits.double().softmax(-1).cumsum(-1)
    share = torch.as_tensor(u, dtype=mass.dtype, device=mass.device).expand(len(mass))
    found = torch.searchsorted(mass, share[:, None].contiguous(), right=True)[:, 0]
    return found.clamp(max=logits.shape[1] - 1)


def _expected(logits: Tensor) -> Tensor:
    """Return the bucket int64 [B] of the mean value under softmax(logits [B, C])."""
    count = logits.shape[1]
    middles = _middle(torch.arange(count, device=logits.device), count).double()
    return _bucket(logits.double().softmax(-1) @ middles, count)
