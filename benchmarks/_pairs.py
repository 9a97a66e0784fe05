"""Small sets of pairs as shards, for benchmarks that train: the drawn set, and the user's own."""

import io
from pathlib import Path

from PIL import Image

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
