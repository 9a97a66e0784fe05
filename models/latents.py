"""Operations on an image's two latents: z_i, its CLIP embedding, and x_T, all else (Ramesh et al.
2022, section 3).

    encode           image -> (z_i, x_T), x_T by inverting DDIM under z_i
    reconstructions  (z_i, x_T) -> image, by DDIM; with eta > 0 its variations (figure 3)
    blends           between two images, by slerp of both latents or of z_i alone (figure 4)
    text_diffs       from an image toward what one caption says beyond another (figure 5)
    pca_images       z_i from its first principal components alone (figure 7)

All use z_i without a caption, which would describe the original image, and with its tokens where
the decoder reads them, but for text diffs and principal components, which turn z_i alone. Images
are the base decoder's, [B, 3, S, S] in [-1, 1]; `UnClip.upsample` enlarges them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.clip import preprocess
from models.diffusion.samplers import ddim
from models.priors.base import vector_of
from models.unclip import Sampling, UnClip

PARALLEL = 1e-4  # sine of the angle below which two vectors count as parallel


@dataclass(frozen=True, kw_only=True)
class Latents:
    """The latents of B images. image_embed: z_i, [B, E], or with tokens [B, 1 + k, E]; start: x_T,
    [B, 3, S, S]."""

    image_embed: Tensor
    start: Tensor

    def __len__(self) -> int:
        return len(self.image_embed)

    def with_embeds(self, image_embed: Tensor) -> "Latents":
        """Return several z_i [B, E] over the x_T of one image."""
        start = self.start.expand(len(image_embed), -1, -1, -1)
        return Latents(image_embed=image_embed, start=start)

    def row(self, number: int) -> "Latents":
        """Return those of one image, B = 1."""
        row = slice(number, number + 1)
        return Latents(image_embed=self.image_embed[row], start=self.start[row])


def pixels_of(images: Sequence[Image.Image], size: int) -> Tensor:
    """Return pictures as the base decoder's images: [B, 3, size, size] in [-1, 1]."""
    stacked = torch.stack([torch.from_numpy(preprocess(image, size)) for image in images])
    return stacked.float() / 127.5 - 1


def embed_images(chain: UnClip, images: Sequence[Image.Image]) -> Tensor:
    """Return z_i [B, E] of pictures, by the chain's encoder, with the tokens that its decoder reads
    [B, 1 + k, E]."""
    stacked = [torch.from_numpy(chain.clip.preprocess(image)) for image in images]
    return chain.clip.encode_image(torch.stack(stacked), chain.base.config.image_tokens)


def encode(
    chain: UnClip, images: Sequence[Image.Image], sampling: Sampling, *, with_tokens: bool = True
) -> Latents:
    """Return both latents of B pictures, by inverting DDIM with `sampling.decoder`'s steps.

    with_tokens: keep the tokens that the decoder reads; without them x_T is that of z_i alone, as
    for edits that turn it.
    """
    image_embed = embed_images(chain, images)
    if not with_tokens:
        image_embed = vector_of(image_embed)
    image = pixels_of(images, chain.base.image_size).to(chain.device)
    condition, options = chain.condition(None, image_embed), sampling.decoder
    with sampling.autocast(image_embed):
        start = chain.base.invert(image, condition, options.sample_steps, options.spacing)
    return Latents(image_embed=image_embed, start=start)


def reconstructions(
    chain: UnClip, keys: Tensor, latents: Latents, sampling: Sampling, eta: float = 0.0
) -> Tensor:
    """Draw images [B, 3, S, S] of latents by DDIM, unguided; keys: int64 [B].

    At eta = 0 they are the encoded images, as well as the decoder can; eta > 0 varies what z_i
    does not determine.
    """
    plain = replace(sampling.decoder, sampler=ddim(eta), cfg_scale=1.0)
    plain = replace(sampling, decoder=plain)
    return chain.sample_base(
        keys, chain.condition(None, latents.image_embed), plain, start=latents.start
    )


def slerp(a: Tensor, b: Tensor, theta: float) -> Tensor:
    """Return the point `theta` in [0, 1] of the way from a to b [B, ...] on their great circle.

    sin((1 - theta) w) / sin(w) a + sin(theta w) / sin(w) b, w the angle between them (Shoemake
    1985); a straight line where they are parallel. The ends are a and b, whatever their norms.
    """
    flat = a.flatten(1).double(), b.flatten(1).double()
    cosine = F.cosine_similarity(*flat, dim=1).clamp(-1, 1)
    angle = cosine.acos().reshape(-1, *[1] * (a.ndim - 1))
    sine = angle.sin()
    near = sine < PARALLEL
    safe = torch.where(near, 1.0, sine)
    of_a = torch.where(near, 1 - theta, ((1 - theta) * angle).sin() / safe)
    of_b = torch.where(near, theta, (theta * angle).sin() / safe)
    return (of_a * a + of_b * b).to(a.dtype)


def blends(a: Latents, b: Latents, thetas: Sequence[float], *, noise: bool) -> Latents:
    """Return the latents between two images a and b, one row for each theta in [0, 1].

    noise: blend x_T as well, so that both ends are the images; otherwise all rows have a's.
    """
    shape = a.image_embed.shape  # each token turns on its own circle
    ends = a.image_embed.flatten(0, -2), b.image_embed.flatten(0, -2)
    embeds = [slerp(*ends, theta).reshape(shape) for theta in thetas]
    starts = [slerp(a.start, b.start, theta) if noise else a.start for theta in thetas]
    return Latents(image_embed=torch.cat(embeds), start=torch.cat(starts))


def text_diffs(
    chain: UnClip, latents: Latents, caption: str, without: str, thetas: Sequence[float]
) -> Latents:
    """Return one image's latents turned toward `caption` and away from `without`.

    z_d = norm(z_t - z_t0), z = slerp(z_i, z_d, theta); the paper's theta ends between .25 and .5.
    latents: of one image, encoded without tokens. without: a caption of the image as it is, or a
    plain one; empty for none (z_t0 = 0). Returns one row for each theta. Raises ValueError for
    captions that the encoder maps to the same embedding: there is no direction.
    """
    embed = chain.encode_captions([caption, without])[1]
    difference = embed[:1] - (embed[1:] if without else 0)
    if difference.norm() < 1e-5 * embed[:1].norm():
        raise ValueError(
            f"text diff: found {caption!r} and {without!r}, which are the same to the encoder, "
            "expected captions that differ"
        )
    z = vector_of(latents.image_embed)
    length = z.norm(dim=1, keepdim=True)  # 1, but for an encoder that keeps it
    toward = F.normalize(difference, dim=1) * length
    turned = [slerp(z, toward, theta) for theta in thetas]
    return latents.with_embeds(torch.cat(turned))


def pca_images(
    latents: Latents, mean: Tensor, basis: Tensor, num_components: Sequence[int]
) -> Latents:
    """Return one image's latents with z_i from its first principal components alone.

    mean: [E] and basis: [E, E], columns by falling eigenvalue, of the embeddings that the decoder
    was trained on.
    """
    z = vector_of(latents.image_embed)
    mean, basis = mean.to(z), basis.to(z)
    y = (z - mean) @ basis  # [1, E]
    kept = [mean + y[:, :count] @ basis[:, :count].T for count in num_components]
    length = z.norm(dim=1, keepdim=True)  # 1, but for an encoder that keeps it
    return latents.with_embeds(F.normalize(torch.cat(kept), dim=1) * length)
