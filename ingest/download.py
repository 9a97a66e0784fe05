"""Download a URL list into WebDataset shards; a finished shard is never fetched again.

examples:
  python ingest/download.py --urls laion.parquet --out data/images
  python ingest/download.py --urls laion.parquet --out data/images --image-size 64 --num-processes 0
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction

from cluster.cli import parse, run_script
from ingest.decode import ResizeMode
from ingest.filters import FilterConfig

if TYPE_CHECKING:
    import pyarrow as pa

    from ingest.commits import Commit
    from ingest.row_filter import RowFilter
    from ingest.shard_task import ShardJob
    from ingest.url_list import UrlList


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Defaults suit web photographs for training at up to 256 px."""

    urls: str = ""
    """List of URLs and captions: Parquet, CSV, TSV, JSON lines, or a text file of URLs; a file, a
    folder or a glob pattern, local or any fsspec URL."""
    out: str = "data/images"
    """Folder for the shards."""
    url_column: str | None = None
    """Column of the URLs; None finds url, URL, image_url or img_url."""
    caption_column: str | None = None
    """Column of the captions; None finds caption, text, TEXT, CAPTION or alt_text."""
    keep_columns: Annotated[tuple[str, ...], UseAppendAction] = ()
    """Further column to store with every row; repeatable."""
    image_size: int = 256
    """Side of the stored images, px."""
    resize_mode: ResizeMode = "keep_ratio"
    """keep_ratio: the shorter side is reduced to image_size, cropping is left to the readers;
    center_crop: then the middle is kept; keep_ratio_largest: the longer side is reduced; border:
    then white is added; no: stored as large as it is. Nothing is enlarged."""
    min_image_side: int = 0
    """Leave out images whose shorter side is below this, px."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    samples_per_shard: int = 1000
    """Rows of the list per shard."""
    num_processes: int | None = None
    """Shards in work at once; None: one per CPU that Ray has; 0: in this process, without Ray."""
    num_threads: int = 32
    """Connections at once per shard in work."""
    timeout: float = 10.0
    """Of one try at one URL, redirects included, seconds."""
    retries: int = 2
    """Further tries after a failure that may pass; a 404 or 403 is not tried again."""
    allow_address: Annotated[tuple[str, ...], UseAppendAction] = ()
    """HOST:PORT that may have a private address; all others must be public; repeatable."""
    metrics_port: int | None = None
    """Serve Prometheus metrics on this port of 127.0.0.1; 0: any free; None: do not."""
    fresh: bool = False
    """Delete the shards in --out first."""


def main(config: DownloadConfig) -> int:
    """Run the download; return 0, or 1 when shards are missing and a rerun would continue."""
    from cluster import metrics
    from ingest.shards import publish_snapshot, recover, remove_data_folder, shard_name

    _check(config)
    listed, row_filter = _open(config)
    if config.fresh:
        remove_data_folder(config.out, "images")
    job = _prepare(config, listed, row_filter)
    done = _finished(job.root)
    total = -(-listed.num_rows // config.samples_per_shard)
    print(f"{listed.num_rows} rows in {total} shards, {len(done)} of them done already", flush=True)
    metrics.serve(config.metrics_port)
    todo = (
        (number, rows)
        for number, rows in enumerate(_shards(config, listed))
        if shard_name(number) not in done
    )
    failures = _run(config, job, todo, total - len(done)) if len(done) < total else {}
    for name, error in failures.items():
        print(f"shard {name} failed: {error}", flush=True)
    recover(job.root)  # a task that died and was tried again left its attempt behind
    snapshot = publish_snapshot(job.root)
    return _report(config, listed.num_rows, total, snapshot.digest)


def _check(config: DownloadConfig) -> None:
    if not config.urls:
        raise ValueError("--urls: not given; expected a list of URLs and captions")
    least = {"image_size": 1, "samples_per_shard": 1, "num_threads": 1, "retries": 0}
    least |= {"min_image_side": 0}
    for name, low in least.items():
        if getattr(config, name) < low:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: found {getattr(config, name)}, expected {low} or more")
    if config.timeout <= 0:
        raise ValueError(f"--timeout: found {config.timeout}, expected seconds above 0")
    if config.num_processes is not None and config.num_processes < 0:
        raise ValueError(f"--num-processes: found {config.num_processes}, expected 0 or more")


def _open(config: DownloadConfig) -> "tuple[UrlList, RowFilter]":
    from ingest.row_filter import RowFilter
    from ingest.url_list import open_url_list

    listed = open_url_list(
        config.urls,
        url_column=config.url_column,
        caption_column=config.caption_column,
        keep_columns=config.keep_columns,
    )
    row_filter = RowFilter.open(config.filters, listed.schema)
    looked_at = tuple(dict.fromkeys([*listed.kept, *row_filter.columns.values()]))
    return replace(listed, kept=looked_at), row_filter


def _prepare(config: DownloadConfig, listed: "UrlList", row_filter: "RowFilter") -> "ShardJob":
    """Write or check the manifest, settle what a killed run left, and describe the work."""
    from ingest.commits import digest_of
    from ingest.fetch import FetchPolicy, parse_allow_address
    from ingest.shard_task import JPEG_QUALITY, ShardJob
    from ingest.shards import recover, write_manifest

    allowed = tuple(parse_allow_address(text) for text in config.allow_address)
    settings = {
        "url_list_sha256": listed.digest,
        "num_rows": listed.num_rows,
        "url_column": listed.url_column,
        "caption_column": listed.caption_column,
        "keep_columns": config.keep_columns,
        "filters": {**asdict(config.filters), "opt_out": row_filter.opt_out_digest},
        "samples_per_shard": config.samples_per_shard,
        "image_size": config.image_size,
        "resize_mode": config.resize_mode,
        "min_image_side": config.min_image_side,
        "jpeg_quality": JPEG_QUALITY,
    }
    config_hash = digest_of(settings)
    write_manifest(config.out, "images", {**settings, "config_hash": config_hash})
    recover(config.out)
    return ShardJob(
        root=os.path.abspath(config.out),  # a Ray worker has another working directory
        samples_per_shard=config.samples_per_shard,
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        min_image_side=config.min_image_side,
        num_threads=config.num_threads,
        config_hash=config_hash,
        policy=FetchPolicy(
            timeout_seconds=config.timeout,
            retries=config.retries,
            allow_addresses=allowed,
            min_pixels=config.filters.min_pixels,
            max_aspect_ratio=config.filters.max_aspect_ratio,
        ),
        row_filter=row_filter,
        kept=config.keep_columns,
    )


def _shards(config: DownloadConfig, listed: "UrlList") -> "Iterator[pa.Table]":
    """Yield the list's shards, with a mark at rows whose URL came before where that matters."""
    import pyarrow as pa

    from ingest.duplicates import repeated_urls
    from ingest.row_filter import REPEATED

    if not config.filters.unique_urls:
        yield from listed.shards(config.samples_per_shard)
        return
    print(f"comparing {listed.num_rows} URLs", flush=True)
    repeated, start = repeated_urls(listed.urls(), listed.num_rows), 0
    for rows in listed.shards(config.samples_per_shard):
        mine = pa.array(repeated[start : start + rows.num_rows])
        yield rows.append_column(REPEATED, mine)
        start += rows.num_rows


def _finished(root: str) -> set[str]:
    """Return the shards that need no work; one with damaged files is withdrawn, and said so."""
    from ingest.shards import committed, damage, withdraw

    done = committed(root)
    for name, commit in list(done.items()):
        problem = damage(root, commit)
        if problem is not None:
            print(f"shard {name} is damaged ({problem}) and is fetched again", flush=True)
            withdraw(root, commit)
            del done[name]
    return set(done)


# -- running the shards --------------------------------------------------------------------------

Todo = Iterator[tuple[int, "pa.Table"]]


def _run(config: DownloadConfig, job: "ShardJob", todo: Todo, count: int) -> dict[str, str]:
    """Make the shards; return the error of each that failed, by name."""
    from ingest.progress import progress
    from ingest.shards import shard_name

    failures: dict[str, str] = {}
    work = _in_this_process if config.num_processes == 0 else _on_ray
    with progress("download", count, unit="shards") as advance:
        for number, commit, error in work(config, job, todo):
            if commit is None:
                failures[shard_name(number)] = error or "unknown"
            else:
                _count(job.root, commit)
            advance()
    return failures


Result = tuple[int, "Commit | None", str | None]


def _in_this_process(_: DownloadConfig, job: "ShardJob", todo: Todo) -> Iterator[Result]:
    from ingest.shard_task import make_shard

    for number, rows in todo:
        try:
            yield number, make_shard(job, number, rows), None
        except (OSError, RuntimeError) as error:
            yield number, None, str(error)


def _on_ray(config: DownloadConfig, job: "ShardJob", todo: Todo) -> Iterator[Result]:
    """Make each shard in a Ray task, a bounded number at once; a task that dies is tried again."""
    from cluster.session import ensure_ray

    ensure_ray()
    import ray

    from ingest.shard_task import make_shard

    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    at_once = config.num_processes or cpus
    task = ray.remote(num_cpus=min(1.0, cpus / at_once), max_retries=3)(make_shard)
    running: dict[Any, int] = {}
    exhausted = False
    while running or not exhausted:
        # One more than can run waits, so that no CPU idles while a table is read.
        while not exhausted and len(running) <= at_once:
            item = next(todo, None)
            exhausted = item is None
            if item is not None:
                running[task.remote(job, *item)] = item[0]
        for reference in ray.wait(list(running), num_returns=1)[0] if running else []:
            yield running.pop(reference), *_result(reference)


def _result(reference: Any) -> tuple["Commit | None", str | None]:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference), None
    except RayTaskError as error:
        return None, str(error.cause)
    except RayError as error:
        return None, str(error).splitlines()[0]


# -- telling -------------------------------------------------------------------------------------


def _count(root: str, commit: "Commit") -> None:
    from cluster import metrics

    for name, number in commit.counts.items():
        metrics.counter("minidalle2_ingest_rows_total").inc(number, outcome=name.partition(":")[0])
    size = commit.files[f"{commit.shard}.tar"]["size"]
    metrics.counter("minidalle2_ingest_bytes_total").inc(size)


def _report(config: DownloadConfig, num_rows: int, total: int, snapshot: str) -> int:
    """Print where every row of the list went, out of the commits alone."""
    from ingest.shards import committed

    commits = committed(config.out)
    counts: Counter[str] = Counter()
    for commit in commits.values():
        counts.update(commit.counts)
    parts = [f"{counts['stored']} stored"]
    for kind in ("filtered", "failed"):
        of_kind = {n.partition(":")[2]: c for n, c in counts.items() if n.startswith(f"{kind}:")}
        reasons = ", ".join(f"{name} {n}" for name, n in sorted(of_kind.items()))
        parts.append(f"{sum(of_kind.values())} {kind}" + (f" ({reasons})" if reasons else ""))
    missing = total - len(commits)
    waiting = num_rows - sum(counts.values())
    parts += [f"{waiting} in {missing} missing shards"] if missing else []
    print(f"{num_rows} rows = {' + '.join(parts)}; snapshot {snapshot[:12]}", flush=True)
    if not missing and waiting:
        raise ValueError(f"{config.out}: {waiting} rows unaccounted for; rerun with --fresh")
    if missing:
        print("incomplete: rerun the same command to continue", flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    run_script(lambda: main(parse(DownloadConfig)))
