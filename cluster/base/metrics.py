"""Every metric of the project, defined once, and the functions by which the code counts.

    counter("minidalle2_ingest_rows_total").inc(12, outcome="stored")
    gauge("minidalle2_train_loss").set(0.31, model="prior")
    histogram("minidalle2_checkpoint_seconds").observe(1.8, model="prior")

Where the values go is said in cluster/base/exporter.py. Whoever runs a stage counts for all of its
workers, so no metric needs a rank: a training's driver publishes what its first rank writes
(training/runs/follower.py). Labels come from closed sets: no URL, key or host becomes a series.
"""

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from cluster.base import exporter
from cluster.base.exporter import Kind, Metric
from cluster.base.options import nearest
from cluster.base.outcomes import FAILED, OUTCOMES

BACKLOGS = ("download", "adopt", "embed")
FOLDERS = ("images", "embeds", "runs")
Incident = Literal["spike", "hang", "lost", "broken", "refused"]  # see training/runs/events.py
INCIDENTS: tuple[str, ...] = get_args(Incident)
MODELS = ("clip", "prior", "decoder", "up256", "up1024")  # an upsampler is named by its stage
SCORED = (*MODELS, "chain")
STAGES = ("download", "clip", "judge", "embed", "prior", "base", "up", "sample", "evaluate")
SHAPE_SETS = ("single", "seen", "held_out")
SHAPE_SCORES = ("all", "attribute", "relation", "real")
SPACES = ("clip", "inception", "inception_clean", "dinov2", "efficientnet_lite0")
SPACE_SCORES = ("fd", "fd_infinity", "kid", "precision", "recall", "density", "coverage")
SCORES = (  # spelled as their paths in eval.json
    "clip.retrieval_at_1",
    "prior.mse",
    "prior.cos",
    "prior.cos_text",
    "prior.cos_shuffled",
    "prior.retrieval_at_1",
    "prior.retrieval_at_5",
    "images.fd_clip",
    "images.fd_clip_real_halves",
    "images.clip_score",
    "images.clip_score_shuffled",
    *(f"features.{space}.{score}" for space, score in itertools.product(SPACES, SPACE_SCORES)),
    "features.clip.cmmd",
    "memorisation.share_closer",
    *(f"shapes.{drawn}.{score}" for drawn, score in itertools.product(SHAPE_SETS, SHAPE_SCORES)),
)

_MODEL = {"model": MODELS}
_TABLE: tuple[tuple[str, Kind, Mapping[str, tuple[str, ...]], str], ...] = (
    ("ingest_rows_total", "counter", {"outcome": OUTCOMES}, "Rows of the URL list attempted."),
    ("ingest_failures_total", "counter", {"reason": FAILED}, "Rows that failed, by reason."),
    ("ingest_shards_total", "counter", {}, "Image shards committed."),
    ("ingest_bytes_total", "counter", {}, "Bytes of images stored in shards."),
    ("embed_images_total", "counter", {}, "Images embedded."),
    ("embed_shards_total", "counter", {}, "Embedding shards committed."),
    ("embed_failed_shards_total", "counter", {}, "Image shards that could not be embedded."),
    ("backlog_shards", "gauge", {"stage": BACKLOGS}, "Shards that the stage has still to make."),
    ("storage_free_bytes", "gauge", {"folder": FOLDERS}, "Free space where a local folder lies."),
    ("storage_size_bytes", "gauge", {"folder": FOLDERS}, "All space where a local folder lies."),
    ("train_running", "gauge", _MODEL, "1 while a run trains, 0 once it ended."),
    ("train_start_timestamp_seconds", "gauge", _MODEL, "When the workers last began; Unix time."),
    ("train_report_timestamp_seconds", "gauge", _MODEL, "When a run last reported."),
    ("train_loss", "gauge", _MODEL, "Mean loss since the last report."),
    ("train_step", "gauge", _MODEL, "Optimizer steps taken."),
    ("train_samples_total", "counter", _MODEL, "Samples trained on by this process."),
    ("train_samples_per_second", "gauge", _MODEL, "Samples a second, over all workers."),
    ("train_data_wait_ratio", "gauge", _MODEL, "Share of the time spent waiting for data."),
    ("train_grad_norm", "gauge", _MODEL, "Norm of the gradient before clipping."),
    ("train_learning_rate_ratio", "gauge", _MODEL, "Learning rate as a share of its peak."),
    ("train_nonfinite_steps_total", "counter", _MODEL, "Steps skipped: loss not finite."),
    ("train_incidents_total", "counter", {**_MODEL, "kind": INCIDENTS}, "Spikes, hangs, losses."),
    ("train_mfu", "gauge", _MODEL, "Share of the devices' peak that the model's products use."),
    ("train_device_memory_bytes", "gauge", _MODEL, "Most memory that the first rank's GPU held."),
    ("train_eta_seconds", "gauge", _MODEL, "Time to the last step at the present rate."),
    ("checkpoint_timestamp_seconds", "gauge", _MODEL, "When a run last wrote one, or began."),
    ("checkpoint_seconds", "histogram", _MODEL, "Time the training loop gives a checkpoint."),
    ("checkpoints_total", "counter", _MODEL, "Checkpoints written."),
    ("samples_generated_total", "counter", {}, "Images generated from captions."),
    ("eval_score", "gauge", {"metric": SCORES}, "Scores of the last evaluation."),
    ("eval_timestamp_seconds", "gauge", {"of": SCORED}, "When it was last scored; Unix time."),
    ("stage_seconds", "gauge", {"stage": STAGES}, "Time a finished stage took."),
)
METRICS: dict[str, Metric] = {
    f"minidalle2_{name}": Metric(name=f"minidalle2_{name}", kind=kind, help=text, labels=labels)
    for name, kind, labels, text in _TABLE
}


def counter(name: str) -> Metric:
    """Return the counter of that name; ValueError, with the nearest, if there is none."""
    return _metric(name, "counter")


def gauge(name: str) -> Metric:
    """Return the gauge of that name; ValueError, with the nearest, if there is none."""
    return _metric(name, "gauge")


def histogram(name: str) -> Metric:
    """Return the histogram of that name; ValueError, with the nearest, if there is none."""
    return _metric(name, "histogram")


def _metric(name: str, kind: Kind) -> Metric:
    metric = METRICS.get(name)
    if metric is None:
        raise ValueError(f"unknown metric {name!r}{nearest(name, list(METRICS))}")
    if metric.kind != kind:
        raise ValueError(f"{name}: found use as a {kind}, expected as a {metric.kind}")
    return metric


def serve(port: int | None) -> int | None:
    """Serve every metric at http://127.0.0.1:port/metrics for the rest of the process.

    port: 0 takes any free port; None serves nothing. Returns the port served. Stages of one process
    share a server: a second call, for that port or for 0, returns the port of the first. Raises
    ValueError if the port cannot be had.
    """
    return None if port is None else exporter.serve(METRICS.values(), port)


def export_to_ray() -> None:
    """Give the Ray that this process has just joined what it counted so far, unless it serves a
    port of its own."""
    exporter.export_to_ray(METRICS.values())


def storage_space(folder: str | Path, *, holds: str) -> None:
    """Set the free space and the size of the disk of `folder`; nothing where it is not local.

    holds: what the folder is for, one of FOLDERS.
    """
    path = str(folder).removeprefix("file://")
    if "://" in path:
        return
    try:
        space = shutil.disk_usage(path)
    except FileNotFoundError:  # not made yet, or deleted already
        return
    gauge("minidalle2_storage_free_bytes").set(space.free, folder=holds)
    gauge("minidalle2_storage_size_bytes").set(space.total, folder=holds)
