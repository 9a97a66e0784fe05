"""Evaluation: images/s of extraction and seconds of the distance, beside pytorch-fid and
torch-fidelity.

    python benchmarks/fid.py        # some fifteen minutes on two cores

All extract pool-3 features of the same pictures, already decoded, by the same weights, drawn at
random, in turn, each in this process with one thread. Each with its own resize: pytorch-fid's
bilinear, the others' TensorFlow 1's. The distance is of two sets' covariances at D = 2,048: ours by
Cholesky or eigh, theirs by scipy's sqrtm, and torch-fidelity's by the eigenvalues of the product.
Memory is the growth of a process of its own that streams features from disk into a distance.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import BenchmarkConfig, run_benchmark

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the comparison."""

    num_images: int = 64
    """pictures of a pass of extraction"""
    image_size: int = 256
    """their side in px"""
    batch_size: int = 32
    """pictures a forward pass"""
    repeats: int = 5
    """passes of each, in turn"""
    width: int = 2048
    """features of an image, for the distance"""
    num_features: int = 10_000
    """images of each side of the distance"""
    memory_counts: tuple[int, int] = (10_000, 50_000)
    """images a side whose distances' peak memory is compared"""
    skip_memory: bool = False
    """leave the memory out"""
    measure_memory: str = ""
    """internal: stream the features in this folder, and print the peak"""


def main(config: Config) -> int:
    """Print tables, and one JSON object as the last line."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from rich.console import Console
    from rich.table import Table
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)
    if config.measure_memory:
        return _stream(Path(config.measure_memory))
    with tempfile.TemporaryDirectory() as name:
        rates, difference = _extraction(Path(name), config)
    seconds, distances = _distances(config)
    memory = {} if config.skip_memory else {n: _memory(n, config) for n in config.memory_counts}
    table = Table("of", "by", "median", "spread")
    for title, by_method in (("images/s", rates), ("seconds a distance", seconds)):
        for by, values in by_method.items():
            table.add_row(title, by, f"{np.median(values):.2f}", f"{np.ptp(values):.2f}")
    for count, peak in memory.items():
        table.add_row("MiB of peak memory", f"{count:,} images a side", f"{peak / 2**20:.0f}", "")
    Console().print(table)
    rate, second = ({k: float(np.median(v)) for k, v in f.items()} for f in (rates, seconds))
    growth = max(memory.values()) / min(memory.values()) if memory else None
    figures = {
        "ratio_extract": rate["ours"] / max(v for k, v in rate.items() if k != "ours"),
        "ratio_distance": second["scipy sqrtm (pytorch-fid)"] / second["ours"],
        "ratio_memory": growth,
        "images_per_second": rate,
        "seconds": second,
        "distances": distances,
        "feature_difference": difference,
        "memory_bytes": memory,
        "rates": rates,
        "all_seconds": seconds,
    }
    print(json.dumps(figures))
    return 0


# -- extraction ------------------------------------------------------------------------------------


def _extraction(folder: Path, config: Config) -> tuple[dict[str, list[float]], float]:
    """Return images/s of every pass of each, and how far ours are from torch-fidelity's features,
    as a share of the largest."""
    import torch

    rng = np.random.default_rng(0)
    side = config.image_size
    noise = rng.integers(0, 256, (config.num_images, 3, side // 8, side // 8), np.uint8)
    pixels = torch.from_numpy(noise.repeat(8, axis=2).repeat(8, axis=3))
    extractors = _extractors(folder)
    rates: dict[str, list[float]] = {name: [] for name in extractors}
    features: dict[str, np.ndarray] = {}
    for repeat in range(config.repeats + 1):  # the first pass warms up
        for name, extract in extractors.items():
            started = time.perf_counter()
            extracted = [extract(batch) for batch in pixels.split(config.batch_size)]
            rate = config.num_images / (time.perf_counter() - started)
            features[name] = np.concatenate(extracted)
            if repeat:
                rates[name].append(rate)
    ours, theirs = features["ours"], features["torch-fidelity"]
    return rates, float(abs(ours - theirs).max() / abs(theirs).max())


def _extractors(folder: Path) -> dict[str, Callable[[Any], np.ndarray]]:
    """Build the three networks with the same tensors."""
    import torch
    from pytorch_fid.inception import InceptionV3
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from eval.features.networks import InceptionPool

    path, _ = _writer()(folder / "random.pth")
    state = torch.load(path, weights_only=True)
    ours = InceptionPool(state, str(path))
    fidelity = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
    )
    with _given(state):
        pytorch_fid = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()

    def by_ours(pixels: Any) -> np.ndarray:
        return ours(pixels).numpy()

    @torch.no_grad()
    def by_fidelity(pixels: Any) -> np.ndarray:
        return fidelity(pixels)[0].numpy()

    @torch.no_grad()
    def by_pytorch_fid(pixels: Any) -> np.ndarray:
        return pytorch_fid(pixels.float() / 255)[0].flatten(1).numpy()

    return {"ours": by_ours, "torch-fidelity": by_fidelity, "pytorch-fid": by_pytorch_fid}


def _writer() -> Callable[[Path], tuple[Path, str]]:
    """Return the tests' function that writes weights drawn at random."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("_inception", ROOT / "tests" / "_inception.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_inception


def _given(state: Any) -> Any:
    """Let pytorch-fid find these tensors where it would download its own."""
    from unittest import mock

    return mock.patch("pytorch_fid.inception.load_state_dict_from_url", lambda *a, **k: state)


# -- the distance ----------------------------------------------------------------------------------


def _features(count: int, width: int, seed: int) -> np.ndarray:
    """Draw features like the Inception's: not negative, correlated, of many scales."""
    rng = np.random.default_rng(seed)
    scales = np.linspace(1.5, 0.05, width)
    drawn = rng.standard_normal((count, width), np.float32) * scales
    shared = rng.standard_normal((count, 1), np.float32)
    return np.abs(drawn + 0.5 * shared).astype(np.float32)


def _distances(config: Config) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return seconds of every pass of each way from moments to the distance, and the distances."""
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    from eval.distances.frechet import Moments, frechet_distance

    a, b = (Moments.of(_features(config.num_features, config.width, seed)) for seed in (0, 1))
    ours, theirs = [{"mu": m.mean, "sigma": m.covariance} for m in (a, b)]
    ways: dict[str, Callable[[], float]] = {
        "ours": lambda: frechet_distance(a, b),
        "scipy sqrtm (pytorch-fid)": lambda: float(
            calculate_frechet_distance(
                ours["mu"], ours["sigma"], theirs["mu"], theirs["sigma"]
            )
        ),
        "torch-fidelity": lambda: fid_statistics_to_metric(ours, theirs, False)[
            "frechet_inception_distance"
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    distances = {}
    for _ in range(config.repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            distances[name] = way()
            seconds[name].append(time.perf_counter() - started)
    return seconds, distances


# -- memory ----------------------------------------------------------------------------------------


def _memory(count: int, config: Config) -> int:
    """Return the peak memory in bytes of a process that streams `count` features a side."""
    with tempfile.TemporaryDirectory() as name:
        for side in ("fake", "real"):
            folder = Path(name) / side
            folder.mkdir()
            for number, start in enumerate(range(0, count, 256)):
                rows = min(256, count - start)
                block = _features(rows, config.width, 2 * number + (side == "real"))
                np.save(folder / f"{number:06d}.npy", block)
        command = [sys.executable, __file__, "--measure-memory", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def _stream(root: Path) -> int:
    """Take the distance, its halves and nearest neighbours of what is in `root`; print the peak."""
    from eval.distances.frechet import frechet_distance
    from eval.distances.intervals import kernel_distance
    from eval.distances.neighbours import nearest_rows
    from eval.features.blocks import Features

    sides = {}
    for side in ("fake", "real"):
        blocks = sorted((root / side).glob("*.npy"))
        sizes = [len(np.load(block, mmap_mode="r")) for block in blocks]
        sides[side] = Features(blocks=blocks, sizes=sizes)
    fake, real = sides["fake"], sides["real"]
    frechet_distance(fake.moments(), real.moments())
    kernel_distance(fake, real)
    few = Features(blocks=fake.blocks[:4], sizes=fake.sizes[:4])
    nearest_rows(few, real)  # all pairs take minutes; the memory is a chunk's against a chunk's
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return 0


if __name__ == "__main__":
    run_benchmark(
        Config, main, num_images=8, batch_size=4, repeats=1, width=256, num_features=500,
        memory_counts=(500, 1000),
    )  # fmt: skip
