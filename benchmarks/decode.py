"""What decoding a JPEG at a reduced scale saves, and what it changes.

    python benchmarks/decode.py                          # photograph-like drawings
    python benchmarks/decode.py --shard shard.tar        # the JPEGs of a WebDataset shard

Of each picture: PSNR of our reduced image against full decode and one bicubic filter, both before
they are stored; beside it the PSNR that storing the exact one as a JPEG of quality 95 leaves.
"""

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import BenchmarkConfig, run_benchmark
from download import _draw

from ingest.fetching.decode import Resizer, decode_to


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """What is decoded."""

    shard: str = ""
    """tar with pictures; none: 40 drawings of some 1024 px"""
    image_size: int = 256
    """shorter side asked for, px; pictures less than twice as large are left out"""
    repeats: int = 5
    """timings of each way, alternating"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    from rich.console import Console
    from rich.table import Table

    pictures = [data for data in _pictures(config) if _short_side(data) >= 2 * config.image_size]
    if not pictures:
        raise ValueError(f"{config.shard}: found no JPEG twice as large as {config.image_size} px")
    ours = Resizer(image_size=config.image_size, resize_mode="keep_ratio")
    seconds: dict[Callable, list[float]] = {_reduced: [], _exact: []}
    for _ in range(config.repeats):
        for way, taken in seconds.items():
            started = time.perf_counter()
            for data in pictures:
                way(ours, data)
            taken.append((time.perf_counter() - started) / len(pictures))
    exact = [_exact(ours, data) for data in pictures]
    cheap = [_psnr(_reduced(ours, d), whole) for d, whole in zip(pictures, exact, strict=True)]
    stored = [_psnr(_through_jpeg(whole), whole) for whole in exact]
    table = Table("decoded", "ms a picture", "PSNR median", "least")
    for name, way, ratios in (("reduced", _reduced, cheap), ("fully, then JPEG", _exact, stored)):
        milliseconds = f"{np.median(seconds[way]) * 1e3:.1f}"
        table.add_row(name, milliseconds, f"{np.median(ratios):.1f}", f"{min(ratios):.1f}")
    Console().print(table)
    figures = {
        "ratio": float(np.median(seconds[_exact]) / np.median(seconds[_reduced])),
        "n": len(pictures),
        "psnr_median": float(np.median(cheap)),
        "psnr_least": min(cheap),
        "psnr_of_storing_median": float(np.median(stored)),
    }
    print(json.dumps(figures))
    return 0


def _pictures(config: Config) -> list[bytes]:
    if not config.shard:
        with tempfile.TemporaryDirectory() as folder:
            _draw(Path(folder))
            return [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    with tarfile.open(config.shard) as tar:
        members = [member for member in tar if member.name.endswith((".jpg", ".jpeg"))]
        return [file.read() for file in map(tar.extractfile, members) if file is not None]


def _open(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data))


def _short_side(data: bytes) -> int:
    return min(_open(data).size)


def _reduced(resizer: Resizer, data: bytes) -> Any:
    image = _open(data)
    return decode_to(image, resizer._target(image.size))


def _exact(resizer: Resizer, data: bytes) -> Any:
    from PIL import Image

    image = _open(data).convert("RGB")
    return image.resize(resizer._target(image.size), Image.Resampling.BICUBIC)


def _through_jpeg(image: Any) -> Any:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return _open(file.getvalue())


def _psnr(image: Any, exact: Any) -> float:
    """Return the peak signal-to-noise ratio over all pixels and channels, dB."""
    difference = np.asarray(image, np.float64) - np.asarray(exact, np.float64)
    return float(10 * np.log10(255**2 / max(1e-9, (difference**2).mean())))


if __name__ == "__main__":
    run_benchmark(Config, main, repeats=1)
