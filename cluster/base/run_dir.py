"""The names of all files in a run's folder, each stated once.

The files that a checkpoint holds for inference (config.json, model.safetensors, ema.safetensors)
and the mark of a finished run (final.json) are named in models/names.py.
"""

import re
from pathlib import Path

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"  # one line a report
VALIDATION_NAME = "validation.jsonl"  # one line a validated checkpoint
LINE_KEYS = ("step", "attempt", "time")  # of a line of both, beside its numbers
WATCH_NAME = "watch.jsonl"  # one line a checkpoint that eval/watch.py scored
TIMELINE_NAME = "timeline.jsonl"  # when the run was launched, lost workers, continued
INCIDENTS_NAME = "incidents.jsonl"  # what went wrong without ending the run
CODE_NAME = "code.json"  # commit and versions of the code that trained it
TRACKERS_NAME = "trackers.json"  # the run's identity in trackers
STATISTICS_NAME = "_statistics.npz"  # of the embeddings that a prior is trained on
VALIDATOR_LOG_NAME = "validator.log"  # what the validation command printed
STOP_NAME = "stop"  # its presence asks the run to stop
LAUNCH_LOCK, TRAIN_LOCK = ".launch", ".lock"  # held by the driver; by its first rank
LOCKS = (LAUNCH_LOCK, TRAIN_LOCK)
ERROR_PREFIX = "error_"  # error_00003.txt: the error that ended rank 3
SNAPSHOT_PREFIX = "snapshot_"  # snapshot_images.txt: the digests of the pinned snapshots

RAY_FOLDER = "_ray"  # Ray Train's own state
HEARTBEATS_FOLDER = "heartbeats"
SAMPLES_FOLDER = "samples"  # the keys of the samples of each step, on request
PROFILE_FOLDER = "profile"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_FOLDER = "wandb"  # as its client names it
VALIDATION_FOLDER = "validation"
WATCH_FOLDER = "watch"  # what eval/watch.py makes of each checkpoint
EMA_SNAPSHOTS_FOLDER = "ema_snapshots"

# Of a run in a bucket
LEASE_FOLDER = "lease"  # lease/000003.alive: which launch holds it
LEASE_SECONDS = 60.0  # without a sign of life, after which a launch is taken for dead
PARTS_FOLDER = "parts"  # of files of lines
ERRORS_FOLDER = "errors"  # errors/000003/error_00003.txt: of that launch

# In the folder of a step
STATE_NAME = "state.json"  # written last
FRAGMENTS_FOLDER = "fragments"
STEP_PREFIX = "step_"

# Of an evaluation or a demo, which holds runs
EVAL_NAME = "eval.json"
DEMO_NAME = "demo.json"
PROVENANCE_NAME = "provenance.json"
TIMINGS_NAME = "timings.json"
SWEEP_NAME = "sweep.jsonl"  # one line a scale of guidance that eval/sweep.py scored
REPORT_NAME = "report.html"


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return run / f"{STEP_PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(folder.name.removeprefix(STEP_PREFIX))


def step_folders(run: Path) -> list[Path]:
    """Return the folders of a run's checkpoints by step, valid or not.

    A copy under another name does not count.
    """
    paths = run.glob(f"{STEP_PREFIX}*")
    return sorted(path for path in paths if re.fullmatch(r"step_\d{8}", path.name))


def fragment_path(folder: Path, rank: int) -> Path:
    """Return the tensors that a rank wrote to a checkpoint."""
    return folder / FRAGMENTS_FOLDER / f"rank_{rank:04d}.safetensors"


def record_path(folder: Path, rank: int) -> Path:
    """Return the record that vouches for the tensors of a rank."""
    return fragment_path(folder, rank).with_suffix(".json")


def samples_path(run: Path, rank: int) -> Path:
    """Return the file in which a rank logs the samples of its steps."""
    return run / SAMPLES_FOLDER / f"rank_{rank:04d}.jsonl"


def samples_paths(run: Path) -> list[Path]:
    """Return the logs of samples of all ranks."""
    return sorted((run / SAMPLES_FOLDER).glob("rank_*.jsonl"))


def error_path(run: Path, rank: int) -> Path:
    """Return the file in which a rank leaves the error that ended it."""
    return run / f"{ERROR_PREFIX}{rank:05d}.txt"


def error_paths(run: Path) -> list[Path]:
    """Return the errors that ranks have left, by rank."""
    return sorted(run.glob(f"{ERROR_PREFIX}*.txt"))


def snapshot_path(run: Path, kind: str) -> Path:
    """Return the file that names the pinned snapshots of images or embeds."""
    return run / f"{SNAPSHOT_PREFIX}{kind}.txt"
