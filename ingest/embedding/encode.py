"""From image shards to embedding shards, in three steps that run wherever there is room.

    read_chunks     CPU: index, JPEG, the encoder's own preprocessing; uint8 pixels and tokens out
    encode_chunk    the encoder, on a GPU if there is one; embeddings out
    Assembler       gathers a shard's chunks; commit_shard checks and commits them

A chunk never crosses shards, so a shard's embeddings do not depend on the process that makes them.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch

from ingest.captions import FurtherCaptions
from ingest.fetching.decode import BAD_BYTES, stored_picture
from ingest.shards import (
    IMAGE_TOKENS,
    Attempt,
    Commit,
    ImageShard,
    ShardEntry,
    Snapshot,
    caption_columns,
    recover,
    write_embed_shard,
    write_manifest,
)
from ingest.store.maintenance import follow_images, record_derived
from ingest.store.storage import Root, absolute_root
from models.clip import FrozenClip, Preprocessing
from models.tokenizers import Tokenizer, TokenizerConfig

NORM_TOLERANCE = 1e-3


def open_embeds(
    root: Root,
    clip_spec: str,
    encoder: FrozenClip,
    images: Snapshot,
    captions: Sequence[str] = (),
    image_tokens: int = 1,
) -> None:
    """Create, or reopen, an embedding folder; another encoder or image folder is a ValueError.

    captions: columns of further captions, which are embedded, too; image_tokens: see
    `FrozenClip.encode_image`; ValueError for a number that the encoder's image tower has not.
    """
    _require_columns(images, captions)
    if image_tokens > 1:
        side = encoder.image_size
        encoder.encode_image(torch.zeros(1, 3, side, side, dtype=torch.uint8), image_tokens)
    fields = {
        "clip": clip_spec,
        "encoder_id": encoder.encoder_id,
        "embed_dim": encoder.embed_dim,
        "text_width": encoder.text_width,
        "context_length": encoder.context_length,
        "images": absolute_root(images.root),
        **({"captions": list(captions)} if captions else {}),
        **({IMAGE_TOKENS: image_tokens} if image_tokens > 1 else {}),
    }
    write_manifest(root, "embeds", fields)
    recover(root)
    record_derived(images.root, root)
    follow_images(images.root, root)


def _require_columns(images: Snapshot, captions: Sequence[str]) -> None:
    """Raise ValueError for a column that has no captions, or whose name can be none of a file."""
    known = caption_columns(images) if captions else []
    for column in captions:
        if column not in known or "/" in column or captions.count(column) > 1:
            raise ValueError(
                f"--captions: found {column!r}, expected columns of texts in {images.root}, each "
                f"once: {', '.join(known) or 'there are none'}"
            )


# -- read ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Neighbouring rows of one shard: first with pixels, then with embeddings in their place.

    start: its first row; total: rows of the shard. pixels: uint8 [n, 3, S, S]; tokens: int32
    [n, L]; bad: bool [n], rows whose image cannot be decoded, black here. image_embed, text_embed:
    float32 [n, E], of unit norm unless the encoder keeps their length, zero where the image is bad.
    image_embed has the k tokens of each image behind, [n, 1 + k, E], where they are asked for.
    further_tokens, further_embed: [m, L] and [m, E], of further captions, by row, then by column.
    problem: why the shard cannot be read; then there are no rows.
    """

    shard: str
    start: int = 0
    total: int = 0
    pixels: np.ndarray = field(default_factory=lambda: np.zeros((0, 3, 1, 1), np.uint8))
    tokens: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.int32))
    bad: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    image_embed: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.float32))
    text_embed: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.float32))
    further_tokens: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.int32))
    further_embed: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.float32))
    read_seconds: float = 0.0
    encode_seconds: float = 0.0
    problem: str = ""


def read_chunks(
    root: str,
    entry: ShardEntry,
    preprocessing: Preprocessing,
    size: int,
    captions: Sequence[str] = (),
) -> Iterator[Chunk]:
    """Yield the rows of an image shard, `size` at a time; an empty shard is one empty chunk.

    captions: columns of further captions. A shard that cannot be read is one chunk with a problem.
    """
    try:
        shard = ImageShard(root, entry.name, digest=entry.digest)
        shard.require_complete()
        for start in range(0, max(1, len(shard)), size):
            rows = range(start, min(start + size, len(shard)))
            yield _read_chunk(shard, rows, preprocessing, captions)
    except (ValueError, OSError) as error:
        yield Chunk(shard=entry.name, problem=str(error))


def _read_chunk(
    shard: ImageShard, rows: range, preprocessing: Preprocessing, columns: Sequence[str]
) -> Chunk:
    started, side = time.perf_counter(), preprocessing.image_size
    pixels = np.zeros((len(rows), 3, side, side), np.uint8)
    bad = np.zeros(len(rows), bool)
    for place, row in enumerate(rows):
        try:
            pixels[place] = preprocessing.pixels(stored_picture(shard.image_bytes(row)))
        except BAD_BYTES:
            bad[place] = True
    captions = [shard.caption(row) for row in rows]
    none = np.zeros((0, preprocessing.tokenizer.context_length), np.int32)
    lists = (shard.further_captions(column)[row] for row in rows for column in columns)
    further = [text for texts in lists for text in texts]
    return Chunk(
        shard=shard.name,
        start=rows.start,
        total=len(shard),
        pixels=pixels,
        tokens=_tokenizer(preprocessing.tokenizer)(captions) if captions else none,
        further_tokens=_tokenizer(preprocessing.tokenizer)(further) if further else none,
        bad=bad,
        read_seconds=time.perf_counter() - started,
    )


@lru_cache(maxsize=1)
def _tokenizer(config: TokenizerConfig) -> Tokenizer:
    return Tokenizer(config)


# -- encode --------------------------------------------------------------------------------------


def encode_chunk(encoder: FrozenClip, chunk: Chunk, num_tokens: int = 1) -> Chunk:
    """Replace a chunk's pixels by the embeddings of both towers; on a GPU in bfloat16.

    num_tokens: see `FrozenClip.encode_image`.
    """
    started, size = time.perf_counter(), len(chunk.bad)
    image_embed, text_embed = np.zeros((2, size, encoder.embed_dim), np.float32)
    if num_tokens > 1:
        image_embed = np.zeros((size, 1 + num_tokens, encoder.embed_dim), np.float32)
    further_embed = np.zeros((len(chunk.further_tokens), encoder.embed_dim), np.float32)
    device = next(encoder.parameters()).device

    def encode_text(tokens: np.ndarray) -> np.ndarray:
        trimmed = encoder.trimmed(torch.tensor(tokens)).to(device)
        return encoder.encode_text(trimmed)[0].cpu().numpy()

    if size:
        pixels = torch.tensor(chunk.pixels, device=device)  # Ray's arrays cannot be written to
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            image_embed = encoder.encode_image(pixels, num_tokens).cpu().numpy()
            text_embed = encode_text(chunk.tokens)
            for start in range(0, len(further_embed), size):  # as many at once as images
                tokens = chunk.further_tokens[start : start + size]
                further_embed[start : start + size] = encode_text(tokens)
        image_embed[chunk.bad] = 0
    return replace(
        chunk,
        pixels=chunk.pixels[:0],
        image_embed=image_embed,
        text_embed=text_embed,
        further_embed=further_embed,
        encode_seconds=time.perf_counter() - started,
    )


# -- commit --------------------------------------------------------------------------------------


class Assembler:
    """Gathers the encoded chunks of shards, in any order."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[int, Chunk]] = {}

    def add(self, chunk: Chunk) -> list[Chunk] | None:
        """Add a chunk; return all chunks of its shard, in order, when this was the last."""
        chunks = self._waiting.setdefault(chunk.shard, {})
        chunks[chunk.start] = chunk  # a chunk from a repeated task counts once
        if sum(len(each.bad) for each in chunks.values()) < chunk.total:
            return None
        del self._waiting[chunk.shard]
        return [chunks[start] for start in sorted(chunks)]


def commit_shard(
    root: Root,
    images: str,
    entry: ShardEntry,
    chunks: list[Chunk],
    *,
    unit_norm: bool = True,
    captions: Sequence[str] = (),
) -> tuple[Commit, list[str]]:
    """Check the embeddings of a complete shard, and commit them.

    captions: the columns that `read_chunks` read. Returns the commit, and the keys of the samples
    whose image cannot be decoded. Raises ValueError for a chunk with a problem, and for embeddings
    that are not finite or, if `unit_norm`, not of unit norm.
    """
    for chunk in chunks:
        if chunk.problem:
            raise ValueError(chunk.problem)
    shard = ImageShard(images, entry.name, digest=entry.digest)
    shard.require_complete()
    bad = np.concatenate([chunk.bad for chunk in chunks])
    image_embed = np.concatenate([chunk.image_embed for chunk in chunks])
    text_embed = np.concatenate([chunk.text_embed for chunk in chunks])
    further_embed = np.concatenate([chunk.further_embed for chunk in chunks])
    norms_of = [np.linalg.norm(each.image_embed, axis=-1) for each in chunks]  # tokens are many
    image_norms = np.concatenate(norms_of)[~bad]  # [n], or with tokens [n, 1 + k]
    has_tokens = image_norms.ndim == 2
    lengths = {
        "image": image_norms[:, 0] if has_tokens else image_norms,
        "image token": image_norms[:, 1:] if has_tokens else np.zeros(0),
        "text": np.linalg.norm(text_embed, axis=1),
        "further text": np.linalg.norm(further_embed, axis=1),
    }
    for name, norms in lengths.items():
        problem, of_unit_norm = "", unit_norm or name == "image token"
        if not np.all(norms < np.finfo(np.float16).max):  # as they are stored
            problem = "finite"
        elif of_unit_norm and not np.all(np.abs(norms - 1) < NORM_TOLERANCE):
            problem = "of unit norm"
        if problem:
            raise ValueError(f"{images}: shard {entry.name}: {name} embeddings are not {problem}")
    further = {column: shard.further_captions(column) for column in captions}
    further_tokens = np.concatenate([chunk.further_tokens for chunk in chunks])
    counts = np.array([[*map(len, each)] for each in further.values()], int)  # [columns, n]
    starts = (counts.T.cumsum() - counts.T.ravel()).reshape(counts.T.shape)
    with Attempt(root, entry.name) as attempt:
        for k, column in enumerate(further):
            texts = FurtherCaptions(starts[:, k], counts[k], further_embed, further_tokens)
            texts.write(attempt.path, f"{entry.name}.{column}")
        write_embed_shard(
            attempt.path,
            entry.name,
            image_embed=image_embed,
            text_embed=text_embed,
            tokens=np.concatenate([chunk.tokens for chunk in chunks]),
            keys=shard.keys,
            captions=[shard.caption(row) for row in range(len(shard))],
            further=further,
        )
        counts = {"embedded": int((~bad).sum())}
        if bad.any():
            counts["undecodable"] = int(bad.sum())
        commit = attempt.commit(num_samples=len(shard), counts=counts, config_hash=entry.digest)
    return commit, [shard.keys[row] for row in np.flatnonzero(bad)]


def encode_shard(
    encoder: FrozenClip,
    images: Snapshot,
    entry: ShardEntry,
    root: Root,
    batch_size: int,
    captions: Sequence[str] = (),
    image_tokens: int = 1,
) -> Commit:
    """Run all three steps for one shard in this process; ValueError if it cannot be read.

    captions: columns of further captions; image_tokens: see `FrozenClip.encode_image`.
    """
    chunks = read_chunks(images.root, entry, encoder.preprocessing, batch_size, captions)
    encoded = [encode_chunk(encoder, chunk, image_tokens) for chunk in chunks]
    return commit_shard(
        root, images.root, entry, encoded, unit_norm=encoder.unit_norm, captions=captions
    )[0]
