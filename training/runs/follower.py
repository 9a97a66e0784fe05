"""The driver's view of a run: it follows what the first rank writes, prints and publishes it.

The driver runs wherever its command was given and reads the files of the run's folder: one source
for its progress bar and its Prometheus metrics, which outlives every worker.
"""

import threading
import time
from pathlib import Path

from cluster.base.files import Json
from cluster.base.jsonl import NewLines
from cluster.base.metrics import SCORES, counter, gauge, histogram, storage_space
from cluster.base.progress import duration
from cluster.base.run_dir import (
    INCIDENTS_NAME,
    LINE_KEYS,
    METRICS_NAME,
    TIMELINE_NAME,
    VALIDATION_NAME,
)

POLL_SECONDS = 1.0
PRINT_SECONDS = 15.0  # between two reports that are printed, where there is no terminal
GAUGES = (
    "loss", "step", "samples_per_second", "data_wait_ratio", "grad_norm", "learning_rate_ratio",
    "device_memory_bytes", "mfu", "eta_seconds",
)  # fmt: skip


class Follower:
    """Shows the progress of a run: a bar on a terminal, lines elsewhere, Prometheus always."""

    def __init__(self, run: Path, model: str) -> None:
        """model: a label of the metrics."""
        self._run, self._model = run, model
        self._metrics = NewLines(run / METRICS_NAME)
        self._others = {  # each with what makes a message of a line, "" for none
            NewLines(run / VALIDATION_NAME): self._validated,
            NewLines(run / INCIDENTS_NAME): self._happened,
            NewLines(run / TIMELINE_NAME): self._continued,
        }
        # What an earlier driver has printed is not new
        reports, *_ = [lines.read() for lines in (self._metrics, *self._others)]
        self._nonfinite = reports[-1]["nonfinite_steps"] if reports else 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)

    def __enter__(self) -> "Follower":
        now = time.time()  # alerts on the age of a report or a checkpoint count from here
        self._set("train_running", 1)
        self._set("train_report_timestamp_seconds", now)
        self._set("checkpoint_timestamp_seconds", now)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._set("train_running", 0)

    def _set(self, name: str, value: float) -> None:
        gauge(f"minidalle2_{name}").set(value, model=self._model)

    def _follow(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        plain = not console.is_terminal
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=plain) as bar:
            task = bar.add_task(self._model, total=None, note="starting")
            stopped, printed, pending = False, 0.0, None
            while not stopped:
                stopped = self._stop.wait(POLL_SECONDS)
                messages = []
                try:
                    for line in self._metrics.read():
                        self._publish(line)
                        pending = line
                    for lines, message_of in self._others.items():
                        messages += filter(None, map(message_of, lines.read()))
                    storage_space(self._run, holds="runs")
                except OSError as error:  # the storage may answer the next time
                    messages.append(f"could not be followed for a moment: {error}")
                for message in messages:
                    console.print(f"{self._model}: {message}", soft_wrap=True, markup=False)
                if pending is None:
                    continue
                if not plain:
                    bar.update(
                        task, total=pending["num_steps"], completed=pending["step"],
                        note=describe(pending),
                    )  # fmt: skip
                    pending = None
                elif stopped or time.monotonic() - printed > PRINT_SECONDS:
                    print(f"{self._model}: {describe(pending)}", flush=True)
                    printed, pending = time.monotonic(), None

    def _publish(self, line: Json) -> None:
        """Publish a line of metrics.jsonl."""
        for name in GAUGES:
            if line.get(name) is not None:
                self._set(f"train_{name}", line[name])
        self._set("train_report_timestamp_seconds", time.time())
        counter("minidalle2_train_samples_total").inc(line["reported_samples"], model=self._model)
        skipped = line["nonfinite_steps"] - self._nonfinite
        if skipped > 0:
            counter("minidalle2_train_nonfinite_steps_total").inc(skipped, model=self._model)
        self._nonfinite = line["nonfinite_steps"]
        if line["checkpoint_seconds"]:
            self._set("checkpoint_timestamp_seconds", time.time())
            counter("minidalle2_checkpoints_total").inc(1, model=self._model)
            seconds = histogram("minidalle2_checkpoint_seconds")
            seconds.observe(line["checkpoint_seconds"], model=self._model)

    def _validated(self, line: Json) -> str:
        """Publish a line of validation.jsonl; return what to print."""
        scores = {name: value for name, value in line.items() if name not in LINE_KEYS}
        for name, value in scores.items():
            if f"{self._model}.{name}" in SCORES:
                gauge("minidalle2_eval_score").set(value, metric=f"{self._model}.{name}")
        gauge("minidalle2_eval_timestamp_seconds").set(time.time(), of=self._model)
        text = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        return f"validation at step {line['step']}: {text}"

    def _happened(self, line: Json) -> str:
        """Count an incident; return what to print."""
        counter("minidalle2_train_incidents_total").inc(1, model=self._model, kind=line["kind"])
        return f"{line['kind']} at step {line['step']}: {line.get('message', '')}"

    def _continued(self, line: Json) -> str:
        """Publish an event of the timeline; return what to print."""
        if line["event"] == "validator failed":
            return f"validator: {line.get('message', '')}"
        if line["event"] == "restored":
            self._set("train_start_timestamp_seconds", line["time"])
            if line["attempt"]:
                workers = f"{line['num_workers']} worker{'s' * (line['num_workers'] > 1)}"
                return f"continues from step {line['step']} with {workers}"
        return ""


def describe(line: Json) -> str:
    """Return a line of metrics.jsonl as text; one whose steps were all skipped has no loss."""
    loss = f"loss {line['loss']:.4f}" if "loss" in line else "no finite loss"
    mfu = f", MFU {line['mfu']:.1%}" if "mfu" in line else ""
    left = f", {duration(line['eta_seconds'])} left" if line.get("eta_seconds") else ""
    return (
        f"step {line['step']}/{line['num_steps']}, {loss}, "
        f"{line['samples_per_second']:.0f} samples/s{mfu}, waiting for data "
        f"{line['data_wait_ratio']:.1%}{left}"
    )
