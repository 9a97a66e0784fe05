"""What embeddings and a trained chain add to an evaluation: the CLIP's own scores, the prior's, and
the ablation of the chain's parts."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from eval.sampling.chain import chain_weights, load_chain
from eval.sampling.generate import sampling_of
from eval.sampling.image_source import ImageSet
from eval.sampling.sample_job import Model
from eval.scores.scorecard import (
    ablation,
    caption_scores,
    clip_scores,
    is_drawn,
    prior_scores,
    read_embeds,
    shape_scores,
)
from models.clip import FrozenClip
from training.tasks.pictures import grid, save_png


def chain_scores(
    embeds: str, model: Model, fake: ImageSet, encoder: FrozenClip | None, device: str
) -> dict[str, Any]:
    """Score the CLIP on the embeddings, the prior where there is one, and the ablation where the
    fake images are the chain's for these captions.

    encoder: the judge of an ablation on captions that are not drawn ones.
    """
    captions, image, text = read_embeds(embeds)
    scores: dict[str, Any] = {"clip": clip_scores(captions, image, text)}
    if not model.prior:
        return scores
    parts = ("", model.prior, model.decoder, model.upsampler)
    chain = load_chain(*parts, guide=fake.settings.get("guide", ""), device=device)
    scores["prior"] = prior_scores(chain, captions, image, text, sampling_of(fake.settings))
    if not model.decoder:
        return scores
    drawn = is_drawn(captions)
    if encoder is None and not drawn:
        print("ablation: left out: no --clip to judge it")
        return scores
    if not _drew(model, fake, captions):
        print(
            f"ablation: left out: {fake.source} are not the samples of --prior, --decoder and "
            "--upsampler as they are now, for all captions of --embeds"
        )
        return scores

    def judge(images: Any) -> dict[str, Any]:
        if drawn or encoder is None:
            return shape_scores(captions, images)
        return caption_scores(map(Image.fromarray, images), captions, encoder)

    step = max(1, len(captions) // 8)
    shown = range(0, len(captions), step)[:8]
    scores["ablation"], images = ablation(chain, (captions, image, text), fake, judge, shown)
    _ablation_grid(fake.paths[0].parent, [captions[i] for i in shown], images)
    return scores


def _drew(model: Model, fake: ImageSet, captions: list[str]) -> bool:
    """Say whether the chain that is given, as it is trained now, drew `fake` for these captions."""
    guide = fake.settings.get("guide", "")
    weights = chain_weights(model.prior, model.decoder, model.upsampler, guide)
    return fake.captions == captions and weights.items() <= fake.settings.items()


def _ablation_grid(folder: Path, captions: list[str], images: dict[str, Any]) -> None:
    """Write ablation.png, and ablation.json with its captions, beside the samples."""
    rows = [list(each) for each in images.values()]
    save_png(folder / "ablation.png", grid(rows, list(images), []))
    (folder / "ablation.json").write_text(json.dumps(captions))
