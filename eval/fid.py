"""The evaluation job: how far generated images are from real ones, and how well they fit their
captions.

    python eval/fid.py --real data/test/images --fake samples --clip runs/clip
    python eval/fid.py --real photos/ --fake samples --features inception --weights-dir weights/
    python eval/fid.py --real data/test/images --fake samples --embeds data/test/embeds \\
        --prior runs/prior --decoder runs/base --upsampler runs/up256
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction

from cluster.cli import parse, run_script

if TYPE_CHECKING:
    from eval.samples import ImageSet
    from models.clip import FrozenClip

DEFAULT_CLIP = "runs/clip"
SMALL = 2049  # below this many images a 2048-dimensional covariance is singular


@dataclass(frozen=True, kw_only=True)
class FidConfig:
    """Every score is written with its features and its number of images."""

    real: str = "data/images"
    """real images: committed shards, or a folder"""
    fake: str = "samples"
    """generated images: a folder of eval/sample.py, or any folder of images"""
    features: Literal["clip", "inception"] = "clip"
    """space of the Frechet distance; FID proper is inception's"""
    weights_dir: str = ""
    """folder of the Inception weights; nothing is ever downloaded"""
    clip: str = ""
    """encoder of CLIP features and of the CLIP score; empty = runs/clip for --features clip, and no
    CLIP score for inception"""
    embeds: str = ""
    """embeddings of the real images: adds the scores of CLIP and, with --prior, of the chain"""
    prior: str = ""
    """finished prior, for its own scores and the ablation; with --embeds"""
    decoder: str = ""
    """finished base decoder, for the ablation; with --prior"""
    upsampler: Annotated[tuple[str, ...], UseAppendAction] = ()
    """finished upsampler; repeatable; with --decoder"""
    out: str = "eval.json"
    """file of the scores"""
    device: str = "auto"
    """auto: a GPU where there is one; cpu, cuda or cuda:N"""
    num_threads: int = 2
    """threads on the CPU"""
    metrics_port: int | None = None
    """serve Prometheus metrics on this loopback port; 0 = any free one"""


def main(config: FidConfig) -> int:
    """Score, print and write what was asked for."""
    import torch

    from cluster.metrics import serve
    from eval.chain import device_named
    from eval.samples import open_images
    from eval.scorecard import is_drawn, shapes_with_real
    from models.clip import load_clip

    _require_together(config)
    serve(config.metrics_port)
    torch.set_num_threads(config.num_threads)
    real, fake = open_images(config.real), open_images(config.fake)
    clip = config.clip or (DEFAULT_CLIP if config.features == "clip" else "")
    encoder = load_clip(clip).to(device_named(config.device)) if clip else None
    scores: dict[str, Any] = {"images": _image_scores(config, real, fake, encoder)}
    if is_drawn(fake.captions) and is_drawn(real.captions):
        scores["shapes"] = shapes_with_real(fake, real)
    if config.embeds:
        scores.update(_chain_scores(config, fake, encoder))
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(scores, indent=1))
    part.replace(out)
    _show(scores)
    return 0


def _require_together(config: FidConfig) -> None:
    """Refuse an option that would do nothing without another."""
    for name, other in (("upsampler", "decoder"), ("decoder", "prior"), ("prior", "embeds")):
        if getattr(config, name) and not getattr(config, other):
            raise ValueError(
                f"--{name}: found it without --{other}, expected both; add --{other} or leave out "
                f"--{name}"
            )


def _image_scores(
    config: FidConfig, real: "ImageSet", fake: "ImageSet", encoder: "FrozenClip | None"
) -> dict[str, Any]:
    """Return the Frechet distance, and the CLIP score where there are captions and an encoder."""
    from eval.chain import device_named
    from eval.features import ClipFeatures, InceptionFeatures
    from eval.scorecard import caption_scores, image_scores

    judge = None if encoder is None else ClipFeatures(encoder)
    if judge is None or config.features == "inception":
        if len(fake) < SMALL:
            print(f"warning: {len(fake)} images are too few to quote an FID; it takes {SMALL}")
        extractor = InceptionFeatures(Path(config.weights_dir), device_named(config.device))
        images = image_scores(real, fake, extractor)
    else:
        images = image_scores(real, fake, judge)
        for name in ("fd", "fd_real_halves"):
            images[name.replace("fd", "fd_clip")] = images.pop(name)
    if judge is not None:
        images["judge"] = judge.name
    if encoder is not None and fake.captions:
        images.update(caption_scores(fake, fake.captions, encoder))
    elif fake.captions:
        print("clip_score: left out: no --clip")
    return images


def _chain_scores(
    config: FidConfig, fake: "ImageSet", encoder: "FrozenClip | None"
) -> dict[str, Any]:
    """Score the CLIP on the embeddings, the prior where it is given, and the ablation where the
    fake images are the chain's for these captions."""
    from PIL import Image

    from eval.chain import load_chain
    from eval.generate import sampling_of
    from eval.scorecard import (
        ablation,
        caption_scores,
        clip_scores,
        is_drawn,
        prior_scores,
        read_embeds,
        shape_scores,
    )

    captions, image, text = read_embeds(config.embeds)
    scores: dict[str, Any] = {"clip": clip_scores(captions, image, text)}
    if not config.prior:
        return scores
    parts = ("", config.prior, config.decoder, config.upsampler)
    chain = load_chain(*parts, guide=fake.settings.get("guide", ""), device=config.device)
    scores["prior"] = prior_scores(chain, captions, image, text, sampling_of(fake.settings))
    if not config.decoder:
        return scores
    drawn = is_drawn(captions)
    if encoder is None and not drawn:
        print("ablation: left out: no --clip to judge it")
        return scores
    if not _drew(config, fake, captions):
        print(
            f"ablation: left out: {config.fake} are not the samples of --prior, --decoder and "
            "--upsampler as they are now, for all captions of --embeds"
        )
        return scores

    def judge(images: Any) -> dict[str, Any]:
        if drawn or encoder is None:
            return shape_scores(captions, images)
        return caption_scores(map(Image.fromarray, images), captions, encoder)

    scores["ablation"], images = ablation(chain, (captions, image, text), fake, judge)
    _ablation_grid(Path(config.fake), captions, images)
    return scores


def _drew(config: FidConfig, fake: "ImageSet", captions: list[str]) -> bool:
    """Say whether the chain that is given, as it is trained now, drew `fake` for these captions."""
    from eval.chain import chain_weights

    guide = fake.settings.get("guide", "")
    weights = chain_weights(config.prior, config.decoder, config.upsampler, guide)
    return fake.captions == captions and weights.items() <= fake.settings.items()


def _ablation_grid(folder: Path, captions: list[str], images: dict[str, Any]) -> None:
    """Write ablation.png, and ablation.json with its captions, beside the samples."""
    from training.pictures import grid, save_png

    step = max(1, len(captions) // 8)
    chosen = range(0, len(captions), step)[:8]
    rows = [[images[name][i] for i in chosen] for name in images]
    save_png(folder / "ablation.png", grid(rows, list(images), []))
    (folder / "ablation.json").write_text(json.dumps([captions[i] for i in chosen]))


def _show(scores: dict[str, Any]) -> None:
    """Print the scores as a table and hand them to the metrics."""
    from rich.console import Console
    from rich.table import Table

    from cluster.metrics import SCORES, gauge
    from eval.formats import flatten

    table = Table("score", "value")
    for name, value in flatten(scores).items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
    for name, value in flatten(scores).items():
        if name in SCORES and value is not None:
            gauge("minidalle2_eval_score").set(value, metric=name)
    gauge("minidalle2_eval_timestamp_seconds").set(time.time(), of="chain")


if __name__ == "__main__":
    run_script(lambda: main(parse(FidConfig)))
