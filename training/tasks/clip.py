"""What training/clip.py trains: a CLIP, its contrastive objective and its data."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from open_clip import CLIP
from torch import Tensor

from cluster.base.files import Json
from models.clip import (
    MAX_LOGIT_SCALE,
    PIXEL_MEAN,
    PIXEL_STD,
    ImageTower,
    build_clip,
    model_options,
    model_sizes,
    normalise_pixels,
)
from models.convert.efficientnet import IDENTITY
from models.convert.runs import load_clip
from models.diffusion import keyed_random
from models.diffusion.losses import bounded, contrastive
from models.networks.transformer import attention_kernels
from models.tokenizers import tokenizer
from training.config import ClipRunConfig
from training.data.dataloader import Batch
from training.data.datasets import ColumnDataset, ImageDataset
from training.data.inputs import gathered, local_alone, mixed, part_of, pin_snapshots
from training.engine.precision import autocast
from training.engine.sam import perturbed
from training.loop import Task, no_context

Gathered = Callable[[Tensor], tuple[Tensor, slice]]


def clip_model(config: ClipRunConfig) -> CLIP:
    """Build the CLIP."""
    return build_clip(config.model, config.image_tower)


def build_clip_task(config: ClipRunConfig) -> Task:
    """Return the task of training a CLIP."""
    if config.train.most_micro_batches > 1:
        raise ValueError(
            f"train.micro_batch_size: found {config.train.batch.micro_batch_size}, expected 0: "
            "CLIP contrasts all samples of a step with each other"
        )
    model = clip_model(config)
    if config.init:
        copy_weights(model, config.init)
    export = {"kind": "clip", "model": dataclasses.asdict(config.model)}
    if config.image_tower:
        export |= {"image_tower": config.image_tower, "image_tower_identity": IDENTITY}
    return Task(
        model=model,
        objective=clip_objective,
        build_dataset=partial(clip_dataset, config, *model_sizes(model)),
        export=export,
        block_size=config.block_size,
        grad_context=partial(sharpness_aware, config) if config.sam_rho else no_context,
    )


def clip_objective(model: Any, batch: Batch, gather: Gathered = gathered) -> dict[str, Tensor]:
    """Contrast every image of the global batch with every other caption; returns loss [B] and
    accuracy [B].

    gather: adds the other workers' rows, and says which are this one's.
    """
    with attention_kernels(batch.keys):
        image = batch["image"]  # pixels, or a frozen tower's features
        image = normalise_pixels(image) if image.ndim == 4 else image
        image, rows = gather(model.encode_image(image, normalize=True))
        text, _ = gather(model.encode_text(batch["tokens"].long(), normalize=True))
    scale = bounded(model.logit_scale, math.log(MAX_LOGIT_SCALE)).exp()
    keep = gather(batch.weight)[0] > 0
    captions = gather(keyed_random.row_hashes(batch["tokens"]))[0]
    # A caption that comes twice in a batch fits both images: neither is a negative of the other.
    # Two captions of one meaning are known for the same by their words alone.
    negative = keep[rows, None] & keep & (captions[rows, None] != captions)
    loss, accuracy = contrastive(image, text, scale, negative, rows)
    return {"loss": loss, "accuracy": accuracy.detach()}


def clip_dataset(config: ClipRunConfig, image_size: int, context_length: int) -> ColumnDataset:
    """Read images, or what a frozen tower makes of them, and their captions' tokens."""
    encode = ImageTower(1).features if config.image_tower else None
    tokenize = tokenizer(context_length, config.model.vocab_size)
    threads = config.num_decode_threads
    captions = config.data.caption_weights()
    data_sets = [
        ImageDataset(
            part_of(snapshot, config.part), image_size, threads, tokenize, captions, encode
        )
        for snapshot in pin_snapshots(config.run, "images", config.images)
    ]
    return mixed(data_sets, config.data.weights)


def sharpness_aware(
    config: ClipRunConfig, model: Any, batches: list[Batch]
) -> AbstractContextManager:
    """Perturb this worker's weights by some of its samples, contrasted among themselves."""
    device = next(model.parameters()).device
    part = batches[0].part(config.sam_batch_size).to(device)

    def loss() -> Tensor:
        with autocast(device.type, config.train.workers.precision):
            losses = clip_objective(model, part, local_alone)["loss"]
        return (losses * part.weight).sum() / part.weight.sum().clamp(min=1)

    return perturbed(model, loss, config.sam_rho)


def copy_weights(model: CLIP, spec: str) -> None:
    """Take over the weights of another CLIP; ValueError naming the first tensor that differs, or
    the first option that shapes do not tell."""
    other = load_clip(spec)
    state = dict(other.clip.state_dict())
    state["logit_scale"] = state["logit_scale"].reshape(1)  # see build_clip

    def facts(weights: dict[str, Tensor], options: Json, pixels: object) -> Json:
        tensors = {f"tensor {name}": list(value.shape) for name, value in weights.items()}
        return {**tensors, **options, "mean and deviation of pixels": pixels}

    pixels = (other.pixel_mean, other.pixel_std)
    theirs = facts(state, model_options(other.clip), pixels)
    tower = model.visual
    statistics = (PIXEL_MEAN, PIXEL_STD)
    if isinstance(tower, ImageTower):
        statistics = (tower.image_mean, tower.image_std)
    ours = facts(model.state_dict(), model_options(model), statistics)
    for name in dict.fromkeys([*theirs, *ours]):
        old, new = theirs.get(name, "none"), ours.get(name, "none")
        if old != new:
            raise ValueError(
                f"init: {spec}: {name}: found {old}, expected {new}; pass the sizes, or the "
                "--model.architecture, of those weights"
            )
    model.load_state_dict(state)
