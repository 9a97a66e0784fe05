"""Score each new checkpoint of a run, while it trains.

    python eval/watch.py --run runs/base --prior runs/prior --captions data/test/images --limit 500
    python eval/watch.py --run runs/prior --decoder runs/base --once     # only the present ones

The watched run takes the place of its kind in the chain; the other runs of the chain are finished.
Complete checkpoints are hard-linked, so that training may prune them before they are scored. Each
is scored once; a killed watch continues. It ends when the run has finished and all is scored.

    <run>/watch.jsonl                 {"step", "samples_seen", "ema_sha256", "seconds", "scores",
                                      "settings"}: flags, and the weights of the chain's other runs
    <run>/watch/step_00001000/        eval.json, samples/grid.png
"""

import dataclasses
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.base.cli import parse, run_script
from cluster.base.files import Json, digest_file, try_lock, write_json
from cluster.base.jsonl import add_line, read_lines
from cluster.base.run_dir import (
    CONFIG_NAME,
    EVAL_NAME,
    STATE_NAME,
    WATCH_NAME,
    step_folders,
    step_of,
)
from eval.sample_and_score import (
    SampleAndScoreConfig,
    finish,
    guide_of,
    sample_and_score,
    settings_of,
)
from ingest.store.storage import absolute_root
from training.bucket.bucket_mirror import WATCHER, mirror_of

WEIGHTS = ("config.json", "ema.safetensors")
LINKED = (*WEIGHTS, STATE_NAME)


@dataclass(frozen=True, kw_only=True)
class RunWatchConfig(SampleAndScoreConfig):
    """Which run, and how its checkpoints are scored."""

    run: str = "runs/base"
    """run to watch: a prior's, a decoder's or an upsampler's; finished or not"""
    once: bool = False
    """score the checkpoints that exist now, and stop"""
    poll_seconds: float = 20.0
    """time between two looks for checkpoints"""


def main(config: RunWatchConfig) -> int:
    """Score checkpoints until the run has finished; with --once, those that exist now."""
    from cluster.base.metrics import serve
    from models.weights import FINAL_NAME

    mirror = mirror_of(config.run, "", WATCHER)
    mirror.begin(fresh=False)
    run = mirror.folder
    if not (run / CONFIG_NAME).is_file():
        raise ValueError(
            f"{mirror.place}: found no run, expected one with config.yaml; start training first"
        )
    if config.poll_seconds <= 0:
        raise ValueError(f"--poll-seconds: found {config.poll_seconds}, expected more than 0")
    serve(config.metrics_port)
    (run / "watch").mkdir(exist_ok=True)
    with (run / "watch" / ".lock").open("w") as lock:
        if not try_lock(lock):  # two would score each checkpoint twice
            raise ValueError(
                f"{run}: another process watches it, expected none; wait for it or end it"
            )
        while True:
            finished = mirror.has(run / FINAL_NAME)  # before the look: no checkpoint comes after it
            mirror.look(LINKED)
            for folder in _unscored(run):
                _score(config, run, folder)
                pages = (run / WATCH_NAME, folder / EVAL_NAME, folder / "samples" / "grid.png")
                mirror.publish(*(path for path in pages if path.is_file()))
                mirror.drop(*(run / folder.name / name for name in WEIGHTS))
            if config.once or finished:
                break
            time.sleep(config.poll_seconds)
    place, count = mirror.place, len(read_lines(run / WATCH_NAME))
    print(f"watch: {count} checkpoints of {place} in {place}/{WATCH_NAME}")
    return 0


def _unscored(run: Path) -> list[Path]:
    """Link every complete checkpoint that has no scores; return the folders by step.

    All are linked before the first is scored, since training may prune any of them meanwhile.
    """
    from models.weights import FINAL_NAME

    scored = {line["step"] for line in read_lines(run / WATCH_NAME)}
    for step in step_folders(run):
        if (step / STATE_NAME).is_file() and step_of(step) not in scored:
            _link_weights(step, run / "watch" / step.name / "run")
    folders = []
    for mark in sorted((run / "watch").glob(f"step_*/run/{FINAL_NAME}")):
        linked = mark.parent
        if step_of(linked.parent) in scored:
            shutil.rmtree(linked)  # a watch was killed after it wrote the line
        else:
            folders.append(linked.parent)
    return folders


def _link_weights(step: Path, linked: Path) -> None:
    """Make `linked` a finished run that holds only the checkpoint `step`, by hard links.

    A checkpoint that training prunes meanwhile is left out, with a message.
    """
    from models.weights import FINAL_NAME

    if (linked / FINAL_NAME).is_file():
        return
    shutil.rmtree(linked, ignore_errors=True)
    (linked / step.name).mkdir(parents=True)
    try:
        for name in LINKED:
            try:
                os.link(step / name, linked / step.name / name)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without links
                shutil.copyfile(step / name, linked / step.name / name)
    except FileNotFoundError:
        shutil.rmtree(linked.parent)
        print(f"{step}: pruned before it was taken; --train.keep-checkpoints keeps more")
        return
    write_json(linked / FINAL_NAME, {"step": step.name})


def _score(config: RunWatchConfig, run: Path, folder: Path) -> None:
    """Score the checkpoint linked in `folder`, and add its line to watch.jsonl."""
    from eval.sampling.chain import run_weights

    started = time.perf_counter()
    linked = folder / "run"
    weights = linked / folder.name
    chain = with_checkpoint(config, linked, weights)
    guide = guide_of(chain.sample_options)
    runs = {"prior": chain.prior, "decoder": chain.decoder, "guide": guide}
    runs |= {f"upsampler {number}": run for number, run in enumerate(chain.upsampler, 1)}
    others = {name: run for name, run in runs.items() if run and run != str(linked)}
    weights_of = {f"weights of {name}": run_weights(run) for name, run in others.items()}
    settings = settings_of(config, weights_of)
    _require_same_settings(run, settings)
    scores = sample_and_score(chain, folder, settings)
    line = {
        "step": step_of(folder),
        "samples_seen": json.loads((weights / STATE_NAME).read_text())["samples_seen"],
        "ema_sha256": digest_file(weights / "ema.safetensors"),
        "seconds": round(time.perf_counter() - started, 2),
        "scores": scores,
        "settings": settings,
    }
    add_line(run / WATCH_NAME, line)
    shutil.rmtree(linked)
    finish(config, folder, scores)
    print(f"watch: {folder.name} scored in {line['seconds']:.0f} s", flush=True)


def _require_same_settings(run: Path, settings: Json) -> None:
    """Raise ValueError where earlier checkpoints were scored otherwise: one curve, one setting."""
    for line in read_lines(run / WATCH_NAME):
        before = line.get("settings", settings)  # lines of old versions have none
        for name in sorted(before.keys() | settings.keys()):
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"{run / WATCH_NAME}: {name}: found {before.get(name)!r} in the scores of step "
                    f"{line['step']}, expected {settings.get(name)!r}; give it as before, or move "
                    "that file away to begin another curve"
                )


def with_checkpoint(config: RunWatchConfig, linked: Path, weights: Path) -> RunWatchConfig:
    """Return the chain with the run `linked` in place of the watched run.

    weights: folder of the checkpoint, whose config.json states the kind. Raises ValueError for a
    CLIP, and for an upsampler that --upsampler does not name.
    """
    kind = json.loads((weights / "config.json").read_text()).get("kind", "")
    if kind == "decoder":
        return dataclasses.replace(config, decoder=str(linked))
    if kind.endswith("_prior"):
        return dataclasses.replace(config, prior=str(linked))
    if kind != "upsampler":
        raise ValueError(
            f"--run: found a run of kind {kind!r}, expected a prior, a decoder or an upsampler; "
            "eval/clip.py scores a CLIP"
        )
    watched = absolute_root(config.run)
    cascade = [str(linked) if absolute_root(run) == watched else run for run in config.upsampler]
    if str(linked) not in cascade:
        raise ValueError(
            f"--upsampler: found {', '.join(config.upsampler) or 'none'}, expected {config.run} in "
            "its place in the cascade"
        )
    return dataclasses.replace(config, upsampler=tuple(cascade))


if __name__ == "__main__":
    run_script(lambda: main(parse(RunWatchConfig)))
