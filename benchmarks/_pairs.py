"""Small sets of pairs as shards, for benchmarks that train: the drawn set, and the user's own."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from models.names import FINAL_NAME

ROOT = Path(__file__).resolve().parent.parent
EMOJI = Path(__file__).resolve().parents[2] / "shared" / "data" / "fluent_emoji_128.parquet"
SIZE = 64  # px
PER_SHARD = 500


def write_sets(
    root: Path, pairs: Path | None, num_train: int, num_test: int, seed: int = 0
) -> None:
    """Write `root`/train and `root`/test as image shards.

    pairs: a Parquet file of images and captions, split by base name; None: the drawn set, whose
    test set holds out combinations of shape, colour and relation. seed: another one draws other
    scenes, and splits a file otherwise.
    """
    from cluster.demo_data import drawn_pairs, given_pairs, read_pairs

    if pairs is None:
        sets = drawn_pairs(root / "pairs", num_train, num_test // 3, seed)
    else:
        salt = f"{seed} " if seed else ""
        sets = given_pairs(root / "pairs", pairs, num_train + num_test, salt)
    for name, path in sets.items():
        _write_shards(root / name, [(row["image"], row["caption"]) for row in read_pairs(path)])


def embedded_sets(
    root: Path,
    pairs: Path | None,
    num_train: int,
    num_test: int,
    clip_steps: int,
    num_threads: int | None = None,
    seed: int = 0,
) -> None:
    """Make what `trained_clip` does, and embed both sets as `root`/train_embeds and
    `root`/test_embeds; not again."""
    from training.data.demo_data import embed_here

    trained_clip(root, pairs, num_train, num_test, clip_steps, num_threads, seed)
    for split in ("train", "test"):
        if not (root / f"{split}_embeds" / "_snapshots").exists():
            embed_here(str(root / split), root / f"{split}_embeds", str(root / "clip"))


def trained_clip(
    root: Path,
    pairs: Path | None,
    num_train: int,
    num_test: int,
    clip_steps: int,
    num_threads: int | None = None,
    seed: int = 0,
) -> None:
    """Write `root`/train and `root`/test as `write_sets` does, and train the demo's CLIP on the
    former as `root`/clip; not again.

    num_threads: of the training, None for all cores.
    """
    if (root / "clip" / FINAL_NAME).exists():
        return
    for name in ("pairs", "train", "test", "clip"):
        shutil.rmtree(root / name, ignore_errors=True)  # of a run that was ended
    write_sets(root, pairs, num_train, num_test, seed)
    threads = [] if num_threads is None else ["--train.num-threads", str(num_threads)]
    command = [
        sys.executable, str(ROOT / "training" / "clip.py"), "--preset", "demo",
        "--images", str(root / "train"), "--run", str(root / "clip"), "--train.num-workers", "0",
        "--block-size", "1" if pairs else "4", "--train.num-steps", str(clip_steps),
        "--train.seed", str(seed), *threads,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600)


def _write_shards(root: Path, rows: list[tuple[bytes, str]]) -> None:
    from ingest.shards import (
        Attempt,
        Sample,
        publish_snapshot,
        shard_name,
        write_image_shard,
        write_manifest,
    )  # fmt: skip

    write_manifest(root, "images", {})
    for start in range(0, len(rows), PER_SHARD):
        name, of_shard = shard_name(start // PER_SHARD), rows[start : start + PER_SHARD]
        samples = [
            Sample(key=f"{start + i:09d}", image_bytes=_jpeg(image), caption=caption, json={})
            for i, (image, caption) in enumerate(of_shard)
        ]
        records = [{"key": sample.key, "status": "success"} for sample in samples]
        with Attempt(root, name) as attempt:
            write_image_shard(attempt.path, name, samples, records)
            attempt.commit(num_samples=len(of_shard), counts={}, config_hash="")
    publish_snapshot(root)


def _jpeg(image: bytes) -> bytes:
    """Return a picture over white, at `SIZE` px, as JPEG."""
    picture = Image.open(io.BytesIO(image)).convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    file = io.BytesIO()
    white.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()
