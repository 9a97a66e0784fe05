"""From an image shard to an embedding shard: what embed.py does a shard at a time."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ingest.embed_statistics import EmbedStatistics
from ingest.shards import (
    Attempt,
    Commit,
    ImageShard,
    ShardEntry,
    Snapshot,
    publish_snapshot,
    recover,
    write_embed_shard,
    write_manifest,
)
from ingest.upkeep import derive, follow
from models.clip import FrozenClip

NORM_TOLERANCE = 1e-3


def open_embeds(root: Path, clip_spec: str, encoder: FrozenClip, images: Snapshot) -> None:
    """Create, or reopen, an embedding folder; another encoder or image folder is a ValueError."""
    fields = {
        "clip": clip_spec,
        "encoder_id": encoder.encoder_id,
        "embed_dim": encoder.embed_dim,
        "text_width": encoder.text_width,
        "context_length": encoder.context_length,
        "images": str(Path(images.root).absolute()),
    }
    write_manifest(root, "embeds", fields)
    recover(root)
    derive(images.root, root)
    follow(images.root, root)


def read_pixels(shard: ImageShard, rows: range, size: int) -> np.ndarray:
    """Decode rows of `shard` to the encoder's input, uint8 [n, 3, size, size]."""
    from models.clip import preprocess

    def one(row: int) -> np.ndarray:
        with Image.open(io.BytesIO(shard.image_bytes(row))) as image:
            return preprocess(image, size)

    return (
        np.stack([one(row) for row in rows])
        if len(rows)
        else np.zeros((0, 3, size, size), np.uint8)
    )


def encode_shard(
    encoder: FrozenClip, images: Snapshot, entry: ShardEntry, embeds: Path, batch_size: int
) -> Commit:
    """Encode one image shard and commit its embeddings. Batches never cross shards, so reruns
    give equal bits.

    Raises ValueError for a damaged shard, and for embeddings that are not finite and of unit norm.
    """
    shard = ImageShard(images.root, entry.name, digest=entry.digest)
    shard.require_whole()
    captions = [shard.caption(row) for row in range(len(shard))]
    tokens = (
        encoder.tokenize(captions) if captions else np.zeros((0, encoder.context_length), np.int32)
    )
    image_parts, text_parts = [np.zeros((0, encoder.embed_dim))], [np.zeros((0, encoder.embed_dim))]
    device = next(encoder.parameters()).device
    for start in range(0, len(shard), batch_size):
        rows = range(start, min(start + batch_size, len(shard)))
        image = torch.from_numpy(read_pixels(shard, rows, encoder.image_size)).to(device)
        image_parts.append(encoder.encode_image(image).cpu().numpy())
        text = torch.from_numpy(tokens[rows.start : rows.stop]).to(device)
        text_parts.append(encoder.encode_text(text)[0].cpu().numpy())
    image_embed, text_embed = np.concatenate(image_parts), np.concatenate(text_parts)
    for name, array in (("image", image_embed), ("text", text_embed)):
        norms = np.linalg.norm(array, axis=1)
        if not np.all(np.abs(norms - 1) < NORM_TOLERANCE):
            raise ValueError(
                f"{images.root}: shard {entry.name}: {name} embeddings are not finite and of "
                f"unit norm"
            )
    with Attempt(embeds, entry.name) as attempt:
        write_embed_shard(
            attempt.path,
            entry.name,
            image_embed=image_embed,
            text_embed=text_embed,
            tokens=tokens,
            keys=shard.keys,
            captions=captions,
        )
        counts = {"embedded": len(shard)}
        return attempt.commit(num_samples=len(shard), counts=counts, config_hash=entry.digest)


def finish_embeds(root: Path) -> Snapshot:
    """Publish what is committed and take its statistics."""
    snapshot = publish_snapshot(root)
    EmbedStatistics.compute(snapshot).write(root)
    return snapshot
