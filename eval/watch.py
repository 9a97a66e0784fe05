"""Evaluate each new checkpoint of a run, beside its training.

    python eval/watch.py --run runs/base --prior runs/prior --captions data/test/images --limit 500
    python eval/watch.py --run runs/prior --decoder runs/base --once        # what is there now

The run stands in the chain where its kind belongs; the other parts are finished runs. A checkpoint
is taken when it is whole, by hard links, so that training may prune it meanwhile. Each is scored
once: kill this, run it again, and it goes on. It ends when the run has finished and is scored.

    <run>/watch.jsonl                 {"step", "samples_seen", "ema_sha256", "seconds", "scores",
                                      "settings"}: flags, and the weights of the other parts
    <run>/watch/step_00001000/        eval.json, samples/grid.png
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.cli import parse, run_script
from cluster.base.jsonl import add_line, read_lines
from eval.html_report.run_curves import WATCH_NAME as LINES_NAME
from eval.rounds import RoundConfig, begin, guide_of, play, publish, tidy

ASIDE = ("run", "once", "poll_seconds", "keep_samples", "metrics_port")  # change no score
WEIGHTS = ("config.json", "ema.safetensors", "state.json")


@dataclass(frozen=True, kw_only=True)
class WatchConfig(RoundConfig):
    """Which run, and how its checkpoints are scored."""

    run: str = "runs/base"
    """run to watch: a prior's, a decoder's or an upsampler's; finished or not"""
    once: bool = False
    """score the checkpoints that are there, and stop"""
    poll_seconds: float = 20.0
    """time between two looks for checkpoints"""


def main(config: WatchConfig) -> int:
    """Score checkpoints until the run has finished, or with --once those that are there."""
    from cluster.base.metrics import serve

    run = Path(config.run)
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"{run}: found no run, expected one with config.yaml; start training first"
        )
    if config.poll_seconds <= 0:
        raise ValueError(f"--poll-seconds: found {config.poll_seconds}, expected more than 0")
    serve(config.metrics_port)
    with _alone(run):
        while True:
            finished = (run / "final.json").is_file()  # looked for first: no checkpoint follows it
            for folder in _taken(run):
                _score(config, run, folder)
            if config.once or finished:
                break
            time.sleep(config.poll_seconds)
    print(f"watch: {len(_lines(run))} checkpoints of {run} in {run / LINES_NAME}")
    return 0


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Hold the run's watch: two would score each checkpoint twice."""
    import fcntl

    (run / "watch").mkdir(exist_ok=True)
    with (run / "watch" / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{run}: another process watches it, expected none; wait for it or end it"
            ) from None
        yield


def _lines(run: Path) -> list[dict[str, Any]]:
    return read_lines(run / LINES_NAME)


def _taken(run: Path) -> list[Path]:
    """Take every whole checkpoint that is not scored yet; return their folders in order of steps.

    All are taken before the first is scored, since training may prune any of them then.
    """
    scored = {line["step"] for line in _lines(run)}
    for step in sorted(run.glob("step_*/state.json")):
        number = step.parent.name.removeprefix("step_")
        if number.isdigit() and int(number) not in scored:
            _take(run, step.parent)
    folders = []
    for mark in sorted((run / "watch").glob("step_*/run/final.json")):
        if int(mark.parent.parent.name.removeprefix("step_")) in scored:
            shutil.rmtree(mark.parent)  # killed between its line and here
        else:
            folders.append(mark.parent.parent)
    return folders


def _take(run: Path, step: Path) -> None:
    """Link the weights of a checkpoint into a finished run of its own; one that is pruned
    meanwhile is left, and said."""
    view = run / "watch" / step.name / "run"
    if (view / "final.json").is_file():
        return
    target = view / step.name
    shutil.rmtree(view, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        for name in WEIGHTS:
            _link(step / name, target / name)
    except FileNotFoundError:
        shutil.rmtree(view.parent)
        print(f"{step}: pruned before it was taken; --train.keep-checkpoints keeps more")
        return
    part = view / "final.part"
    part.write_text(json.dumps({"step": step.name}))
    part.replace(view / "final.json")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _score(config: WatchConfig, run: Path, folder: Path) -> None:
    """Play a round with the taken checkpoint in its place, and write its line."""
    from cluster.base.files import digest_file

    started = time.perf_counter()
    weights = folder / "run" / folder.name
    state = json.loads((weights / "state.json").read_text())
    chain = _with(config, folder / "run", weights)
    settings = _settings(config, chain, folder / "run")
    _require_one_curve(run, settings)
    begin(folder, settings)
    scores = play(chain, folder)
    line = {
        "step": int(folder.name.removeprefix("step_")),
        "samples_seen": state["samples_seen"],
        "ema_sha256": digest_file(weights / "ema.safetensors"),
        "seconds": round(time.perf_counter() - started, 2),
        "scores": scores,
        "settings": settings,
    }
    add_line(run / LINES_NAME, line)
    publish(scores)
    shutil.rmtree(folder / "run")
    tidy(folder, keep_samples=config.keep_samples)
    print(f"watch: {folder.name} scored in {line['seconds']:.0f} s", flush=True)


def _settings(config: WatchConfig, chain: WatchConfig, view: Path) -> dict[str, Any]:
    """Return what makes the scores of checkpoints comparable: the flags, and the weights of all
    parts of the chain but the watched one."""
    from eval.sampling.chain import run_weights

    told = {k: v for k, v in dataclasses.asdict(config).items() if k not in ASIDE}
    guide = guide_of(chain.sample_options)
    parts = {"prior": chain.prior, "decoder": chain.decoder, "guide": guide}
    parts |= {f"upsampler {number}": part for number, part in enumerate(chain.upsampler, 1)}
    weights = {k: run_weights(part) for k, part in parts.items() if part and part != str(view)}
    return json.loads(json.dumps({**told, **{f"weights of {k}": v for k, v in weights.items()}}))


def _require_one_curve(run: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError where checkpoints were scored otherwise before: one curve must not mix
    both, and those checkpoints may be pruned."""
    for line in _lines(run):
        before = line.get("settings", settings)  # a line may be older than the settings
        for name in sorted(before.keys() | settings.keys()):
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"{run / LINES_NAME}: {name}: found {before.get(name)!r} in the scores of step "
                    f"{line['step']}, expected {settings.get(name)!r}; give it as before, or move "
                    "that file away to begin another curve"
                )


def _with(config: WatchConfig, view: Path, weights: Path) -> WatchConfig:
    """Return the chain with the checkpoint where its kind belongs; ValueError for a CLIP."""
    kind = json.loads((weights / "config.json").read_text()).get("kind", "")
    if kind == "upsampler":
        named = [Path(run).absolute() == Path(config.run).absolute() for run in config.upsampler]
        if not any(named):
            raise ValueError(
                f"--upsampler: found {', '.join(config.upsampler) or 'none'}, expected "
                f"{config.run} in its place in the cascade"
            )
        pairs = zip(config.upsampler, named, strict=True)
        return dataclasses.replace(
            config, upsampler=tuple(str(view) if mine else run for run, mine in pairs)
        )
    if kind == "decoder":
        return dataclasses.replace(config, decoder=str(view))
    if kind.endswith("_prior"):
        return dataclasses.replace(config, prior=str(view))
    raise ValueError(
        f"--run: found a run of kind {kind!r}, expected a prior, a decoder or an upsampler; "
        "eval/clip.py scores a CLIP"
    )


if __name__ == "__main__":
    run_script(lambda: main(parse(WatchConfig)))
