"""Sample captions with a chain, then score the samples: one point of a curve.

Both steps run the script that a user would run, in a process of its own, and continue what a killed
one left. eval/watch.py does this for each checkpoint, eval/sweep.py for each scale of guidance.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction

from cluster.base.cli import DONE, WRONG_REQUEST
from cluster.base.files import Json, write_json
from cluster.base.run_dir import EVAL_NAME, SAMPLES_FOLDER
from eval.html_report.formats import Scores

ROOT = Path(__file__).resolve().parent.parent
NOT_SETTINGS = (  # flags that change no score
    "run", "keep_samples", "metrics_port", "scales", "once", "poll_seconds"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SampleAndScoreConfig:
    """The chain, the captions it draws, and the images it is scored against."""

    prior: str = "runs/prior"
    """finished run of training/prior.py"""
    decoder: str = "runs/base"
    """finished run of training/decoder.py --stage base"""
    upsampler: Annotated[tuple[str, ...], UseAppendAction] = ()
    """finished run of an upsampler, in order of the cascade; repeatable"""
    captions: str = "data/test/images"
    """captions to draw: a text file, or a folder of committed image shards"""
    limit: int = 0
    """draw only the first captions; 0 = all"""
    real: str = "data/test/images"
    """real images: committed shards, or a folder"""
    clip: str = ""
    """encoder that scores; empty = the one that the chain was trained on"""
    sample_options: str = ""
    """more flags of eval/sample.py, as one string such as "--decoder-steps 50 --seed 1" """
    score_options: str = ""
    """more flags of eval/fid.py, as one string"""
    keep_samples: bool = False
    """keep all sampled images, not only their grid"""
    metrics_port: int | None = None
    """serve Prometheus metrics on this loopback port; 0 = any free one"""


def sample_and_score(
    config: SampleAndScoreConfig,
    folder: Path,
    settings: Json,
    more_options: Sequence[str] = (),
) -> Scores:
    """Sample into <folder>/samples, score into <folder>/eval.json, and return the scores.

    settings: what the scores depend on; results of other settings in `folder` are deleted first.
    more_options: further flags of eval/sample.py, which override `config.sample_options`. Raises
    ValueError for a wrong request, and OSError for any other failure of a script, which a rerun may
    mend.
    """
    _delete_other_results(folder, settings)
    samples, out = folder / SAMPLES_FOLDER, folder / EVAL_NAME

    chain = ["--prior", config.prior, "--decoder", config.decoder]
    chain += [flag for run in config.upsampler for flag in ("--upsampler", run)]
    limit = ["--limit", str(config.limit)] if config.limit else []
    run_command([
        "eval/sample.py", *chain, "--captions", config.captions, *limit, "--out", str(samples),
        *shlex.split(config.sample_options), *more_options,
    ])  # fmt: skip

    clip = config.clip
    if not clip:
        from models.weights import exported, load_config

        clip = str(load_config(exported(config.prior))["clip"])
    run_command([
        "eval/fid.py", "--real", config.real, "--fake", str(samples), "--out", str(out),
        "--clip", clip, *shlex.split(config.score_options),
    ])  # fmt: skip
    return json.loads(out.read_text(encoding="utf-8"))


def settings_of(config: SampleAndScoreConfig, weights: Json) -> Json:
    """Return what all points of a curve share: the flags that change scores, and `weights`."""
    flags = {k: v for k, v in asdict(config).items() if k not in NOT_SETTINGS}
    return json.loads(json.dumps(flags | weights))


def _delete_other_results(folder: Path, settings: Json) -> None:
    """Keep the results of these settings, to continue them; delete those of others."""
    path = folder / "settings.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) == settings:
        return
    for name in (SAMPLES_FOLDER, "eval_features"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / EVAL_NAME).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def finish(config: SampleAndScoreConfig, folder: Path, scores: Scores) -> None:
    """Publish the scores; of the samples keep the grid, or all with --keep-samples."""
    publish(scores)
    if not config.keep_samples:
        for path in (folder / SAMPLES_FOLDER).glob("[0-9]*.png"):
            path.unlink()


def guide_of(sample_options: str) -> str:
    """Return the run that --guide names in flags of eval/sample.py; "" without that flag."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--guide", default="")
    return parser.parse_known_args(shlex.split(sample_options))[0].guide


def run_command(arguments: Sequence[str]) -> None:
    """Run a script of this project; see `sample_and_score` for what it raises."""
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    print(f"$ python {shlex.join(arguments)}", flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode == DONE:
        return
    lines = done.stderr.strip().splitlines() or ["no error message"]
    message = f"{arguments[0]}: exit code {done.returncode}: {lines[-1].removeprefix('error: ')}"
    raise (ValueError if done.returncode == WRONG_REQUEST else OSError)(message)


def publish(scores: Scores) -> None:
    """Set the Prometheus gauges of the scores that have one."""
    from cluster.base.metrics import SCORES, gauge
    from eval.html_report.formats import flatten

    for name, value in flatten(scores).items():
        if name in SCORES and value is not None:
            gauge("minidalle2_eval_score").set(value, metric=name)
    gauge("minidalle2_eval_timestamp_seconds").set(time.time(), of="chain")
