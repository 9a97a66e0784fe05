"""The whole pipeline, small, on this machine: from a URL list to a measured model and its report.

    python cluster/demo.py                                     # the drawn set
    python cluster/demo.py --pairs pairs.parquet --limit 3000  # your pictures: image and caption

The drawn set takes some 13 minutes on two cores. Each stage is a script of its own; its command is
printed before it runs. What is done is not done again: rerun the same command to continue.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.cli import DONE, parse, require_local, run_script
from cluster.timings import Timings

CONFIG_NAME = "demo.json"  # also the mark by which --fresh knows that a folder is ours


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Everything is written below --run."""

    run: str = "runs/demo"
    """folder of data, runs, samples and report"""
    pairs: str = ""
    """Parquet file with columns image and caption (and name, to split by); empty = draw shapes"""
    limit: int = 0
    """use only so many of --pairs; 0 = all"""
    num_train: int = 8000
    """drawn training pairs"""
    num_test: int = 200
    """drawn test pairs of each kind: one shape, two in a seen and in a held-out combination"""
    size: str = "demo"
    """presets of the four trainers: demo, or debug for a quick look at the plumbing"""
    seed: int = 0
    """of the drawn set and of the test split"""
    metrics_port: int | None = None
    """serve Prometheus metrics of every stage on this loopback port; 0 = any free one"""
    fresh: bool = False
    """delete the demo's folder, if it is ours, and start over"""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the pipeline, and the number of images that it handles.

    output, inputs: of a script that does not know by itself that it is done, the file that it
    writes last and those whose change calls for another.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    num_images: int
    output: Path | None = None
    inputs: tuple[Path, ...] = ()


def main(config: DemoConfig) -> int:
    """Run every stage that is not done, then write the report."""
    from cluster.base.metrics import serve
    from cluster.base.ray_session import ensure_ray

    run = _open(config)
    port = serve(config.metrics_port)
    if port is not None:
        print(f"metrics: http://127.0.0.1:{port}/metrics")
    timings = Timings(run / "timings.json")
    with timings.attempt("pairs") as attempt:
        sets = _pairs(config, run / "source")
        attempt.done = True
    code = _download(run, sets, timings, port)
    if code:
        return code
    ensure_ray()
    counts = {name: len(rows) for name, rows in sets.items()}
    drawn = not config.pairs
    for stage in _stages(config, run, counts, drawn):
        code = _run_stage(stage, timings, port)
        if code:
            return code
    _finish(config, run, timings)
    return 0


def _open(config: DemoConfig) -> Path:
    """Create or reopen the demo's folder; another data set or seed in it is a ValueError, and so
    is a folder that would not last."""
    require_local("--run", config.run)
    run = Path(config.run).absolute()
    mark = run / CONFIG_NAME
    wanted = {
        k: v
        for k, v in dataclasses.asdict(config).items()
        if k not in ("run", "metrics_port", "fresh")
    }
    if run.is_dir() and any(run.iterdir()) and not mark.is_file():
        raise ValueError(
            f"{run}: found a folder without {CONFIG_NAME}, expected a demo or nothing; name "
            f"another --run"
        )
    if config.fresh and mark.is_file():
        shutil.rmtree(run)
    if mark.is_file():
        found = json.loads(mark.read_text())
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{run}: {name}: found {found.get(name)!r} in this demo, expected {value!r}; "
                    "name another --run or start over with --fresh"
                )
        return run
    run.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(wanted, indent=1))
    return run


def _pairs(config: DemoConfig, folder: Path) -> dict[str, list[dict[str, Any]]]:
    from cluster.demo_data import drawn_pairs, given_pairs

    if config.pairs:
        found = given_pairs(folder, Path(config.pairs), config.limit)
    else:
        found = drawn_pairs(folder, config.num_train, config.num_test, config.seed)
    return {name: pairs.read() for name, pairs in found.items()}


def _download(
    run: Path, sets: dict[str, list[dict[str, Any]]], timings: Timings, port: int | None
) -> int:
    """Serve the pairs on the loopback and download them, as one would from the web.

    Returns the exit code. A download that is whole needs no server, nor its old port.
    """
    from cluster.demo_data import is_fetched, serve_pairs, write_url_list

    folders = {name: run / "data" / name / "images" for name in sets}
    # an even number of shards, so that a judge can learn from the other half of them
    per_shard = {name: max(1, min(500, -(-len(rows) // 8))) for name, rows in sets.items()}
    mark = run / "source" / "port"
    known = int(mark.read_text()) if mark.is_file() else 0
    whole = known and all(
        is_fetched(folders[name], -(-len(rows) // per_shard[name])) for name, rows in sets.items()
    )
    with nullcontext(known) if whole else serve_pairs(sets, known) as served:
        mark.write_text(str(served))
        for name, rows in sets.items():
            urls = run / "source" / f"{name}_urls.parquet"
            if not urls.is_file():
                write_url_list(urls, rows, served, name)
            arguments = (
                "--urls", str(urls), "--out", str(folders[name]),
                "--image-size", "64", "--samples-per-shard", str(per_shard[name]),
                "--num-processes", "0", "--allow-address", f"127.0.0.1:{served}",
                "--host-rate", "0", "--host-connections", "32",
            )  # fmt: skip
            stage = Stage(
                name=f"download {name}",
                script="ingest/download.py",
                arguments=arguments,
                num_images=len(rows),
            )
            code = _run_stage(stage, timings, port)
            if code:
                print(f"{run}: the download of {name} is incomplete; rerun the same command")
                return code
    return DONE


def _stages(config: DemoConfig, run: Path, counts: dict[str, int], drawn: bool) -> list[Stage]:
    """List the commands after the download, in order."""
    from eval.sampling.image_source import SAMPLES_NAME
    from models.weights import FINAL_NAME

    data = {
        name: (str(run / "data" / name / "images"), str(run / "data" / name / "embeds"))
        for name in counts
    }
    (images, embeds), (test_images, test_embeds) = data["train"], data["test"]
    runs = {name: str(run / name) for name in ("clip", "judge", "prior", "base", "up")}
    finals = [run / name / FINAL_NAME for name in runs if name != "judge" or not drawn]
    preset, samples = ("--preset", config.size), str(run / "samples")
    chain = ("--prior", runs["prior"], "--decoder", runs["base"], "--upsampler", runs["up"])

    def trainer(name: str, script: str, *arguments: str) -> Stage:
        return Stage(
            name=name, script=script, arguments=(*arguments, "--run", runs[name]), num_images=0
        )

    neighbours = () if drawn else ("--block-size", "1", "--part", "1/2")
    stages = [trainer("clip", "training/clip.py", *preset, "--images", images, *neighbours)]
    if not drawn:
        other = ("--block-size", "1", "--part", "2/2", "--train.seed", "1")
        stages.append(trainer("judge", "training/clip.py", *preset, "--images", images, *other))
    for name, (source, target) in data.items():
        arguments = ("--images", source, "--clip", runs["clip"], "--out", target)
        stages.append(
            Stage(
                name=f"embed {name}",
                script="ingest/embed.py",
                arguments=arguments,
                num_images=counts[name],
            )
        )
    inputs = ("--images", images, "--embeds", embeds)
    up_preset = ("--preset", f"{config.size}_up")
    stages += [
        trainer("prior", "training/prior.py", *preset, "--embeds", embeds),
        trainer("base", "training/decoder.py", *preset, *inputs, "--stage", "base"),
        trainer("up", "training/decoder.py", *up_preset, *inputs),
        Stage(
            name="sample",
            script="eval/sample.py",
            arguments=(*chain, "--captions", test_images, "--out", samples),
            num_images=counts["test"],
        ),
        Stage(
            name="evaluate",
            script="eval/fid.py",
            arguments=(
                "--real", test_images, "--fake", samples, "--embeds", test_embeds, *chain,
                "--clip", runs["clip" if drawn else "judge"], "--out", str(run / "scores.json"),
            ),
            num_images=counts["test"],
            output=run / "scores.json",
            inputs=(run / "samples" / SAMPLES_NAME, *finals),
        ),
    ]  # fmt: skip
    return stages


def _run_stage(stage: Stage, timings: Timings, port: int | None) -> int:
    """Print the stage's command and run its `main` with the configuration that this command
    gives, unless its output is there already."""
    from training.config import RunConfig

    shown = " ".join(_short(argument) for argument in stage.arguments)
    command = f"python {stage.script} {shown}"
    print(f"\n$ {command}", flush=True)
    config_class, run_main, presets = _script(stage.script)
    config = parse(config_class, presets=presets, argv=stage.arguments)
    config = dataclasses.replace(config, metrics_port=port)
    images = stage.num_images
    if isinstance(config, RunConfig):
        images = config.train.schedule.num_steps * config.train.batch.global_batch_size
    with timings.attempt(stage.name, command, images) as attempt:
        code = DONE if _is_current(stage) else run_main(config)
        attempt.done = code == DONE
    return code


def _is_current(stage: Stage) -> bool:
    """Say, and tell, whether the stage's output is newer than everything that it was made of."""
    if stage.output is None or not stage.output.is_file():
        return False
    written = stage.output.stat().st_mtime_ns
    if any(path.stat().st_mtime_ns >= written for path in stage.inputs):
        return False
    print(f"{_short(str(stage.output))}: newer than what it is made of; delete it to make it anew")
    return True


def _short(argument: str) -> str:
    """Show a path below the working directory as relative to it."""
    here = str(Path.cwd())
    return argument.removeprefix(here + "/") if argument.startswith(here) else argument


def _script(path: str) -> tuple[type, Callable[[Any], int], Path | None]:
    """Return a script's configuration, its `main` and the prefix of its presets."""
    from eval import fid, sample
    from ingest import download, embed
    from training import clip, decoder, prior
    from training.config import PRESETS, ClipRunConfig, DecoderRunConfig, PriorRunConfig

    scripts: dict[str, tuple[type, Callable[[Any], int], Path | None]] = {
        "ingest/download.py": (download.DownloadConfig, download.main, None),
        "ingest/embed.py": (embed.EmbedConfig, embed.main, None),
        "training/clip.py": (ClipRunConfig, clip.main, PRESETS / "clip"),
        "training/prior.py": (PriorRunConfig, prior.main, PRESETS / "prior"),
        "training/decoder.py": (DecoderRunConfig, decoder.main, PRESETS / "decoder"),
        "eval/sample.py": (sample.SampleConfig, sample.main, None),
        "eval/fid.py": (fid.FidConfig, fid.main, None),
    }
    return scripts[path]


def _finish(config: DemoConfig, run: Path, timings: Timings) -> None:
    """Join scores and timings into eval.json, say where everything comes from, write the report."""
    from rich.console import Console
    from rich.table import Table

    from eval.html_report.page import card_scores, write_report
    from training.runs.cards import refresh_cards

    scores = json.loads((run / "scores.json").read_text())
    judge = (
        "the CLIP that the model was trained on"
        if not config.pairs
        else "a second CLIP, of the other half"
    )
    scores["images"]["judge"] = f"{judge}: {scores['images']['judge']}"
    scores["seconds"] = {row["stage"].replace(" ", "_"): row["seconds"] for row in timings.rows}
    part = run / "eval.part"
    part.write_text(json.dumps(scores, indent=1))
    part.replace(run / "eval.json")
    (run / "provenance.json").write_text(json.dumps(_provenance(config, run), indent=1))
    report = write_report(run)
    refresh_cards(run, card_scores(run))
    table = Table("stage", "seconds", "images/s", "peak memory")
    for row in timings.rows:
        rate = f"{row['images_per_second']:.1f}" if row["images_per_second"] else ""
        table.add_row(
            row["stage"],
            f"{row['seconds']:.1f}",
            rate,
            f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
        )
    table.add_row("all", f"{sum(row['seconds'] for row in timings.rows):.1f}", "", "")
    Console().print(table)
    print(f"scores: {_short(str(run / 'eval.json'))}\nreport: {_short(str(report))}")


def _provenance(config: DemoConfig, run: Path) -> dict[str, Any]:
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
