"""The drawn set, made on the spot for a training script that is run without data of its own."""

import hashlib
from pathlib import Path

from ingest.embedding.encode import encode_shard, open_embeds
from ingest.embedding.publish import publish_embeds
from ingest.shapes import make_pairs
from ingest.shards import (
    Attempt,
    Sample,
    committed,
    load_snapshot,
    publish_snapshot,
    recover,
    shard_name,
    write_image_shard,
    write_manifest,
)
from ingest.store.snapshots import latest_digest
from training.config import EMBEDS, IMAGES

NUM_SHARDS, SAMPLES_PER_SHARD = 4, 128
CLIP_SPEC = "tiny:random"  # untrained: enough to exercise a trainer, and nothing to wait for


def draw_default_images() -> None:
    """Draw the folder of images that training reads by default, unless it is there."""
    if latest_digest(IMAGES) is None:
        print(f"{IMAGES}: absent; drawing {NUM_SHARDS * SAMPLES_PER_SHARD} shapes", flush=True)
        draw_images(Path(IMAGES))


def embed_default_images() -> None:
    """Embed that folder, drawn if need be, where training reads embeddings by default, unless they
    are there."""
    if latest_digest(EMBEDS) is None:
        draw_default_images()
        print(f"{EMBEDS}: absent; embedding the drawn set with {CLIP_SPEC}", flush=True)
        embed_here(IMAGES, Path(EMBEDS), CLIP_SPEC)


def draw_images(
    root: Path, split: str = "train", seed: int = 0, num_shards: int = NUM_SHARDS,
    samples_per_shard: int = SAMPLES_PER_SHARD,
) -> None:  # fmt: skip
    """Write shards of drawn pairs to `root`, without a download."""
    source = f"shapes {split} {seed}"
    fields = {"source": source, "num_shards": num_shards, "samples_per_shard": samples_per_shard}
    write_manifest(root, "images", fields)
    recover(root)
    pairs = list(make_pairs(num_shards * samples_per_shard, seed, split))
    done = committed(root)
    for number in range(num_shards):
        name = shard_name(number)
        if name in done:
            continue
        samples, rows = [], []
        for row, pair in enumerate(pairs[number * samples_per_shard :][:samples_per_shard]):
            key = f"{number * samples_per_shard + row:09d}"
            image, caption = pair.image_bytes, pair.caption
            samples.append(Sample(key=key, image_bytes=image, caption=caption, json={"key": key}))
            sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), 64)
            rows.append({
                "key": key, "url": f"shapes:{split}/{key}", "caption": caption,
                "sha256": hashlib.sha256(image).hexdigest(),
                "status": "success", "error": None, **sizes,
            })  # fmt: skip
        with Attempt(root, name) as attempt:
            stored = write_image_shard(attempt.path, name, samples, rows)
            attempt.commit(num_samples=stored, counts={"stored": stored}, config_hash=split)
    publish_snapshot(root)


def embed_here(
    images: str, root: Path, clip_spec: str, batch_size: int = 128, image_tokens: int = 1
) -> None:
    """Embed a small image folder in this process; image_tokens: see `FrozenClip.encode_image`."""
    from models.convert.runs import load_clip

    encoder, snapshot = load_clip(clip_spec), load_snapshot(images)
    open_embeds(root, clip_spec, encoder, snapshot, image_tokens=image_tokens)
    done = committed(root)
    for entry in snapshot.shards:
        if entry.name not in done:
            encode_shard(encoder, snapshot, entry, root, batch_size, image_tokens=image_tokens)
    publish_embeds(root)
