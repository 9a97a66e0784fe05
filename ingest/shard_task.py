"""One shard: its rows in, its committed files out, through img2dataset's Downloader.

img2dataset downloads with threads and describes; the fetching is ours (`ingest.fetch`), so is the
decoding (`ingest.decode`), and so is the writing: it collects what img2dataset hands over in order
of arrival and stores it in row order, so that the same answers of the web give the same bytes.
"""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingest.decode import ResizeMode, Resizer
from ingest.fetch import Fetched, Fetcher, FetchPolicy
from ingest.filters import outcome
from ingest.row_filter import RowFilter, normalised
from ingest.shards import STORED, Attempt, Commit, Sample, shard_name, write_image_shard

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_DIGITS = 6  # of a shard's name; img2dataset calls it oom_shard_count
JPEG_QUALITY = 95


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What every shard of a download has in common. image_size, min_image_side: px; kept: the
    list's columns that are stored."""

    root: str
    samples_per_shard: int
    image_size: int
    resize_mode: ResizeMode
    min_image_side: int
    num_threads: int
    config_hash: str
    policy: FetchPolicy
    row_filter: RowFilter
    kept: tuple[str, ...]


@lru_cache(maxsize=1)
def process_fetcher(policy: FetchPolicy) -> Fetcher:
    """Return this process's fetcher: its connections outlive the shard."""
    return Fetcher(policy)


def make_shard(
    job: ShardJob, number: int, rows: "pa.Table", *, fetcher: Fetcher | None = None
) -> Commit:
    """Download the `number`-th shard and commit it; return the winner's commit.

    rows: the columns url and caption, then the kept ones and those that filters look at. fetcher:
    None for this process's own.
    Raises OSError when the files cannot be written; a bad URL is never an error.
    """
    name = shard_name(number)
    rows = normalised(rows)
    refused = job.row_filter.problems(rows)
    rows = rows.select(["url", "caption", *job.kept])
    kept = [rows.schema.field(field) for field in job.kept]
    with Attempt(job.root, name) as attempt:
        fetch = _refusing(refused, (fetcher or process_fetcher(job.policy)).fetch)
        found = _download(job, number, rows, attempt.path, fetch)
        ordered = [found[key] for key in sorted(found)]
        if len(ordered) != rows.num_rows:  # img2dataset prints what it could not handle and goes on
            lost = rows.num_rows - len(ordered)
            raise RuntimeError(f"shard {name}: img2dataset lost {lost} of {rows.num_rows} rows")
        num_samples = write_image_shard(
            attempt.path,
            name,
            (sample for _, sample in ordered if sample is not None),
            [row for row, _ in ordered],
            kept=_schema(kept),
        )
        return attempt.commit(
            num_samples=num_samples,
            counts=count_outcomes([row for row, _ in ordered]),
            config_hash=job.config_hash,
        )


def count_outcomes(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Count rows as "stored", "filtered:REASON" and "failed:REASON"."""
    names = (
        "stored" if row["status"] == STORED else f"{row['status']}:{row['error']}" for row in rows
    )
    return dict(sorted(Counter(names).items()))


def _schema(fields: "list[pa.Field]") -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(fields)


Row = dict[str, Any]
Fetch = Callable[[int, str | None], Fetched]  # a row's number in its shard and its URL


def _download(
    job: ShardJob, number: int, rows: "pa.Table", folder: Path, fetch: Fetch
) -> dict[str, tuple[Row, Sample | None]]:
    """Run img2dataset over the rows; return the row and the sample, if any, of each key."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks the network
    import pyarrow as pa
    from img2dataset.downloader import Downloader

    collected = _Collector()
    downloader = Downloader(
        sample_writer_class=lambda *_: collected,
        resizer=Resizer(
            image_size=job.image_size,
            resize_mode=job.resize_mode,
            min_image_size=job.min_image_side,
            quality=JPEG_QUALITY,
        ),
        thread_count=job.num_threads,
        save_caption=True,
        extract_exif=False,  # it may say where and by whom a picture was taken
        output_folder=str(folder),
        column_list=rows.column_names,
        timeout=job.policy.timeout_seconds,
        number_sample_per_shard=max(1000, job.samples_per_shard),  # three digits of a key at least
        oom_shard_count=SHARD_DIGITS,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=job.policy.retries,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    rows_file = folder / "rows.arrow"  # img2dataset deletes it when it is done
    with pa.ipc.new_file(str(rows_file), rows.schema) as sink:
        sink.write_table(rows)
    with _fetching_with(fetch):
        downloader.download_shard((number, str(rows_file)))
    return collected.found


class _Collector:
    """Stands where img2dataset expects its sample writer."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Row, Sample | None]] = {}

    def write(self, image: bytes | None, key: str, caption: str | None, meta: Row) -> None:
        """Take a row as img2dataset hands it over; image: None when there is no sample."""
        status, error = outcome(meta.pop("error_message"))
        row = {**meta, "caption": caption or "", "status": status, "error": error}
        sample = None
        if image is not None:
            described = {name: value for name, value in row.items() if name != "error"}
            sample = Sample(key=key, image_bytes=image, caption=caption or "", json=described)
        self.found[key] = (row, sample)

    def close(self) -> None:
        """Do nothing: the shard is written by `make_shard`, where an error is seen."""


def _refusing(refused: dict[int, str], fetch: Callable[[str | None], Fetched]) -> Fetch:
    """Answer for the rows that are left out; only the others reach the web."""

    def of_row(number: int, url: str | None) -> Fetched:
        return Fetched(reason=refused[number]) if number in refused else fetch(url)

    return of_row


@contextmanager
def _fetching_with(fetch: Fetch) -> Iterator[None]:
    """Let img2dataset's Downloader fetch with `fetch`, whose module has no other seam for it."""
    from img2dataset import downloader

    def download(row: tuple[int, str], **_: Any) -> tuple[int, io.BytesIO | None, str | None]:
        got = fetch(*row)
        return row[0], None if got.body is None else io.BytesIO(got.body), got.reason

    original: Callable[..., Any] = downloader.download_image_with_retry
    downloader.download_image_with_retry = download
    try:
        yield
    finally:
        downloader.download_image_with_retry = original
