"""When the checkpoints of a run are saved, validated and passed on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.base.run_dir import step_folder, step_folders, step_of
from training.bucket.mirror import Mirror
from training.checkpoints.checkpointer import Checkpointer
from training.checkpoints.records import Progress, from_first_rank, on_all_ranks
from training.config import TrainConfig
from training.engine.ema import Ema
from training.engine.engines import Engine
from training.runs.events import num_attempts, report_incident
from training.runs.reporting import Reporter

if TYPE_CHECKING:
    from training.loop import Flags, Task


class Checkpoints:
    """The checkpoints of one run, one object in each rank; every rank makes the same calls.

    A checkpoint is copied after its step, written while training continues, and validated once it
    is written. All ranks validate after the same step, since `Task.on_checkpoint` may let them wait
    for each other.
    """

    def __init__(
        self, task: Task, mirror: Mirror, engine: Engine, ema: Ema, config: TrainConfig,
        reporter: Reporter,
    ) -> None:  # fmt: skip
        self._task, self._run, self._engine = task, mirror.folder, engine
        self._config, self._reporter = config, reporter
        self._checkpointer = Checkpointer(mirror, engine, ema, task.export, config)
        self._unvalidated: Progress | None = None

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its part of the last checkpoint."""
        return self._checkpointer.idle

    def resume(self) -> Progress:
        """Continue from the newest valid checkpoint, and report from which, and which are broken.

        Its scores are made up for where the run was killed before it had them.
        """
        folders = step_folders(self._run)
        progress = self._checkpointer.resume()
        broken = [folder.name for folder in folders if step_of(folder) > progress.step]
        if broken and self._engine.rank == 0:
            names = ", ".join(broken)
            message = f"{names}: no complete checkpoint; continues from step {progress.step}"
            report_incident(self._run, "broken", progress.step, message)
        attempt = from_first_rank(self._engine, num_attempts(self._run))
        num_workers = self._engine.world_size
        self._reporter.started(progress, num_workers=num_workers, attempt=attempt)
        if progress.step and self._saves(progress.step):
            self._validate(progress)
        return progress

    def is_due(self, step: int, flags: Flags) -> bool:
        """Return whether `after_step` has something to do after `step` steps."""
        validates = flags.written and self._unvalidated is not None
        return flags.stop or validates or self._saves(step) or self._saves_averages(step)

    def after_step(self, progress: Progress, flags: Flags) -> None:
        """Save what is due after a step, and validate the checkpoint before it.

        A snapshot of the power-function averages comes before the checkpoint of the same step,
        after which a killed run would continue without it. Until the first update there is no
        average.
        """
        saves = []
        if progress.updates and self._saves_averages(progress.step):
            saves.append(self._checkpointer.save_averages)
        if flags.stop or self._saves(progress.step):
            saves.append(self._checkpointer.save)
        if saves or flags.written:
            self._validate_written()
        for save in saves:
            with self._reporter.checkpointing(progress.step - 1, self._checkpointer):
                save(progress)
        if self._saves(progress.step):
            self._unvalidated = progress

    def finish(self, progress: Progress) -> None:
        """Wait for the last write and validate it; mark a run that has done all its steps."""
        self._checkpointer.wait()
        self._validate_written()
        self._checkpointer.finish(progress)

    def _saves(self, step: int) -> bool:
        every = self._config.checkpoint.checkpoint_every
        return step == self._config.schedule.num_steps or step % every == 0

    def _saves_averages(self, step: int) -> bool:
        every = self._config.averages.snapshot_every
        return bool(every) and (step == self._config.schedule.num_steps or step % every == 0)

    def _validate_written(self) -> None:
        """Validate the last checkpoint, if that is still to be done, and pass its folder on."""
        progress, self._unvalidated = self._unvalidated, None
        if progress is None or not (self._task.validate or self._task.on_checkpoint):
            return
        self._reporter.enters(progress.step, "checkpoint")  # the wait for the disk is no step
        self._checkpointer.wait()
        self._validate(progress)
        if self._task.on_checkpoint is not None:
            self._task.on_checkpoint(step_folder(self._run, progress.step))

    def _validate(self, progress: Progress) -> None:
        """Score a checkpoint that has no scores yet; the first rank does, and the others wait for
        it, in a phase that may last."""
        if self._task.validate is None:
            return
        self._reporter.enters(progress.step, "validation")
        if self._engine.rank == 0 and not self._reporter.is_validated(progress):
            scores = self._task.validate(step_folder(self._run, progress.step))
            self._reporter.validated(progress, scores)
        on_all_ranks(self._engine, True)
