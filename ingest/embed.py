"""Precompute CLIP embeddings of image shards with Ray Data; each shard exactly once.

python ingest/embed.py --images data/images --clip ViT-L-14:laion2b_s32b_b82k --out data/embeds
python ingest/embed.py --images data/images --clip runs/clip --out data/embeds
"""

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli import DONE, INCOMPLETE, parse, run_script

if TYPE_CHECKING:
    from ingest.shards import ShardEntry, Snapshot


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Encode every committed shard that has no embeddings yet."""

    images: str = "data/images"
    """folder of committed image shards"""
    clip: str = "runs/clip"
    """encoder: a run of training/clip.py, or ARCHITECTURE:TAG, ARCHITECTURE:random,
    ARCHITECTURE:FILE.safetensors"""
    out: str = "data/embeds"
    """folder of the embeddings"""
    num_actors: int = 1
    """encoders side by side; each takes a GPU where there is one"""
    num_threads: int = 2
    """threads of an encoder on the CPU"""
    batch_size: int = 256
    """samples a forward pass"""
    metrics_port: int | None = None
    """serve Prometheus metrics on this loopback port; 0 = any free one"""
    fresh: bool = False
    """delete the embeddings, if the folder is ours, and start over"""


class Encoder:
    """A Ray Data actor: keeps one CLIP loaded and turns shard names into committed shards."""

    def __init__(self, config: EmbedConfig, images: "Snapshot") -> None:
        import torch

        from models.clip import load_clip

        torch.set_num_threads(config.num_threads)
        self._config, self._images = config, images
        self._encoder = load_clip(config.clip)
        if torch.cuda.is_available():
            self._encoder.cuda()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from ingest.encode import encode_shard

        entries = {entry.name: entry for entry in self._images.shards}
        found: dict[str, list[Any]] = {"shard": [], "num_samples": [], "error": []}
        for name in batch["shard"]:
            commit, error = None, ""
            try:
                size = self._config.batch_size
                commit = encode_shard(
                    self._encoder, self._images, entries[name], Path(self._config.out), size
                )
            except (
                ValueError,
                OSError,
            ) as problem:  # a damaged shard is named and counted; the rest goes on
                error = str(problem)
            found["shard"].append(str(name))
            found["num_samples"].append(commit.num_samples if commit else 0)
            found["error"].append(error)
        return found


def main(config: EmbedConfig) -> int:
    """Embed what is pending, then publish the snapshot and its statistics."""
    from cluster.metrics import serve
    from cluster.session import ensure_ray
    from ingest.encode import finish_embeds, open_embeds
    from ingest.shards import load_snapshot, remove_data_folder
    from models.clip import load_clip

    started = time.perf_counter()
    serve(config.metrics_port)
    out = Path(config.out).absolute()
    clip = str(Path(config.clip).absolute()) if Path(config.clip).is_dir() else config.clip
    images = load_snapshot(Path(config.images).absolute())
    if config.fresh and out.exists():
        remove_data_folder(out, "embeds")
    encoder = load_clip(clip)
    open_embeds(out, clip, encoder, images)
    done = _finished(out, images)
    pending = [entry for entry in images.shards if entry.name not in done]
    print(
        f"embed: {len(images.shards)} shards, {len(images.shards) - len(pending)} done, "
        f"{len(pending)} to go"
    )
    failed = []
    if pending:
        ensure_ray()
        absolute = EmbedConfig(**{**vars(config), "out": str(out), "clip": clip})
        failed = _embed(absolute, images, pending)
    for line in failed:
        print(f"embed: failed: {line}")
    snapshot = finish_embeds(out)
    seconds = time.perf_counter() - started
    print(
        f"embed: {snapshot.num_samples} samples in {len(snapshot.shards)} shards, {seconds:.1f} "
        f"s -> {out}"
    )
    return INCOMPLETE if failed else DONE


def _finished(out: Path, images: "Snapshot") -> set[str]:
    """Return the shards that need no work; what is damaged, or of other images, is withdrawn."""
    from ingest.shards import Commit, committed_names, withdraw_damaged

    digests = {entry.name: entry.digest for entry in images.shards}

    def judge(commit: Commit) -> str | None:
        known = digests.get(commit.shard, commit.config_hash)
        return None if commit.config_hash == known else "its images have changed"

    for name, problem in withdraw_damaged(out, judge).items():
        print(f"embed: shard {name} is made again: {problem}")
    return set(committed_names(out))


def _embed(config: EmbedConfig, images: "Snapshot", pending: "list[ShardEntry]") -> list[str]:
    """Run the actors over the pending shards; returns what failed, a line a shard."""
    import ray
    import ray.data
    from rich.progress import track

    from cluster.metrics import counter

    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts images
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it narrates each plan
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= config.num_actors else 0
    shards = ray.data.from_items(
        [{"shard": entry.name} for entry in pending], override_num_blocks=len(pending)
    )
    results = shards.map_batches(
        Encoder,
        fn_constructor_args=(config, images),
        batch_size=1,
        num_gpus=gpus,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=config.num_actors),
    )
    failed = []
    quiet = not os.isatty(1)
    for row in track(results.iter_rows(), description="embed", total=len(pending), disable=quiet):
        counter("minidalle2_embed_shards_total").inc(1)
        counter("minidalle2_embed_images_total").inc(int(row["num_samples"]))
        if row["error"]:
            failed.append(row["error"])
        elif quiet:
            print(f"embed: shard {row['shard']}: {row['num_samples']} samples", flush=True)
    return failed


if __name__ == "__main__":
    run_script(lambda: main(parse(EmbedConfig)))
