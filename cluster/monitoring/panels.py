"""The panels of three dashboards, stated once for Grafana and for the page of watch.py.

A query reads the series that `cluster/prometheus/recording.yaml` makes of the metrics, wherever
these came from: a script's own port, or Ray's exporter with its `ray_` and its WorkerId.
"""

from dataclasses import dataclass, field

Unit = str  # one of UNITS, which are Grafana's names
UNITS = {
    "short": "a number", "percentunit": "a share of 1", "s": "seconds", "bytes": "bytes",
    "Bps": "bytes a second", "cps": "a second", "bool": "yes or no",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A chart: a PromQL query, and the name of each of its lines.

    legend: {{label}} stands for a label's value. gpu: whether only a run on a GPU has it.
    """

    title: str
    query: str
    legend: str
    help: str
    unit: Unit = "short"
    gpu: bool = False


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """Panels in titled rows; `name` ends its address and its file's name."""

    name: str
    title: str
    rows: dict[str, tuple[Panel, ...]] = field(default_factory=dict)

    @property
    def panels(self) -> list[Panel]:
        """All panels, row by row."""
        return [panel for row in self.rows.values() for panel in row]


def _panel(title: str, query: str, legend: str, text: str, unit: Unit = "short") -> Panel:
    return Panel(title=title, query=query, legend=legend, help=text, unit=unit)


def _age(series: str) -> str:
    return f"time() - {series}"


_FAILED = 'minidalle2:ingest_rows:rate5m{outcome="failed"}'

PIPELINE = Dashboard(
    name="pipeline",
    title="minidalle2: pipeline",
    rows={
        "Download": (
            _panel("Rows", "minidalle2:ingest_rows:rate5m", "{{outcome}}",
                   "Rows of the URL list, by what became of them.", "cps"),
            _panel("Failed rows", f"sum({_FAILED}) / sum(minidalle2:ingest_rows:rate5m)", "failed",
                   "Share of the rows that could not be had; .2 to .5 is usual for an old list.",
                   "percentunit"),
            _panel("Why rows fail", "topk(6, minidalle2:ingest_failures:rate5m > 0)", "{{reason}}",
                   "The six commonest reasons; no_network and resolver_failed are our own.", "cps"),
            _panel("Stored", "minidalle2:ingest_bytes:rate5m", "images",
                   "Bytes of images that go into shards.", "Bps"),
            _panel("Image shards in the last hour", "minidalle2:ingest_shards:increase1h", "images",
                   "Shards committed."),
        ),
        "Embedding": (
            _panel("Images embedded", "minidalle2:embed_images:rate5m", "images",
                   "Over all encoders.", "cps"),
            _panel("Embedding shards in the last hour", "minidalle2:embed_shards:increase1h",
                   "made", "Shards committed."),
            _panel("Failed shards in the last hour", "minidalle2:embed_failed_shards:increase1h",
                   "failed", "Image shards that could not be embedded; see _quarantine."),
        ),
        "Room and backlog": (
            _panel("Shards to go", "minidalle2:backlog_shards", "{{stage}} {{instance}}",
                   "Should fall; the alert ShardBacklog fires where it does not."),
            _panel("Free space", "minidalle2:storage_free_bytes", "{{folder}} {{instance}}",
                   "Of the disks where local folders lie.", "bytes"),
            _panel("Free share", "minidalle2:storage_free_bytes / minidalle2:storage_size_bytes",
                   "{{folder}} {{instance}}", "Below .1 an alert fires.", "percentunit"),
            _panel("Stages that are done", "minidalle2:stage_seconds", "{{stage}}",
                   "Time each took, over all of its attempts.", "s"),
            _panel("Targets", "up", "{{job}} {{instance}}", "Who answers Prometheus.", "bool"),
        ),
    },
)  # fmt: skip

TRAINING = Dashboard(
    name="training",
    title="minidalle2: training",
    rows={
        "Learning": (
            _panel("Loss", "minidalle2:train_loss", "{{model}} {{instance}}",
                   "Mean since the report before."),
            _panel("Gradient norm", "minidalle2:train_grad_norm", "{{model}} {{instance}}",
                   "Before clipping."),
            _panel("Learning rate", "minidalle2:train_learning_rate_ratio",
                   "{{model}} {{instance}}", "As a share of its peak.", "percentunit"),
            _panel("Steps", "minidalle2:train_step", "{{model}} {{instance}}",
                   "Optimizer steps taken."),
        ),
        "Speed": (
            _panel("Samples a second", "minidalle2:train_samples_per_second",
                   "{{model}} {{instance}}", "Over all workers.", "cps"),
            _panel("Samples trained on", "minidalle2:train_samples:rate5m", "{{model}}",
                   "Smoothed over five minutes, over all runs of a model, pauses included.", "cps"),
            _panel("Waiting for data", "minidalle2:train_data_wait_ratio",
                   "{{model}} {{instance}}", "Share of the time; above .2 the device starves.",
                   "percentunit"),
            _panel("Time left", "minidalle2:train_eta_seconds", "{{model}} {{instance}}",
                   "At the present rate.", "s"),
            _panel("MFU", "minidalle2:train_mfu", "{{model}} {{instance}}",
                   "Share of the devices' peak; where that is known.", "percentunit"),
            Panel(title="GPU memory", query="minidalle2:train_device_memory_bytes",
                  legend="{{model}} {{instance}}", help="The most that the first rank held.",
                  unit="bytes", gpu=True),
        ),
        "Health": (
            _panel("Running", "minidalle2:train_running", "{{model}} {{instance}}",
                   "Whether a run is under way.", "bool"),
            _panel("Since the last report", _age("minidalle2:train_report_timestamp_seconds"),
                   "{{model}} {{instance}}", "A run that is silent for long has stalled.", "s"),
            _panel("Since the last checkpoint", _age("minidalle2:checkpoint_timestamp_seconds"),
                   "{{model}} {{instance}}", "What a crash would cost now.", "s"),
            _panel("Checkpoints in the last hour", "minidalle2:checkpoints:increase1h", "{{model}}",
                   "Checkpoints written."),
            _panel("Time of a checkpoint", "minidalle2:checkpoint_seconds:p90_1h", "{{model}}",
                   "That the steps wait for; 9 of 10 in the last hour took less.", "s"),
            _panel("Skipped steps in the last hour", "minidalle2:train_nonfinite_steps:increase1h",
                   "{{model}}", "Loss or gradient not finite."),
            _panel("Incidents in the last hour", "minidalle2:train_incidents:increase1h",
                   "{{model}} {{kind}}", "Spikes of the loss; ranks that hung or were lost."),
            _panel("Starts in the last hour",
                   "changes(minidalle2:train_start_timestamp_seconds[1h])",
                   "{{model}} {{instance}}", "How often the workers began again."),
        ),
    },
)  # fmt: skip


def _scores(title: str, pattern: str, text: str) -> Panel:
    query = f'minidalle2:eval_score{{metric=~"{pattern}"}}'
    return _panel(title, query, "{{metric}}", text)


EVALUATION = Dashboard(
    name="evaluation",
    title="minidalle2: evaluation",
    rows={
        "Images": (
            _scores("Frechet distance", "images[.]fd.*",
                    "In CLIP's features; real_halves is between two halves of the real images."),
            _scores("CLIP score", "images[.]clip_score.*",
                    "Cosine of image and caption; shuffled: of another's caption."),
            _scores("Drawings right in everything", "shapes[.].*[.]all",
                    "Share of drawn captions, by whether training saw their combination."),
            _scores("Drawings' parts", "shapes[.].*[.](attribute|relation)",
                    "Share of attributes and relations that are right."),
            _scores("Scorer on real drawings", "shapes[.].*[.]real",
                    "What the scorer gives to true drawings: the most to be had."),
        ),
        "Prior and CLIP": (
            _scores("Cosines of the prior", "prior[.]cos.*",
                    "Its embedding with the image's, the caption's, and other images'."),
            _scores("Error of the prior", "prior[.]mse", "Mean square, of unit embeddings."),
            _scores("Retrieval", "(prior|clip)[.]retrieval.*",
                    "Share whose own image is among the nearest."),
        ),
        "Work": (
            _panel("Since the last score", _age("minidalle2:eval_timestamp_seconds"), "{{of}}",
                   "By what was scored: a model at its checkpoints, or the whole chain.", "s"),
            _panel("Images drawn", "minidalle2:samples_generated:rate5m", "images",
                   "From captions.", "cps"),
        ),
    },
)  # fmt: skip

DASHBOARDS = (TRAINING, PIPELINE, EVALUATION)
