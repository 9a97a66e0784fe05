"""What the three priors share: the caption as their input, sampling options, and the scale of
image embeddings."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import (
    AutoregressivePriorConfig,
    DiffusionPriorConfig,
    RegressionPriorConfig,
    Spacing,
)
from models.diffusion.samplers import Sampler
from models.networks.packing import CaptionPacking
from models.networks.transformer import trimmed_length

EMBED_RMS = 0.5375  # the paper's 17.2 / sqrt(1024): RMS of ImageNet's pixels in [-1, 1]


@dataclass(frozen=True, kw_only=True)
class PriorText:
    """A caption as a prior's input.

    text_embed: z_t, float [B, E], unit norm; text: CLIP's token states, float [B, L, W], or the
    prior's own tokens, int [B, L]; token_mask: bool [B, L], True = keep.
    """

    text_embed: Tensor
    text: Tensor
    token_mask: Tensor

    def trimmed(self) -> "PriorText":
        """Return the same captions without the columns that are padding in every row.

        Most captions fill a fifth of 77 tokens. Lengths are multiples of `TRIM_MULTIPLE`, so that a
        compiled network sees few.
        """
        length = trimmed_length(self.token_mask)
        return replace(self, text=self.text[:, :length], token_mask=self.token_mask[:, :length])


@dataclass(frozen=True, kw_only=True)
class PackedText:
    """Captions as a prior's input in training, without padding.

    text_embed: z_t, float [B, E], unit norm; text: CLIP's token states, float [S, W], or the
    prior's own tokens, int [S], of the captions that `packing` has not dropped; packing: from the
    prior's own `pack`.
    """

    text_embed: Tensor
    text: Tensor
    packing: CaptionPacking


@dataclass(frozen=True, kw_only=True)
class PriorSampling:
    """How to sample a prior; each field applies to the priors that have it.

    sampler, sample_steps, spacing, best_of: diffusion; temperature, top_share, mean_of:
    autoregressive; cfg_scale: both. sampler: one of `SAMPLERS`, `analytic_ddpm` is the paper's.
    temperature 0 draws nothing, see `AutoregressivePrior.sample_codes`. mean_of: number of draws to
    average, an estimate of E[z_i | caption]: nearer to z_i than a draw, and less varied.
    """

    sampler: Sampler
    sample_steps: int = 16
    spacing: Spacing = "trailing"
    best_of: int = 2
    cfg_scale: float = 1.0
    temperature: float = 1.0
    top_share: float = 0.5
    mean_of: int = 1


class Prior(Protocol):
    """From a caption to image embeddings."""

    embed_dim: int
    config: DiffusionPriorConfig | AutoregressivePriorConfig | RegressionPriorConfig

    def pack(self, lengths: Tensor, keys: Tensor) -> CaptionPacking:
        """Return how captions of `lengths` int64 [B] are packed for `losses` under sample `keys`
        int64 [B], all on the CPU."""
        ...

    def losses(
        self, keys: Tensor, image_embed: Tensor, text: PriorText | PackedText
    ) -> dict[str, Tensor]:
        """Return {"loss": [B], other scores: [B]} of image_embed [B, E]; all randomness comes from
        the sample `keys` int64 [B]. Packed or padded, the losses are the same."""
        ...

    def sample(self, keys: Tensor, text: PriorText, options: PriorSampling) -> Tensor:
        """Draw z_i [B, E], unit norm; or z_i with k tokens, [B, 1 + k, E]."""
        ...


def vector_of(z: Tensor) -> Tensor:
    """Return the embedding alone, [B, E], of z_i [B, E] or z_i with tokens [B, 1 + k, E]."""
    return z if z.ndim == 2 else z[:, 0]


class EmbedScale(nn.Module):
    """The units in which a network sees embeddings: x = (z - mean) / std, saved with the weights.

    As built, one scale for all dimensions, with which a unit vector has the paper's norm.
    """

    mean: Tensor
    std: Tensor
    spectrum: Tensor  # [E], eigenvalues of the covariance of x

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("std", torch.full((embed_dim,), 1 / (EMBED_RMS * embed_dim**0.5)))
        self.register_buffer("spectrum", torch.full((embed_dim,), EMBED_RMS**2))

    def set(self, mean: Tensor, std: Tensor) -> None:
        """Whiten each dimension with the data's mean and standard deviation, both [E]."""
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-6))

    def set_spectrum(self, covariance: Tensor) -> None:
        """Set the covariance of z, [E, E]: its eigenvalues in units of x give Analytic-DPM's
        variances."""
        std = self.std.double()
        self.spectrum.copy_(torch.linalg.eigvalsh(covariance.double() / std / std[:, None]))

    def forward(self, z: Tensor) -> Tensor:
        """Map embeddings z [..., E] to x [..., E]."""
        return (z - self.mean) / self.std

    def restore(self, x: Tensor, *, unit_norm: bool = True) -> Tensor:
        """Map x [..., E] back to embeddings z [..., E], by default on the unit sphere."""
        z = x * self.std + self.mean
        return F.normalize(z, dim=-1) if unit_norm else z
