"""One self-contained HTML page on what a run reached: pictures, scores, curves, timings.

The page loads nothing and runs nothing: images are inline, charts are inline SVG, and its own
security policy forbids the rest. Every text from a file is escaped. A section whose file is absent
is left out. What the page says about its sections is in templates/report.html.j2.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.base.files import Json, write_text
from cluster.base.run_dir import (
    CONFIG_NAME,
    DEMO_NAME,
    EVAL_NAME,
    METRICS_NAME,
    PROVENANCE_NAME,
    REPORT_NAME,
    SAMPLES_FOLDER,
    TIMINGS_NAME,
    WATCH_NAME,
)
from eval.html_report import charts, pictures
from eval.html_report import score_table as tables
from eval.html_report.formats import Scores, duration, flatten, number, read_json, size
from eval.sampling.image_source import SETTINGS_NAME

if TYPE_CHECKING:
    from training.runs.cards import CardScore


def write_report(run_dir: Path, against: Sequence[Path] = ()) -> Path:
    """Write `run_dir`/report.html from what the stages left in `run_dir`, and return its path.

    against: earlier runs, or their eval.json, to show beside this one's scores. Reads eval.json,
    timings.json, provenance.json, samples/, edits/, sweep.jsonl, and config.yaml, metrics.jsonl,
    validation.jsonl and watch.jsonl of the folder and of every run folder in it. Raises ValueError
    if there is nothing to report, or a file is not what its name says.
    """
    import jinja2

    read_scores, curves = read_json(run_dir / EVAL_NAME, dict), charts.curves(run_dir)
    if read_scores is None and not (run_dir / METRICS_NAME).is_file() and not curves:
        raise ValueError(
            f"{run_dir}: found no {EVAL_NAME} and no {METRICS_NAME} or {WATCH_NAME}, expected one; "
            "run eval/fid.py first, or name the folder of a run"
        )
    scores, samples = read_scores or {}, run_dir / SAMPLES_FOLDER
    title, names = run_dir.resolve().name, ("grid", "ablation", "neighbours")
    nearest = (scores.get("memorisation") or {}).get("nearest") or []
    facts = _facts(run_dir, scores)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters["number"] = number
    page = templates.get_template("report.html.j2").render(
        title=title,
        commit=facts.get("commit") or facts.get("evaluation.commit"),
        headlines=tables.headlines(scores),
        gallery=pictures.gallery(samples),
        sheets={name: pictures.sheet(samples, name) for name in names},
        scores=tables.score_tables(title, scores, _scores_of(against)),
        drawings=tables.shape_table(scores.get("shapes") or {}),
        guidance=charts.sweep_charts(run_dir),
        ablation=tables.ablation_table(scores.get("ablation") or {}),
        edits=pictures.edits(run_dir),
        neighbours=[(pair["fake"], pair["train"], pair["distance"]) for pair in nearest],
        curves=curves,
        stages=_stages(read_json(run_dir / TIMINGS_NAME, list) or []),
        facts=list(facts.items()),
        settings=_sample_settings(samples),
        configs=_configs(run_dir),
        numbers=list(flatten(scores).items()) if scores else [],
    )
    return write_text(run_dir / REPORT_NAME, page)


def _facts(run: Path, scores: Scores) -> Json:
    """Return what is recorded of the run, and of its evaluation: code, versions, protocol."""
    facts = flatten(read_json(run / PROVENANCE_NAME, dict) or {})
    for key, name in (("provenance", "evaluation"), ("protocol",) * 2, ("sampling",) * 2):
        flat = flatten(scores.get(key) or {}, name)
        facts |= {k: value for k, value in flat.items() if not isinstance(value, float)}
    return facts


def _stages(timings: list[Json]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = [
        (row["stage"], duration(row["seconds"]), row.get("images_per_second"),
         size(row.get("peak_memory_bytes")), row.get("command") or "")
        for row in timings
    ]  # fmt: skip
    if rows:
        rows.append(("together", duration(sum(row["seconds"] for row in timings)), "", "", ""))
    return rows


def _sample_settings(samples: Path) -> list[tuple[str, object]]:
    settings = flatten(read_json(samples / SETTINGS_NAME, dict) or {})
    return [(name, value) for name, value in settings.items() if name != "captions"]


def _configs(run: Path) -> dict[str, str]:
    """Return the configurations of a demo, of the run and of the runs in its folder, as text."""
    demo = read_json(run / DEMO_NAME, dict)
    configs = {"demo": json.dumps(demo, indent=1)} if demo else {}
    for path in (run / CONFIG_NAME, *sorted(run.glob(f"*/{CONFIG_NAME}"))):
        if path.is_file():
            configs[path.parent.resolve().name] = path.read_text(encoding="utf-8")
    return configs


def _scores_of(runs: Sequence[Path]) -> dict[str, Scores]:
    """Read the scores of earlier runs by a short name of each; ValueError for one without any."""
    by_name: dict[str, Scores] = {}
    for run in runs:
        path = run / EVAL_NAME if run.is_dir() else run
        scores = read_json(path, dict)
        if scores is None:
            raise ValueError(
                f"{path}: found no such file, expected the scores of an earlier run; run "
                "eval/fid.py there first"
            )
        name = path.parent.resolve().name
        by_name[str(run) if name in by_name else name] = scores
    return by_name


def card_scores(run_dir: Path) -> "list[CardScore]":
    """Return the scores of a folder's eval.json as text, for the cards of its runs."""
    from training.runs.cards import CardScore

    scores = read_json(run_dir / EVAL_NAME, dict) or {}
    cards = []
    for entry in tables.entries({k: v for k, v in scores.items() if k not in tables.ELSEWHERE}):
        name, _, method = tables.described(entry.path, entry.made)
        texts = (entry.spread, method, tables.made_of(entry))
        name = f"{tables.group_title(entry.group)}, {name}"
        text = ", ".join(text for text in texts if text)
        cards.append(CardScore(name=name, value=number(entry.value), method=text))
    return cards
