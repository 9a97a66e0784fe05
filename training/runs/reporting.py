"""What a rank reports of its steps; the first rank writes it to the run's folder.

    metrics.jsonl      one line a report: loss, speed, waits, memory, time left
    validation.jsonl   one line a validated checkpoint

The driver reads these files (training/runs/follower.py).
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cluster.base.files import write_text
from cluster.base.jsonl import add_line, read_lines
from cluster.base.run_dir import METRICS_NAME, VALIDATION_NAME
from models.costs import CAPTION_TOKENS
from training.checkpoints.checkpointer import Checkpointer
from training.checkpoints.records import Progress
from training.config import TrainConfig
from training.data.dataloader import Batch
from training.runs.events import SampleLog, SpikeDetector, record_event, report_incident
from training.runs.profiling import Profiler
from training.runs.watchdog import Watchdog


class Reporter:
    """Collects a rank's timings and scores; the first rank writes them."""

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        rank: int,
        *,
        watchdog: Watchdog | None = None,
        flops: Callable[[float], float] | None = None,
        peak: float = 0.0,
    ) -> None:
        """flops: of training on a sample, by the mean length of captions in tokens, None where the
        peak is unknown; peak: FLOP/s of all devices."""
        self._run, self._config, self._rank = run, config, rank
        self._watchdog, self._flops, self._peak = watchdog, flops, peak
        self._profiler = Profiler(run, config.logging.profile, rank)
        self._spikes = SpikeDetector(config.faults.spike_deviations)
        self._samples: SampleLog | None = None
        self._checkpointer: Checkpointer | None = None
        self._first_step_due, self._attempt = False, 0
        self._started = time.perf_counter()
        self._begin_report(Progress())

    def _begin_report(self, progress: Progress) -> None:
        self._reported, self._reported_samples = time.perf_counter(), progress.samples_seen
        self._wait_seconds = self._checkpoint_seconds = 0.0
        self._num_tokens = self._num_captions = 0
        self._sums: dict[str, float] = {}
        self._count = 0

    def started(self, progress: Progress, *, num_workers: int = 1, attempt: int = 0) -> None:
        """Record where an attempt begins, and drop the lines past that checkpoint.

        attempt: a number that all ranks share.
        """
        self._begin_report(progress)
        self._attempt = attempt
        if self._config.logging.log_samples:
            self._samples = SampleLog(
                self._run, self._rank, num_workers=num_workers, attempt=attempt
            )
        if self._rank == 0:
            for path in (self._run / METRICS_NAME, self._run / VALIDATION_NAME):
                lines = [line for line in read_lines(path) if line["step"] <= progress.step]
                if path.is_file():
                    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
            place = {"attempt": attempt, "step": progress.step, "num_workers": num_workers}
            record_event(self._run, "restored", **place)
            self._first_step_due = True

    def trained(self, progress: Progress, micro_batches: list[Batch]) -> None:
        """Record that a step has moved the weights by these samples."""
        for batch in micro_batches:
            if batch.captions is not None:
                self._num_tokens += batch.captions.packing.num_tokens
                self._num_captions += len(batch.keys)
        if self._samples is not None:
            self._samples.write(progress.step, micro_batches)
        if self._first_step_due:
            record_event(self._run, "stepped", step=progress.step)
            self._first_step_due = False

    def _mfu(self, samples_per_second: float) -> dict[str, float]:
        """Return the share of the peak that real tokens take: MFU."""
        if self._flops is None:
            return {}
        mean = CAPTION_TOKENS  # of towers that read padded captions, which nobody counts
        if self._num_captions:
            mean = self._num_tokens / self._num_captions
        return {"mfu": samples_per_second * self._flops(mean) / self._peak}

    def is_validated(self, progress: Progress) -> bool:
        """Return whether a checkpoint has its scores."""
        lines = read_lines(self._run / VALIDATION_NAME)
        return any(line["step"] == progress.step for line in lines)

    def validated(self, progress: Progress, scores: dict[str, float]) -> None:
        """Write the scores of a checkpoint."""
        add_line(self._run / VALIDATION_NAME, {**self._place(progress), **scores})

    def _place(self, progress: Progress) -> dict[str, float]:
        """Return what each line begins with: run_dir.LINE_KEYS."""
        return {"step": progress.step, "attempt": self._attempt, "time": time.time()}

    def enters(self, step: int, phase: str) -> None:
        """Pass the watchdog what this rank does from now on; phase: one of watchdog.PHASES."""
        if self._watchdog is not None:
            self._watchdog.beat(step, phase)

    @contextmanager
    def fetching(self, step: int) -> Iterator[None]:
        """Time the wait for the data of a step; the forward pass follows."""
        self._profiler.begin(step)
        self.enters(step, "fetch")
        started = time.perf_counter()
        yield
        self._wait_seconds += time.perf_counter() - started
        self.enters(step, "forward")

    @contextmanager
    def checkpointing(self, step: int, checkpointer: Checkpointer) -> Iterator[None]:
        """Time for how long a checkpoint blocks the steps; `checkpointer` times its write."""
        self.enters(step, "checkpoint")
        self._checkpointer = checkpointer
        started = time.perf_counter()
        yield
        self._checkpoint_seconds += time.perf_counter() - started

    def step(
        self, progress: Progress, scores: dict[str, float], learning_rate_ratio: float
    ) -> None:
        """Add a step's mean scores, none where it was skipped; report every `report_every` steps.

        A report has the means of the scores since the last one.
        """
        config = self._config
        for name, value in scores.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += bool(scores)
        if self._rank == 0 and "loss" in scores:
            message = self._spikes.check(scores["loss"])
            if message:
                report_incident(self._run, "spike", progress.step, message)
        last = progress.step == config.schedule.num_steps
        self._profiler.end(progress.step - 1, last=last)
        if progress.step % config.logging.report_every and not last:
            return
        if self._rank:
            self._begin_report(progress)
            return

        # The first rank writes a report
        now = time.perf_counter()
        seconds, samples = now - self._reported, progress.samples_seen - self._reported_samples
        rate = samples / seconds
        samples_left = (config.schedule.num_steps - progress.step) * config.batch.global_batch_size
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        write_seconds = self._checkpointer.write_seconds if self._checkpointer else 0.0
        line = {
            **self._place(progress),
            "samples_seen": progress.samples_seen,
            "reported_samples": samples,
            **{name: value / self._count for name, value in self._sums.items()},
            "learning_rate_ratio": learning_rate_ratio,
            **({} if memory is None else {"device_memory_bytes": memory}),
            "samples_per_second": rate,
            **self._mfu(rate),
            "eta_seconds": samples_left / rate if rate else None,
            "data_wait_ratio": self._wait_seconds / seconds,
            "checkpoint_seconds": self._checkpoint_seconds,
            "checkpoint_write_seconds": write_seconds,
            "nonfinite_steps": progress.nonfinite_steps,
            "num_steps": config.schedule.num_steps,
            "seconds": now - self._started,
        }
        add_line(self._run / METRICS_NAME, line)
        self._begin_report(progress)
