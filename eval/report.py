"""One self-contained HTML page that tells what a run reached: pictures, scores, curves, timings.

    write_report(Path("runs/demo"))      # reads what the stages left there, writes report.html

The page loads nothing: images are inline PNGs, charts inline SVG. A part whose file is absent is
left out; only eval.json must be there.
"""

import base64
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.charts import Chart, line_chart
from training.reporting import METRICS_NAME, read_lines

REPORT_NAME = "report.html"
CURVES = (("loss", "loss"), ("samples_per_second", "samples/s"))
RUN_ORDER = ("clip", "judge", "prior", "base", "up")
SHAPE_SETS = {
    "single": "one shape",
    "seen": "two shapes, combination seen in training",
    "held_out": "two shapes, combination held out",
}
SHAPE_SCORES = ("all", "attribute", "relation")
ABLATION = {
    "true_image_embed": "decoder given the true image embedding",
    "prior": "full chain: caption, prior, decoder",
    "text_embed": "text embedding in place of the prior's output",
}
FIGURES = {
    "grid": "Captions that training never saw, and what the full chain makes of them.",
    "ablation": "The same captions, with what the decoder is given exchanged.",
}


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A number with what makes it one: its method, its count, and what to hold it against."""

    name: str
    value: str
    against: str | None
    method: str
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An image to inline, with its captions: of each cell in reading order, or of each column."""

    name: str
    title: str
    source: str
    captions: list[str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns under groups of columns: each group's name and width, each column's head."""

    groups: list[tuple[str, int]]
    heads: list[str]
    rows: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RunCurves:
    """The charts of one training run."""

    name: str
    summary: str
    charts: list[Chart]


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from what the stages left in `run_dir`, and return its path.

    Reads eval.json, and where present timings.json, provenance.json, samples/grid.png and
    samples/ablation.png with their captions in a .json beside each (a list, or {"captions": list}),
    and metrics.jsonl of every run folder. Raises ValueError if eval.json is absent or a file is not
    what its name says.
    """
    import jinja2

    scores = _read_json(run_dir / "eval.json", dict)
    if scores is None:
        raise ValueError(f"{run_dir}: found no eval.json, expected one; run eval/fid.py first")
    timings = _read_json(run_dir / "timings.json", list) or []
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(number=number, duration=duration, size=size)
    page = templates.get_template("report.html.j2").render(
        title=run_dir.resolve().name,
        headlines=headlines(scores),
        figures=[figure for name in FIGURES if (figure := _figure(run_dir, name))],
        shapes=_shape_rows(scores.get("shapes") or {}),
        ablation=_ablation_table(scores.get("ablation") or {}),
        shape_scores=SHAPE_SCORES,
        runs=_curves(run_dir),
        timings=timings,
        longest=max((row["seconds"] for row in timings), default=1) or 1,
        provenance=flatten(_read_json(run_dir / "provenance.json", dict) or {}),
        scores=flatten(scores),
    )
    path = run_dir / REPORT_NAME
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(page, encoding="utf-8")
    return unfinished.replace(path)


def headlines(scores: dict[str, Any]) -> list[Headline]:
    """Choose the numbers that the page opens with; those that `scores` lacks are left out."""
    clip, prior, images = (scores.get(part) or {} for part in ("clip", "prior", "images"))
    count, label = images.get("n"), judged_by(scores)
    found = [
        _shape_headline(scores, "held_out", "Two held-out shapes, all right"),
        _shape_headline(scores, "single", "One shape, all right"),
        _headline(
            images,
            ("clip_score", "clip_score_shuffled", "shuffled captions"),
            "CLIP score",
            _counted("mean cosine of a generated image's embedding and its caption's", count),
            label,
        ),
        _headline(
            images,
            (
                "fd_clip",
                "fd_clip_real_halves",
                _counted("real halves", images.get("n_real_halves")),
            ),
            "CLIP Fréchet distance",
            _counted(
                "between the embeddings of generated and real images; lower is better "
                "(Heusel et al. 2017, float64, symmetric form)",
                count,
            ),
            label,
        ),
        _headline(
            prior,
            ("cos", "cos_shuffled", "shuffled captions"),
            "Prior cosine",
            _counted("mean cosine of predicted and true image embedding", prior.get("n")),
        ),
        _headline(
            prior,
            ("retrieval_at_1", None, ""),
            "Prior retrieval@1",
            _counted(
                "predicted embedding finds an image of its caption's meaning first", prior.get("n")
            ),
        ),
        _headline(
            clip,
            ("retrieval_at_1", None, ""),
            "CLIP retrieval@1",
            _counted("caption finds an image of its meaning first", clip.get("n")),
        ),
    ]
    return [headline for headline in found if headline]


def judged_by(scores: dict[str, Any]) -> str | None:
    """Say which CLIP gave the image scores; None if eval.json does not."""
    judge = (scores.get("images") or {}).get("judge") or scores.get("judge")
    if not judge:
        return None
    return str(judge) if str(judge).startswith("scored by") else f"scored by {judge}"


def number(value: Any) -> str:
    """Show a score to three digits after the point, a count whole, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.1f}"


def duration(seconds: float | None) -> str:
    """Show seconds as 7.5 s, 12 min 05 s or 2 h 03 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float | None) -> str:
    """Show bytes as MiB or GiB."""
    if not num_bytes:
        return "–"
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:,.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return nested objects as one: {"a": {"b": 1}} is {"a.b": 1}."""
    if not isinstance(value, dict):
        return {path: ", ".join(map(str, value)) if isinstance(value, list) else value}
    inner = (flatten(item, f"{path}.{key}" if path else str(key)) for key, item in value.items())
    return {key: item for part in inner for key, item in part.items()}


def _headline(
    scores: dict[str, Any],
    keys: tuple[str, str | None, str],
    name: str,
    method: str,
    label: str | None = None,
) -> Headline | None:
    """Make one headline of `keys`: the value's, its baseline's, and the baseline in words."""
    key, baseline, against = keys
    if scores.get(key) is None:
        return None
    found = scores.get(baseline) if baseline else None
    held = f"{against}: {number(found)}" if found is not None else None
    return Headline(name=name, value=number(scores[key]), against=held, method=method, label=label)


def _shape_headline(scores: dict[str, Any], drawn: str, name: str) -> Headline | None:
    cell = (scores.get("shapes") or {}).get(drawn) or {}
    if cell.get("all") is None:
        return None
    real = _real(cell).get("all")
    return Headline(
        name=name,
        value=number(cell["all"]),
        against=f"true drawings: {number(real)}" if real is not None else None,
        method=_counted(
            "share of images in which every shape, colour and relation is as said", cell.get("n")
        ),
        label="scored by reading the drawing, without CLIP",
    )


def _counted(method: str, count: int | None) -> str:
    return f"{method}; n = {count:,}" if count else method


def _real(cell: dict[str, Any]) -> dict[str, Any]:
    """Return what the scorer gives true drawings: per score, or of `all` where it is one number."""
    real = cell.get("real")
    return real if isinstance(real, dict) else {"all": real}


def _shape_rows(shapes: dict[str, Any]) -> list[dict[str, Any]]:
    """Lay out the shapes table: each score with its standard error and the true drawings'."""
    rows = []
    for drawn, title in SHAPE_SETS.items():
        cell = shapes.get(drawn)
        if not cell:
            continue
        count, real = cell.get("n"), _real(cell)
        scores = [
            {
                "value": cell.get(s),
                "real": real.get(s),
                "error": _standard_error(s, cell),
            }
            for s in SHAPE_SCORES
        ]
        rows.append({"title": title, "n": count, "scores": scores})
    return rows


def _standard_error(score: str, cell: dict[str, Any]) -> float | None:
    """Return the standard error of a score: sqrt(p (1 - p) / n) of a share of images; of attribute,
    a mean over images of several answers each, what the scorer found; None if it did not."""
    if score == "attribute":
        return cell.get("attribute_error")
    share, count = cell.get(score), cell.get("n")
    if share is None or not count or not 0 <= share <= 1:
        return None
    return math.sqrt(share * (1 - share) / count)


def _ablation_table(ablation: dict[str, Any]) -> Table | None:
    """Lay out what each input of the decoder reached: shapes scores, or on real pictures CLIP's."""
    flat = {given: flatten(ablation.get(given) or {}) for given in ABLATION}
    drawn = [f"{s}.{k}" for s, k in itertools.product(SHAPE_SETS, SHAPE_SCORES)]
    found = list(dict.fromkeys(path for cells in flat.values() for path in cells))
    paths = [p for p in drawn if p in found] or [p for p in found if not p.endswith(".n")]
    rows = [
        {
            "title": ABLATION[given],
            "cells": [cells.get(p) for p in paths],
            "chosen": given == "prior",
        }
        for given, cells in flat.items()
        if cells
    ]
    heads = [path.replace("_", " ").rpartition(".") for path in paths]
    groups = [(name, len(list(same))) for name, same in itertools.groupby(h[0] for h in heads)]
    return Table(groups=groups, heads=[head[2] for head in heads], rows=rows) if rows else None


def _curves(run_dir: Path) -> list[RunCurves]:
    """Read metrics.jsonl of every run folder, the known stages first and in their order."""
    found = {path.parent.name: read_lines(path) for path in run_dir.glob(f"*/{METRICS_NAME}")}
    order = [*(n for n in RUN_ORDER if n in found), *sorted(found.keys() - set(RUN_ORDER))]
    return [_run_curves(name, found[name]) for name in order if found[name]]


def _run_curves(name: str, lines: list[dict[str, Any]]) -> RunCurves:
    charts = []
    for key, title in CURVES:
        points = [(line["samples_seen"], line[key]) for line in lines if line.get(key) is not None]
        charts.append(line_chart(title, points))
    last = lines[-1]
    summary = f"{last['step']:,} steps, {last['samples_seen']:,} samples"
    return RunCurves(name=name, summary=summary, charts=[chart for chart in charts if chart])


def _figure(run_dir: Path, name: str) -> Figure | None:
    path = run_dir / "samples" / f"{name}.png"
    if not path.is_file():
        return None
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{path}: found {content[:8]!r} at its start, expected a PNG image")
    sidecar = _read_json(path.with_suffix(".json"), (list, dict)) or []
    captions = sidecar.get("captions") or [] if isinstance(sidecar, dict) else sidecar
    source = "data:image/png;base64," + base64.b64encode(content).decode()
    return Figure(
        name=name, title=FIGURES[name], source=source, captions=[str(c) for c in captions]
    )


def _read_json(path: Path, kind: type | tuple[type, ...]) -> Any:
    """Read a JSON file; None if it is absent, ValueError if it is not JSON of that kind."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: found {error}, expected JSON; rerun the stage that wrote it"
        ) from error
    if not isinstance(content, kind):
        raise ValueError(
            f"{path}: found a JSON {type(content).__name__}, expected another kind of value"
        )
    return content
