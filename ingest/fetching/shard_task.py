"""One shard: its rows in, its committed files out, in img2dataset's own layout.

Keys, members, columns and `_stats.json` are those that img2dataset 1.47 writes; its downloader runs
the shard (see `engine`), webdataset writes the tar.
"""

import faulthandler
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cluster.base.outcomes import RETRIED, status_of
from ingest.fetching.decode import Resizer
from ingest.fetching.engine import (
    EngineConfig,
    RowRequest,
    RowResult,
    ShardDownload,
    require_our_transport,
)
from ingest.fetching.fetch import Fetcher, FetchPolicy
from ingest.fetching.retries import FAILED_BEFORE
from ingest.lists.filters import RowFilter, normalised
from ingest.shards import (
    SIZE_COLUMNS,
    STORED,
    Attempt,
    Commit,
    Sample,
    outcome,
    write_image_shard,
)
from ingest.store.removal import FORGOTTEN, read_forgotten
from ingest.store.shard_runner import Unit

if TYPE_CHECKING:
    import pyarrow as pa

JPEG_QUALITY = 95
MIN_ROW_DIGITS = 3  # of a key, after the shard's name
OUTAGE = frozenset({"no_network", "resolver_failed"})  # reasons that mean our own network is down
OUTAGE_SHARE = 0.5
GRACE_SECONDS = 60.0  # after a shard's deadline, for the tries in progress and for writing


class NetworkDownError(OSError):
    """Our own network was down for most rows of a shard: it is better made later."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What every shard of a download has in common. kept: the list's columns that are stored."""

    root: str
    samples_per_shard: int
    resizer: Resizer
    engine: EngineConfig
    config_hash: str
    policy: FetchPolicy
    row_filter: RowFilter
    kept: tuple[str, ...]

    def __call__(self, unit: Unit) -> Commit:
        """Make the shard that a unit names of its payload, the rows.

        A unit with a share of the limits per host is made in a worker, which ends itself, with its
        stacks in the log, if it hangs.
        """
        fetcher = process_fetcher(self.policy)  # keeps what it knows of hosts from shard to shard
        if unit.share is None:
            return make_shard(self, unit.name, unit.payload, fetcher)
        fetcher.limits.change(unit.share.connections, unit.share.rate)
        require_our_transport()  # here, since its imports are slow
        if self.engine.deadline_seconds is not None:
            limit = self.engine.deadline_seconds + GRACE_SECONDS
            faulthandler.dump_traceback_later(limit, exit=True)
        try:
            return make_shard(self, unit.name, unit.payload, fetcher)
        finally:
            faulthandler.cancel_dump_traceback_later()


@lru_cache(maxsize=1)
def process_fetcher(policy: FetchPolicy) -> Fetcher:
    """Return this process's fetcher: its connections outlive the shard."""
    return Fetcher(policy)


def make_shard(job: ShardJob, name: str, rows: "pa.Table", fetcher: Fetcher) -> Commit:
    """Download a shard and commit it; return the commit, of whoever came first.

    rows: the columns url and caption, then the kept ones and those that filters need.
    Raises OSError when the files cannot be written, NetworkDownError when there was no network for
    most of the rows; a bad URL is never an error.
    """
    rows = normalised(rows)
    urls = rows["url"].to_pylist()

    # Rows that are left out before they are fetched
    left_out = job.row_filter.problems(rows)
    forgotten = read_forgotten(job.root)
    if forgotten:
        left_out |= {row: FORGOTTEN for row, url in enumerate(urls) if forgotten.covers(url)}
    hashes = {kind: rows[name].to_pylist() for kind, name in job.row_filter.hashes.items()}
    requests = [
        RowRequest(
            row=row,
            url=url,
            hashes={kind: values[row] for kind, values in hashes.items() if values[row]},
        )
        for row, url in enumerate(urls)
        if row not in left_out
    ]

    # The others, by img2dataset, whose writer calls `finish`
    with Attempt(job.root, name) as attempt:
        table: list[dict[str, Any]] = []

        def finish(results: dict[int, RowResult]) -> None:
            cut_off = sum(result.reason in OUTAGE for result in results.values())
            if cut_off and cut_off >= OUTAGE_SHARE * len(requests):
                raise NetworkDownError(
                    f"no network for {cut_off} of {len(requests)} rows; not committed"
                )
            settled = _leave_out(job, urls, results)
            samples = _tabulate(job, name, rows, settled, table)
            kept = rows.select(job.kept).schema
            write_image_shard(attempt.path, name, samples, table, kept=kept)

        ShardDownload(requests, fetcher, job.resizer, job.engine, finish, left_out).run(
            attempt.path, name
        )
        counts = Counter(outcome(row["status"], row["error"]) for row in table)
        if FAILED_BEFORE in rows.column_names:
            counts.update(f"{RETRIED}:{reason}" for reason in rows[FAILED_BEFORE].to_pylist())
        return attempt.commit(
            num_samples=counts["stored"],
            counts=dict(sorted(counts.items())),
            config_hash=job.config_hash,
        )


def _leave_out(
    job: ShardJob, urls: list[str | None], results: dict[int, RowResult]
) -> dict[int, RowResult]:
    """Leave out what was to be forgotten meanwhile, and repeated images where a filter says so."""
    forgotten = read_forgotten(job.root)  # again: fetching may have taken long
    unique = "images" in job.row_filter.config.unique
    seen: set[str] = set()  # digests of the fetched bytes of earlier rows
    settled: dict[int, RowResult] = {}
    for row, result in results.items():
        settled[row] = result
        if forgotten.covers(urls[row], result.sha256):
            settled[row] = RowResult(reason=FORGOTTEN)
        elif unique and result.sha256 in seen:
            settled[row] = replace(result, image=None, reason="duplicate_image")
        elif result.sha256 is not None:
            seen.add(result.sha256)
    return settled


def _tabulate(
    job: ShardJob,
    name: str,
    rows: "pa.Table",
    results: dict[int, RowResult],
    table: list[dict[str, Any]],
) -> list[Sample]:
    """Append every row of the list to `table`; return the samples of those that have one."""
    digits = max(MIN_ROW_DIGITS, len(str(job.samples_per_shard - 1)))
    samples: list[Sample] = []
    for number, row in enumerate(rows.select(["url", "caption", *job.kept]).to_pylist()):
        result, image = results[number], results[number].image
        row |= {"key": f"{name}{number:0{digits}d}", "sha256": result.sha256}
        if result.reason == FORGOTTEN:
            row |= dict.fromkeys(("url", "caption", *job.kept))
        row["status"] = STORED if result.reason is None else status_of(result.reason)
        for size in SIZE_COLUMNS:
            row[size] = getattr(image, size) if image else None
        if image is not None:
            sample = Sample(
                key=row["key"], image_bytes=image.data, caption=row["caption"], json=dict(row)
            )
            samples.append(sample)
        row["error"] = result.reason
        table.append(row)
    return samples
