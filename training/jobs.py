"""What each training script trains: model, objective and data, built anew in every worker."""

import dataclasses
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from open_clip import CLIP
from torch import Tensor

from ingest.embed_statistics import EmbedStatistics
from ingest.shards import Snapshot, load_snapshot, read_manifest
from models.clip import (
    MAX_LOGIT_SCALE,
    FrozenClip,
    build_clip,
    load_clip,
    model_sizes,
    normalise_pixels,
    token_mask,
    tokenizer,
)
from models.decoder import Condition, Decoder
from models.diffusion_prior import DiffusionPrior
from models.losses import contrastive
from models.transformer import attention_kernels
from models.upsampler import Upsampler
from training.batches import Batch
from training.config import ClipRunConfig, DecoderRunConfig, PriorRunConfig
from training.loop import Job
from training.readers import CaptionReader, EmbedReader, ImageReader, JoinedReader, short_sides
from training.sizing import encoder_sizes

Config = TypeVar("Config", ClipRunConfig, PriorRunConfig, DecoderRunConfig)
MIN_CROP = 16


def prepare_data(config: Config) -> Config:
    """Make the demo's data where the default folder is absent, and make data paths absolute."""
    from training.demo_data import ensure_embeds, ensure_images

    changes = {}
    if isinstance(config, (ClipRunConfig, DecoderRunConfig)):
        changes["images"] = ensure_images(config.images)
    if isinstance(config, (PriorRunConfig, DecoderRunConfig)):
        changes["embeds"] = ensure_embeds(config.embeds)
        if Path(config.clip).is_dir() and config.clip:  # a worker has a folder of its own
            changes["clip"] = str(Path(config.clip).absolute())
    if isinstance(config, DecoderRunConfig):
        require_size(changes["images"], config.image_size)
    return dataclasses.replace(config, **changes)


def require_size(images: str, size: int) -> None:
    """Say how many images of the first shard have no `size` px and will be enlarged.

    Raises ValueError where none has: there is no detail of that size to learn from.
    """
    sides = short_sides(load_snapshot(images))
    small = int((sides < size).sum())
    if not small:
        return
    if small == len(sides):
        raise ValueError(
            f"image_size: found {size} px over images of at most {sides.max()} px in the first "
            f"shard of {images}, expected images as large; pass --image-size {sides.max()} or "
            f"less, or download them again with --image-size {size}"
        )
    print(
        f"{images}: {small} of the first shard's {len(sides)} images are smaller than {size} px, "
        f"down to {sides.min()} px, and are enlarged; ingest/download.py --min-image-side {size} "
        "leaves such out",
        flush=True,
    )


def encoder_of(embeds: Path | str, clip: str) -> FrozenClip:
    """Load the encoder that made `embeds`: `clip`, or the one its manifest names; another one is
    a ValueError."""
    manifest = read_manifest(embeds)
    encoder = load_clip(clip or manifest["clip"])
    if encoder.encoder_id != manifest["encoder_id"]:
        raise ValueError(
            f"{embeds}: found embeddings of encoder {manifest['encoder_id']}, expected "
            f"{encoder.encoder_id} "
            f"of {clip or manifest['clip']}; embed again with this encoder or pass the other one"
        )
    return encoder


def pin_snapshot(run: str, kind: str, root: str) -> Snapshot:
    """Return the snapshot a run reads: the latest when the run begins, that very one when it
    continues."""
    path = Path(run) / f"snapshot_{kind}.txt"
    if _rank() == 0 and not path.is_file():
        part = path.with_suffix(".part")
        part.write_text(load_snapshot(root).digest + "\n")
        part.replace(path)
    if dist.is_initialized():
        dist.barrier()  # one rank chooses: a snapshot may be published between two ranks' looks
    return load_snapshot(root, path.read_text().strip())


def part_of(snapshot: Snapshot, part: str) -> Snapshot:
    """Return the shards of part "k/n" of `snapshot`: neighbours, since a list's order may mean
    something."""
    try:
        k, n = (int(number) for number in part.split("/"))
    except ValueError:
        raise ValueError(f'part: found {part!r}, expected "k/n" such as 1/2') from None
    count = len(snapshot.shards)
    if not 1 <= k <= n <= count:
        raise ValueError(
            f"part: found {part!r}, expected 1 <= k <= n <= {count}, the number of shards"
        )
    shards = snapshot.shards[(k - 1) * count // n : k * count // n]
    return dataclasses.replace(snapshot, shards=shards)


# --- CLIP
# ---------------------------------------------------------------------------------------------


def clip_model(config: ClipRunConfig) -> CLIP:
    """Build the CLIP."""
    return build_clip(config.model)


def build_clip_job(config: ClipRunConfig) -> Job:
    """Describe the training of a CLIP."""
    model = clip_model(config)
    image_size, context_length = model_sizes(model)
    snapshot = part_of(pin_snapshot(config.run, "images", config.images), config.part)
    reader = CaptionReader(snapshot, image_size, tokenizer(context_length, config.model.vocab_size))
    export = {"kind": "clip", "model": dataclasses.asdict(config.model)}
    if config.train.grad_accum_steps > 1:
        raise ValueError(
            f"train.micro_batch_size: found {config.train.micro_batch_size}, expected 0: "
            "CLIP contrasts all samples of a step with each other"
        )
    return Job(
        model=model,
        objective=clip_objective,
        reader=reader,
        export=export,
        block_size=config.block_size,
    )


def clip_objective(model, batch: Batch) -> dict[str, Tensor]:
    """Contrast every image of the global batch with every other caption."""
    with attention_kernels(batch.keys):
        image = _gathered(model.encode_image(normalise_pixels(batch["image"]), normalize=True))
        text = _gathered(model.encode_text(batch["tokens"].long(), normalize=True))
    scale = model.logit_scale.clamp(max=float(torch.tensor(MAX_LOGIT_SCALE).log())).exp()
    keep, tokens = _gathered(batch.weight) > 0, _gathered(batch["tokens"])
    # A caption that comes twice in a batch fits both images: neither is a negative of the other.
    # Two captions of one meaning are known for the same by their words alone.
    negative = keep[:, None] & keep & (tokens[:, None] != tokens).any(2)
    loss, accuracy = contrastive(image, text, scale, negative)
    mine = slice(_rank() * len(batch.weight), (_rank() + 1) * len(batch.weight))
    return {"loss": loss[mine], "accuracy": accuracy[mine].detach()}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gathered(mine: Tensor) -> Tensor:
    """Concatenate every rank's rows; gradients flow back to the rank that owns them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(mine))


# --- prior
# --------------------------------------------------------------------------------------------


def prior_model(config: PriorRunConfig) -> DiffusionPrior:
    """Build the prior for the encoder of its embeddings."""
    return DiffusionPrior(config.model, **encoder_sizes(config.embeds))


def build_prior(config: PriorRunConfig) -> Job:
    """Describe the training of a prior; the frozen text tower stays outside the engine."""
    encoder = encoder_of(config.embeds, config.clip)
    sizes = encoder_sizes(config.embeds)
    model = prior_model(config)
    if config.whiten:
        statistics = EmbedStatistics.read(config.embeds)
        model.set_statistics(torch.from_numpy(statistics.mean), torch.from_numpy(statistics.std))
    export = {
        "kind": "diffusion_prior",
        "model": dataclasses.asdict(config.model),
        "encoder_id": encoder.encoder_id,
        "clip": config.clip or read_manifest(config.embeds)["clip"],
        **sizes,
    }

    def objective(model: DiffusionPrior, batch: Batch) -> dict[str, Tensor]:
        _, states = encoder.to(batch.keys.device).encode_text(batch["tokens"])
        mask = token_mask(batch["tokens"])
        return model.losses(batch.keys, batch["image_embed"], batch["text_embed"], states, mask)

    reader = EmbedReader(pin_snapshot(config.run, "embeds", config.embeds))
    return Job(model=model, objective=objective, reader=reader, export=export)


# --- decoder cascade
# ----------------------------------------------------------------------------------


def decoder_model(config: DecoderRunConfig) -> Decoder | Upsampler:
    """Build the model of one stage."""
    if config.stage == "base":
        sizes = encoder_sizes(config.embeds)
        del sizes["context_length"]
        return Decoder(config.base, image_size=config.image_size, **sizes)
    factor, crop = cascade_sizes(config)
    return Upsampler(config.up, factor=factor, crop_size=crop)


def build_decoder(config: DecoderRunConfig) -> Job:
    """Describe the training of one stage of the cascade."""
    return _build_base(config) if config.stage == "base" else _build_upsampler(config)


def pixels(image: Tensor) -> Tensor:
    """Map uint8 [B, 3, H, W] to float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def _build_base(config: DecoderRunConfig) -> Job:
    encoder = encoder_of(config.embeds, config.clip)
    export = {
        "kind": "decoder",
        "model": dataclasses.asdict(config.base),
        "encoder_id": encoder.encoder_id,
        "clip": config.clip or read_manifest(config.embeds)["clip"],
        "image_size": config.image_size,
        "embed_dim": encoder.embed_dim,
        "text_width": encoder.text_width,
    }

    def objective(model: Decoder, batch: Batch) -> dict[str, Tensor]:
        states = mask = None
        if config.base.use_text:
            _, states = encoder.to(batch.keys.device).encode_text(batch["tokens"])
            mask = token_mask(batch["tokens"])
        condition = Condition(image_embed=batch["image_embed"], text_states=states, token_mask=mask)
        return model.losses(batch.keys, pixels(batch["image"]), condition)

    images = pin_snapshot(config.run, "images", config.images)
    embeds = pin_snapshot(config.run, "embeds", config.embeds)
    reader = JoinedReader(images, embeds, config.image_size)
    return Job(model=decoder_model(config), objective=objective, reader=reader, export=export)


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


def _build_upsampler(config: DecoderRunConfig) -> Job:
    factor, crop = cascade_sizes(config)
    export = {
        "kind": "upsampler",
        "model": dataclasses.asdict(config.up),
        "image_size": config.image_size,
        "factor": factor,
        "crop_size": crop,
    }

    def objective(model: Upsampler, batch: Batch) -> dict[str, Tensor]:
        return model.losses(batch.keys, keyed_crops(pixels(batch["image"]), batch.keys, crop))

    reader = ImageReader(pin_snapshot(config.run, "images", config.images), config.image_size)
    return Job(model=decoder_model(config), objective=objective, reader=reader, export=export)


def keyed_crops(image: Tensor, keys: Tensor, crop: int) -> Tensor:
    """Cut a crop [B, 3, crop, crop] out of each image [B, 3, H, H], where the sample's key says."""
    from models import keyed_random

    room = image.shape[-1] - crop + 1
    corner = (keyed_random.uniform(keys, "crop", (2,)) * room).long()  # [B, 2]
    span = torch.arange(crop, device=image.device)
    rows, columns = corner[:, :1] + span, corner[:, 1:] + span  # [B, crop]
    batch = torch.arange(len(image), device=image.device)[:, None, None]
    return image.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
