"""The embedding of many shards by Ray Data: readers on CPUs, encoders on GPUs, commits here."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from cluster.base.files import Json
from cluster.base.machine import threads_for
from cluster.base.metrics import counter
from cluster.base.progress import progress, show_place
from cluster.base.ray_session import ending_with_own_node, ensure_ray, group_resources
from ingest.embedding.encode import Assembler, Chunk, commit_shard, encode_chunk, read_chunks
from ingest.shards import Commit, ShardEntry, Snapshot, committed_names, withdraw_damaged
from models.clip import FrozenClip, Preprocessing
from models.convert.runs import load_clip


@dataclass(frozen=True, kw_only=True)
class EncoderPool:
    """The encoders of `clip`, and the readers that prepare chunks of `batch_size` samples for them.

    num_actors: encoders at the start, 0 for one in this process; max_actors: as a cluster grows,
    None = num_actors. num_readers: None = as many as keep the encoders busy. num_threads: of an
    encoder on the CPU, None = an equal part of its machine's cores. captions: columns of further
    captions; image_tokens: see `FrozenClip.encode_image`.
    """

    clip: str
    batch_size: int
    num_actors: int = 1
    max_actors: int | None = None
    num_readers: int | None = None
    num_threads: int | None = None
    compile: bool = False
    captions: tuple[str, ...] = ()
    image_tokens: int = 1

    def actors(self, num_gpus: int) -> tuple[int, int]:
        """Return the number of encoders at the start, and of GPUs that each takes, 1 or 0.

        Two encoders would share a GPU badly, and one on a CPU would be slow: on a cluster with
        GPUs there are at most as many encoders as GPUs, which is printed. Groups of nodes start
        GPUs on demand.
        """
        if group_resources("gpu_group"):
            return self.num_actors, 1
        if 0 < num_gpus < self.num_actors:
            wait = f"; up to {self.max_actors} as GPUs come" if self.max_actors else ""
            print(
                f"embed: {num_gpus} of --num-actors {self.num_actors} encoders, one for each GPU "
                f"that there is{wait}",
                flush=True,
            )
        return min(self.num_actors, num_gpus or self.num_actors), min(num_gpus, 1)


class ChunkReader:
    """A Ray Data task: turns the entry of a shard into rows of chunks."""

    def __init__(self, root: str, preprocessing: Preprocessing, pool: EncoderPool) -> None:
        self._root, self._preprocessing, self._pool = root, preprocessing, pool

    def __call__(self, row: Json) -> Iterator[Json]:
        """Yield the chunks of the shard `row`."""
        size, captions = self._pool.batch_size, self._pool.captions
        shard = ShardEntry(**row)
        for chunk in read_chunks(self._root, shard, self._preprocessing, size, captions):
            yield vars(chunk)


def prepared(encoder: FrozenClip, pool: EncoderPool) -> FrozenClip:
    """Return an encoder as the pool's are, where this process computes; sets its threads."""
    torch.set_num_threads(threads_for(pool.num_threads, pool.num_actors))
    if torch.cuda.is_available():
        encoder.cuda()
    if pool.compile:
        encoder.clip.visual = cast(Any, torch.compile(encoder.clip.visual))
    return encoder


class ClipEncoder:
    """A Ray Data actor: keeps one CLIP loaded and turns pixels into embeddings."""

    def __init__(self, pool: EncoderPool) -> None:
        self._encoder = prepared(load_clip(pool.clip), pool)
        self._num_tokens = pool.image_tokens

    def __call__(self, row: Json) -> Json:
        """Encode the chunk `row`."""
        return vars(encode_chunk(self._encoder, Chunk(**row), self._num_tokens))


def cpu_share(num_actors: int) -> float:
    """Return the CPUs of a reader and of an encoder: 1, and less where the encoders would leave
    none for a reader, for which they would wait for ever; not on a cluster that grows."""
    import ray

    share = ray.cluster_resources().get("CPU", 1.0) / (num_actors + 1)
    return 1.0 if group_resources("cpu_group") else min(1.0, math.floor(share * 1e4) / 1e4)


def encoded_chunks(
    pool: EncoderPool, images: Snapshot, pending: Sequence[ShardEntry], encoder: FrozenClip
) -> Iterator[Chunk]:
    """Yield the encoded chunks of the pending shards as they come, from Ray's readers and actors;
    without actors from `encoder`, which is the pool's.
    """
    if not pool.num_actors:
        prepared(encoder, pool)
        for entry in pending:
            for chunk in read_chunks(
                images.root, entry, encoder.preprocessing, pool.batch_size, pool.captions
            ):
                yield encode_chunk(encoder, chunk, pool.image_tokens)
        return
    import ray
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts images
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it describes each plan
    num_actors, gpus = pool.actors(int(ray.cluster_resources().get("GPU", 0)))
    cpus = cpu_share(num_actors)
    rows = [vars(entry) for entry in pending]
    shards = ray.data.from_items(rows, override_num_blocks=len(rows))
    chunks = shards.flat_map(
        ChunkReader(images.root, encoder.preprocessing, pool),
        num_cpus=cpus,
        # A few chunks. It also differs from the encoders' resources; with equal ones Ray Data would
        # run readers inside the encoders' processes.
        memory=4 * 3 * encoder.image_size**2 * pool.batch_size,
        concurrency=pool.num_readers,
        resources=group_resources("cpu_group"),
    )
    encoded = chunks.map(
        cast(Any, ClipEncoder),  # an actor's class, where Ray's annotation has functions only
        fn_constructor_args=(pool,),
        num_gpus=gpus,
        num_cpus=cpus,
        resources=group_resources("gpu_group"),
        compute=ray.data.ActorPoolStrategy(
            min_size=num_actors,
            max_size=pool.max_actors or num_actors,
            initial_size=num_actors,
        ),
    )
    for row in encoded.iter_rows():
        yield Chunk(**row)


def pending_shards(out: str, images: Snapshot) -> list[ShardEntry]:
    """Return the shards without embeddings, after withdrawing damaged and outdated embeddings."""
    digests = {entry.name: entry.digest for entry in images.shards}

    def outdated(commit: Commit) -> str | None:
        current = digests.get(commit.shard, commit.config_hash)
        return None if commit.config_hash == current else "its images have changed"

    for name, problem in withdraw_damaged(out, outdated).items():
        print(f"embed: shard {name} is made again: {problem}", flush=True)
    done = set(committed_names(out))
    return [entry for entry in images.shards if entry.name not in done]


@dataclass(kw_only=True)
class EmbedResult:
    """The result of a run. failed: problem by shard; undecodable: keys; seconds: over all
    processes, by step."""

    failed: dict[str, str] = field(default_factory=dict)
    undecodable: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"read": 0.0, "encode": 0.0, "commit": 0.0}
    )


def embed_shards(
    out: str,
    pool: EncoderPool,
    images: Snapshot,
    pending: Sequence[ShardEntry],
    encoder: FrozenClip,
) -> EmbedResult:
    """Encode the pending shards, and commit each when its last chunk has come."""
    result, assembler = EmbedResult(), Assembler()
    if not pending:
        return result
    watch = nullcontext()
    if pool.num_actors:
        ensure_ray()
        watch = ending_with_own_node()
    entries = {entry.name: entry for entry in pending}
    total, waiting = sum(entry.num_samples for entry in pending), len(pending)
    show_place("embed", out, waiting)
    with watch, progress("embed", total, unit="images") as advance:
        for chunk in encoded_chunks(pool, images, pending, encoder):
            result.seconds["read"] += chunk.read_seconds
            result.seconds["encode"] += chunk.encode_seconds
            chunks = assembler.add(chunk)
            if chunks is not None:
                started, entry = time.perf_counter(), entries[chunk.shard]
                try:
                    commit, undecodable = commit_shard(
                        out, images.root, entry, chunks,
                        unit_norm=encoder.unit_norm, captions=pool.captions,
                    )  # fmt: skip
                except ValueError as error:  # this shard's fault: the others continue
                    result.failed[entry.name] = str(error)
                    counter("minidalle2_embed_failed_shards_total").inc()
                else:
                    result.undecodable += undecodable
                    result.seconds["commit"] += time.perf_counter() - started
                    counter("minidalle2_embed_shards_total").inc()
                    counter("minidalle2_embed_images_total").inc(commit.num_samples)
                waiting -= 1
                show_place("embed", out, waiting)
            advance(len(chunk.bad), note=f"{len(result.failed)} shards failed")
    return result
