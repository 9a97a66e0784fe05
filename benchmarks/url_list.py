"""A list of 100 M rows: what the driver needs to resume it, all but its last shards done.

    python benchmarks/url_list.py        # some twenty minutes on two cores, 25 GB of disk

The whole command runs, with Ray: it looks at every commit, reads the whole list, makes the last
three shards and publishes a snapshot of all. Nothing is fetched: a filter leaves every row out.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from _common import BenchmarkConfig, run_benchmark

from cluster.base.files import canonical_json
from ingest.download import DownloadConfig, prepare
from ingest.lists.filters import FilterConfig
from ingest.shards import shard_name
from ingest.store.commits import Commit, FileEntry

ROOT = Path(__file__).resolve().parent.parent
GROUP_ROWS = 1_000_000
SHARD, MISSING = 1000, 3
REPEATED_EVERY = 50  # of the URLs, one in so many is another's
UNIQUE = {"all rows": (), "unique urls": ("urls",)}


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Size of the list."""

    rows: int = 100_000_000
    """rows of the list, a multiple of 1,000"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "rows", "shards", "seconds", "peak MiB of the driver")
    peaks, seconds = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_list(folder / "list.parquet", config.rows)
        fake_commits(folder / "commits", config.rows // SHARD)
        for case, unique in UNIQUE.items():
            seconds[case], peaks[case] = resume(folder, unique)
            row = (case, f"{config.rows:,}", f"{config.rows // SHARD:,}")
            table.add_row(*row, f"{seconds[case]:.0f}", f"{peaks[case]:.0f}")
    Console().print(table)
    rates = {case: config.rows / taken for case, taken in seconds.items()}
    peak = max(peaks.values())
    figures = {"rows": config.rows, "peak_mib": peak, "peak_mib_by_case": peaks}
    print(json.dumps({**figures, "rows_per_second_by_case": rates}))
    return 0


def write_list(path: Path, rows: int) -> None:
    """Write a list with URLs and captions as long as LAION's, a row group at a time."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = pa.schema([("URL", pa.string()), ("TEXT", pa.string()), ("similarity", pa.float32())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, GROUP_ROWS):
            number = np.arange(start, min(rows, start + GROUP_ROWS))
            number[::REPEATED_EVERY] = number[::REPEATED_EVERY] // 2
            text = pc.cast(pa.array(number), pa.string())
            host = pc.cast(pa.array(number % 999_983), pa.string())
            parts = ["https://host", host, ".example.com/pictures/of/all/kinds/", text, ".jpg", ""]
            url = pc.binary_join_element_wise(*parts)  # type: ignore[attr-defined]
            captions = [
                "picture ",
                text,
                " of a thing that somebody put on a page",
                "",
            ]
            caption = pc.binary_join_element_wise(*captions)  # type: ignore[attr-defined]
            similarity = pa.array((number % 1000 / 1000).astype(np.float32))
            writer.write_table(pa.table([url, caption, similarity], schema=schema))


def fake_commits(folder: Path, shards: int) -> None:
    """Write commits as a download leaves them, of files that are all empty."""
    (folder / "_commits").mkdir(parents=True)
    for number in range(shards - MISSING):
        name = shard_name(number)
        entry: FileEntry = {"sha256": f"{number:064x}", "size": 0}
        files = {f"{name}{end}": entry for end in (".idx.npy", ".parquet", ".tar")}
        stats = f"{name}_stats.json"
        for file in [*files, stats]:
            (folder / file).touch()
        commit = Commit(
            shard=name,
            num_samples=0,
            counts={"filtered:short_caption": SHARD},
            files=files,
            config_hash=f"{number:064x}",
            undigested=[stats],
        )
        (folder / "_commits" / f"{name}.json").write_bytes(canonical_json(vars(commit)))


def resume(folder: Path, unique: tuple) -> tuple[float, float]:
    """Run the command over the commits; return seconds, and the peak of its driver, MiB."""
    out = folder / "commits"
    filters = FilterConfig(min_caption_chars=1000, unique=unique)
    config = DownloadConfig(urls=str(folder / "list.parquet"), out=str(out), filters=filters)
    _manifest(folder, config)
    names = sorted(path.stem for path in (out / "_commits").iterdir())
    command = [
        sys.executable, str(ROOT / "ingest" / "download.py"), "--urls", config.urls,
        "--out", config.out, "--num-processes", "2", "--filters.min-caption-chars", "1000",
    ]  # fmt: skip
    for word in unique:
        command += ["--filters.unique", word]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    taken = time.perf_counter() - started
    made = {path.stem for path in (out / "_commits").iterdir()} - set(names)
    if status or len(made) != MISSING:
        raise RuntimeError(f"{command}: status {status}, made {sorted(made)}")
    for name in made:
        for path in [*out.glob(f"{name}*"), out / "_commits" / f"{name}.json"]:
            path.unlink()
    return taken, usage.ru_maxrss / 1024


def _manifest(folder: Path, config: DownloadConfig) -> None:
    """Write the manifest that the command would have begun with."""
    elsewhere = replace(config, out=str(folder / "manifest"))
    prepare(elsewhere)
    shutil.copy(folder / "manifest" / "_manifest.json", folder / "commits")
    shutil.rmtree(folder / "manifest")


if __name__ == "__main__":
    run_benchmark(Config, main, rows=500_000)
