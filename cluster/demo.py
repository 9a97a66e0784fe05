"""The complete pipeline, small, on this machine: from a URL list to a measured model and a report.

    python cluster/demo.py                                     # the drawn set
    python cluster/demo.py --pairs pairs.parquet --limit 3000  # your pictures: image and caption

The drawn set takes some nine minutes on two cores with bf16. Each stage is a script; its command is
printed before it runs. A finished stage is not run again: rerun the same command to continue.
"""

import dataclasses
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

from cluster.base.cli import DONE, parse, require_local, run_script
from cluster.base.files import Json, write_json
from cluster.base.options import DataclassInstance
from cluster.base.run_dir import DEMO_NAME, EVAL_NAME, PROVENANCE_NAME, RAY_FOLDER, TIMINGS_NAME
from cluster.base.timings import Timings
from cluster.lanes import Command, run_lanes

SCORES_NAME = "scores.json"
LANES_BYTES = 7 << 30  # of the machine's memory, for two trainings at once: 5.3 GiB were used
# By which each kind of stage makes the whole longer, on two cores with bf16: --size debug, demo,
# and demo of given pairs. What trains beside the decoder ends before it
USUAL_SECONDS = {
    "pairs": (6, 10, 15), "download": (4, 13, 0), "adopt": (4, 0, 5), "clip": (12, 80, 60),
    "judge": (4, 0, 90), "embed": (4, 7, 5), "prior": (5, 120, 130), "base": (6, 120, 260),
    "up": (5, 50, 80), "sample": (4, 15, 40), "evaluate": (6, 60, 120),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Everything is written below --run."""

    run: str = "runs/demo"
    """folder of data, runs, samples and report"""
    pairs: str = ""
    """Parquet file with columns image and caption (and name, to split by), or anything else that
    ingest/adopt.py takes; empty = draw shapes"""
    limit: int = 0
    """use only so many of --pairs; 0 = all"""
    num_train: int = 8000
    """drawn training pairs"""
    num_test: int = 120
    """drawn test pairs of each kind: one shape, two in a seen and in a held-out combination"""
    size: Literal["demo", "debug"] = "demo"
    """presets of the four trainers: demo, or debug for a quick look at the plumbing"""
    seed: int = 0
    """of the drawn set and of the test split"""
    metrics_port: int | None = None
    """serve Prometheus metrics of every stage on this loopback port; 0 = any free one"""
    fresh: bool = False
    """delete the demo's folder, if it is ours, and start over"""


def main(config: DemoConfig) -> int:
    """Run every stage that is not done, then write the report."""
    from cluster.base.metrics import serve
    from cluster.base.ray_session import ensure_ray

    # For this process and Ray's: trainings side by side have no core to spare for threads that spin
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run = _open(config)
    port = serve(config.metrics_port)
    if port is not None:
        print(f"metrics: http://127.0.0.1:{port}/metrics")
    served = not config.pairs or (run / "source" / "port").is_file()  # by an earlier version
    verb, make_images = ("download", _download) if served else ("adopt", _adopt)
    named = [each.name for each in _commands(config, run, {"train": 0, "test": 0})]
    column = (config.size == "demo") * (1 + bool(config.pairs))
    timings = Timings(
        run / TIMINGS_NAME,
        {
            name: USUAL_SECONDS[name.split()[0]][column]
            for name in ("pairs", f"{verb} train", f"{verb} test", *named)
        },
    )

    # Pairs of image and caption, while Ray starts, which is a wait for its processes
    print(timings.outlook("pairs"), flush=True)
    with timings.attempt("pairs") as attempt, ThreadPoolExecutor(1) as pool:
        pool.submit(import_module, "torch")
        pairs = pool.submit(_pairs, config, run / "source")
        ensure_ray()
        sets = pairs.result()
        attempt.done = True
    commands = _commands(config, run, {name: len(rows) for name, rows in sets.items()})
    lanes = _lanes([each for each in commands if not each.script.startswith("eval/")])

    # Shards of them, drawn ones by way of a URL list, while the workers start; then CLIP and
    # embeddings, which the decoder needs, and beside it all other models
    with ExitStack() as stack:
        for lane in lanes:
            stack.enter_context(_workers(lane, run))
        code = make_images(run, sets, timings, port)
        run_command = partial(_run_command, timings=timings, port=port)
        code = code or run_lanes(lanes, run, run_command)

    # Samples, scores, and the report
    for command in () if code else (each for each in commands if each.script.startswith("eval/")):
        code = code or _run_command(command, timings, port)
    if not code:
        _finish(config, run, timings)
    return code


def _lanes(commands: list[Command]) -> list[list[Command]]:
    """Split the commands that train into lanes that run side by side: what others need, and what
    needs them.

    Small networks make little use of a second thread: on two cores two of them take three quarters
    of the time that they take one after the other (benchmarks/results.md). One core, little memory,
    or a GPU has one lane.
    """
    from cluster.base.machine import available_cpus, total_memory
    from cluster.base.ray_session import has_gpus

    if available_cpus() < 2 or total_memory() < LANES_BYTES or has_gpus():
        return [commands]
    commands = [_with_threads(each, available_cpus() // 2) for each in commands]
    return [[c for c in commands if c.needs], [c for c in commands if not c.needs]]


def _with_threads(command: Command, share: int) -> Command:
    """Return a command of a lane with its share of the cores.

    In bf16 the threads of two networks hold each other up: on two cores, two threads each took 5 to
    25 times as long as one each. In fp32 they do not, and the lane that lasts longer ends alone.
    """
    from training.engine.precision import native_bf16

    if share == 1 and not native_bf16("cpu"):
        return command
    flag = "--train.num-threads" if command.script.startswith("training/") else "--num-threads"
    return dataclasses.replace(command, arguments=(*command.arguments, flag, str(share)))


def _workers(commands: list[Command], run: Path) -> AbstractContextManager[None]:
    """Start workers for the runs that are not finished: one start for all, since it takes longer
    than a short training."""
    from models.weights import FINAL_NAME
    from training.config import RunConfig
    from training.runs.ray_train import shared_workers

    runs, builds = {}, []
    for command in commands:
        module, config = _request(command)
        if isinstance(config, RunConfig) and not (run / command.name / FINAL_NAME).is_file():
            runs[run / command.name] = config.train
            builds.append(module.BUILD)
    return shared_workers(run / RAY_FOLDER, runs, builds) if runs else nullcontext()


def _open(config: DemoConfig) -> Path:
    """Create or reopen the demo's folder; another data set or seed in it is a ValueError, and so
    is a folder that would not last."""
    require_local("--run", config.run)
    run = Path(config.run).absolute()
    mark = run / DEMO_NAME
    wanted = dataclasses.asdict(config)
    for name in ("run", "metrics_port", "fresh"):
        del wanted[name]
    if run.is_dir() and any(run.iterdir()) and not mark.is_file():
        raise ValueError(
            f"{run}: found a folder without {DEMO_NAME}, expected a demo or nothing; name another "
            "--run"
        )
    if config.fresh and mark.is_file():
        shutil.rmtree(run)
    if mark.is_file():
        known = json.loads(mark.read_text())
        for name, value in wanted.items():
            if known.get(name) != value:
                raise ValueError(
                    f"{run}: {name}: found {known.get(name)!r} in this demo, expected {value!r}; "
                    "name another --run or start over with --fresh"
                )
        return run
    run.mkdir(parents=True, exist_ok=True)
    write_json(mark, wanted, indent=1)
    return run


def _pairs(config: DemoConfig, folder: Path) -> dict[str, list[Json]]:
    """Draw or split the pairs, and return their rows by set."""
    from cluster.demo_data import drawn_pairs, given_pairs, read_pairs

    if config.pairs:
        paths = given_pairs(folder, Path(config.pairs), config.limit)
    else:
        paths = drawn_pairs(folder, config.num_train, config.num_test, config.seed)
    return {name: read_pairs(path) for name, path in paths.items()}


def _download(
    run: Path, sets: dict[str, list[Json]], timings: Timings, port: int | None
) -> int:
    """Serve the pairs on the loopback and download them, as one would from the web.

    Returns the exit code. A complete download needs no server, nor its old port.
    """
    from cluster.demo_data import is_fetched, serve_pairs, write_url_list

    folders = {name: run / "data" / name / "images" for name in sets}
    per_shard = {name: _samples_per_shard(rows) for name, rows in sets.items()}
    mark = run / "source" / "port"
    known = int(mark.read_text()) if mark.is_file() else 0
    complete = known and all(
        is_fetched(folders[name], -(-len(rows) // per_shard[name])) for name, rows in sets.items()
    )
    with nullcontext(known) if complete else serve_pairs(sets, known) as served:
        mark.write_text(str(served))
        for name, rows in sets.items():
            urls = run / "source" / f"{name}_urls.parquet"
            if not urls.is_file():
                write_url_list(urls, rows, served, name)
            arguments = (
                "--urls", str(urls), "--allow-address", f"127.0.0.1:{served}",
                "--host-rate", "0", "--host-connections", "32",
            )  # fmt: skip
            if code := _make_shards("download", run, name, rows, arguments, timings, port):
                return code
    return DONE


def _samples_per_shard(rows: list[Json]) -> int:
    """Return a number that makes an even number of shards, so that a second CLIP can learn from
    the other half."""
    return max(1, min(500, -(-len(rows) // 8)))


def _make_shards(
    verb: str,
    run: Path,
    name: str,
    rows: list[Json],
    arguments: tuple[str, ...],
    timings: Timings,
    port: int | None,
) -> int:
    """Make the shards of a set of pairs by the script of ingest/ that `verb` names; return the exit
    code."""
    from cluster.demo_data import SIDE

    command = Command(
        name=f"{verb} {name}", script=f"ingest/{verb}.py", num_images=len(rows),
        arguments=(
            *arguments, "--out", str(run / "data" / name / "images"), "--image-size", str(SIDE),
            "--samples-per-shard", str(_samples_per_shard(rows)), "--num-processes", "0",
        ),
    )  # fmt: skip
    code = _run_command(command, timings, port)
    if code:
        print(f"{run}: the {verb} of {name} is incomplete; rerun the same command")
    return code


def _adopt(run: Path, sets: dict[str, list[Json]], timings: Timings, port: int | None) -> int:
    """Make shards of given pairs; return the exit code."""
    for name, rows in sets.items():
        arguments = ("--source", str(run / "source" / f"{name}.parquet"))
        if code := _make_shards("adopt", run, name, rows, arguments, timings, port):
            return code
    return DONE


def _commands(config: DemoConfig, run: Path, counts: dict[str, int]) -> list[Command]:
    """List the commands after the download, in order.

    The drawn set is scored by the CLIP that it trains. Given pairs are few and unlike the drawn
    ones, so a second CLIP, trained on the other half of the shards, scores them. Distances are also
    in the space of an ImageNet classifier, on which nothing here was trained.
    """
    from eval.sampling.image_source import SAMPLES_NAME
    from models.weights import FINAL_NAME

    drawn, preset = not config.pairs, ("--preset", config.size)
    base_preset = "demo_pictures" if config.pairs and config.size == "demo" else config.size
    images = {name: str(run / "data" / name / "images") for name in counts}
    embeds = {name: str(run / "data" / name / "embeds") for name in counts}
    clip, second_clip, prior, base, up = (
        str(run / name) for name in ("clip", "judge", "prior", "base", "up")
    )
    scorer, half, other_half = clip, (), ()
    if not drawn:
        scorer = second_clip
        half = ("--block-size", "1", "--part", "1/2")
        other_half = ("--block-size", "1", "--part", "2/2", "--train.seed", "1")
    train_images, samples = ("--images", images["train"]), str(run / "samples")
    data = (*train_images, "--embeds", embeds["train"])
    chain = ("--prior", prior, "--decoder", base, "--upsampler", up)

    def train(
        name: str, script: str, *arguments: str, needs: tuple[str, ...] = ()
    ) -> Command:
        return Command(
            name=name, script=f"training/{script}.py", num_images=0, needs=needs,
            arguments=(*arguments, "--run", str(run / name)),
        )  # fmt: skip

    def embed(name: str) -> Command:
        return Command(
            name=f"embed {name}", script="ingest/embed.py", num_images=counts[name],
            arguments=("--images", images[name], "--clip", clip, "--out", embeds[name],
                "--num-actors", "0"),
        )  # fmt: skip

    finals = [Path(path) / FINAL_NAME for path in dict.fromkeys((clip, scorer, prior, base, up))]
    return [
        train("clip", "clip", *preset, *train_images, *half),
        *(embed(name) for name in counts),
        train(
            "base", "decoder", "--preset", base_preset, *data, "--stage", "base",
            needs=("embed train",),
        ),
        train("prior", "prior", *preset, "--embeds", embeds["train"]),
        train("up", "decoder", "--preset", f"{config.size}_up", *data),
        *([] if drawn else [train("judge", "clip", *preset, *train_images, *other_half)]),
        Command(
            name="sample", script="eval/sample.py", num_images=counts["test"],
            arguments=(
                *chain, "--captions", images["test"], "--out", samples,
                "--decoder-steps", "8", "--upsampler-steps", "2",
            ),
        ),
        Command(
            name="evaluate", script="eval/fid.py", num_images=counts["test"],
            arguments=(
                "--real", images["test"], "--fake", samples, "--embeds", embeds["test"], *chain,
                "--features", "efficientnet_lite0", "clip", "--clip", scorer,
                "--out", str(run / SCORES_NAME),
            ),
            output=run / SCORES_NAME,
            inputs=(run / "samples" / SAMPLES_NAME, *finals),
        ),
    ]  # fmt: skip


def _run_command(command: Command, timings: Timings, port: int | None) -> int:
    """Print a command and run its script's `main` with the configuration that it gives, unless its
    output is up to date."""
    from training.config import RunConfig

    line = f"python {command.script} {' '.join(_short(each) for each in command.arguments)}"
    print("", *filter(None, (timings.outlook(command.name), f"$ {line}")), sep="\n", flush=True)
    module, config = _request(command)
    config = dataclasses.replace(config, metrics_port=port)
    images = command.num_images
    if isinstance(config, RunConfig):
        images = config.train.schedule.num_steps * config.train.batch.global_batch_size
    with timings.attempt(command.name, line, images) as attempt:
        code = DONE if _is_current(command) else module.main(config)
        attempt.done = code == DONE
    return code


def _is_current(command: Command) -> bool:
    """Return, and print, whether a command's output is newer than all of its inputs."""
    if command.output is None or not command.output.is_file():
        return False
    written = command.output.stat().st_mtime_ns
    if any(path.stat().st_mtime_ns >= written for path in command.inputs):
        return False
    print(f"{_short(str(command.output))}: newer than its inputs; delete it to make it again")
    return True


def _short(argument: str) -> str:
    """Return a path below the working directory relative to it."""
    return argument.removeprefix(f"{Path.cwd()}/")


def _request(command: Command) -> tuple[ModuleType, DataclassInstance]:
    """Return a command's script and the configuration that it is given."""
    from eval import fid, sample
    from ingest import adopt, download, embed
    from ingest.adopting.config import AdoptConfig
    from training import clip, decoder, prior
    from training.config import PRESETS, ClipRunConfig, DecoderRunConfig, PriorRunConfig

    scripts: dict[str, tuple[ModuleType, type, Path | None]] = {
        "ingest/adopt.py": (adopt, AdoptConfig, None),
        "ingest/download.py": (download, download.DownloadConfig, None),
        "ingest/embed.py": (embed, embed.EmbedConfig, None),
        "training/clip.py": (clip, ClipRunConfig, PRESETS / "clip"),
        "training/prior.py": (prior, PriorRunConfig, PRESETS / "prior"),
        "training/decoder.py": (decoder, DecoderRunConfig, PRESETS / "decoder"),
        "eval/sample.py": (sample, sample.SampleConfig, None),
        "eval/fid.py": (fid, fid.FidConfig, None),
    }
    module, config_class, presets = scripts[command.script]
    return module, parse(config_class, presets=presets, argv=command.arguments)


def _finish(config: DemoConfig, run: Path, timings: Timings) -> None:
    """Join scores and timings into eval.json, write where everything comes from, and the report."""
    from rich.console import Console
    from rich.table import Table

    from eval.html_report.page import card_scores, write_report
    from training.runs.cards import refresh_cards

    scores = json.loads((run / SCORES_NAME).read_text())
    scorer = "the CLIP that the model was trained on"
    if config.pairs:
        scorer = "a second CLIP, of the other half"
    scores["images"]["judge"] = f"{scorer}: {scores['images']['judge']}"
    scores["seconds"] = {row["stage"].replace(" ", "_"): row["seconds"] for row in timings.rows}
    write_json(run / EVAL_NAME, scores, indent=1)
    write_json(run / PROVENANCE_NAME, _provenance(config, run), indent=1)
    report = write_report(run)
    refresh_cards(run, card_scores(run))
    table = Table("stage", "seconds", "images/s", "peak memory")
    for row in timings.rows:
        rate = f"{row['images_per_second']:.1f}" if row["images_per_second"] else ""
        memory = f"{row['peak_memory_bytes'] / 2**30:.2f} GiB"
        table.add_row(row["stage"], f"{row['seconds']:.1f}", rate, memory)
    table.add_row("all", f"{timings.elapsed():.1f}", "", "")
    Console().print(table)
    print(f"scores: {_short(str(run / 'eval.json'))}\nreport: {_short(str(report))}")


def _provenance(config: DemoConfig, run: Path) -> Json:
    """Return the code's version, the configuration and the digests of the data."""
    from ingest.shards import load_snapshot
    from training.runs.cards import code_version

    snapshots = {
        f"{name} {kind}": load_snapshot(run / "data" / name / kind).digest
        for name in ("train", "test")
        for kind in ("images", "embeds")
    }
    return {
        "commit": code_version()["commit"] or "not a git checkout",
        "python": sys.version.split()[0],
        "demo": dataclasses.asdict(config),
        "snapshots": snapshots,
    }


if __name__ == "__main__":
    run_script(lambda: main(parse(DemoConfig)))
