"""What a run says of itself: metrics.jsonl beside its checkpoints, and the driver that follows it.

Rank 0 writes one JSON line a report. The driver, wherever it runs, reads those lines for its
progress bar and
its Prometheus metrics: one source, which survives the worker.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cluster.base.jsonl import NewLines, add_line, read_lines
from cluster.base.run_dir import INCIDENTS_NAME, METRICS_NAME, TIMELINE_NAME, VALIDATION_NAME
from training.checkpoints.records import Progress
from training.checkpoints.writer import Writer
from training.config import TrainConfig
from training.data.dataloader import Batch
from training.runs.incidents import LossWatch, report_incident
from training.runs.profiling import Profiler
from training.runs.sample_log import SampleLog
from training.runs.timeline import note
from training.runs.trackers import Events
from training.runs.watchdog import Watchdog

SECONDS_BETWEEN_LINES = 15.0


class Reporter:
    """Collects a rank's timings and scores; the first rank writes them."""

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        rank: int,
        *,
        watchdog: Watchdog | None = None,
        peak_samples_per_second: float = 0.0,
    ) -> None:
        """peak_samples_per_second: what all devices could do at their peak, 0 where unknown."""
        self._run = run
        self._path = run / METRICS_NAME if rank == 0 else None
        self._watchdog = watchdog
        self._peak = peak_samples_per_second
        self._writer: Writer | None = None
        self._losses = LossWatch(config.spike_deviations)
        self._profiler = Profiler(run, config.profile, rank)
        self._validation = run / VALIDATION_NAME
        self._config = config
        self._started = self._reported = time.perf_counter()
        self._reported_samples = 0
        self._waited = self._checkpoint_seconds = 0.0
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._rank = rank
        self._samples: SampleLog | None = None
        self._first = False

    def started(self, progress: Progress, *, num_workers: int = 1, attempt: int = 0) -> None:
        """Say where an attempt begins, and forget the lines past that checkpoint; attempt: a number
        that all ranks share."""
        self._reported = time.perf_counter()
        self._reported_samples = progress.samples_seen
        if self._config.log_samples:
            self._samples = SampleLog(
                self._run, self._rank, num_workers=num_workers, attempt=attempt
            )
        if self._path is not None:
            for path in (self._path, self._validation):
                _keep_lines(path, progress.step)
            told = {"attempt": attempt, "step": progress.step, "num_workers": num_workers}
            note(self._run, "restored", **told)
            self._first = True

    def trained(self, progress: Progress, micro_batches: list[Batch]) -> None:
        """Take in that a step has moved the weights by these samples."""
        if self._samples is not None:
            self._samples.write(progress.step, micro_batches)
        if self._first:
            note(self._run, "stepped", step=progress.step)
            self._first = False

    def is_validated(self, progress: Progress) -> bool:
        """Say whether a checkpoint has its scores."""
        return any(line["step"] == progress.step for line in read_lines(self._validation))

    def validated(self, progress: Progress, scores: dict[str, float]) -> None:
        """Write the scores of a checkpoint."""
        add_line(self._validation, {"step": progress.step, **scores})

    def enters(self, step: int, phase: str) -> None:
        """Tell the watchdog what this rank does from now on."""
        if self._watchdog is not None:
            self._watchdog.beat(step, phase)

    @contextmanager
    def fetching(self, step: int) -> Iterator[None]:
        """Wait for the data of a step, which then goes forward."""
        self._profiler.begin(step)
        self.enters(step, "fetch")
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started
        self.enters(step, "forward")

    @contextmanager
    def checkpointing(self, step: int, writer: Writer) -> Iterator[None]:
        """Count the time that the steps give to a checkpoint; `writer` knows that of its write."""
        self.enters(step, "checkpoint")
        self._writer = writer
        started = time.perf_counter()
        yield
        self._checkpoint_seconds += time.perf_counter() - started

    @contextmanager
    def validating(self, step: int) -> Iterator[None]:
        self.enters(step, "validation")
        yield

    def step(
        self, progress: Progress, scores: dict[str, Tensor], learning_rate_ratio: float
    ) -> None:
        """Add a step's mean scores, none where it was skipped; every `report_every` steps write
        their means since the last line."""
        for name, value in scores.items():
            self._sums[name] = self._sums.get(name, torch.zeros(())) + value
        self._count += bool(scores)
        if self._path is not None and "loss" in scores:
            strange = self._losses.spike(scores["loss"].item())
            if strange:
                report_incident(self._run, "spike", progress.step, strange)
        last = progress.step == self._config.num_steps
        self._profiler.end(progress.step - 1, last=last)
        if progress.step % self._config.report_every and not last:
            return
        now = time.perf_counter()
        seconds = now - self._reported
        rate = (progress.samples_seen - self._reported_samples) / seconds
        left = (self._config.num_steps - progress.step) * self._config.global_batch_size
        line = {
            "step": progress.step,
            "samples_seen": progress.samples_seen,
            "reported_samples": progress.samples_seen - self._reported_samples,
            **{name: value.item() / self._count for name, value in self._sums.items()},
            "learning_rate_ratio": learning_rate_ratio,
            **_device_memory(),
            "samples_per_second": rate,
            **({"mfu": rate / self._peak} if self._peak else {}),
            "eta_seconds": left / rate if rate else None,
            "data_wait_ratio": self._waited / seconds,
            "checkpoint_seconds": self._checkpoint_seconds,
            "checkpoint_write_seconds": self._writer.seconds if self._writer else 0.0,
            "nonfinite_steps": progress.nonfinite_steps,
            "num_steps": self._config.num_steps,
            "seconds": now - self._started,
        }
        if self._path is not None:
            add_line(self._path, line)
        self._reported, self._reported_samples = now, progress.samples_seen
        self._waited = self._checkpoint_seconds = 0.0
        self._sums, self._count = {}, 0


def _device_memory() -> dict[str, int]:
    """Return the most memory that this rank has held on its GPU, where it has one."""
    if not torch.cuda.is_available():
        return {}
    return {"device_memory_bytes": torch.cuda.max_memory_allocated()}


def _keep_lines(path: Path, step: int) -> None:
    """Keep the lines of a file up to a step, whole or not at all: the disk may be full."""
    lines = [line for line in read_lines(path) if line["step"] <= step]
    if path.is_file():
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        part.replace(path)


class Follower:
    """Shows a run's progress on the driver: a bar on a terminal, plain lines elsewhere,
    Prometheus always."""

    def __init__(self, run: Path, model: str, *, tensorboard: bool = False) -> None:
        """tensorboard: write what is followed as its events, too."""
        self._run = run
        self._metrics = NewLines(run / METRICS_NAME)
        self._validation = NewLines(run / VALIDATION_NAME)
        self._incidents = NewLines(run / INCIDENTS_NAME)
        self._timeline = NewLines(run / TIMELINE_NAME)
        # what was told to an earlier driver is not new
        trained, validated = self._metrics.read(), self._validation.read()
        self._incidents.read()
        self._timeline.read()
        self._model = model
        self._nonfinite = trained[-1]["nonfinite_steps"] if trained else 0
        self._events = Events(run, trained, validated) if tensorboard else None
        self._said = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="follow", daemon=True)

    def __enter__(self) -> "Follower":
        now = time.time()  # the age of what is still to come is told from here on
        self._set("train_running", 1)
        self._set("train_report_timestamp_seconds", now)
        self._set("checkpoint_timestamp_seconds", now)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._set("train_running", 0)
        self._tell_events(Events.close)

    def _set(self, name: str, value: float) -> None:
        from cluster.base.metrics import gauge

        gauge(f"minidalle2_{name}").set(value, model=self._model)

    def _work(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        hidden = not console.is_terminal
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as bar:
            task = bar.add_task(self._model, total=None, note="starting")
            stopped, unsaid = False, None
            while not stopped:
                stopped = self._stop.wait(1.0)
                line, tell = None, partial(console.print, soft_wrap=True, markup=False)
                try:
                    line = self._catch_up()
                    self._tell_validations(tell)
                    self._tell_incidents(tell)
                    self._look_around()
                except OSError as error:  # of a storage that may answer the next time
                    tell(f"{self._model}: not followed for a moment: {error}")
                if line is not None:
                    done, total = line["step"], line["num_steps"]
                    bar.update(task, total=total, completed=done, note=describe(line))
                    unsaid = line
                if unsaid is not None and self._say(unsaid, at_once=stopped, silent=not hidden):
                    unsaid = None

    def _tell_events(self, tell: Callable[..., None], *lines: list[dict]) -> None:
        """Tell TensorBoard's events, where they are kept; what keeps them from the disk holds up
        nothing else."""
        if self._events is None:
            return
        try:
            tell(self._events, *lines)
        except OSError as error:
            print(f"{self._model}: events for TensorBoard are not whole: {error}", flush=True)

    def _catch_up(self) -> dict | None:
        """Publish the lines that are new; returns the last of them."""
        new = self._metrics.read()
        for line in new:
            self._publish(line)
        if new:
            self._tell_events(Events.trained, new)
        return new[-1] if new else None

    def _tell_validations(self, tell: Callable[[str], None]) -> None:
        """Print and publish the validations that are new."""
        from cluster.base.metrics import SCORES, gauge

        new = self._validation.read()
        for line in new:
            scores = {name: value for name, value in line.items() if name != "step"}
            told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            tell(f"{self._model}: validation at step {line['step']}: {told}")
            for name, value in scores.items():
                if f"{self._model}.{name}" in SCORES:
                    gauge("minidalle2_eval_score").set(value, metric=f"{self._model}.{name}")
            gauge("minidalle2_eval_timestamp_seconds").set(time.time(), of=self._model)
        if new:
            self._tell_events(Events.validated, new)

    def _tell_incidents(self, tell: Callable[[str], None]) -> None:
        """Print and count the incidents that are new, where the run went on after them, and what
        kept a validator from its scores."""
        from cluster.base.metrics import counter

        for line in self._incidents.read():
            tell(f"{self._model}: {line['kind']} at step {line['step']}: {line['told']}")
            counter("minidalle2_train_incidents_total").inc(1, model=self._model, kind=line["kind"])
        for line in self._timeline.read():
            if line["event"] == "restored":
                self._set("train_start_timestamp_seconds", line["time"])
            if line["event"] == "validator failed":
                tell(f"{self._model}: validator: {line['told']}")
            if line["event"] == "restored" and line["attempt"]:
                workers = f"{line['num_workers']} worker{'s' * (line['num_workers'] > 1)}"
                tell(f"{self._model}: goes on from step {line['step']} with {workers}")

    def _look_around(self) -> None:
        """Publish the space that the run's disk has left."""
        from cluster.base.metrics import storage_space

        storage_space(self._run, holds="runs")

    def _say(self, line: dict, *, at_once: bool, silent: bool) -> bool:
        """Print a line unless another was printed just now; whether it was, or never will be."""
        if silent:
            return True
        if not (at_once or time.monotonic() - self._said > SECONDS_BETWEEN_LINES):
            return False
        self._said = time.monotonic()
        print(f"{self._model}: {describe(line)}", flush=True)
        return True

    def _publish(self, line: dict) -> None:
        from cluster.base.metrics import counter, histogram

        for name in (
            "loss",
            "step",
            "samples_per_second",
            "data_wait_ratio",
            "grad_norm",
            "learning_rate_ratio",
            "device_memory_bytes",
            "mfu",
            "eta_seconds",
        ):
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


def describe(line: dict) -> str:
    """Say a report in a few words; one whose steps were all skipped has no loss."""
    loss = f"loss {line['loss']:.4f}" if "loss" in line else "no finite loss"
    use = f", MFU {line['mfu']:.1%}" if "mfu" in line else ""
    left = f", {_clock(line['eta_seconds'])} left" if line.get("eta_seconds") else ""
    return (
        f"step {line['step']}/{line['num_steps']}, {loss}, "
        f"{line['samples_per_second']:.0f} samples/s{use}, waiting for data "
        f"{line['data_wait_ratio']:.1%}{left}"
    )


def _clock(seconds: float) -> str:
    """Return a duration as people say it: "2 d 3 h", "1 h 40 min", "50 s"."""
    whole = round(seconds)
    for unit, size, smaller, less in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // less} {smaller}"
    return f"{whole // 60} min" if whole >= 120 else f"{whole} s"
