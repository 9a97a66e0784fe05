"""One shard: its rows in, its committed files out, in img2dataset's own layout.

Keys, members, columns and `_stats.json` are those that img2dataset 1.47 writes. Its downloader is
not used: it has no limits per host and no deadline, drops a row where something fails, and the
import alone costs every worker seconds.
"""

import faulthandler
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.base.outcomes import RETRIED, status_of
from ingest.fetching.decode import Resizer
from ingest.fetching.fetch import Fetcher, FetchPolicy
from ingest.fetching.harvest import HarvestConfig, Harvested, Request, harvest, without_repetitions
from ingest.lists.filters import RowFilter, normalised
from ingest.shards import (
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
FAILED_BEFORE = "_failed_before"  # column of a round of retries: why the row failed
OUTAGE = frozenset({"no_network", "resolver_failed"})  # reasons that speak of our own network
OUTAGE_SHARE = 0.5
GRACE_SECONDS = 60.0  # after a shard's deadline, for the tries in progress and for writing


class NetworkDown(OSError):
    """Our own network was down for most rows of a shard: it is better made later."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What every shard of a download has in common. kept: the list's columns that are stored."""

    root: str
    samples_per_shard: int
    resizer: Resizer
    harvest: HarvestConfig
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
        if self.harvest.deadline_seconds is not None:
            limit = self.harvest.deadline_seconds + GRACE_SECONDS
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
    Raises OSError when the files cannot be written, NetworkDown when there was no network for most
    of the rows; a bad URL is never an error.
    """
    started = time.time()
    rows = normalised(rows)
    found = {row: Harvested(reason=why) for row, why in job.row_filter.problems(rows).items()}
    urls, forgotten = rows["url"].to_pylist(), read_forgotten(job.root)
    for row, url in enumerate(urls if forgotten else ()):
        if forgotten.covers(url):
            found[row] = Harvested(reason=FORGOTTEN)
    requests = [one for one in _requests(rows, job.row_filter.hashes) if one.row not in found]
    with Attempt(job.root, name) as attempt:
        fetched = harvest(requests, fetcher, job.resizer, job.harvest)
        _require_network(fetched)
        forgotten = read_forgotten(job.root)  # again: fetching may have taken long
        for row, one in fetched.items():
            known = forgotten.covers(urls[row], one.sha256)
            found[row] = Harvested(reason=FORGOTTEN) if known else one
        if "images" in job.row_filter.config.unique:
            found = without_repetitions(found)
        described = _described(job, name, rows, found)
        num_samples = write_image_shard(
            attempt.path,
            name,
            _samples(described, found),
            described,
            kept=rows.select(job.kept).schema,
        )
        counts = count_outcomes(described)
        if FAILED_BEFORE in rows.column_names:
            before = Counter(f"{RETRIED}:{reason}" for reason in rows[FAILED_BEFORE].to_pylist())
            counts |= dict(sorted(before.items()))
        _write_stats(attempt.path / f"{name}_stats.json", described, started)
        return attempt.commit(num_samples=num_samples, counts=counts, config_hash=job.config_hash)


def count_outcomes(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Count rows as "stored", "filtered:REASON" and "failed:REASON"."""
    return dict(sorted(Counter(outcome(row["status"], row["error"]) for row in rows).items()))


Row = dict[str, Any]


def _requests(rows: "pa.Table", columns: Mapping[str, str]) -> list[Request]:
    hashes = {kind: rows[name].to_pylist() for kind, name in columns.items()}
    return [
        Request(
            row=row,
            url=url,
            hashes={kind: values[row] for kind, values in hashes.items() if values[row]},
        )
        for row, url in enumerate(rows["url"].to_pylist())
    ]


def _require_network(fetched: Mapping[int, Harvested]) -> None:
    """Raise NetworkDown if most rows failed for reasons that speak of our own network."""
    cut_off = sum(one.reason in OUTAGE for one in fetched.values())
    if cut_off and cut_off >= OUTAGE_SHARE * len(fetched):
        raise NetworkDown(f"no network for {cut_off} of {len(fetched)} rows; not committed")


def _described(
    job: ShardJob, name: str, rows: "pa.Table", found: Mapping[int, Harvested]
) -> list[Row]:
    """Return the Parquet row of every row of the list, in order."""
    digits = max(MIN_ROW_DIGITS, len(str(job.samples_per_shard - 1)))
    described = []
    for number, row in enumerate(rows.select(["url", "caption", *job.kept]).to_pylist()):
        one = found[number]
        picture = one.picture
        row |= {"key": f"{name}{number:0{digits}d}", "sha256": one.sha256, "error": one.reason}
        if one.reason == FORGOTTEN:
            row |= dict.fromkeys(("url", "caption", *job.kept))
        row["status"] = STORED if one.reason is None else status_of(one.reason)
        for size in ("width", "height", "original_width", "original_height"):
            row[size] = getattr(picture, size) if picture else None
        described.append(row)
    return described


def _samples(described: list[Row], found: Mapping[int, Harvested]):
    """Yield the sample of every row that has one; its metadata are the row's."""
    for number, row in enumerate(described):
        picture = found[number].picture
        if picture is not None:
            metadata = {name: value for name, value in row.items() if name != "error"}
            yield Sample(
                key=row["key"], image_bytes=picture.jpeg, caption=row["caption"], json=metadata
            )


def _write_stats(path: Path, rows: list[Row], started: float) -> None:
    """Write img2dataset's own statistics of a shard; what it calls resizing is decoding here."""
    reasons = Counter(row["error"] or STORED for row in rows)
    ended, undecodable = time.time(), reasons["undecodable"] + reasons["too_small"]
    stats = {
        "count": len(rows),
        "successes": reasons[STORED],
        "failed_to_download": len(rows) - reasons[STORED] - undecodable,
        "failed_to_resize": undecodable,
        "duration": ended - started,
        "start_time": started,
        "end_time": ended,
        "status_dict": dict(reasons),
    }
    path.write_text(json.dumps(stats, indent=4))
