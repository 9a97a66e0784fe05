"""Download a URL list into WebDataset shards; a finished shard is never fetched again.

examples:
  python ingest/download.py --urls laion.parquet --out data/images
  python ingest/download.py --urls laion.parquet --out s3://bucket/images --image-size 64
  python ingest/download.py --out data/images --verify
  python ingest/download.py --out data/images --forget urls.txt
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction

from cluster.base.cli import Option, parse, require_lasting, run_script
from ingest.fetching.decode import ResizeMode
from ingest.lists.filters import FilterConfig

if TYPE_CHECKING:
    import pyarrow as pa

    from ingest.fetching.retries import Plan
    from ingest.fetching.shard_task import ShardJob
    from ingest.lists.filters import RowFilter
    from ingest.lists.url_list import UrlList
    from ingest.store.shard_runner import Unit


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
    retries: Annotated[int, Option(hidden=True)] = 2
    """Further tries after a failure that may pass; a 404 or 403 is not tried again."""
    shard_timeout: float = 1800.0
    """Of all of a shard's rows, seconds; those left over count as failed: shard_deadline."""
    host_connections: int = 4
    """Connections at once per host, over all shards in work; each has one at least."""
    host_rate: float = 10.0
    """Requests per second and host, over all shards in work, after a burst of a second's, or of
    one from each; 0: any number."""
    robots: bool = True
    """Keep to robots.txt."""
    contact: str = ""
    """Address or page for complaints; part of the user agent that hosts see."""
    allow_address: Annotated[tuple[str, ...], UseAppendAction] = ()
    """HOST:PORT that may have a private address or another port; all others must be public, on
    80 or 443; repeatable."""
    proxy: Annotated[str, Option(hidden=True)] = ""
    """http://HOST:PORT to CONNECT through, "environment" for HTTPS_PROXY's; empty: directly."""
    metrics_port: int | None = None
    """Serve Prometheus metrics on this port of 127.0.0.1; 0: any free; None: do not."""
    retry_failed: bool = False
    """Fetch rows that failed for passing reasons once more, into new shards."""
    verify: bool = False
    """Fetch nothing: read every shard in --out again, images' or embeddings', and set damaged ones
    aside."""
    forget: str = ""
    """Fetch nothing: remove samples from --out, and from the embeddings made of it, for good; a
    text file of URLs and sha256 digests of images, one a line."""
    fresh: bool = False
    """Delete the shards in --out first."""


def main(config: DownloadConfig) -> int:
    """Run the download; return 0, or 1 when shards are missing and a rerun would continue."""
    from cluster.base import metrics
    from ingest.fetching.retries import Plan, read_rounds, start_round
    from ingest.shards import publish_snapshot, recover, remove_data_folder, shard_name
    from ingest.store.maintenance import drop_repeated_images
    from ingest.store.removal import read_forgotten

    _check(config)
    if config.verify:
        return _verify(config)
    if config.forget:
        return _forget(config)
    listed, row_filter = _open(config)
    if config.fresh:
        remove_data_folder(config.out, "images")
    job = _prepare(config, listed, row_filter)
    size, rounds, known = config.samples_per_shard, read_rounds(job.root), read_forgotten(job.root)
    plan = Plan(num_rows=listed.num_rows, samples_per_shard=size, rounds=rounds)
    metrics.serve(config.metrics_port)
    earlier, missing = _make_missing(config, job, listed, plan)
    if config.retry_failed and not missing and not (rounds and earlier < plan.num_shards):
        again = start_round(job.root, plan, [shard_name(n) for n in range(plan.num_shards)])
        if again is None:
            print("no row failed for a reason that may pass", flush=True)
        else:
            print(f"round {again.number}: {len(again.rows)} rows are tried again", flush=True)
            plan = replace(plan, rounds=(*plan.rounds, again))
            _, missing = _make_missing(config, job, listed, plan)
    recover(job.root)  # a task that died and was tried again left its attempt behind
    if "images" in config.filters.unique:
        print(f"{drop_repeated_images(job.root)} repeated images dropped", flush=True)
    if read_forgotten(job.root) != known:  # a request came in the meantime
        _forget(config)
    snapshot = publish_snapshot(job.root)
    return _report(config, plan, snapshot.digest)


def _make_missing(
    config: DownloadConfig, job: "ShardJob", listed: "UrlList", plan: "Plan"
) -> tuple[int, int]:
    """Make the shards of the plan that are not there; return how many were, and how many lack."""

    done = _finished(job.root)
    total = plan.num_shards
    print(f"{listed.num_rows} rows in {total} shards, {len(done)} of them done already", flush=True)
    todo = (unit for unit in _shards(config, listed, plan) if unit.name not in done)
    failures = _run(config, job, todo, total - len(done)) if len(done) < total else {}
    for name, error in failures.items():
        print(f"shard {name} failed: {error}", flush=True)
    return len(done), len(failures)


def _verify(config: DownloadConfig) -> int:
    from ingest.shards import committed_names
    from ingest.store.maintenance import orphan_files, verify
    from ingest.store.snapshots import read_manifest

    problems = verify(config.out)
    for name, problem in problems.items():
        print(f"shard {name}: {problem}; now in {config.out}/_quarantine", flush=True)
    unknown = orphan_files(config.out)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        print(f"of no commit: {', '.join(unknown[:3])}{more}", flush=True)
    print(
        f"{len(committed_names(config.out))} shards are whole, {len(problems)} were not", flush=True
    )
    if problems:
        embeds = read_manifest(config.out).get("kind") == "embeds"
        what = "ingest/embed.py to make" if embeds else "the download to fetch"
        print(f"incomplete: rerun {what} them again", flush=True)
    return 1 if problems else 0


def _forget(config: DownloadConfig) -> int:
    from ingest.store.maintenance import forget
    from ingest.store.removal import Forgotten, read_request

    request = read_request(config.forget) if config.forget else Forgotten()
    removed = forget(config.out, request)
    print(
        f"forgotten: {removed.num_samples} samples, {removed.num_rows} rows, in "
        f"{removed.num_shards} shards made anew; no later download stores them",
        flush=True,
    )
    for embeds in removed.unreached:
        print(f"warning: embeddings in {embeds} are not there now: delete that copy", flush=True)
    return 0


def _check(config: DownloadConfig) -> None:
    from ingest.fetching.net import proxy_named

    require_lasting("--out", config.out)
    proxy_named(config.proxy)
    if config.verify and config.forget:
        raise ValueError("--verify and --forget: found both, expected one of them")
    if config.verify or config.forget:
        if config.fresh or config.retry_failed:
            raise ValueError("--verify and --forget fetch nothing: drop --fresh and --retry-failed")
        return
    if not config.urls:
        raise ValueError("--urls: not given; expected a list of URLs and captions")
    least = {"image_size": 1, "samples_per_shard": 1, "num_threads": 1, "host_connections": 1}
    least |= {"retries": 0, "min_image_side": 0}
    for name, low in least.items():
        if getattr(config, name) < low:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: found {getattr(config, name)}, expected {low} or more")
    for name in ("timeout", "shard_timeout"):
        if getattr(config, name) <= 0:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: found {getattr(config, name)}, expected seconds above 0")
    if config.host_rate < 0:
        raise ValueError(f"--host-rate: found {config.host_rate}, expected 0 or more a second")
    if any(sign in config.contact for sign in "\r\n") or not config.contact.isascii():
        raise ValueError("--contact: expected one line of ASCII, such as https://example.com/bot")
    if config.num_processes is not None and config.num_processes < 0:
        raise ValueError(f"--num-processes: found {config.num_processes}, expected 0 or more")


def _open(config: DownloadConfig) -> "tuple[UrlList, RowFilter]":
    from ingest.lists.filters import RowFilter
    from ingest.lists.url_list import open_url_list

    listed = open_url_list(
        config.urls,
        url_column=config.url_column,
        caption_column=config.caption_column,
        keep_columns=config.keep_columns,
    )
    row_filter = RowFilter.open(config.filters, listed.schema)
    looked_at = tuple(dict.fromkeys([*listed.kept, *row_filter.needed_columns]))
    return replace(listed, kept=looked_at), row_filter


def _prepare(config: DownloadConfig, listed: "UrlList", row_filter: "RowFilter") -> "ShardJob":
    """Write or check the manifest, settle what a killed run left, and describe the work."""
    from cluster.base.files import digest_of
    from ingest.fetching.decode import Resizer
    from ingest.fetching.fetch import FetchPolicy, parse_allow_address
    from ingest.fetching.harvest import HarvestConfig
    from ingest.fetching.net import proxy_named
    from ingest.fetching.shard_task import JPEG_QUALITY, ShardJob
    from ingest.shards import recover, write_manifest
    from ingest.store.storage import absolute_root

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
    for host, port in allowed:
        print(f"warning: {host}:{port} may be fetched from, whatever its address", flush=True)
    return ShardJob(
        root=absolute_root(config.out),  # a Ray worker has another working directory
        samples_per_shard=config.samples_per_shard,
        resizer=Resizer(
            image_size=config.image_size,
            resize_mode=config.resize_mode,
            min_image_side=config.min_image_side,
            quality=JPEG_QUALITY,
        ),
        harvest=HarvestConfig(
            num_threads=config.num_threads,
            retries=config.retries,
            deadline_seconds=config.shard_timeout,
        ),
        config_hash=config_hash,
        policy=FetchPolicy(
            timeout_seconds=config.timeout,
            allow_addresses=allowed,
            min_pixels=config.filters.min_pixels,
            max_aspect_ratio=config.filters.max_aspect_ratio,
            robots=config.robots,
            host_connections=config.host_connections,
            host_rate=config.host_rate,
            contact=config.contact,
            proxy=proxy_named(config.proxy),
        ),
        row_filter=row_filter,
        kept=config.keep_columns,
    )


def _shards(config: DownloadConfig, listed: "UrlList", plan: "Plan") -> "Iterator[Unit]":
    """Yield all shards: the list's, then those of the rounds of retries."""
    import pyarrow as pa

    from ingest.fetching.retries import pick
    from ingest.fetching.shard_task import FAILED_BEFORE
    from ingest.shards import shard_name
    from ingest.store.shard_runner import Unit

    number = 0
    for rows in _tables(config, listed):
        yield Unit(name=shard_name(number), payload=rows)
        number += 1
    for again in plan.rounds:
        size = config.samples_per_shard
        for rows in pick(_tables(config, listed), again.rows, size):
            reasons = pa.array(plan.reasons_of(number), pa.string())
            rows = rows.append_column(FAILED_BEFORE, reasons)
            yield Unit(name=shard_name(number), payload=rows)
            number += 1


def _tables(config: DownloadConfig, listed: "UrlList") -> "Iterator[pa.Table]":
    """Yield the list's shards, with a mark at rows whose URL came before where that matters."""
    import pyarrow as pa

    from ingest.lists.duplicates import repeated_urls
    from ingest.lists.filters import REPEATED

    if "urls" not in config.filters.unique:
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
    from ingest.shards import committed_names, withdraw_damaged

    for name, problem in withdraw_damaged(root).items():
        print(f"shard {name} is damaged ({problem}) and is fetched again", flush=True)
    return set(committed_names(root))


def _run(
    config: DownloadConfig, job: "ShardJob", todo: "Iterator[Unit]", count: int
) -> dict[str, str]:
    """Make the shards; return the error of each that failed, by name."""
    from cluster.base.progress import progress, show_place
    from ingest.fetching.rate_limit import deal_host_share
    from ingest.fetching.shard_task import NetworkDown
    from ingest.store.accounts import Accounts, count_rows
    from ingest.store.shard_runner import WorkerPool, run_units

    show_place("download", job.root, count)
    failures: dict[str, str] = {}
    accounts, started = Accounts(), time.monotonic()
    results = run_units(
        job,
        todo,
        WorkerPool(number=config.num_processes, group="cpu_group"),
        passing=(NetworkDown,),
        deal_share=partial(deal_host_share, config.host_connections, config.host_rate),
    )
    with progress("download", count, unit="shards") as advance:
        for result in results:
            if result.error is not None:
                failures[result.name] = result.problem(job.root)
            else:
                count -= 1
                count_rows(result.value)
                show_place("download", job.root, count)
                accounts += Accounts.of([result.value])
            advance(note=accounts.rate(time.monotonic() - started))
    return failures


# -- telling -------------------------------------------------------------------------------------


def _report(config: DownloadConfig, plan: "Plan", snapshot: str) -> int:
    """Print where every row of the list went, out of the commits alone."""
    from ingest.shards import committed_names, read_commits
    from ingest.store.accounts import Accounts

    accounts = Accounts.of(read_commits(config.out))
    missing = plan.num_shards - len(committed_names(config.out))
    waiting = plan.num_rows - accounts.total
    more = f" + {waiting} in {missing} missing shards" if waiting else ""
    print(f"{plan.num_rows} rows = {accounts}{more}; snapshot {snapshot[:12]}", flush=True)
    if not missing and waiting:
        raise ValueError(f"{config.out}: {waiting} rows unaccounted for; rerun with --fresh")
    if missing:
        print("incomplete: rerun the same command to continue", flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    run_script(lambda: main(parse(DownloadConfig, check=_check)))
