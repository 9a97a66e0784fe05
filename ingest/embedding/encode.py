"""From image shards to embedding shards, in three steps that run wherever there is room.

    read_chunks     CPU: index, JPEG, the encoder's own preprocessing; uint8 pixels and tokens out
    encode_chunk    the encoder, on a GPU if there is one; embeddings out
    Assembler       gathers a shard's chunks; commit_shard checks and commits them

A chunk never crosses shards, so a shard's embeddings are the same bits whoever makes them.
"""

import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from ingest.shards import (
    Attempt,
    Commit,
    ImageShard,
    ShardEntry,
    Snapshot,
    recover,
    write_embed_shard,
    write_manifest,
)
from ingest.store.maintenance import follow_images, record_derived
from ingest.store.storage import absolute_root
from models.clip import FrozenClip, Preprocessing, preprocess, tokenizer

NORM_TOLERANCE = 1e-3
Root = str | os.PathLike[str]


def open_embeds(root: Root, clip_spec: str, encoder: FrozenClip, images: Snapshot) -> None:
    """Create, or reopen, an embedding folder; another encoder or image folder is a ValueError."""
    fields = {
        "clip": clip_spec,
        "encoder_id": encoder.encoder_id,
        "embed_dim": encoder.embed_dim,
        "text_width": encoder.text_width,
        "context_length": encoder.context_length,
        "images": absolute_root(images.root),
    }
    write_manifest(root, "embeds", fields)
    recover(root)
    record_derived(images.root, root)
    follow_images(images.root, root)


# -- read ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Neighbouring rows of one shard, on their way to the encoder.

    start: its first row; total: rows of the shard. pixels: uint8 [n, 3, S, S]; tokens: int32
    [n, L]; bad: bool [n], rows whose image cannot be decoded, black here. seconds: what reading
    took. problem: why the shard cannot be read; then there are no rows.
    """

    shard: str
    start: int = 0
    total: int = 0
    pixels: np.ndarray = field(default_factory=lambda: np.zeros((0, 3, 1, 1), np.uint8))
    tokens: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.int32))
    bad: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    seconds: float = 0.0
    problem: str = ""


def read_chunks(root: str, entry: ShardEntry, how: Preprocessing, size: int) -> Iterator[Chunk]:
    """Yield the rows of an image shard, `size` at a time; an empty shard is one empty chunk.

    A shard that cannot be read is one chunk with a problem.
    """
    try:
        shard = ImageShard(root, entry.name, digest=entry.digest)
        shard.require_complete()
        for start in range(0, max(1, len(shard)), size):
            yield _read_chunk(shard, range(start, min(start + size, len(shard))), how)
    except (ValueError, OSError) as error:
        yield Chunk(shard=entry.name, problem=str(error))


def _read_chunk(shard: ImageShard, rows: range, how: Preprocessing) -> Chunk:
    started = time.perf_counter()
    pixels = np.zeros((len(rows), 3, how.image_size, how.image_size), np.uint8)
    bad = np.zeros(len(rows), bool)
    for place, row in enumerate(rows):
        try:
            with Image.open(io.BytesIO(shard.image_bytes(row))) as image:
                pixels[place] = preprocess(image, how.image_size)
        except (OSError, SyntaxError, ValueError):  # what Pillow raises for bytes that are no image
            bad[place] = True
    captions = [shard.caption(row) for row in rows]
    tokens = np.zeros((0, how.context_length), np.int32)
    return Chunk(
        shard=shard.name,
        start=rows.start,
        total=len(shard),
        pixels=pixels,
        tokens=_tokenizer(how)(captions) if captions else tokens,
        bad=bad,
        seconds=time.perf_counter() - started,
    )


@lru_cache(maxsize=1)
def _tokenizer(how: Preprocessing):
    return tokenizer(how.context_length, how.vocab_size)


# -- encode --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A chunk with embeddings in the place of its pixels: float32 [n, E], of unit norm if
    `unit_norm`, zero where the image is bad. seconds: of encoding."""

    chunk: Chunk
    image_embed: np.ndarray
    text_embed: np.ndarray
    seconds: float
    unit_norm: bool = True


def encode_chunk(encoder: FrozenClip, chunk: Chunk) -> Encoded:
    """Run both towers over a chunk; on a GPU in bfloat16."""
    started = time.perf_counter()
    image_embed, text_embed = np.zeros((2, len(chunk.bad), encoder.embed_dim), np.float32)
    if len(chunk.bad):
        device = next(encoder.parameters()).device
        pixels = torch.tensor(chunk.pixels, device=device)  # Ray's arrays cannot be written to
        tokens = encoder.trimmed(torch.tensor(chunk.tokens)).to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            image_embed = encoder.encode_image(pixels).cpu().numpy()
            text_embed = encoder.encode_text(tokens)[0].cpu().numpy()
        image_embed[chunk.bad] = 0
    return Encoded(
        chunk=replace(chunk, pixels=chunk.pixels[:0]),
        image_embed=image_embed,
        text_embed=text_embed,
        seconds=time.perf_counter() - started,
        unit_norm=encoder.unit_norm,
    )


# -- commit --------------------------------------------------------------------------------------


class Assembler:
    """Gathers the chunks of shards, in whatever order they come."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[int, Encoded]] = {}

    def add(self, encoded: Encoded) -> list[Encoded] | None:
        """Take a chunk; return the whole of its shard, in order, when this was the last."""
        chunk = encoded.chunk
        parts = self._waiting.setdefault(chunk.shard, {})
        parts[chunk.start] = encoded  # the same chunk twice, from a task tried again, counts once
        if sum(len(part.chunk.bad) for part in parts.values()) < chunk.total:
            return None
        del self._waiting[chunk.shard]
        return [parts[start] for start in sorted(parts)]


def commit_shard(root: Root, images: str, entry: ShardEntry, parts: list[Encoded]) -> Commit:
    """Check the embeddings of a whole shard, and commit them.

    Raises ValueError for embeddings that are not finite and, unless their encoder keeps their
    length, of unit norm.
    """
    shard = ImageShard(images, entry.name, digest=entry.digest)
    shard.require_complete()
    bad = np.concatenate([part.chunk.bad for part in parts])
    image_embed = np.concatenate([part.image_embed for part in parts])
    text_embed = np.concatenate([part.text_embed for part in parts])
    for name, array in (("image", image_embed[~bad]), ("text", text_embed)):
        norms = np.linalg.norm(array, axis=1)
        if not np.all(norms < np.finfo(np.float16).max):  # as they are stored
            raise ValueError(f"{images}: shard {entry.name}: {name} embeddings are not finite")
        if parts[0].unit_norm and not np.all(np.abs(norms - 1) < NORM_TOLERANCE):
            raise ValueError(
                f"{images}: shard {entry.name}: {name} embeddings are not of unit norm"
            )
    with Attempt(root, entry.name) as attempt:
        write_embed_shard(
            attempt.path,
            entry.name,
            image_embed=image_embed,
            text_embed=text_embed,
            tokens=np.concatenate([part.chunk.tokens for part in parts]),
            keys=shard.keys,
            captions=[shard.caption(row) for row in range(len(shard))],
        )
        counts = {"embedded": int((~bad).sum())}
        if bad.any():
            counts["undecodable"] = int(bad.sum())
        return attempt.commit(num_samples=len(shard), counts=counts, config_hash=entry.digest)


def bad_keys(images: str, entry: ShardEntry, parts: list[Encoded]) -> list[str]:
    """Return the keys of the samples whose image cannot be decoded."""
    bad = np.concatenate([part.chunk.bad for part in parts])
    if not bad.any():
        return []
    keys = ImageShard(images, entry.name, digest=entry.digest).keys
    return [keys[row] for row in np.flatnonzero(bad)]


def encode_shard(
    encoder: FrozenClip, images: Snapshot, entry: ShardEntry, root: Root, batch_size: int
) -> Commit:
    """Do all three steps for one shard, here; ValueError if it cannot be read."""
    chunks = read_chunks(images.root, entry, encoder.preprocessing, batch_size)
    parts = [encode_chunk(encoder, chunk) for chunk in chunks]
    problems = [part.chunk.problem for part in parts if part.chunk.problem]
    if problems:
        raise ValueError(problems[0])
    return commit_shard(root, images.root, entry, parts)
