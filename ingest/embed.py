"""Precompute CLIP embeddings of image shards with Ray Data; each shard exactly once.

    python ingest/embed.py --images data/images --clip ViT-L-14:laion2b_s32b_b82k --out data/embeds
    python ingest/embed.py --images data/images --clip runs/clip --out data/embeds --num-actors 8
"""

from dataclasses import dataclass

from cluster.base.cli import (
    DONE,
    INCOMPLETE,
    parse,
    require_at_least,
    require_lasting,
    run_script,
)
from models.configs import token_side


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Encode every committed shard that has no embeddings yet."""

    images: str = "data/images"
    """folder of committed image shards, local or a URL such as s3://bucket/images"""
    clip: str = "runs/clip"
    """encoder: a run of training/clip.py, ARCHITECTURE:TAG, ARCHITECTURE:FILE, hf-hub:REPOSITORY or
    another of docs/encoders.md"""
    out: str = "data/embeds"
    """folder of the embeddings, local or a URL"""
    captions: tuple[str, ...] = ()
    """kept columns of the images' tables whose texts are further captions: embedded as well, for
    --data.captions of training"""
    image_tokens: int = 1
    """keep k = 4, 9, 16, ... tokens of the image tower's last map beside each embedding, which the
    diffusion prior may predict and the decoder may read; 1: the embedding alone, as in the paper"""
    num_actors: int = 1
    """parallel encoders; where there are GPUs each takes one, and there are at most as many; 0:
    this process encodes, without Ray"""
    max_actors: int | None = None
    """parallel encoders at most, where a cluster grows; None: num_actors"""
    num_readers: int | None = None
    """shards read and decoded in parallel, on CPUs; None: as many as keep the encoders busy"""
    num_threads: int | None = None
    """threads of an encoder on the CPU; None: the cores of its machine, shared by --num-actors"""
    batch_size: int = 256
    """samples a forward pass"""
    compile: bool = False
    """compile the image tower (torch.compile): minutes at the start, faster afterwards"""
    min_similarity: float | None = None
    """exclude samples from the published snapshot whose caption and image have a lower cosine"""
    dedup: float | None = None
    """exclude images from it whose cosine to an earlier image is at least this, such as .95"""
    metrics_port: int | None = None
    """serve Prometheus metrics on this loopback port; 0 = any free one"""
    fresh: bool = False
    """delete the embeddings first, if the folder is one of embeddings"""


def main(config: EmbedConfig) -> int:
    """Embed the pending shards, then publish the snapshot and its statistics."""
    from cluster.base.metrics import serve
    from ingest.embedding.encode import open_embeds
    from ingest.embedding.publish import Rules, publish_embeds
    from ingest.embedding.ray_encoders import EncoderPool, embed_shards, pending_shards
    from ingest.shards import load_snapshot, remove_data_folder
    from ingest.store.maintenance import record_failed
    from ingest.store.storage import absolute_root
    from models.convert.runs import absolute_spec, load_clip

    # The images, the encoder, and the folder of their embeddings
    _check(config)
    serve(config.metrics_port)
    out, clip = absolute_root(config.out), absolute_spec(config.clip)
    images = load_snapshot(absolute_root(config.images))
    if config.fresh:
        remove_data_folder(out, "embeds")
    encoder = load_clip(clip)
    if not encoder.unit_norm and (config.min_similarity, config.dedup) != (None, None):
        raise ValueError(
            f"--clip: found {config.clip} with --min-similarity or --dedup, expected an encoder "
            "whose embeddings are of unit norm"
        )
    open_embeds(out, clip, encoder, images, config.captions, config.image_tokens)

    # Embed each shard that has no embeddings
    pending = pending_shards(out, images)
    num_done = len(images.shards) - len(pending)
    print(f"embed: {len(images.shards)} shards, {num_done} done, {len(pending)} to go", flush=True)
    pool = EncoderPool(
        clip=clip,
        batch_size=config.batch_size,
        num_actors=config.num_actors,
        max_actors=config.max_actors,
        num_readers=config.num_readers,
        num_threads=config.num_threads,
        compile=config.compile,
        captions=config.captions,
        image_tokens=config.image_tokens,
    )
    result = embed_shards(out, pool, images, pending, encoder)
    record_failed(out, result.failed)
    for problem in result.failed.values():
        print(f"embed: failed: {problem}; recorded in {out}/_quarantine", flush=True)
    if result.undecodable:
        keys = ", ".join(result.undecodable[:3])
        more = f" and {len(result.undecodable) - 3} more" if len(result.undecodable) > 3 else ""
        print(f"embed: undecodable: {keys}{more}", flush=True)

    # Publish what is committed, without what the rules exclude
    rules = Rules(min_similarity=config.min_similarity, dedup=config.dedup)
    snapshot, excluded = publish_embeds(out, rules)
    for reason, number in sorted(excluded.items()):
        print(f"embed: left out of the snapshot: {number} {reason}", flush=True)
    count = f"{snapshot.num_samples} samples in {len(snapshot.shards)} shards"
    spent = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in result.seconds.items())
    print(f"embed: {count} -> {out}; this run, over all processes: {spent}", flush=True)
    return INCOMPLETE if result.failed else DONE


def _check(config: EmbedConfig) -> None:
    require_lasting("--out", config.out)
    require_at_least(
        config, num_actors=0, max_actors=1, num_readers=1, num_threads=1, batch_size=1
    )
    if config.max_actors is not None and config.max_actors < config.num_actors:
        raise ValueError(
            f"--max-actors: found {config.max_actors}, expected at least --num-actors, "
            f"{config.num_actors}"
        )
    token_side(config.image_tokens)
    if config.compile and config.image_tokens > 1:
        raise ValueError(
            "--compile: found true with --image-tokens, expected false: the tower that gives its "
            "last map is not compiled"
        )
    for name, least in (("min_similarity", -1.0), ("dedup", 0.0)):
        value = getattr(config, name)
        if value is not None and not least <= value <= 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: found {value}, expected a cosine from {least:g} to 1")


if __name__ == "__main__":
    run_script(lambda: main(parse(EmbedConfig, check=_check)))
