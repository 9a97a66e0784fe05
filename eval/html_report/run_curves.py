"""The curves of the report: of training, of scores over checkpoints, of scores over guidance."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.jsonl import read_lines
from cluster.base.run_dir import METRICS_NAME, SWEEP_NAME, VALIDATION_NAME, WATCH_NAME
from eval.html_report.charts import Chart, line_chart, point_chart
from eval.html_report.score_table import described, entries

CURVES = (("loss", "loss"), ("samples_per_second", "samples/s"))
RUN_ORDER = ("clip", "judge", "prior", "base", "up")
MAX_SCORES = 8  # charts of one kind: more than that nobody compares


@dataclass(frozen=True, kw_only=True)
class RunCurves:
    """The charts of one training run: of its steps, and of its checkpoints' scores."""

    name: str
    summary: str
    charts: list[Chart]
    scores: list[Chart]


def run_curves(run: Path) -> list[RunCurves]:
    """Read the curves of a run and of every run below it, the known stages first and in order."""
    found = {path.parent.name: path.parent for path in run.glob(f"*/{METRICS_NAME}")}
    order = [*(n for n in RUN_ORDER if n in found), *sorted(found.keys() - set(RUN_ORDER))]
    curves = [_curves(run.resolve().name, run), *(_curves(name, found[name]) for name in order)]
    return [one for one in curves if one is not None]


def _curves(name: str, run: Path) -> RunCurves | None:
    lines = read_lines(run / METRICS_NAME)
    scored = [_over_steps(run / VALIDATION_NAME), _over_steps(run / WATCH_NAME)]
    scores = [chart for charts in scored for chart in charts]
    if not lines and not scores:
        return None
    charts = []
    for key, title in CURVES:
        points = [(line["samples_seen"], line[key]) for line in lines if line.get(key) is not None]
        charts.append(line_chart(title, points))
    summary = ""
    if lines:
        summary = f"{lines[-1]['step']:,} steps, {lines[-1]['samples_seen']:,} samples"
    return RunCurves(name=name, summary=summary, charts=[c for c in charts if c], scores=scores)


def _over_steps(path: Path) -> list[Chart]:
    lines = [line for line in read_lines(path) if line.get("step") is not None]
    told = [line.get("scores") or _numbers(line) for line in lines]
    return _score_charts([line["step"] for line in lines], told)


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("step", "samples_seen")}


def sweep_charts(run: Path) -> list[Chart]:
    """Return the charts of scores over the scale of guidance (figure 11 of the paper)."""
    lines = [line for line in read_lines(run / SWEEP_NAME) if line.get("cfg_scale") is not None]
    return _score_charts(
        [float(line["cfg_scale"]) for line in lines], [line.get("scores") or {} for line in lines]
    )


def _score_charts(places: list[float], scores: list[dict[str, Any]]) -> list[Chart]:
    """Draw each score that has a better direction over `places`."""
    series: dict[str, list[tuple[float, float]]] = {}
    for place, told in zip(places, scores, strict=True):
        for entry in entries(told):
            series.setdefault(entry.path, []).append((place, entry.value))
    charts = []
    for path, points in series.items():
        name, better, _ = described(path)
        if better:
            charts.append(point_chart(name, points, better))
    return [chart for chart in charts if chart is not None][:MAX_SCORES]
