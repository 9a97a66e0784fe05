"""The scores of a chain on held-out captions: of the prior alone, of its images, and with parts
exchanged."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cluster.base.files import digest_of
from eval.features.extractors import ClipFeatures, extract, in_batches
from eval.html_report.formats import CAPTIONS_KEY
from eval.sampling.generate import caption_keys, render_all, sampling_of
from eval.sampling.image_source import ImageSet
from eval.scores.shapes import score, summarise
from ingest.shapes import is_held_out, parse
from ingest.shards import EmbedShard, load_snapshot
from models.clip import FrozenClip
from models.scores import mean_cosine, prior_scorecard, retrieval_at_k, shuffled_cosine
from models.unclip import Sampling, UnClip

BATCH_SIZE = 100  # captions at once


def read_embeds(root: str) -> tuple[list[str], Tensor, Tensor]:
    """Return captions, image_embed [N, E] and text_embed [N, E] of the latest snapshot of
    `root`."""
    snapshot = load_snapshot(root)
    shards = [EmbedShard(root, entry.name, digest=entry.digest) for entry in snapshot.shards]
    captions = [caption for shard in shards for caption in shard.captions]
    arrays = [
        np.concatenate([np.asarray(getattr(s, part)) for s in shards])
        for part in ("image_embed", "text_embed")
    ]
    image, text = (torch.from_numpy(array.astype(np.float32)) for array in arrays)
    return captions, image, text


def is_drawn(captions: list[str]) -> bool:
    """Say whether every caption is one of the drawn set's."""
    try:
        return all(parse(caption) for caption in captions) and bool(captions)
    except ValueError:
        return False


def meaning(caption: str) -> str:
    """Name what a drawn caption says, so that its phrasings count as one; other captions are
    themselves."""
    try:
        scene = parse(caption)
    except ValueError:
        return caption
    return f"{scene.things} {scene.relation}"


def shape_set(caption: str) -> str:
    """Return "single", "seen" or "held_out" of a drawn caption."""
    scene = parse(caption)
    if len(scene.things) == 1:
        return "single"
    return "held_out" if is_held_out(scene) else "seen"


def clip_scores(captions: list[str], image: Tensor, text: Tensor) -> dict[str, Any]:
    """Score an encoder by retrieval: the share of captions whose nearest image is theirs."""
    meanings = [meaning(caption) for caption in captions]
    return {
        "retrieval_at_1": retrieval_at_k(text, image, meanings),
        "n": len(captions),
        CAPTIONS_KEY: digest_of(captions),
    }


def prior_scores(
    chain: UnClip, captions: list[str], image: Tensor, text: Tensor, sampling: Sampling
) -> dict[str, Any]:
    """Compare the prior's draws with the true image and text embeddings [N, E] of `captions`."""
    keys = caption_keys(captions, 0).split(BATCH_SIZE)
    parts = zip(keys, in_batches(captions, BATCH_SIZE), strict=True)
    drawn = torch.cat([chain.imagine(mine, part, sampling).cpu() for mine, part in parts])
    scores = prior_scorecard(drawn, image, text, [meaning(caption) for caption in captions])
    return {**scores, CAPTIONS_KEY: digest_of(captions)}


def shape_scores(captions: list[str], images: Iterable[np.ndarray]) -> dict[str, dict[str, Any]]:
    """Score drawings against their captions: {set: what `summarise` returns}.

    Squares of another size, such as a base decoder's own, are brought to the scorer's 64 px:
    drawings that went through 32 px are read as well as others.
    """
    found: dict[str, list] = {}
    for caption, image in zip(captions, images, strict=True):
        found.setdefault(shape_set(caption), []).append(score(_at_64_px(image), caption))
    summaries = {name: dict(summarise(scores)) for name, scores in found.items()}
    if "single" in summaries:
        summaries["single"].pop("relation", None)
    return summaries


def _at_64_px(image: np.ndarray) -> np.ndarray:
    if image.shape[0] != image.shape[1] or image.shape[0] == 64:
        return image
    return np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC))


def arrays(images: Iterable[Image.Image]) -> Iterable[np.ndarray]:
    return (np.asarray(image) for image in images)


def shapes_with_real(fake: ImageSet, real: ImageSet) -> dict[str, dict[str, Any]]:
    """Return `shape_scores` of `fake`, with the `all` that true drawings get beside it as `real`:
    None for a set that `real` has no drawing of."""
    scores = shape_scores(fake.captions, arrays(fake))
    truth = shape_scores(real.captions, arrays(real))
    captions: dict[str, list[str]] = {}
    for caption in fake.captions:
        captions.setdefault(shape_set(caption), []).append(caption)
    return {
        name: {
            **values,
            "real": truth.get(name, {}).get("all"),
            CAPTIONS_KEY: digest_of(captions[name]),
        }
        for name, values in scores.items()
    }


def caption_scores(
    images: Iterable[Image.Image], captions: list[str], encoder: FrozenClip
) -> dict[str, float]:
    """Return CLIP score, the mean cosine of image and caption, and the same over all wrong
    pairs."""
    return embed_scores(extract(ClipFeatures(encoder), images), captions, encoder)


def embed_scores(
    image_embed: np.ndarray, captions: list[str], encoder: FrozenClip
) -> dict[str, float]:
    """Return what `caption_scores` does, of image embeddings [N, E] that are known."""
    image = torch.from_numpy(image_embed)
    text = torch.cat([
        encoder.encode_text(torch.from_numpy(encoder.tokenize(part)))[0].cpu()
        for part in in_batches(captions, BATCH_SIZE)
    ])  # fmt: skip
    return {
        "clip_score": mean_cosine(image, text),
        "clip_score_shuffled": shuffled_cosine(image, text),
    }


def ablation(
    chain: UnClip,
    embeds: tuple[list[str], Tensor, Tensor],
    samples: ImageSet,
    judge: Callable[[np.ndarray], dict],
    shown: Sequence[int],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Decode the true image embedding and the text embedding in place of the prior's (Ramesh et
    al., 5.1).

    embeds: as of `read_embeds`. samples: what the chain drew for these captions; the others are
    drawn as they were. judge: maps images uint8 [N, H, W, 3] to scores. Returns the scores of each
    variant, and its images at the places `shown`; all images of one are held at a time.
    """
    captions, image, text = embeds
    sampling, seed = sampling_of(samples.settings), samples.settings["seed"]
    variants = {
        "true_image_embed": partial(render_all, chain, captions, image, sampling, seed=seed),
        "prior": lambda: np.stack(list(arrays(samples))),
        "text_embed": partial(render_all, chain, captions, text, sampling, seed=seed),
    }
    scores, images = {}, {}
    for name, draw in variants.items():
        print(f"ablation: {name}: {len(captions)} images", flush=True)
        found = draw()
        scores[name], images[name] = judge(found), found[list(shown)]
    return scores, images
