"""What training/decoder.py trains: one stage of the cascade, its objective, data and validation."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ingest.shards import Snapshot, load_snapshot
from models.clip import FrozenClip
from models.decoder import Condition, Decoder, ImageSampling, dropped_captions
from models.degradation import shrink
from models.diffusion import keyed_random
from models.diffusion.samplers import dpmpp_2m
from models.networks.packing import CaptionPacking, PackedTokens, token_lengths
from models.networks.transformer import trim, trimmed_length
from models.tokenizers import token_mask, tokenizer
from models.upsampler import Upsampler
from models.weights import EMA_NAME, load_weights
from training.config import DecoderRunConfig
from training.data.dataloader import Batch, as_it_is, first_batches
from training.data.datasets import ColumnDataset, ImageDataset, PairDataset
from training.data.inputs import clip_of, encoder_of, mixed, pin_snapshots, start_from
from training.engine.precision import device_of_run
from training.loop import Task
from training.tasks.networks import cascade_sizes, decoder_model
from training.tasks.pictures import grid, pixels, save_png, to_uint8

MAX_VALIDATED = 512  # held-out images, the first ones
VALIDATED_AT_ONCE = 32
NUM_DRAWN = 8
DRAWING = ImageSampling(sampler=dpmpp_2m, sample_steps=16, spacing="karras")


def build_decoder(config: DecoderRunConfig) -> Task:
    """Return the task of training one stage of the cascade."""
    objective: Callable[[Any, Batch], dict[str, Tensor]]
    collate: Callable[[Batch], Batch] = as_it_is
    if config.stage == "base":
        if config.flip:
            raise ValueError(
                "flip: found true for stage base, expected false: its image embeddings and "
                "captions are of the images as they are"
            )
        encoder = encoder_of((*config.embeds, *config.validation_embeds), config.clip)
        if config.base.embed_noise and not encoder.unit_norm:
            raise ValueError(
                f"base.embed_noise: found {config.base.embed_noise} for embeddings that keep "
                "their length, expected 0: what it makes of them is of unit norm"
            )
        condition = partial(decoder_condition, encoder, config)
        objective = partial(base_objective, encoder, config)
        if config.base.use_text and (config.base.text_tokens or encoder.packs_text):
            collate = partial(pack_captions_of_decoder, encoder, config)
        export = {
            "kind": "decoder",
            "model": dataclasses.asdict(config.base),
            "encoder_id": encoder.encoder_id,
            "clip": clip_of(config.embeds, config.clip),
            "image_size": config.image_size,
            "embed_dim": encoder.embed_dim,
            "text_width": encoder.text_width,
        }
    else:
        factor, crop = cascade_sizes(config)
        condition = None
        objective, collate = upsampler_objective, partial(crop_images, crop, config.flip)
        export = {
            "kind": "upsampler",
            "model": dataclasses.asdict(config.up),
            "image_size": config.image_size,
            "factor": factor,
            "crop_size": crop,
        }
        encoder = None
    build, validate = partial(decoder_model, config), None
    if config.validation:
        dataset = stage_dataset(config, latest(config.validation), latest(config.validation_embeds))
        validate = Validation(
            build=build, objective=objective, condition=condition, dataset=dataset,
            collate=collate, device=config.train.workers.device,
        )  # fmt: skip
    return Task(
        model=start_from(build(), config.init, config.run, export),
        objective=objective,
        build_dataset=partial(decoder_dataset, config),
        collate=collate,
        export=export,
        encoder=encoder,
        validate=validate,
    )


# -- objectives ------------------------------------------------------------------------------------


def base_objective(
    encoder: FrozenClip, config: DecoderRunConfig, model: Decoder, batch: Batch
) -> dict[str, Tensor]:
    """Return the losses [B] of a base decoder."""
    if batch.captions is not None:
        condition = packed_condition(encoder, config, batch, batch.captions)
    else:
        drop = dropped_captions(config.base, batch.keys) if config.base.empty_caption else None
        condition = decoder_condition(encoder, config, batch, drop)
    return model.losses(batch.keys, pixels(batch["image"]), condition)


def upsampler_objective(model: Upsampler, batch: Batch) -> dict[str, Tensor]:
    """Return the losses [B] of an upsampler on a batch from `crop_images`."""
    return model.losses(batch.keys, pixels(batch["image"]))


def crop_images(crop: int, flip: bool, batch: Batch) -> Batch:
    """Return a batch on the CPU with crops of `crop` px, mirrored at random, for whole images: a
    sixteenth of 1024 px has to be sent to a GPU."""
    image = keyed_crops(batch["image"], batch.keys, crop)
    image = keyed_flips(image, batch.keys) if flip else image
    return dataclasses.replace(batch, columns={**batch.columns, "image": image})


def pack_captions_of_decoder(encoder: FrozenClip, config: DecoderRunConfig, batch: Batch) -> Batch:
    """Return a batch with its captions packed for a base decoder, dropped ones empty."""
    drop = torch.zeros_like(batch.keys, dtype=torch.bool)
    tokens = batch["caption_tokens" if config.base.text_tokens else "tokens"]
    if config.base.empty_caption:
        drop = dropped_captions(config.base, batch.keys)
        empty = torch.from_numpy(encoder.tokenize([""])).to(tokens)
        tokens = torch.where(drop[:, None], empty, tokens)
    packing = CaptionPacking.of(token_lengths(token_mask(tokens)), drop)
    return dataclasses.replace(batch, captions=PackedTokens.of(tokens, packing))


def packed_condition(
    encoder: FrozenClip, config: DecoderRunConfig, batch: Batch, captions: PackedTokens
) -> Condition:
    """Return what conditions a base decoder in training on a batch and its packed captions.

    A GPU pads to the context, so that all batches have one shape: 77 tokens beside the 256 cells of
    an image cost under 1 %. A CPU pads to the longest caption.
    """
    packing, tokens, text_embed = captions.packing.text, captions.tokens, batch["text_embed"]
    length = batch["caption_tokens" if config.base.text_tokens else "tokens"].shape[1]
    length = length if tokens.is_cuda else trim(packing.longest, length)
    text: dict[str, Any] = {"token_mask": packing.mask(length)}
    if config.base.text_tokens:
        text |= {"tokens": tokens, "packing": packing}
    else:
        states = encoder.on(tokens.device).encode_packed(tokens, packing)  # [S, W]
        text["text_states"] = packing.pad(states, length)  # [B, L, W]
        if config.base.empty_caption:
            embed = encoder.pool_packed(states, tokens, packing)
            text_embed = torch.where(captions.packing.drop[:, None], embed, text_embed)
    return Condition(image_embed=batch["image_embed"], text_embed=text_embed, **text)


def decoder_condition(
    encoder: FrozenClip, config: DecoderRunConfig, batch: Batch, drop: Tensor | None = None
) -> Condition:
    """Return what conditions a base decoder on a batch of padded captions; drop: bool [B], whose
    captions are to be the empty one."""
    if not config.base.use_text:
        return Condition(image_embed=batch["image_embed"])
    text_embed, states = batch["text_embed"], {}
    if config.base.text_tokens:
        tokens = batch["caption_tokens"]
        tokens = tokens[:, : trimmed_length(token_mask(tokens))]
        states["tokens"] = tokens
    else:
        tokens = batch["tokens"]
        if drop is not None:
            empty = torch.from_numpy(encoder.tokenize([""])).to(tokens)
            tokens = torch.where(drop[:, None], empty, tokens)
        tokens = encoder.trimmed(tokens)
        embed, states["text_states"] = encoder.on(batch.keys.device).encode_text(tokens)
        if drop is not None:
            text_embed = torch.where(drop[:, None], embed, text_embed)
    return Condition(
        image_embed=batch["image_embed"],
        text_embed=text_embed,
        token_mask=token_mask(tokens),
        **states,
    )


def keyed_crops(image: Tensor, keys: Tensor, crop: int) -> Tensor:
    """Cut a crop [B, 3, crop, crop] out of each image [B, 3, H, H], where the sample's key says.

    Returns it channels-last, as networks on GPUs take it.
    """
    room = image.shape[-1] - crop + 1
    corners = (keyed_random.uniform(keys, "crop", (2,)) * room).long().tolist()  # [B, 2]
    crops = [x[:, i : i + crop, j : j + crop] for x, (i, j) in zip(image, corners, strict=True)]
    return torch.stack(crops).contiguous(memory_format=torch.channels_last)


def keyed_flips(image: Tensor, keys: Tensor) -> Tensor:
    """Mirror half of the images [B, 3, H, W] left to right, where the sample's key says."""
    mirrored = keyed_random.uniform(keys, "flip") < 0.5
    return torch.where(mirrored[:, None, None, None], image.flip(-1), image)


# -- data ------------------------------------------------------------------------------------------


def decoder_dataset(config: DecoderRunConfig) -> ColumnDataset:
    """Read the run's images; for the base decoder with their embeddings and tokens."""
    images = pin_snapshots(config.run, "images", config.images)
    embeds = pin_snapshots(config.run, "embeds", config.embeds) if config.stage == "base" else []
    data = config.data
    return stage_dataset(config, images, embeds, data.weights, data.caption_weights())


def stage_dataset(
    config: DecoderRunConfig,
    images: Sequence[Snapshot],
    embeds: Sequence[Snapshot],
    weights: tuple[float, ...] = (),
    captions: Mapping[str, float] | None = None,
) -> ColumnDataset:
    """Read images as a stage does; embeds: for the base decoder, one for each of `images`;
    captions: weights of columns of captions, None for the main caption."""
    size, threads = config.image_size, config.num_decode_threads
    if config.stage != "base":
        return mixed([ImageDataset(snapshot, size, threads) for snapshot in images], weights)
    length = config.base.text_tokens
    tokenize = tokenizer(length) if length and config.base.use_text else None
    has_tokens = config.base.image_tokens > 1
    pairs = [
        PairDataset(*pair, size, threads, tokenize, captions, has_tokens)
        for pair in zip(images, embeds, strict=True)
    ]
    return mixed(pairs, weights)


def latest(roots: tuple[str, ...]) -> list[Snapshot]:
    """Load the latest snapshot of each folder."""
    return [load_snapshot(root) for root in roots]


# -- validation ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Scores a checkpoint of a stage on held-out samples: its loss, and a picture.

    build: makes the model; objective: training's; condition: what conditions the base decoder on a
    batch, None for an upsampler; dataset: the held-out samples, of which at most 512 are used;
    collate, device: as of training.
    """

    build: Callable[[], nn.Module]
    objective: Callable[[Any, Batch], dict[str, Tensor]]
    condition: Callable[[Batch], Condition] | None
    dataset: ColumnDataset
    collate: Callable[[Batch], Batch]
    device: Literal["auto", "cpu", "cuda"]

    @torch.no_grad()
    def __call__(self, folder: Path) -> dict[str, float]:
        """Return {"loss"} of a checkpoint's averaged weights, with the same noise at each, and draw
        <run>/validation/<step>.png: images, and below what the base decoder draws under their
        embeddings and captions, or an upsampler of them made small."""
        model: Any = load_weights(self.build(), folder / EMA_NAME)
        device = device_of_run(self.device)
        model.to(device)
        count = min(MAX_VALIDATED, sum(sum(sizes) for sizes in self.dataset.data_sets))
        losses: list[Tensor] = []
        for whole in first_batches(self.dataset, count, VALIDATED_AT_ONCE, torch.device("cpu")):
            batch = self.collate(whole).to(device)
            losses.append(self.objective(model, batch)["loss"].cpu())
            if len(losses) == 1:
                self._draw(model, whole.part(NUM_DRAWN).to(device), folder)
        return {"loss": float(torch.cat(losses).mean())}

    def _draw(self, model: Any, batch: Batch, folder: Path) -> None:
        image, draw = pixels(batch["image"]), partial(model.sample, batch.keys)
        rows = {"image": image}
        if self.condition is not None:
            rows["drawn"] = draw(self.condition(batch), DRAWING)
        else:
            low_res = shrink(image, model.factor)
            rows["small"] = F.interpolate(low_res, scale_factor=model.factor, mode="nearest")
            rows["drawn"] = draw(low_res, DRAWING)
        picture = grid([list(to_uint8(row)) for row in rows.values()], list(rows), [])
        save_png(folder.parent / "validation" / f"{folder.name}.png", picture)
