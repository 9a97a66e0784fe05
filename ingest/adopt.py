"""Adopt images that are already there: tars by anyone, folders, image bytes in Parquet.

    python ingest/adopt.py --source "s3://bucket/cc12m/{00000..01242}.tar" --out data/images
    python ingest/adopt.py --source photos/ --out data/images
    python ingest/adopt.py --source "train-*.parquet" --out data/images

Tars are indexed where they lie. ingest/download.py --verify and --forget work on --out as on a
download's. A rerun makes what is missing, or was changed since.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING

from cluster.base.cli import flag_of, parse, require_at_least, require_lasting, run_script
from ingest.adopting.config import AdoptConfig

if TYPE_CHECKING:
    from ingest.adopting.sources import Source
    from ingest.store.stage import MakeShard


def main(config: AdoptConfig) -> int:
    """Run the adoption; return 0, or 1 when parts are missing and a rerun would continue."""
    from cluster.base import metrics
    from ingest.adopting.sources import open_source
    from ingest.shards import committed_names, shard_name, withdraw_damaged
    from ingest.store.removal import read_forgotten
    from ingest.store.shard_runner import Unit, WorkerPool
    from ingest.store.stage import make_shards, publish_and_report

    _check(config)
    source = open_source(config)
    job = prepare(config, source)
    requests = read_forgotten(job.root)
    metrics.serve(config.metrics_port)

    # Make the shards that are missing, or whose tar was changed
    for name, problem in withdraw_damaged(job.root).items():
        print(f"shard {name} is made again: {problem}", flush=True)
    parts, done = source.parts(), set(committed_names(job.root))
    units = [
        Unit(name=name, payload=part)
        for name, part in zip(map(shard_name, range(len(parts))), parts, strict=True)
        if name not in done
    ]
    print(f"{len(parts)} shards, {len(done)} of them done already", flush=True)
    places = {unit.name: unit.payload.place for unit in units}
    pool = WorkerPool(number=config.num_processes, group="cpu_group")
    failures = make_shards("adopt", job, units, pool, missing=len(units)) if units else {}
    for name, problem in failures.items():
        print(f"shard {name} failed: {places[name]}: {problem}", flush=True)

    return publish_and_report(
        job.root,
        num_shards=len(parts),
        num_rows=None,
        unique=config.filters.unique,
        before=requests,
    )


def prepare(config: AdoptConfig, source: "Source") -> "MakeShard":
    """Write or check the manifest, and describe what all shards have in common."""
    import pyarrow as pa

    from cluster.base.files import digest_of
    from ingest.adopting.copies import CopyJob
    from ingest.adopting.in_place import InPlaceJob
    from ingest.adopting.tars import LISTING, TarSource
    from ingest.fetching.decode import ImageLimits, Resizer
    from ingest.fetching.formats import report_missing_formats
    from ingest.lists.filters import RowFilter
    from ingest.shards import recover, remove_data_folder, write_manifest
    from ingest.store.storage import absolute_root, storage_of

    report_missing_formats()
    schema = pa.schema([("url", pa.string()), ("caption", pa.string()), *source.kept])
    row_filter = RowFilter.open(config.filters, schema)
    copies = config.copy or source.copied
    _require_effect(config, source, copies)
    settings = {
        "source": absolute_root(config.source),
        "source_digest": source.digest,
        "keep_columns": config.keep_columns,
        "copy": copies,
        "filters": {**asdict(config.filters), "opt_out": row_filter.opt_out_digest},
        "min_image_side": config.min_image_side,
    }
    resizer = Resizer(
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        min_image_side=config.min_image_side,
    )
    if copies:
        settings |= {**asdict(resizer), "samples_per_shard": config.samples_per_shard}
    config_hash = digest_of(settings)
    if config.fresh:
        remove_data_folder(config.out, "images")
    write_manifest(config.out, "images", {**settings, "config_hash": config_hash})
    recover(config.out)
    if isinstance(source, TarSource):
        storage_of(config.out).replace(LISTING, "".join(f"{p}\n" for p in source.places).encode())
    root = absolute_root(config.out)  # a Ray worker has another working directory
    limits = ImageLimits(
        min_side=config.min_image_side,
        min_pixels=config.filters.min_pixels,
        max_aspect_ratio=config.filters.max_aspect_ratio,
    )
    common = {"root": root, "row_filter": row_filter, "limits": limits, "config_hash": config_hash}
    if copies or not isinstance(source, TarSource):
        return CopyJob(source=source, resizer=resizer, **common)
    return InPlaceJob(source=source, **common)


def _require_effect(config: AdoptConfig, source: "Source", copies: bool) -> None:
    """Raise ValueError for an option that changes nothing for this kind of source."""
    from ingest.adopting.folders import FolderSource
    from ingest.adopting.tables import TableSource
    from ingest.adopting.tars import TarSource

    idle = {
        "image_size": not copies,
        "resize_mode": not copies,
        "samples_per_shard": isinstance(source, TarSource),
        "image_column": not isinstance(source, TableSource),
        "captions": not isinstance(source, FolderSource),
    }
    for name in (name for name, has_none in idle.items() if has_none):
        if getattr(config, name) != getattr(AdoptConfig(), name):
            add_copy = name in ("image_size", "resize_mode")
            remedy = "drop it, or add --copy" if add_copy else "drop it"
            raise ValueError(f"{flag_of(name)}: changes nothing of {config.source}; {remedy}")


def _check(config: AdoptConfig) -> None:
    from fsspec import get_filesystem_class

    require_lasting("--out", config.out)
    if not config.source:
        raise ValueError("--source: not given; expected tars, a folder, or Parquet files")
    scheme, separator, _ = config.source.partition("://")
    try:
        get_filesystem_class(scheme if separator else "file")
    except (ValueError, ImportError) as error:
        raise ValueError(f"--source {config.source}: {error}") from None
    if "urls" in config.filters.unique:
        raise ValueError(
            "--filters.unique: found urls, expected images: what is adopted has no list"
        )
    require_at_least(config, image_size=1, samples_per_shard=1, min_image_side=0, num_processes=0)


if __name__ == "__main__":
    run_script(lambda: main(parse(AdoptConfig, check=_check)))
