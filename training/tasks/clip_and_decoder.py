"""What each training script trains: model, objective and data, built anew in every worker."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from open_clip import CLIP
from torch import Tensor

from ingest.shards import Snapshot, load_snapshot
from models.clip import (
    MAX_LOGIT_SCALE,
    PIXEL_MEAN,
    PIXEL_STD,
    VOCAB_SIZE,
    FrozenClip,
    build_clip,
    load_clip,
    model_options,
    model_sizes,
    normalise_pixels,
    token_mask,
    tokenizer,
)
from models.decoder import Condition, Decoder, dropped_captions
from models.diffusion import keyed_random
from models.diffusion.losses import bounded, contrastive, require_weights
from models.networks.transformer import attention_kernels, trimmed_length
from models.upsampler import Upsampler
from training.config import ClipRunConfig, DecoderRunConfig
from training.data.dataloader import Batch
from training.data.datasets import ColumnDataset, ImageDataset, PairDataset
from training.data.inputs import (
    clip_of,
    encoder_of,
    gathered,
    mine_alone,
    mixed,
    part_of,
    pin_snapshots,
    start_from,
)
from training.engine.precision import autocast
from training.engine.sam import perturbed
from training.loop import Task, no_context
from training.runs.dry_run import encoder_sizes
from training.tasks.pictures import pixels
from training.tasks.validation import Validation

MIN_CROP = 16
Gathered = Callable[[Tensor], tuple[Tensor, slice]]

# -- CLIP ------------------------------------------------------------------------------------------


def clip_model(config: ClipRunConfig) -> CLIP:
    """Build the CLIP."""
    return build_clip(config.model)


def build_clip_task(config: ClipRunConfig) -> Task:
    """Describe the training of a CLIP."""
    model = clip_model(config)
    if config.init:
        _start_from(model, config.init)
    export = {"kind": "clip", "model": dataclasses.asdict(config.model)}
    if config.train.most_micro_batches > 1:
        raise ValueError(
            f"train.micro_batch_size: found {config.train.batch.micro_batch_size}, expected 0: "
            "CLIP contrasts all samples of a step with each other"
        )
    return Task(
        model=model,
        objective=clip_objective,
        build_dataset=partial(clip_dataset, config, *model_sizes(model)),
        export=export,
        block_size=config.block_size,
        grad_context=partial(_sam_context, config) if config.sam_rho else no_context,
    )


def _start_from(model: CLIP, spec: str) -> None:
    """Take over the weights of another CLIP; ValueError naming the first tensor that differs, or
    the first option that shapes do not tell."""
    other = load_clip(spec)
    state = dict(other.clip.state_dict())
    state["logit_scale"] = state["logit_scale"].reshape(1)  # see build_clip
    wanted = model.state_dict()
    shapes = [{name: list(value.shape) for name, value in each.items()} for each in (state, wanted)]
    _require_equal(spec, "tensor ", *shapes)
    options = [model_options(clip) for clip in (other.clip, model)]
    _require_equal(spec, "", *options)
    statistics = [{"pixels": value} for value in ((other.pixel_mean, other.pixel_std),
                                                  (PIXEL_MEAN, PIXEL_STD))]  # fmt: skip
    _require_equal(spec, "mean and deviation of ", *statistics)
    model.load_state_dict(state)


def _require_equal(spec: str, what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        theirs, ours = found.get(name, "none"), wanted.get(name, "none")
        if theirs != ours:
            raise ValueError(
                f"init: {spec}: {what}{name}: found {theirs}, expected {ours}; pass the sizes, or "
                "the --model.architecture, of those weights"
            )


def _sam_context(config: ClipRunConfig, model: Any, batches: list[Batch]) -> AbstractContextManager:
    """Perturb this worker's weights by some of its samples, contrasted among themselves."""
    device = next(model.parameters()).device
    part = batches[0].part(config.sam_batch_size).to(device)

    def loss() -> Tensor:
        with autocast(device.type, config.train.workers.precision):
            losses = clip_objective(model, part, mine_alone)["loss"]
        return (losses * part.weight).sum() / part.weight.sum().clamp(min=1)

    return perturbed(model, loss, config.sam_rho)


def clip_dataset(config: ClipRunConfig, image_size: int, context_length: int) -> ColumnDataset:
    """Read images and their captions' tokens."""
    tokenize = tokenizer(context_length, config.model.vocab_size)
    parts = [
        part_of(one, config.part) for one in pin_snapshots(config.run, "images", config.images)
    ]
    threads = config.data.num_threads
    data_sets = [ImageDataset(part, image_size, threads, tokenize) for part in parts]
    return mixed(data_sets, config.data.weights)


def clip_objective(model, batch: Batch, gathered: Gathered = gathered) -> dict[str, Tensor]:
    """Contrast every image of the global batch with every other caption.

    gathered: adds the other workers' rows, and says which are this one's.
    """
    with attention_kernels(batch.keys):
        image, mine = gathered(model.encode_image(normalise_pixels(batch["image"]), normalize=True))
        text, _ = gathered(model.encode_text(batch["tokens"].long(), normalize=True))
    scale = bounded(model.logit_scale, math.log(MAX_LOGIT_SCALE)).exp()
    keep = gathered(batch.weight)[0] > 0
    words = gathered(keyed_random.row_hashes(batch["tokens"]))[0]
    # A caption that comes twice in a batch fits both images: neither is a negative of the other.
    # Two captions of one meaning are known for the same by their words alone.
    negative = keep[mine, None] & keep & (words[mine, None] != words)
    loss, accuracy = contrastive(image, text, scale, negative, mine)
    return {"loss": loss, "accuracy": accuracy.detach()}


# -- decoder cascade -------------------------------------------------------------------------------


def decoder_model(
    config: DecoderRunConfig, sizes: dict[str, int] | None = None
) -> Decoder | Upsampler:
    """Build the model of one stage for an encoder of these sizes; None for that of its
    embeddings."""
    model: Decoder | Upsampler
    if config.stage == "base":
        sizes = dict(sizes or encoder_sizes(config.embeds))
        del sizes["context_length"]
        model = Decoder(config.base, image_size=config.image_size, **sizes, vocab_size=VOCAB_SIZE)
    else:
        factor, crop = cascade_sizes(config)
        model = Upsampler(config.up, factor=factor, crop_size=crop)
    require_weights(model.schedule, model.config.weighting, model.config.prediction)
    return model


def build_decoder(config: DecoderRunConfig) -> Task:
    """Describe the training of one stage of the cascade."""
    return _build_base(config) if config.stage == "base" else _build_upsampler(config)


def _build_base(config: DecoderRunConfig) -> Task:
    if config.flip:
        raise ValueError(
            "flip: found true for stage base, expected false: its image embeddings and captions "
            "are of the images as they are"
        )
    encoder = encoder_of((*config.embeds, *config.validation_embeds), config.clip)
    if config.base.embed_noise and not encoder.unit_norm:
        raise ValueError(
            f"base.embed_noise: found {config.base.embed_noise} for embeddings that keep their "
            "length, expected 0: what it makes of them is of unit norm"
        )
    export = {
        "kind": "decoder",
        "model": dataclasses.asdict(config.base),
        "encoder_id": encoder.encoder_id,
        "clip": clip_of(config.embeds, config.clip),
        "image_size": config.image_size,
        "embed_dim": encoder.embed_dim,
        "text_width": encoder.text_width,
    }

    def objective(model: Decoder, batch: Batch) -> dict[str, Tensor]:
        drop = None
        if config.base.empty_caption:
            drop = dropped_captions(config.base, batch.keys)
        condition = decoder_condition(encoder, config, batch, drop)
        return model.losses(batch.keys, pixels(batch["image"]), condition)

    return _stage_job(config, objective, export, partial(decoder_condition, encoder, config))


def _stage_job(
    config: DecoderRunConfig, objective: Callable, export: dict[str, Any], condition: Any
) -> Task:
    """Describe the training of a stage; condition: what a base decoder is told of a batch, None for
    an upsampler."""
    build, validate = partial(decoder_model, config), None
    if config.validation:
        reader = stage_dataset(config, latest(config.validation), latest(config.validation_embeds))
        validate = Validation(
            build=build, objective=objective, condition=condition, reader=reader,
            device=config.train.workers.device,
        )  # fmt: skip
    model = start_from(build(), config.init, config.run, export)
    return Task(
        model=model,
        objective=objective,
        build_dataset=partial(decoder_dataset, config),
        export=export,
        validate=validate,
    )


def latest(roots: tuple[str, ...]) -> list[Snapshot]:
    """Load the latest snapshot of each folder."""
    return [load_snapshot(root) for root in roots]


def decoder_condition(
    encoder: FrozenClip, config: DecoderRunConfig, batch: Batch, drop: Tensor | None = None
) -> Condition:
    """Return what a base decoder is told of a batch; drop: bool [B], whose captions are to be the
    empty one."""
    if not config.base.use_text:
        return Condition(image_embed=batch["image_embed"])
    words: dict[str, Any]
    text_embed = batch["text_embed"]
    if config.base.text_tokens:
        tokens = batch["caption_tokens"]
        tokens = tokens[:, : trimmed_length(token_mask(tokens))]
        words = {"tokens": tokens}
    else:
        tokens = batch["tokens"]
        if drop is not None:
            empty = torch.from_numpy(encoder.tokenize([""])).to(tokens)
            tokens = torch.where(drop[:, None], empty, tokens)
        tokens = encoder.trimmed(tokens)
        embed, states = encoder.to(batch.keys.device).encode_text(tokens)
        words = {"text_states": states}
        if drop is not None:
            text_embed = torch.where(drop[:, None], embed, text_embed)
    return Condition(
        image_embed=batch["image_embed"],
        text_embed=text_embed,
        token_mask=token_mask(tokens),
        **words,
    )


def decoder_dataset(config: DecoderRunConfig) -> ColumnDataset:
    """Read the run's images; for the base decoder with their embeddings and tokens."""
    images = pin_snapshots(config.run, "images", config.images)
    base = config.stage == "base"
    embeds = pin_snapshots(config.run, "embeds", config.embeds) if base else []
    return stage_dataset(config, images, embeds, config.data.weights)


def stage_dataset(
    config: DecoderRunConfig,
    images: Sequence[Snapshot],
    embeds: Sequence[Snapshot],
    weights: tuple[float, ...] = (),
) -> ColumnDataset:
    """Read images as a stage does; embeds: of the base decoder's, one for each of `images`."""
    size, threads = config.image_size, config.data.num_threads
    if config.stage == "base":
        pairs = zip(images, embeds, strict=True)
        own = config.base.text_tokens
        tokenize = tokenizer(own) if own and config.base.use_text else None
        return mixed([PairDataset(*pair, size, threads, tokenize) for pair in pairs], weights)
    return mixed([ImageDataset(each, size, threads) for each in images], weights)


def cascade_sizes(config: DecoderRunConfig) -> tuple[int, int]:
    """Return an upsampler's factor and crop size in px; ValueError if the sizes do not divide."""
    size = config.image_size
    low_res = config.low_res_size or size // 4
    crop = config.crop_size or max(MIN_CROP, size // 4)
    if size % low_res or crop % (size // low_res) or crop > size:
        raise ValueError(
            f"crop_size: found a crop of {crop} px from {size} px over {low_res} px, expected "
            f"sizes that divide"
        )
    return size // low_res, crop


def _build_upsampler(config: DecoderRunConfig) -> Task:
    factor, crop = cascade_sizes(config)
    export = {
        "kind": "upsampler",
        "model": dataclasses.asdict(config.up),
        "image_size": config.image_size,
        "factor": factor,
        "crop_size": crop,
    }

    def objective(model: Upsampler, batch: Batch) -> dict[str, Tensor]:
        image = keyed_crops(pixels(batch["image"]), batch.keys, crop)
        return model.losses(batch.keys, keyed_flips(image, batch.keys) if config.flip else image)

    return _stage_job(config, objective, export, None)


def keyed_crops(image: Tensor, keys: Tensor, crop: int) -> Tensor:
    """Cut a crop [B, 3, crop, crop] out of each image [B, 3, H, H], where the sample's key says."""
    room = image.shape[-1] - crop + 1
    corner = (keyed_random.uniform(keys, "crop", (2,)) * room).long()  # [B, 2]
    span = torch.arange(crop, device=image.device)
    rows, columns = corner[:, :1] + span, corner[:, 1:] + span  # [B, crop]
    batch = torch.arange(len(image), device=image.device)[:, None, None]
    return image.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def keyed_flips(image: Tensor, keys: Tensor) -> Tensor:
    """Mirror half of the images [B, 3, H, W] left to right, where the sample's key says."""
    mirrored = keyed_random.uniform(keys, "flip") < 0.5
    return torch.where(mirrored[:, None, None, None], image.flip(-1), image)
