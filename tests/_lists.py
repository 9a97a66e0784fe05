"""URL lists as tests need them, and downloads of them in the calling process."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import Site

from ingest.download import DownloadConfig
from ingest.fetching.engine import EngineConfig, RowRequest, RowResult, ShardDownload
from ingest.fetching.fetch import Fetcher, FetchPolicy, parse_allow_address
from ingest.store.commits import committed, damage

ROOT = Path(__file__).resolve().parent.parent


def write_list(path: Path, urls: Sequence[str | None], **columns: Any) -> str:
    """Write a list in Parquet; columns: beside `url` and, unless they are given, captions."""
    captions = {} if "text" in columns else {"caption": [f"caption {i}" for i in range(len(urls))]}
    pq.write_table(pa.table({"url": list(urls), **captions, **columns}), path)
    return str(path)


def download_of(site: Site, urls: str, out: Path | str, **fields: Any) -> DownloadConfig:
    """Describe a download from a site to images of 32 px, without retries or limits per host."""
    given = {"image_size": 32, "num_processes": 0, "retries": 0, "host_rate": 0, **fields}
    return DownloadConfig(urls=urls, out=str(out), allow_address=(site.address,), **given)


def download_command(site: Site, urls: str, out: Path | str, *more: object) -> list[str]:
    """Return the command of such a download."""
    return [
        sys.executable, str(ROOT / "ingest" / "download.py"), "--urls", urls, "--out", str(out),
        "--retries", "0", "--host-rate", "0", "--allow-address", site.address, *map(str, more),
    ]  # fmt: skip


def finished(command: list[str], seconds: float = 300) -> str:
    """Run a command that is to succeed; return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def digests(root: str | Path) -> dict[str, str]:
    """Return the digest of each commit."""
    return {name: commit.digest for name, commit in committed(root).items()}


def is_whole(root: str | Path) -> bool:
    """Say whether every file is the one that was committed."""
    return not any(damage(root, commit, deep=True) for commit in committed(root).values())


def fetcher_of(*sites: Site, **policy: Any) -> Fetcher:
    """Return what fetches from some sites, without a limit per host."""
    allowed = tuple(parse_allow_address(site.address) for site in sites)
    given = {"allow_addresses": allowed, "host_rate": 0, "timeout_seconds": 5.0, **policy}
    return Fetcher(FetchPolicy(**given))


def fetched_rows(
    requests: Sequence[RowRequest],
    fetcher: Fetcher,
    resizer: Any,
    left_out: dict[int, str] | None = None,
    **config: Any,
) -> dict[int, RowResult]:
    """Return the result of every row of a shard that img2dataset makes, which stores nothing."""
    given = {"num_threads": 1, "retries": 0, **config}
    results: dict[int, RowResult] = {}
    download = ShardDownload(
        requests, fetcher, resizer, EngineConfig(**given), results.update, left_out
    )
    with TemporaryDirectory() as folder:
        download.run(Path(folder), "000000")
        (path,) = Path(folder).iterdir()  # img2dataset's statistics, and no list of places
        assert json.loads(path.read_text())["count"] == len(results)
    return results
