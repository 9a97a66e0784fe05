"""What the installed judge sees: FD in the space of `efficientnet_lite0` of damaged images.

    python benchmarks/judge.py                                        # drawn shapes, some 3 minutes
    python benchmarks/judge.py --pairs fluent_emoji_128.parquet       # these too

Half of the images is the reference. The other half is compared with it as it is, blurred, with
noise, and with only some of its images, each repeated.
"""

import io
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _common import BenchmarkConfig, run_benchmark
from PIL import Image, ImageFilter

BLUR, NOISE, KEPT = (0.5, 1.0, 2.0), (4.0, 10.0, 40.0), (0.5, 0.25, 0.1)
SIDE = 64  # px


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """The images."""

    pairs: str = ""
    """Parquet file with a column of image bytes, to measure beside the drawn set"""
    num_images: int = 300
    """of each half"""


def main(config: Config) -> int:
    """Print distances, and the rate of extraction, as one JSON object a set."""
    import torch

    from eval.distances.frechet import Moments, Reference
    from eval.features.extractors import efficientnet_spec, extract
    from ingest.shapes import make_pairs

    if config.pairs and not Path(config.pairs).is_file():
        raise ValueError(f"--pairs: found no file {config.pairs}, expected one of Parquet")
    torch.set_num_threads(1)
    extractor = efficientnet_spec().build("cpu")
    count = config.num_images
    drawn = [make_pairs(count, seed, "seen") for seed in (0, 1)]
    sets = {"drawn": [[pair.image_bytes for pair in half] for half in drawn]}
    if config.pairs:
        import pyarrow.parquet as pq

        column = pq.read_table(config.pairs, columns=["image"])["image"].to_pylist()
        rows = np.random.default_rng(0).permutation(len(column))
        sets["pairs"] = [[column[i] for i in rows[k * count : (k + 1) * count]] for k in (0, 1)]
    for name, halves in sets.items():
        images, others = ([picture(data) for data in half] for half in halves)
        start = time.process_time()
        features = extract(extractor, images)
        rate = count / (time.process_time() - start)
        reference = Reference.of(Moments.of(extract(extractor, others)))
        found = {"as they are": features}
        for level in BLUR:
            blurred = (image.filter(ImageFilter.GaussianBlur(level)) for image in images)
            found[f"blur {level} px"] = extract(extractor, blurred)
        for level in NOISE:
            rng = np.random.default_rng(0)
            noisy = (with_noise(image, level, rng) for image in images)
            found[f"noise {level}"] = extract(extractor, noisy)
        for share in KEPT:
            found[f"share kept {share}"] = np.resize(features[: int(count * share)], features.shape)
        distances = {key: reference.distance(Moments.of(value)) for key, value in found.items()}
        rounded = {key: round(value, 1) for key, value in distances.items()}
        print(json.dumps({"set": name, "n": count, "images_per_cpu_second": rate, "fd": rounded}))
    return 0


def picture(data: bytes) -> Image.Image:
    """Return image bytes over white, at the side of the samples."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def with_noise(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """Add normal noise of deviation `level` of 255 to each channel."""
    noisy = np.asarray(image, float) + rng.normal(0, level, (*image.size[::-1], 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    run_benchmark(Config, main, num_images=20)
