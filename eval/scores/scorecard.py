"""Scores of a chain on held-out captions: of its CLIP, its prior, its images, and with parts
exchanged."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cluster.base.files import digest_of
from eval.features.extractors import clip_features, extract, in_batches
from eval.html_report.formats import CAPTIONS_KEY, Scores
from eval.sampling.chain import Model, chain_weights
from eval.sampling.generate import caption_keys, render_all, sampling_of
from eval.sampling.image_source import ImageSet
from eval.scores.shapes import score, summarise
from ingest.shapes import is_held_out, parse
from ingest.shards import IMAGE_TOKENS, EmbedShard, load_snapshot, read_manifest
from models.clip import FrozenClip
from models.priors.base import vector_of
from models.scores import mean_cosine, prior_scorecard, retrieval_at_k, shuffled_cosine
from models.unclip import Sampling, UnClip
from training.tasks.pictures import grid, save_png

BATCH_SIZE = 100  # captions at once
NUM_SHOWN = 8  # columns of ablation.png


def read_embeds(root: str, num_tokens: int = 1) -> tuple[list[str], Tensor, Tensor]:
    """Return captions, image_embed [N, E] and text_embed [N, E] of the latest snapshot.

    num_tokens: k > 1 for image_embed [N, 1 + k, E]; ValueError where there are not as many tokens.
    """
    found, entries = read_manifest(root).get(IMAGE_TOKENS, 1), load_snapshot(root).shards
    if num_tokens not in (1, found):
        raise ValueError(f"{root}: found {found} image tokens, expected {num_tokens}")
    shards = [
        EmbedShard(root, e.name, digest=e.digest, image_tokens=num_tokens > 1) for e in entries
    ]
    captions = [caption for shard in shards for caption in shard.captions]
    image, text = (
        torch.from_numpy(np.concatenate([np.asarray(e) for e in embeds]).astype(np.float32))
        for embeds in ([s.image_embed for s in shards], [s.text_embed for s in shards])
    )
    if num_tokens > 1:
        tokens = np.concatenate([shard.image_tokens for shard in shards]).astype(np.float32)
        image = torch.cat([image[:, None], torch.from_numpy(tokens)], dim=1)
    return captions, image, text


def is_drawn(captions: list[str]) -> bool:
    """Return whether every caption is one of the drawn set's."""
    try:
        return bool(captions) and all(parse(caption) for caption in captions)
    except ValueError:
        return False


def meaning(caption: str) -> str:
    """Return what a drawn caption means, equal for all its phrasings; another caption itself."""
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


def clip_scores(captions: list[str], image: Tensor, text: Tensor) -> Scores:
    """Score an encoder by retrieval: the share of captions whose nearest image is theirs."""
    meanings = [meaning(caption) for caption in captions]
    return {
        "retrieval_at_1": retrieval_at_k(text, image, meanings),
        "n": len(captions),
        CAPTIONS_KEY: digest_of(captions),
    }


def prior_scores(
    chain: UnClip, captions: list[str], image: Tensor, text: Tensor, sampling: Sampling
) -> Scores:
    """Compare the prior's draws with the true image and text embeddings [N, E] of `captions`."""
    keys = caption_keys(captions, 0).split(BATCH_SIZE)
    batches = zip(keys, in_batches(captions, BATCH_SIZE), strict=True)
    drawn = torch.cat([
        vector_of(chain.sample_prior(key, batch, sampling)).cpu() for key, batch in batches
    ])  # fmt: skip
    scores = prior_scorecard(drawn, image, text, [meaning(caption) for caption in captions])
    return {**scores, CAPTIONS_KEY: digest_of(captions)}


def shape_scores(captions: list[str], images: Iterable[np.ndarray]) -> dict[str, Scores]:
    """Score drawings, uint8 [H, W, 3] each, against their captions: {set: `summarise`'s scores}.

    Squares of another size, such as a base decoder's own, are resized to the scorer's 64 px:
    drawings that went through 32 px are read as well as others.
    """
    scores: dict[str, list] = {}
    for caption, image in zip(captions, images, strict=True):
        if image.shape[0] == image.shape[1] != 64:
            small = Image.fromarray(image)
            image = np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC))
        scores.setdefault(shape_set(caption), []).append(score(image, caption))
    summaries = {name: dict(summarise(of_set)) for name, of_set in scores.items()}
    if "single" in summaries:
        summaries["single"].pop("relation", None)
    return summaries


def shapes_with_real(fake: ImageSet, real: ImageSet) -> dict[str, Scores]:
    """Return `shape_scores` of `fake`, with the score `all` of true drawings as `real`.

    `real` is None for a set of which there is no true drawing.
    """
    scores = shape_scores(fake.captions, map(np.asarray, fake))
    truth = shape_scores(real.captions, map(np.asarray, real))
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
    """Return `embed_scores` of images whose embeddings are not known yet."""
    return embed_scores(extract(partial(clip_features, encoder), images), captions, encoder)


def embed_scores(
    image_embed: np.ndarray, captions: list[str], encoder: FrozenClip
) -> dict[str, float]:
    """Return the CLIP score, the mean cosine of image [N, E] and caption, and that of wrong pairs.

    CLIPScore of Hessel et al. 2021, without its factor 2.5 and its clipping at 0.
    """
    image = torch.from_numpy(image_embed)
    text = torch.cat([
        encoder.encode_text(torch.from_numpy(encoder.tokenize(batch)))[0].cpu()
        for batch in in_batches(captions, BATCH_SIZE)
    ])  # fmt: skip
    return {
        "clip_score": mean_cosine(image, text),
        "clip_score_shuffled": shuffled_cosine(image, text),
    }


def ablation(
    chain: UnClip,
    embeds: tuple[list[str], Tensor, Tensor],
    samples: ImageSet,
    score_images: Callable[[np.ndarray], dict],
    shown: Sequence[int],
) -> tuple[Scores, dict[str, np.ndarray]]:
    """Decode the true image embedding and the text embedding in place of the prior's (Ramesh et
    al. 2022, section 5.1).

    embeds: as of `read_embeds`. samples: what the chain drew for these captions; the other variants
    are drawn in the same way. score_images: maps images uint8 [N, H, W, 3] to scores. Returns the
    scores of each variant, and its images at the rows `shown`; one variant is in memory at a time.
    """
    captions, image, text = embeds
    sampling, seed = sampling_of(samples.settings), samples.settings["seed"]
    variants = {
        "true_image_embed": partial(render_all, chain, captions, image, sampling, seed=seed),
        "prior": lambda: np.stack([np.asarray(each) for each in samples]),
        "text_embed": partial(render_all, chain, captions, text, sampling, seed=seed),
    }
    scores, images = {}, {}
    for name, draw in variants.items():
        print(f"ablation: {name}: {len(captions)} images", flush=True)
        drawn = draw()
        scores[name], images[name] = score_images(drawn), drawn[list(shown)]
    return scores, images


def chain_scores(
    embeds: str, model: Model, fake: ImageSet, encoder: FrozenClip | None, device: str
) -> Scores:
    """Score the CLIP on embeddings, and the prior and the ablation of a chain where there is one.

    The ablation needs `fake` to be the chain's samples for these captions. encoder: scores it where
    the captions are not drawn ones.
    """
    captions, image, text = read_embeds(embeds)
    scores: Scores = {"clip": clip_scores(captions, image, text)}
    if not model.prior:
        return scores
    guided = replace(model, guide=fake.settings.get("guide", ""))
    chain = guided.load(device)
    scores["prior"] = prior_scores(chain, captions, image, text, sampling_of(fake.settings))
    if not model.decoder:
        return scores
    drawn = is_drawn(captions)
    if encoder is None and not drawn:
        print("ablation: left out: no --clip to score it")
        return scores
    weights = chain_weights(*guided.runs)
    if fake.captions != captions or not weights.items() <= fake.settings.items():
        print(
            f"ablation: left out: {fake.source} are not the samples of --prior, --decoder and "
            "--upsampler as they are now, for all captions of --embeds"
        )
        return scores

    def score_images(images: np.ndarray) -> Scores:
        if drawn or encoder is None:
            return shape_scores(captions, images)
        return caption_scores(map(Image.fromarray, images), captions, encoder)

    try:
        image = read_embeds(embeds, chain.base.config.image_tokens)[1]
    except ValueError as error:
        print(f"ablation: left out: {error}")
        return scores
    shown = range(0, len(captions), max(1, len(captions) // NUM_SHOWN))[:NUM_SHOWN]
    scores["ablation"], images = ablation(chain, (captions, image, text), fake, score_images, shown)
    folder = fake.paths[0].parent
    rows = [list(row) for row in images.values()]
    save_png(folder / "ablation.png", grid(rows, list(images), []))
    (folder / "ablation.json").write_text(json.dumps([captions[i] for i in shown]))
    return scores
