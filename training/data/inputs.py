"""What a run reads: which snapshots, of which encoder, and how several are mixed."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.base.files import Json, write_text
from cluster.base.run_dir import snapshot_path, step_folders
from ingest.embedding.statistics import NAME as STATISTICS
from ingest.embedding.statistics import EmbedStatistics
from ingest.shards import IMAGE_TOKENS, Snapshot, caption_columns, load_snapshot, read_manifest
from ingest.store.storage import absolute_root
from models.clip import FrozenClip
from models.configs import token_side, weight_options
from models.convert.runs import absolute_spec, load_clip
from models.weights import EMA_NAME, exported, load_config, load_weights
from training.config import (
    EMBEDS,
    IMAGES,
    MAIN_CAPTION,
    ClipRunConfig,
    DecoderRunConfig,
    PriorRunConfig,
)
from training.data.datasets import ColumnDataset, MixedDataset, short_sides

Model = TypeVar("Model", bound=nn.Module)
Chosen = TypeVar("Chosen")
Config = TypeVar("Config", ClipRunConfig, PriorRunConfig, DecoderRunConfig)


def prepare_data(config: Config) -> Config:
    """Make the demo's data where the default folder is absent, and make data paths absolute."""
    from training.data.demo_data import draw_default_images, embed_default_images

    changes: dict[str, Any] = {}
    if isinstance(config, (ClipRunConfig, DecoderRunConfig)):
        if IMAGES in config.images:
            draw_default_images()
        changes["images"] = _committed_roots(config.images)
    if isinstance(config, (PriorRunConfig, DecoderRunConfig)) and not _upsampler(config):
        if EMBEDS in config.embeds:
            embed_default_images()
        changes["embeds"] = _committed_roots(config.embeds)
        changes["clip"] = absolute_spec(config.clip)
    if config.init and Path(config.init).is_dir():
        changes["init"] = str(Path(config.init).absolute())
    if isinstance(config, (PriorRunConfig, DecoderRunConfig)):
        changes["validation"] = tuple(absolute_root(root) for root in config.validation)
    _require_captions(config, changes)
    for root in changes.get("embeds", ()):
        _require_tokens(root, config)
    if isinstance(config, DecoderRunConfig):
        for images in changes["images"]:
            require_size(images, config.image_size)
        embeds = tuple(absolute_root(root) for root in config.validation_embeds)
        changes["validation_embeds"] = embeds
        _require_paired("embeds", config.images, config.embeds, config)
        _require_paired("validation_embeds", config.validation, embeds, config)
        for root in embeds:
            _require_tokens(root, config)
    return dataclasses.replace(config, **changes)


def _committed_roots(roots: Sequence[str]) -> tuple[str, ...]:
    """Return absolute roots; ValueError for one without a snapshot."""
    for root in roots:
        load_snapshot(root)
    return tuple(absolute_root(root) for root in roots)


def _require_paired(
    name: str, images: tuple[str, ...], embeds: tuple[str, ...], config: DecoderRunConfig
) -> None:
    """Raise ValueError unless the base decoder has embeddings for each folder of images, and an
    upsampler none, which it would not read."""
    if _upsampler(config) and name == "validation_embeds" and embeds:
        raise ValueError(f"{name}: found {len(embeds)} folders for an upsampler, expected none")
    if not _upsampler(config) and len(images) != len(embeds):
        raise ValueError(
            f"{name}: found {len(embeds)} folders for {len(images)} of images, expected one for "
            "each, in the same order"
        )


def _require_tokens(embeds: str, config: Config) -> None:
    """Raise ValueError for a model of k tokens of an image over embeddings that have others."""
    if isinstance(config, PriorRunConfig):
        name = f"{config.prior}.{IMAGE_TOKENS}"
        wanted = getattr(getattr(config, config.prior), IMAGE_TOKENS, 1)
    else:
        assert isinstance(config, DecoderRunConfig)
        name, wanted = f"base.{IMAGE_TOKENS}", config.base.image_tokens
    found = read_manifest(embeds).get(IMAGE_TOKENS, 1)
    if token_side(wanted) > 1 and wanted != found:
        raise ValueError(
            f"{name}: found {wanted} over embeddings with {found} in {embeds}, expected 1 or as "
            "many; ingest/embed.py --image-tokens K --out ANOTHER makes more"
        )


def _require_captions(config: Config, roots: Json) -> None:
    """Raise ValueError for a column of --data.captions that none of the folders has."""
    weights = config.data.caption_weights()
    if not weights:
        return
    if isinstance(config, DecoderRunConfig) and not ("embeds" in roots and config.base.use_text):
        raise ValueError(
            f"data.captions: found {config.data.captions} for a stage without captions, expected "
            "none"
        )
    known, remedy = [MAIN_CAPTION], ""
    if "embeds" in roots:
        remedy = "; ingest/embed.py --captions NAME --out ANOTHER embeds more"
        known += (name for r in roots["embeds"] for name in read_manifest(r).get("captions", ()))
    else:
        known += (name for r in roots["images"] for name in caption_columns(load_snapshot(r)))
    for name in weights:
        if name not in known:
            raise ValueError(
                f"data.captions: found {name!r}, expected columns of captions in "
                f"{', '.join(roots.get('embeds') or roots['images'])}: "
                f"{', '.join(dict.fromkeys(known))}{remedy}"
            )


def _upsampler(config: PriorRunConfig | DecoderRunConfig) -> bool:
    return isinstance(config, DecoderRunConfig) and config.stage != "base"


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


def clip_of(embeds: Sequence[str], clip: str) -> str:
    """Return the specification of the encoder of `embeds`: `clip`, or the one they name."""
    return clip or read_manifest(embeds[0])["clip"]


def encoder_of(embeds: Sequence[str], clip: str) -> FrozenClip:
    """Load the encoder that made all of `embeds`: `clip`, or the one the first's manifest names;
    its text tower alone, since the images' embeddings are there.

    Raises ValueError where one was made by another.
    """
    encoder = load_clip(clip_of(embeds, clip))
    for root in embeds:
        manifest = read_manifest(root)
        if encoder.encoder_id != manifest["encoder_id"]:
            raise ValueError(
                f"{root}: found embeddings of encoder {manifest['encoder_id']}, expected "
                f"{encoder.encoder_id} of {clip_of(embeds, clip)}; embed again with this encoder "
                "or pass the other one"
            )
    encoder.drop_vision()
    return encoder


def start_from(model: Model, init: str, run: str, export: Json) -> Model:
    """Load the averaged weights of a finished run, or none for an empty `init` or a `run` that has
    a valid checkpoint of its own.

    export: what config.json of the new run says of its model. Raises ValueError naming the first
    tensor that differs, or the kind of model, its encoder, or an option that its weights are for.
    """
    from training.checkpoints.records import valid_records

    if not init or _chosen_once(lambda: any(map(valid_records, step_folders(Path(run))))):
        return model
    step = exported(init)
    stored = load_config(step)
    keys = ("kind", "encoder_id", "factor")
    pairs = [(name, stored.get(name), export.get(name)) for name in keys]
    if stored.get("kind") == export.get("kind"):
        kind: Any = type(model.config)
        theirs, ours = (weight_options(kind, each["model"]) for each in (stored, export))
        # of another network all options differ
        other = theirs.get("network") != ours.get("network")
        names = ["network"] if other else sorted(theirs.keys() | ours.keys())
        pairs += [(name, theirs.get(name), ours.get(name)) for name in names]
    differ = [each for each in pairs if each[1] != each[2]]
    if differ:
        reasons = "; ".join(f"{name}: found {old!r}, expected {new!r}" for name, old, new in differ)
        raise ValueError(f"init: {init}: {reasons}; pass the options of those weights")
    load_weights(model, step / EMA_NAME)
    return model.train()


def pin_snapshots(run: str, kind: str, roots: Sequence[str]) -> list[Snapshot]:
    """Return the snapshots a run reads: the latest when the run begins, and the same ones when it
    continues."""
    kinds = [kind, *(f"{kind}_{number}" for number in range(2, len(roots) + 1))]

    def pin() -> list[str]:
        """Return the digests that are pinned."""
        digests = []
        for root, each in zip(roots, kinds, strict=True):
            path = snapshot_path(Path(run), each)
            if not path.is_file():
                write_text(path, _with_samples(root).digest + "\n")
            digests.append(path.read_text().strip())
        return digests

    digests = _chosen_once(pin)
    return [load_snapshot(root, digest) for root, digest in zip(roots, digests, strict=True)]


def _chosen_once(choose: Callable[[], Chosen]) -> Chosen:
    """Return what the first rank chooses: a snapshot may be published between two ranks' reads, and
    the ranks of a run in a bucket see different folders."""
    if not dist.is_initialized():
        return choose()
    box = [choose() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return cast(Chosen, box[0])


def _with_samples(root: str) -> Snapshot:
    """Return the latest snapshot; ValueError if it has no samples."""
    snapshot = load_snapshot(root)
    if not snapshot.num_samples:
        raise ValueError(
            f"{root}: found a data set without samples, expected some; the last line of what made "
            "it says what became of its rows"
        )
    return snapshot


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


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


def mixed(parts: Sequence[ColumnDataset], weights: Sequence[float]) -> ColumnDataset:
    """Return one data set of several, mixed by weights or by their sizes: see `DataConfig`."""
    if weights and len(weights) != len(parts):
        raise ValueError(
            f"data.weights: found {len(weights)}, expected one for each of {len(parts)} data sets"
        )
    return parts[0] if len(parts) == 1 else MixedDataset(parts, weighted=bool(weights))


def pin_statistics(run: str, embeds: Sequence[str], weights: Sequence[float]) -> EmbedStatistics:
    """Return the moments of the image embeddings that a run reads: those of the day it began, kept
    in its folder."""

    def pin() -> EmbedStatistics:
        """Return the moments that are pinned."""
        if not (Path(run) / STATISTICS).is_file():
            for root in embeds:
                _with_samples(root)  # there are no statistics of none
            parts = [EmbedStatistics.read(root) for root in embeds]
            EmbedStatistics.merge(parts, weights if len(parts) > 1 else ()).write(run)
        return EmbedStatistics.read(run)

    return _chosen_once(pin)


def local_alone(local: Tensor) -> tuple[Tensor, slice]:
    """Return this rank's rows as all there are: `gathered` of a worker that trains alone."""
    return local, slice(len(local))


def gathered(local: Tensor) -> tuple[Tensor, slice]:
    """Return every rank's rows, and which of them are this one's.

    Gradients flow back to the rank that owns them.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local_alone(local)
    from torch.distributed.nn.functional import all_gather

    rows = slice(_rank() * len(local), (_rank() + 1) * len(local))
    return torch.cat(all_gather(local)), rows
