"""Adoption of img2dataset's tars in place: MB a second and core, against reading them once.

    python benchmarks/adopt.py        # some ten minutes on two cores, 3 GB of disk

The peer is webdataset's plain iteration, which keeps nothing: it splits the tars into samples, and
neither verifies an image nor digests a byte. Both run in one process, in turn; a core's seconds are
those of the CPU. Memory is the peak of an adoption of one tar, of n and of 4n samples.
"""

import io
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _common import ROOT, BenchmarkConfig, run_benchmark

PER_TAR = 10_000  # img2dataset's default
NUM_IMAGES = 200  # distinct ones, of which each sample has one
CHILD = """
import re, sys, time
tars, out = sys.argv[2:-1], sys.argv[-1]
if sys.argv[1] == "adopt":
    from ingest import adopt
    import PIL.JpegImagePlugin, pandas, pyarrow.parquet
    from ingest.adopting import config, copies, in_place, tables, tars as _
    arguments = config.AdoptConfig(source=tars[0], out=out, num_processes=0)
    started = time.process_time()
    assert adopt.main(arguments) == 0
else:
    import webdataset
    from ingest.adopting.tars import list_tars
    started, count = time.process_time(), 0
    for sample in webdataset.WebDataset(list_tars(tars[0]), shardshuffle=False):
        count += len(sample["jpg"])
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(time.process_time() - started, int(peak) / 1024)
"""


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Size of the tars."""

    samples: int = 100_000
    """samples, of about 24 kB each"""
    rounds: int = 3
    """measurements of each, in turn"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory() as name:
        # Speed
        folder, images = Path(name), jpegs()
        for first in range(0, config.samples, PER_TAR):
            number = min(PER_TAR, config.samples - first)
            write_tar(folder / f"{first // PER_TAR:05d}.tar", images, number)
        size = sum(path.stat().st_size for path in folder.glob("*.tar")) / 1e6
        rates: dict[str, list[float]] = {"adopt": [], "webdataset": []}
        for turn in range(config.rounds):
            for kind, speeds in rates.items():
                seconds, _ = measured(kind, folder / "*.tar", folder / f"out{turn}")
                speeds.append(size / seconds)

        # Memory
        peaks = []
        for number in (config.samples // 20, config.samples // 5):
            source = folder / "one" / f"{number}.tar"
            source.parent.mkdir(exist_ok=True)
            write_tar(source, images, number)
            peaks.append(measured("adopt", source, folder / f"out-{number}")[1])

    table = Table("", "MB a second and core", "lowest", "highest")
    medians = {kind: statistics.median(speeds) for kind, speeds in rates.items()}
    for kind, speeds in rates.items():
        figures = (medians[kind], min(speeds), max(speeds))
        table.add_row(kind, *(f"{figure:.1f}" for figure in figures))
    Console().print(table)
    print(f"peak of a tar of n samples {peaks[0]:.0f} MiB, of 4n {peaks[1]:.0f} MiB")
    pairs = zip(*rates.values(), strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    print(
        json.dumps(
            {
                "ratio": statistics.median(ratios), "ratio_spread": [min(ratios), max(ratios)],
                "mb_per_second_and_core": medians, "samples": config.samples, "mb": size,
                "peak_mib": peaks,
            }
        )
    )  # fmt: skip
    return 0


def jpegs() -> list[bytes]:
    """Return photograph-like JPEGs of 256 px and about 20 kB, as img2dataset makes them."""
    import numpy as np
    from PIL import Image

    rng, images = np.random.default_rng(0), []
    for _ in range(NUM_IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8))
        pixels = np.asarray(coarse.resize((340, 256), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels += rng.integers(-8, 9, pixels.shape, np.int16)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=75)
        images.append(file.getvalue())
    return images


def write_tar(path: Path, images: Sequence[bytes], samples: int) -> None:
    """Write a tar by the writer that img2dataset uses, with its members."""
    import webdataset

    record = {"caption": "a caption of some words", "sha256": "0" * 64, "width": 340, "height": 256}
    with open(path, "wb") as file, webdataset.TarWriter(file, encoder=False) as tar:
        for i in range(samples):
            record |= {"key": f"{i:09d}", "url": f"https://host/{i}.jpg"}
            sample = {"jpg": images[i % len(images)], "json": json.dumps(record).encode()}
            tar.write({"__key__": f"{i:09d}", **sample, "txt": b"a caption of some words"})


def measured(kind: str, source: Path, out: Path) -> tuple[float, float]:
    """Return the CPU-seconds of one pass in a process of its own, and its peak, MiB."""
    command = [sys.executable, "-c", CHILD, kind, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, peak = done.stdout.splitlines()[-1].split()
    return float(seconds), float(peak)


if __name__ == "__main__":
    run_benchmark(Config, main, samples=2000, rounds=2)
