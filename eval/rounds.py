"""One round of evaluation: a chain draws the captions, and what it drew is scored.

Each half is the script that one would run by hand, in a process of its own, and continues what a
killed one left. eval/watch.py makes a round of each checkpoint, eval/sweep.py one of each scale.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import UseAppendAction

from cluster.base.cli import DONE, WRONG_REQUEST

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """What is drawn, by which chain, and against what it is scored."""

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
    """keep all images of a round, not its grid alone"""
    metrics_port: int | None = None
    """serve Prometheus metrics on this loopback port; 0 = any free one"""


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Continue a round of these settings; what one of others drew and scored is deleted."""
    mark = folder / "settings.json"
    if mark.is_file() and json.loads(mark.read_text()) == settings:
        return
    for name in ("samples", "eval_features"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "eval.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    mark.with_suffix(".part").write_text(json.dumps(settings))
    mark.with_suffix(".part").replace(mark)


def play(config: RoundConfig, folder: Path, more: Sequence[str] = ()) -> dict[str, Any]:
    """Draw into <folder>/samples, score into <folder>/eval.json, and return the scores.

    more: further flags of eval/sample.py. Raises ValueError for a wrong request, and OSError where
    a script ended otherwise, with its last line: to be tried again.
    """
    samples, out = folder / "samples", folder / "eval.json"
    chain = ["--prior", config.prior, "--decoder", config.decoder]
    chain += [word for run in config.upsampler for word in ("--upsampler", run)]
    limit = ["--limit", str(config.limit)] if config.limit else []
    run_command([
        "eval/sample.py", *chain, "--captions", config.captions, *limit, "--out", str(samples),
        *shlex.split(config.sample_options), *more,
    ])  # fmt: skip
    run_command([
        "eval/fid.py", "--real", config.real, "--fake", str(samples), "--out", str(out),
        "--clip", config.clip or _encoder(config), *shlex.split(config.score_options),
    ])  # fmt: skip
    return json.loads(out.read_text(encoding="utf-8"))


def _encoder(config: RoundConfig) -> str:
    """Return the encoder that the chain's prior was trained on."""
    from models.weights import exported, load_config

    return str(load_config(exported(Path(config.prior)))["clip"])


def guide_of(options: str) -> str:
    """Return the run that guides, by `options` of eval/sample.py; nothing where none does."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--guide", default="")
    return parser.parse_known_args(shlex.split(options))[0].guide


def run_command(arguments: Sequence[str]) -> None:
    """Run a script of this project, with its words on ours; see `play` for what it raises."""
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    print(f"$ python {shlex.join(arguments)}", flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode == DONE:
        return
    words = done.stderr.strip().splitlines() or ["it said nothing"]
    told = f"{arguments[0]}: exit code {done.returncode}: {words[-1].removeprefix('error: ')}"
    raise (ValueError if done.returncode == WRONG_REQUEST else OSError)(told)


def tidy(folder: Path, *, keep_samples: bool) -> None:
    """Leave of a round its scores and its grid."""
    for path in [] if keep_samples else (folder / "samples").glob("[0-9]*.png"):
        path.unlink()


def publish(scores: dict[str, Any]) -> None:
    """Hand the scores that have a metric to Prometheus."""
    from cluster.base.metrics import SCORES, gauge
    from eval.html_report.formats import flatten

    for name, value in flatten(scores).items():
        if name in SCORES and value is not None:
            gauge("minidalle2_eval_score").set(value, metric=name)
    gauge("minidalle2_eval_timestamp_seconds").set(time.time(), of="chain")
