"""Precompute CLIP embeddings of image shards with Ray Data; each shard exactly once.

examples:
  python ingest/embed.py --images data/images --clip ViT-L-14:laion2b_s32b_b82k --out data/embeds
  python ingest/embed.py --images data/images --clip runs/clip --out data/embeds --num-actors 8
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.base.cli import DONE, INCOMPLETE, parse, require_lasting, run_script
from cluster.base.machine import threads_for

if TYPE_CHECKING:
    from ingest.shards import ShardEntry, Snapshot
    from models.clip import FrozenClip, Preprocessing


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Encode every committed shard that has no embeddings yet."""

    images: str = "data/images"
    """folder of committed image shards, local or a URL such as s3://bucket/images"""
    clip: str = "runs/clip"
    """encoder: a run of training/clip.py, or ARCHITECTURE:TAG, ARCHITECTURE:random,
    ARCHITECTURE:FILE.safetensors"""
    out: str = "data/embeds"
    """folder of the embeddings, local or a URL"""
    num_actors: int = 1
    """encoders side by side; where there are GPUs each takes one, and there are no more of them"""
    max_actors: int | None = None
    """encoders side by side at most, where a cluster grows; None: num_actors"""
    num_readers: int | None = None
    """shards read and decoded side by side, on CPUs; None: as many as keep the encoders busy"""
    num_threads: int | None = None
    """threads of an encoder on the CPU; None: the cores of its machine, shared by --num-actors"""
    batch_size: int = 256
    """samples a forward pass"""
    compile: bool = False
    """compile the image tower (torch.compile): minutes at the start, faster afterwards"""
    min_similarity: float | None = None
    """leave samples out of the published snapshot whose caption and image have a lesser cosine"""
    dedup: float | None = None
    """leave images out of it that have this cosine, or more, to one before them, such as .95"""
    metrics_port: int | None = None
    """serve Prometheus metrics on this loopback port; 0 = any free one"""
    fresh: bool = False
    """delete the embeddings, if the folder is ours, and start over"""


class Reader:
    """A Ray Data task: turns the entry of a shard into rows of chunks."""

    def __init__(self, root: str, how: "Preprocessing", size: int) -> None:
        self._root, self._how, self._size = root, how, size

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        from ingest.embedding.encode import read_chunks
        from ingest.shards import ShardEntry

        for chunk in read_chunks(self._root, ShardEntry(**row), self._how, self._size):
            yield vars(chunk)


class Encoder:
    """A Ray Data actor: keeps one CLIP loaded and turns pixels into embeddings."""

    def __init__(self, config: EmbedConfig) -> None:
        import torch

        from models.clip import load_clip

        torch.set_num_threads(threads_for(config.num_threads, config.num_actors))
        self._encoder = load_clip(config.clip)
        if torch.cuda.is_available():
            self._encoder.cuda()
        if config.compile:
            self._encoder.clip.visual = torch.compile(self._encoder.clip.visual)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from ingest.embedding.encode import Chunk, encode_chunk

        encoded = encode_chunk(self._encoder, Chunk(**row))
        embeds = {"image_embed": encoded.image_embed, "text_embed": encoded.text_embed}
        return {**vars(encoded.chunk), **embeds, "encode_seconds": encoded.seconds}


@dataclass
class Outcome:
    """What a run came to. seconds: of all processes, by step; bad: keys of undecodable samples."""

    failed: dict[str, str] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))


STEPS = ("read", "encode", "commit")


def main(config: EmbedConfig) -> int:
    """Embed what is pending, then publish the snapshot and its statistics."""
    from cluster.base.metrics import serve
    from ingest.embedding.encode import open_embeds
    from ingest.embedding.publish import Rules, publish_embeds
    from ingest.shards import load_snapshot, remove_data_folder
    from ingest.store.storage import absolute_root
    from models.clip import absolute_spec, load_clip

    _check(config)
    serve(config.metrics_port)
    out = absolute_root(config.out)
    clip = absolute_spec(config.clip)
    images = load_snapshot(absolute_root(config.images))
    if config.fresh:
        remove_data_folder(out, "embeds")
    encoder = load_clip(clip)
    if not encoder.unit_norm and (config.min_similarity, config.dedup) != (None, None):
        raise ValueError(
            f"--clip: found {config.clip} with --min-similarity or --dedup, expected an encoder "
            "whose embeddings are of unit norm"
        )
    open_embeds(out, clip, encoder, images)
    done = _finished(out, images)
    pending = [entry for entry in images.shards if entry.name not in done]
    print(f"embed: {len(images.shards)} shards, {len(done)} done, {len(pending)} to go", flush=True)
    outcome = Outcome()
    if pending:
        absolute = EmbedConfig(**{**vars(config), "out": out, "clip": clip})
        outcome = _embed(absolute, images, pending, encoder)
    _quarantine(out, outcome.failed)
    if outcome.bad:
        more = f" and {len(outcome.bad) - 3} more" if len(outcome.bad) > 3 else ""
        print(f"embed: undecodable: {', '.join(outcome.bad[:3])}{more}", flush=True)
    rules = Rules(min_similarity=config.min_similarity, dedup=config.dedup)
    snapshot, excluded = publish_embeds(out, rules)
    for reason, number in sorted(excluded.items()):
        print(f"embed: left out of the snapshot: {number} {reason}", flush=True)
    count = f"{snapshot.num_samples} samples in {len(snapshot.shards)} shards"
    spent = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in outcome.seconds.items())
    print(f"embed: {count} -> {out}; this run, over all processes: {spent}", flush=True)
    return INCOMPLETE if outcome.failed else DONE


def _quarantine(out: str, failed: dict[str, str]) -> None:
    """Name the shards that this run could not embed, here and in records; drop former records.

    <embeds>/_quarantine/<shard>.json   {"problem"}: the next run tries it again
    """
    from cluster.base.files import canonical_json
    from ingest.store.storage import storage_of

    storage = storage_of(out)
    for name in storage.names("_quarantine"):
        # what --verify set aside is in folders there, for whoever wants to look
        if name.endswith(".json") and name.removesuffix(".json") not in failed:
            storage.delete(f"_quarantine/{name}")
    for shard, problem in failed.items():
        storage.replace(f"_quarantine/{shard}.json", canonical_json({"problem": problem}))
        print(f"embed: failed: {problem}; recorded in {out}/_quarantine", flush=True)


def _check(config: EmbedConfig) -> None:
    require_lasting("--out", config.out)
    for name in ("num_actors", "max_actors", "num_readers", "num_threads", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: found {value}, expected 1 or more")
    if config.max_actors is not None and config.max_actors < config.num_actors:
        raise ValueError(
            f"--max-actors: found {config.max_actors}, expected at least --num-actors, "
            f"{config.num_actors}"
        )
    for name, least in (("min_similarity", -1.0), ("dedup", 0.0)):
        value = getattr(config, name)
        if value is not None and not least <= value <= 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: found {value}, expected a cosine from {least:g} to 1")


def _finished(out: str, images: "Snapshot") -> set[str]:
    """Return the shards that need no work; what is damaged, or of other images, is withdrawn."""
    from ingest.shards import Commit, committed_names, withdraw_damaged

    digests = {entry.name: entry.digest for entry in images.shards}

    def judge(commit: Commit) -> str | None:
        known = digests.get(commit.shard, commit.config_hash)
        return None if commit.config_hash == known else "its images have changed"

    for name, problem in withdraw_damaged(out, judge).items():
        print(f"embed: shard {name} is made again: {problem}", flush=True)
    return set(committed_names(out))


def _embed(
    config: EmbedConfig,
    images: "Snapshot",
    pending: "list[ShardEntry]",
    encoder: "FrozenClip",
) -> Outcome:
    """Send the pending shards through readers and encoders, and commit what comes back."""
    from cluster.base.progress import progress, show_place
    from cluster.base.ray_session import ending_with_own_node, ensure_ray
    from ingest.embedding.encode import Assembler, Chunk, Encoded

    ensure_ray()
    entries = {entry.name: entry for entry in pending}
    assembler, outcome = Assembler(), Outcome()
    total = sum(entry.num_samples for entry in pending)
    waiting = len(pending)
    show_place("embed", config.out, waiting)
    with ending_with_own_node(), progress("embed", total, unit="images") as advance:
        for row in _encoded_rows(config, images, pending, encoder).iter_rows():
            embeds = {name: row.pop(name) for name in ("image_embed", "text_embed")}
            seconds, chunk = row.pop("encode_seconds"), Chunk(**row)
            outcome.seconds["read"] += chunk.seconds
            outcome.seconds["encode"] += seconds
            encoded = Encoded(
                chunk=chunk, seconds=seconds, unit_norm=encoder.unit_norm, **embeds
            )
            whole = assembler.add(encoded)
            if whole is not None:
                _settle(config.out, images.root, entries[chunk.shard], whole, outcome)
                waiting -= 1
                show_place("embed", config.out, waiting)
            advance(len(chunk.bad), note=f"{len(outcome.failed)} shards failed")
    return outcome


def _encoded_rows(
    config: EmbedConfig,
    images: "Snapshot",
    pending: "list[ShardEntry]",
    encoder: "FrozenClip",
) -> Any:
    """Return the lazy Ray data set of all pending chunks, encoded."""
    import ray
    import ray.data

    from cluster.base.ray_session import group_resources

    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts images
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it narrates each plan
    num_actors, gpus = _encoders(config, int(ray.cluster_resources().get("GPU", 0)))
    read = Reader(images.root, encoder.preprocessing, config.batch_size)
    rows = [vars(entry) for entry in pending]
    shards = ray.data.from_items(rows, override_num_blocks=len(rows))
    side = encoder.image_size
    memory = 4 * 3 * side * side * config.batch_size  # a few chunks; and unlike the encoder's
    # resources, or Ray Data would run readers inside the encoders' processes
    chunks = shards.flat_map(
        read,
        num_cpus=1,
        memory=memory,
        concurrency=config.num_readers,
        resources=group_resources("cpu_group"),
    )
    encode: Any = Encoder  # an actor's class, where the annotations know functions only
    return chunks.map(
        encode,
        fn_constructor_args=(config,),
        num_gpus=gpus,
        num_cpus=1,
        resources=group_resources("gpu_group"),
        compute=ray.data.ActorPoolStrategy(
            min_size=num_actors,
            max_size=config.max_actors or num_actors,
            initial_size=num_actors,
        ),
    )


def _encoders(config: EmbedConfig, gpus_there: int) -> tuple[int, int]:
    """Return how many encoders begin, and the GPUs that each takes, 1 or 0.

    Where there are GPUs, two encoders would crowd on one, or one be slow on a CPU; so there are as
    many encoders as GPUs, and that is said. Groups of nodes start GPUs as they are asked for.
    """
    from cluster.base.ray_session import group_resources

    if group_resources("gpu_group"):
        return config.num_actors, 1
    if 0 < gpus_there < config.num_actors:
        wait = f"; up to {config.max_actors} as GPUs come" if config.max_actors else ""
        print(
            f"embed: {gpus_there} of --num-actors {config.num_actors} encoders, one for each GPU "
            f"that there is{wait}",
            flush=True,
        )
    return min(config.num_actors, gpus_there or config.num_actors), min(gpus_there, 1)


def _settle(out: str, images: str, entry: "ShardEntry", parts: list[Any], outcome: Outcome) -> None:
    """Commit a whole shard, or put down why it cannot be."""
    from cluster.base.metrics import counter
    from ingest.embedding.encode import bad_keys, commit_shard

    started = time.perf_counter()
    problem = next((part.chunk.problem for part in parts if part.chunk.problem), "")
    try:
        if problem:
            raise ValueError(problem)
        commit = commit_shard(out, images, entry, parts)
    except ValueError as error:  # this shard's fault: it is named and counted, the rest goes on
        outcome.failed[entry.name] = str(error)
        counter("minidalle2_embed_failed_shards_total").inc()
        return
    outcome.bad += bad_keys(images, entry, parts)
    outcome.seconds["commit"] += time.perf_counter() - started
    counter("minidalle2_embed_shards_total").inc()
    counter("minidalle2_embed_images_total").inc(commit.num_samples)


if __name__ == "__main__":
    run_script(lambda: main(parse(EmbedConfig, check=_check)))
