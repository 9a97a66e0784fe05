"""One self-contained HTML page that tells what a run reached: pictures, scores, curves, timings.

The page loads nothing and runs nothing: images are inline, charts are inline SVG, and its own
security policy forbids the rest, so that a caption is a caption whatever it says. A part whose file
is absent is left out.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.base.run_dir import METRICS_NAME, WATCH_NAME
from eval.html_report import pictures
from eval.html_report.formats import duration, flatten, number, size
from eval.html_report.headlines import headlines
from eval.html_report.part_tables import SHAPE_SCORES, ablation_table, shape_rows
from eval.html_report.run_curves import run_curves, sweep_charts
from eval.html_report.score_table import (
    ELSEWHERE,
    described,
    entries,
    made_of,
    score_table,
    title_of,
)
from eval.sampling.image_source import SETTINGS_NAME

if TYPE_CHECKING:
    from training.runs.cards import Score

REPORT_NAME = "report.html"
SCORES_NAME = "eval.json"
CONFIG_NAME = "config.yaml"


def write_report(run_dir: Path, against: Sequence[Path] = ()) -> Path:
    """Write `run_dir`/report.html from what the stages left in `run_dir`, and return its path.

    against: earlier runs, or their eval.json, to show beside this one's scores. Reads eval.json,
    timings.json, provenance.json, samples/, edits/, sweep.jsonl, and config.yaml, metrics.jsonl,
    validation.jsonl and watch.jsonl of the folder and of every run folder in it. Raises ValueError
    if there is nothing to report, or a file is not what its name says.
    """
    scores = pictures.read_json(run_dir / SCORES_NAME, dict)
    curves = run_curves(run_dir)
    if scores is None and not (run_dir / METRICS_NAME).is_file() and not curves:
        raise ValueError(
            f"{run_dir}: found no {SCORES_NAME} and no {METRICS_NAME} or {WATCH_NAME}, expected "
            "one; run eval/fid.py first, or name the folder of a run"
        )
    timings = pictures.read_json(run_dir / "timings.json", list) or []
    samples, scores = run_dir / "samples", scores or {}
    template = _templates().get_template("report.html.j2")
    page = template.render(
        title=run_dir.resolve().name,
        headlines=headlines(scores),
        samples=pictures.samples(samples),
        grid=pictures.figure(samples, "grid"),
        table=score_table(scores, _others(against)),
        shapes=shape_rows(scores.get("shapes") or {}),
        shape_scores=SHAPE_SCORES,
        strips=pictures.strips(run_dir),
        sweep=sweep_charts(run_dir),
        ablation=ablation_table(scores.get("ablation") or {}),
        ablation_figure=pictures.figure(samples, "ablation"),
        neighbours=pictures.figure(samples, "neighbours"),
        nearest=(scores.get("memorisation") or {}).get("nearest") or [],
        runs=curves,
        timings=timings,
        longest=max((row["seconds"] for row in timings), default=1) or 1,
        provenance=_provenance(run_dir, scores),
        weights=_weights(samples),
        configs=_configs(run_dir),
        scores=flatten(scores),
    )
    path = run_dir / REPORT_NAME
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(page, encoding="utf-8")
    return unfinished.replace(path)


def card_scores(run_dir: Path) -> "list[Score]":
    """Return the scores of a folder's eval.json in words, for the cards of its runs."""
    from training.runs.cards import Score

    found = pictures.read_json(run_dir / SCORES_NAME, dict) or {}
    told = []
    for entry in entries({key: value for key, value in found.items() if key not in ELSEWHERE}):
        name, _, note = described(entry.path, entry.made)
        made = ", ".join(word for word in (entry.spread, note, made_of(entry)) if word)
        group = title_of(entry.path)
        told.append(Score(name=f"{group}, {name}", value=number(entry.value), method=made))
    return told


def _templates() -> Any:
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(number=number, duration=duration, size=size)
    return templates


def _others(against: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Read the scores of earlier runs by a short name of each; ValueError for one without any."""
    found: dict[str, dict[str, Any]] = {}
    for given in against:
        path = given / SCORES_NAME if given.is_dir() else given
        scores = pictures.read_json(path, dict)
        if scores is None:
            raise ValueError(
                f"{path}: found no such file, expected the scores of an earlier run; run "
                "eval/fid.py there first"
            )
        name = (given if given.is_dir() else given.parent).resolve().name
        found[str(given) if name in found else name] = scores
    return found


def _provenance(run: Path, scores: dict[str, Any]) -> dict[str, Any]:
    """Return what is recorded of the run, and of its evaluation: code, versions, protocol."""
    told = flatten(pictures.read_json(run / "provenance.json", dict) or {})
    for part in ("provenance", "protocol", "sampling"):
        name = "evaluation" if part == "provenance" else part
        found = flatten(scores.get(part) or {}, name)
        told |= {key: value for key, value in found.items() if not isinstance(value, float)}
    return told


def _weights(samples: Path) -> dict[str, Any]:
    """Return what eval/sample.py recorded of the weights that drew the samples, and how."""
    told = pictures.read_json(samples / SETTINGS_NAME, dict) or {}
    return {key: value for key, value in flatten(told).items() if key != "captions"}


def _configs(run: Path) -> list[tuple[str, str]]:
    """Return the configuration of the run and of every run below it."""
    paths = [run / CONFIG_NAME, *sorted(run.glob(f"*/{CONFIG_NAME}"))]
    found = [(path, path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    demo = pictures.read_json(run / "demo.json", dict)
    told = [(path.parent.resolve().name, text) for path, text in found]
    return ([("demo", json.dumps(demo, indent=1))] if demo else []) + told
