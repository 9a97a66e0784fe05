"""Download a URL list into WebDataset shards; a finished shard is never fetched again.

    python ingest/download.py --urls laion.parquet --out data/images
    python ingest/download.py --urls laion.parquet --out s3://bucket/images --image-size 64
    python ingest/download.py --out data/images --verify
    python ingest/download.py --out data/images --forget urls.txt
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction

from cluster.base.cli import (
    DONE,
    INCOMPLETE,
    Option,
    parse,
    require_at_least,
    require_lasting,
    run_script,
)
from ingest.fetching.decode import MIN_IMAGE_SIDE, ResizeMode
from ingest.lists.filters import FilterConfig

if TYPE_CHECKING:
    import pyarrow as pa

    from ingest.fetching.retries import DownloadPlan
    from ingest.fetching.shard_task import ShardJob
    from ingest.lists.url_list import UrlList


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Defaults suit web photographs for training at up to 256 px."""

    urls: str = ""
    """List of URLs and captions: Parquet, CSV, TSV, JSON, or a text file of URLs; a file, a folder
    or a glob pattern, local or any fsspec URL."""
    out: str = "data/images"
    """Folder for the shards."""
    url_column: str | None = None
    """Column of the URLs; None finds url, image_url or img_url, in any case."""
    caption_column: str | None = None
    """Column of the captions; None finds caption, text or alt_text, in any case; the
    further ones of a list of captions are stored as captions_more."""
    columns: Annotated[tuple[str, ...], Option(hidden=True)] = ()
    """Columns of a CSV or TSV list without a header line, in order, such as caption url."""
    keep_columns: Annotated[tuple[str, ...], UseAppendAction] = ()
    """Further column to store with every row; repeatable."""
    image_size: int = 256
    """Side of the stored images, px."""
    resize_mode: ResizeMode = "keep_ratio"
    """keep_ratio: the shorter side is reduced to image_size, cropping is left to the readers;
    center_crop: then the middle is kept; keep_ratio_largest: the longer side is reduced; border:
    then white is added; no: stored as large as it is. Nothing is enlarged."""
    min_image_side: int | None = None
    """Leave out images whose shorter side is below this, px; None: 16, which leaves out tracking
    pixels, or what the folder was begun with."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    samples_per_shard: int = 1000
    """Rows of the list per shard."""
    num_processes: int | None = None
    """Shards at once; None: one per CPU of the Ray cluster; 0: in this process, without Ray."""
    num_threads: int = 32
    """Connections at once per shard."""
    timeout: float = 10.0
    """Of one try at one URL, redirects included, seconds."""
    retries: Annotated[int, Option(hidden=True)] = 2
    """Further tries after a failure that may pass; a 404 or 403 is not tried again."""
    shard_timeout: float = 1800.0
    """For all rows of a shard, seconds; rows that are left fail with shard_deadline."""
    host_connections: int = 4
    """Connections at once per host, over all shards; each shard has at least one."""
    host_rate: float = 10.0
    """Requests per second and host, over all shards; 0: no limit. A first burst may have a
    second's requests, or one from each shard."""
    robots: bool = True
    """Obey robots.txt."""
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
    """Fetch rows that failed for reasons that may pass again, into new shards."""
    verify: bool = False
    """Fetch nothing: read every shard in --out, of images or embeddings, and quarantine damaged
    ones."""
    forget: str = ""
    """Fetch nothing: remove samples from --out, and from the embeddings made of it, for good; a
    text file of URLs and sha256 digests of images, one a line."""
    fresh: bool = False
    """Delete the shards in --out first."""


def main(config: DownloadConfig) -> int:
    """Run the download; return 0, or 1 when shards are missing and a rerun would continue."""
    from cluster.base import metrics
    from ingest.fetching.retries import DownloadPlan, read_rounds, start_round
    from ingest.store.removal import read_forgotten
    from ingest.store.stage import publish_and_report

    _check(config)
    if config.verify:
        return _verify(config)
    if config.forget:
        return _forget(config)

    # The list, and what is committed of it
    url_list, job = prepare(config)
    plan = DownloadPlan(
        num_rows=url_list.num_rows,
        samples_per_shard=config.samples_per_shard,
        rounds=read_rounds(job.root),
    )
    requests = read_forgotten(job.root)
    metrics.serve(config.metrics_port)

    # Make the missing shards, then those of a round of retries
    num_done, num_failed = _make_missing(config, job, url_list, plan)
    round_was_open = bool(plan.rounds) and num_done < plan.num_shards
    if config.retry_failed and not num_failed and not round_was_open:
        retry_round = start_round(job.root, plan)
        if retry_round is None:
            print("no row failed for a reason that may pass", flush=True)
        else:
            num_rows = len(retry_round.rows)
            print(f"round {retry_round.number}: {num_rows} rows are tried again", flush=True)
            plan = replace(plan, rounds=(*plan.rounds, retry_round))
            _make_missing(config, job, url_list, plan)

    return publish_and_report(
        job.root,
        num_shards=plan.num_shards,
        num_rows=plan.num_rows,
        unique=config.filters.unique,
        before=requests,
    )


def prepare(config: DownloadConfig) -> "tuple[UrlList, ShardJob]":
    """Open the list, write or check the manifest, and describe what all shards have in common."""
    from cluster.base.files import digest_of
    from ingest.fetching.decode import ImageLimits, Resizer
    from ingest.fetching.engine import EngineConfig
    from ingest.fetching.fetch import FetchPolicy, parse_allow_address
    from ingest.fetching.formats import report_missing_formats
    from ingest.fetching.net import resolve_proxy
    from ingest.fetching.shard_task import JPEG_QUALITY, ShardJob
    from ingest.lists.url_list import open_url_list
    from ingest.shards import read_manifest, recover, remove_data_folder, write_manifest
    from ingest.store.storage import absolute_root

    report_missing_formats()
    url_list = open_url_list(
        config.urls,
        url_column=config.url_column,
        caption_column=config.caption_column,
        keep_columns=config.keep_columns,
        columns=config.columns,
        filters=config.filters,
    )
    allowed = tuple(parse_allow_address(text) for text in config.allow_address)

    # The manifest: what the shards depend on
    min_image_side = config.min_image_side
    if min_image_side is None:
        begun_with = {}
        with suppress(ValueError):  # not begun
            begun_with = {} if config.fresh else read_manifest(config.out)
        min_image_side = begun_with.get("min_image_side", MIN_IMAGE_SIDE)
    settings = {
        "url_list_sha256": url_list.digest,
        "num_rows": url_list.num_rows,
        "url_column": url_list.url_column,
        "caption_column": url_list.caption_column,
        "keep_columns": config.keep_columns,
        "filters": {**asdict(config.filters), "opt_out": url_list.row_filter.opt_out_digest},
        "samples_per_shard": config.samples_per_shard,
        "image_size": config.image_size,
        "resize_mode": config.resize_mode,
        "min_image_side": min_image_side,
        "jpeg_quality": JPEG_QUALITY,
    }
    config_hash = digest_of(settings)
    if config.fresh:
        remove_data_folder(config.out, "images")
    write_manifest(config.out, "images", {**settings, "config_hash": config_hash})
    recover(config.out)
    for host, port in allowed:
        print(f"warning: {host}:{port} may be fetched from, whatever its address", flush=True)

    job = ShardJob(
        root=absolute_root(config.out),  # a Ray worker has another working directory
        samples_per_shard=config.samples_per_shard,
        resizer=Resizer(
            image_size=config.image_size,
            resize_mode=config.resize_mode,
            min_image_side=min_image_side,
            quality=JPEG_QUALITY,
        ),
        engine=EngineConfig(
            num_threads=config.num_threads,
            retries=config.retries,
            deadline_seconds=config.shard_timeout,
        ),
        config_hash=config_hash,
        policy=FetchPolicy(
            timeout_seconds=config.timeout,
            allow_addresses=allowed,
            limits=ImageLimits(
                min_pixels=config.filters.min_pixels,
                max_aspect_ratio=config.filters.max_aspect_ratio,
            ),
            robots=config.robots,
            host_connections=config.host_connections,
            host_rate=config.host_rate,
            contact=config.contact,
            proxy=resolve_proxy(config.proxy),
        ),
        row_filter=url_list.row_filter,
        kept=url_list.kept,
    )
    return url_list, job


def _make_missing(
    config: DownloadConfig, job: "ShardJob", url_list: "UrlList", plan: "DownloadPlan"
) -> tuple[int, int]:
    """Make the missing shards of the plan; return how many were done before, how many failed.

    A damaged shard is withdrawn first, and made again.
    """
    from ingest.fetching.rate_limit import deal_host_share
    from ingest.fetching.shard_task import NetworkDownError
    from ingest.shards import committed_names, withdraw_damaged
    from ingest.store.shard_runner import WorkerPool
    from ingest.store.stage import make_shards

    for name, problem in withdraw_damaged(job.root).items():
        print(f"shard {name} is damaged ({problem}) and is fetched again", flush=True)
    done = set(committed_names(job.root))
    missing = plan.num_shards - len(done)
    print(
        f"{plan.num_rows} rows in {plan.num_shards} shards, {len(done)} of them done already",
        flush=True,
    )
    if missing <= 0:
        return len(done), 0

    units = plan.units(lambda: _read_list(config, url_list))
    failures = make_shards(
        "download",
        job,
        (unit for unit in units if unit.name not in done),
        WorkerPool(number=config.num_processes, group="cpu_group"),
        missing=missing,
        passing=(NetworkDownError,),
        deal_share=partial(deal_host_share, config.host_connections, config.host_rate),
    )
    for name, problem in failures.items():
        print(f"shard {name} failed: {problem}", flush=True)
    return len(done), len(failures)


def _read_list(config: DownloadConfig, url_list: "UrlList") -> "Iterator[pa.Table]":
    """Yield the list's shards; rows whose URL came before are marked where they are left out."""
    import pyarrow as pa

    from ingest.lists.duplicates import repeated_urls
    from ingest.lists.filters import REPEATED

    if "urls" not in config.filters.unique:
        yield from url_list.shards(config.samples_per_shard)
        return
    print(f"comparing {url_list.num_rows} URLs", flush=True)
    repeated, start = repeated_urls(url_list.urls(), url_list.num_rows), 0
    for rows in url_list.shards(config.samples_per_shard):
        yield rows.append_column(REPEATED, pa.array(repeated[start : start + rows.num_rows]))
        start += rows.num_rows


def _verify(config: DownloadConfig) -> int:
    from ingest.shards import committed_names, read_manifest
    from ingest.store.maintenance import orphan_files, verify

    problems = verify(config.out)
    for name, problem in problems.items():
        print(f"shard {name}: {problem}; now in {config.out}/_quarantine", flush=True)
    orphans = orphan_files(config.out)
    if orphans:
        more = f" and {len(orphans) - 3} more" if len(orphans) > 3 else ""
        print(f"of no commit: {', '.join(orphans[:3])}{more}", flush=True)
    num_valid = len(committed_names(config.out))
    print(f"{num_valid} shards are valid, {len(problems)} were damaged", flush=True)
    if problems:
        manifest = read_manifest(config.out)
        remedy = "ingest/adopt.py to make" if "source" in manifest else "the download to fetch"
        if manifest.get("kind") == "embeds":
            remedy = "ingest/embed.py to make"
        print(f"incomplete: rerun {remedy} them again", flush=True)
    return INCOMPLETE if problems else DONE


def _forget(config: DownloadConfig) -> int:
    from ingest.store.maintenance import forget
    from ingest.store.removal import read_request
    from ingest.store.stage import report_removed

    request = read_request(config.forget)
    report_removed(forget(config.out, request))
    return DONE


def _check(config: DownloadConfig) -> None:
    from ingest.fetching.net import resolve_proxy

    require_lasting("--out", config.out)
    resolve_proxy(config.proxy)
    if config.verify and config.forget:
        raise ValueError("--verify and --forget: found both, expected one of them")
    if config.verify or config.forget:
        if config.fresh or config.retry_failed:
            raise ValueError("--verify and --forget fetch nothing: drop --fresh and --retry-failed")
        return
    if not config.urls:
        raise ValueError("--urls: not given; expected a list of URLs and captions")
    require_at_least(
        config, image_size=1, samples_per_shard=1, num_threads=1, host_connections=1, retries=0,
        min_image_side=0, num_processes=0, host_rate=0,
    )  # fmt: skip
    for name in ("timeout", "shard_timeout"):
        if getattr(config, name) <= 0:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: found {getattr(config, name)}, expected seconds above 0")
    if any(sign in config.contact for sign in "\r\n") or not config.contact.isascii():
        raise ValueError("--contact: expected one line of ASCII, such as https://example.com/bot")


if __name__ == "__main__":
    run_script(lambda: main(parse(DownloadConfig, check=_check)))
