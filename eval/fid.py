"""The evaluation job: how far generated images are from real ones, and how well they fit their
captions.

    python eval/fid.py --real data/test/images --fake samples --clip runs/clip
    python eval/fid.py --real photos/ --fake samples --features inception inception_clean \\
        --weights-dir weights/ --num-workers 4
    python eval/fid.py --real data/test/images --model runs/demo --captions prompts.txt \\
        --fake samples --judge ViT-B-32:open_clip_pytorch_model.safetensors
    python eval/fid.py --protocol shapes --model runs/demo --fake samples
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction

from cluster.base.cli import DONE, parse, require_at_least, require_local, run_script

if TYPE_CHECKING:
    from eval.evaluation import Evaluation
    from eval.sampling.sample_job import Model

Space = Literal["clip", "inception", "inception_clean", "dinov2"]


@dataclass(frozen=True, kw_only=True)
class FidConfig:
    """Every score is written with its features and its number of images."""

    real: str = "data/images"
    """real images: committed shards, a folder, or statistics: an npz, or a folder of them"""
    fake: str = "samples"
    """generated images: a folder of eval/sample.py, or any of those; with --captions or a model for
    --protocol, where they are drawn"""
    features: tuple[Space, ...] = ()
    """spaces of the distances; FID proper is inception's; empty = the protocol's, or clip"""
    image_size: int = 0
    """crop the centre square of all images and resize it to this side in px; 0 = as they are"""
    weights_dir: str = ""
    """folder of published weights; empty = that of MINIDALLE2_WEIGHTS; nothing is ever
    downloaded"""
    inception_weights: str = ""
    """other weights of the Inception, whose digest the score is then named after"""
    inception_sha256: str = ""
    """their sha256"""
    dinov2_weights: str = ""
    """other weights of DINOv2, whose digest the score is then named after"""
    dinov2_sha256: str = ""
    """their sha256"""
    dinov2_model: str = "vit_large_patch14_dinov2"
    """size of DINOv2, as timm calls it"""
    clip: str = ""
    """encoder of CLIP features and of the CLIP score; empty = runs/clip for --features clip, and no
    CLIP score for others"""
    judge: str = ""
    """another CLIP to score with than the model was trained on; goes before --clip"""
    embeds: str = ""
    """embeddings of the real images: adds the scores of CLIP and, with --prior, of the chain"""
    train: str = ""
    """images that the model was trained on: adds nearest training neighbours"""
    prior: str = ""
    """finished prior, for its own scores and the ablation, with --embeds; to draw, with --captions
    or --protocol"""
    decoder: str = ""
    """finished base decoder, for the ablation and to draw; with --prior"""
    upsampler: Annotated[tuple[str, ...], UseAppendAction] = ()
    """finished upsampler; repeatable; with --decoder"""
    model: str = ""
    """folder with the runs prior, base and up..., in place of the three"""
    captions: str = ""
    """draw these into --fake first: a text file, a caption a line (T2I-CompBench's); JSON lines
    with a prompt each (GenEval's); or image shards"""
    limit: int = 0
    """draw only the first captions; 0 = all"""
    seed: int | None = None
    """of the noise of what is drawn; none = the protocol's, or 0"""
    sampling: str = ""
    """how to draw: a JSON file of eval/sample.py's options, or a settings.json of its samples;
    empty = its defaults"""
    protocol: str = ""
    """coco30k, shapes, emoji or a JSON file: says captions, real images, size and seed"""
    protocol_data: str = ""
    """folder of the protocol's data; empty = where it says"""
    num_resamples: int = 50
    """bootstrap resamples of the generated images, for an interval; 0 = none"""
    save_statistics: str = ""
    """folder to write the statistics of the real images to, an npz a space"""
    features_dir: str = ""
    """folder of features, by which a rerun continues; empty = one beside --out"""
    num_workers: int = 0
    """Ray actors that draw and extract; 0 = this process; no number of them changes a score"""
    out: str = "eval.json"
    """file of the scores"""
    device: str = "auto"
    """auto: a GPU where there is one; cpu, cuda or cuda:N"""
    num_threads: int = 2
    """threads on the CPU, of each worker"""
    metrics_port: int | None = None
    """serve Prometheus metrics on this loopback port; 0 = any free one"""
    fresh: bool = False
    """delete earlier features, and samples where they are drawn, instead of continuing"""


def main(config: FidConfig) -> int:
    """Draw and score, print and write what was asked for."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # weights are never downloaded here
    import torch

    from cluster.base.metrics import serve

    require_local("--out", config.out)
    require_local("--features-dir", config.features_dir)
    require_local("--save-statistics", config.save_statistics)
    model = _checked(config)
    if model.decoder:  # what it draws goes there
        require_local("--fake", config.fake)
    serve(config.metrics_port)
    torch.set_num_threads(config.num_threads)
    evaluation = _evaluation(config, model)
    scores = evaluation.scores(config.embeds)
    if config.save_statistics:
        evaluation.save_statistics(Path(config.save_statistics))
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(scores, indent=1))
    part.replace(out)
    _show(scores)
    return DONE


def _checked(config: FidConfig) -> "Model":
    """Return the runs that draw, once the request makes sense."""
    model = _model(config)
    _require_together(config, model)
    return model


def _model(config: FidConfig) -> "Model":
    """Return the runs that draw, from --model or one by one."""
    from eval.sampling.sample_job import Model, model_in

    if not config.model:
        return Model(prior=config.prior, decoder=config.decoder, upsampler=config.upsampler)
    if config.prior or config.decoder or config.upsampler:
        raise ValueError("--model: found it with --prior, --decoder or --upsampler, expected one")
    return model_in(Path(config.model))


def _require_together(config: FidConfig, model: "Model") -> None:
    """Refuse an option that would do nothing without another."""
    drawing = config.captions or config.protocol
    for name, other, there in (
        ("upsampler", "--decoder", model.decoder),
        ("decoder", "--prior", model.prior),
        ("prior", "--embeds, --captions or --protocol", config.embeds or drawing),
    ):
        if getattr(model, name) and not there:
            raise ValueError(
                f"--{name}: found it without {other}, expected both; add {other} or leave out "
                f"--{name}"
            )
    if config.captions and not model.decoder:
        raise ValueError("--captions: found it without --model, expected what is to draw them")
    if config.captions and config.protocol:
        raise ValueError("--captions: found it with --protocol, which has its own, expected one")
    if config.protocol and config.limit:
        raise ValueError(
            f"--limit: found {config.limit} with --protocol, which says how many, expected 0; "
            "--captions draws fewer"
        )
    for name in ("limit", "seed", "sampling"):
        if getattr(config, name) and not (drawing and model.decoder):
            raise ValueError(f"--{name}: found it without anything to draw; leave it out")
    require_at_least(config, limit=0, num_threads=1, num_workers=0)
    if config.protocol_data and not config.protocol:
        raise ValueError("--protocol-data: found it without --protocol, expected both")
    if config.num_resamples < 0 or config.num_resamples == 1:
        raise ValueError(f"--num-resamples: found {config.num_resamples}, expected 0, 2 or more")


def _evaluation(config: FidConfig, model: "Model") -> "Evaluation":
    """Draw what is to be drawn, open both sides and describe the extractors."""
    from eval.evaluation import EvalRequest, Evaluation, Weights
    from eval.features.actor_pool import Place, Workers

    out = Path(config.out)
    folder = Path(config.features_dir or out.with_name(f"{out.stem}_features")).absolute()
    workers = Workers(
        number=config.num_workers, num_threads=config.num_threads, device=config.device
    )
    request = EvalRequest(
        real=config.real,
        fake=config.fake,
        captions=config.captions,
        limit=config.limit,
        protocol=config.protocol,
        protocol_data=config.protocol_data,
        sampling=config.sampling,
        seed=config.seed,
        image_size=config.image_size,
        fresh=config.fresh,
    )
    weights = Weights(
        folder=config.weights_dir,
        inception=(config.inception_weights, config.inception_sha256),
        dinov2=(config.dinov2_weights, config.dinov2_sha256),
        dinov2_model=config.dinov2_model,
    )
    return Evaluation.opened(
        request, model, Place(folder=folder, workers=workers), weights=weights,
        spaces=config.features, clip=config.judge or config.clip, train=config.train,
        num_resamples=config.num_resamples,
    )  # fmt: skip


def _show(scores: dict[str, Any]) -> None:
    """Print the numbers as a table and hand them to the metrics."""
    from rich.console import Console
    from rich.table import Table

    from cluster.base.metrics import SCORES, gauge
    from eval.html_report.formats import flatten

    table = Table("score", "value")
    found = flatten({name: part for name, part in scores.items() if name != "sampling"})
    for name, value in found.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
    for name, value in found.items():
        if name in SCORES and value is not None:
            gauge("minidalle2_eval_score").set(value, metric=name)
    gauge("minidalle2_eval_timestamp_seconds").set(time.time(), of="chain")


if __name__ == "__main__":
    run_script(lambda: main(parse(FidConfig, check=_checked)))
