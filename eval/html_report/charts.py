"""The report's charts: training, scores over checkpoints, scores over guidance.

Each is drawn by matplotlib as SVG whose text stays text, for a page to hold inline.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

from cluster.base.files import Json
from cluster.base.jsonl import read_lines
from cluster.base.run_dir import METRICS_NAME, SWEEP_NAME, VALIDATION_NAME, WATCH_NAME
from eval.html_report.formats import short
from eval.html_report.score_table import described, entries

MAX_POINTS = 240  # more are not visible at this width
LOG_RATIO = 30.0  # max / min from which on a linear axis would hide the end of a curve
MAX_CHARTS = 8  # of scores
COLOUR = "#4a80cc"  # visible on light and on dark paper
TRAINING_CURVES = {"loss": "loss", "samples_per_second": "samples/s"}
RUN_ORDER = ("clip", "judge", "prior", "base", "up")

Point = tuple[float, float]
Line = tuple[ArrayLike, ArrayLike, float, str]  # x, y, opacity, marker


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure: its title, what its caption states beside it, and its drawing."""

    title: str
    caption: str
    svg: Markup


def line_chart(title: str, points: list[Point]) -> Chart | None:
    """Draw a curve over samples seen, faint, and its running mean; None below two finite points.

    The mean is m_i = sum_j w^(i-j) v_j / sum_j w^(i-j) with w = 0.8.
    """
    import pandas as pd

    curve = _finite(points)
    if len(curve) < 2:
        return None
    if len(curve) > MAX_POINTS:
        groups = np.array_split(curve, MAX_POINTS)
        curve = np.stack([[group[-1, 0], group[:, 1].mean()] for group in groups])
    xs, ys = curve.T
    log = ys.min() > 0 and ys.max() / ys.min() >= LOG_RATIO
    mean = pd.Series(ys).ewm(alpha=0.2).mean()
    caption = f"last {short(ys[-1])}{', log scale' if log else ''}"
    lines = [(xs, ys, 0.3, ""), (xs, mean.to_numpy(), 1.0, "")]
    return _draw(title, caption, lines, "log" if log else "linear", from_zero=not log)


def point_chart(title: str, points: list[Point], better: int) -> Chart | None:
    """Draw few measured points, joined by a line; None if fewer than two are finite.

    better: 1 where higher is better, -1 where lower is.
    """
    curve = _finite(sorted(points))
    if len(curve) < 2:
        return None
    best = max(curve.tolist(), key=lambda point: point[1] * better)
    caption = f"best {short(best[1])} at {short(best[0])}"
    xs, ys = curve.T
    return _draw(title, caption, [(xs, ys, 1.0, "o")])


def _finite(points: list[Point]) -> np.ndarray:
    """Return the finite points as float64 [N, 2]."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    return np.array(finite, dtype=np.float64).reshape(-1, 2)


def _draw(
    title: str, caption: str, lines: Sequence[Line], scale: str = "linear", *,
    from_zero: bool = False,
) -> Chart:  # fmt: skip
    import matplotlib  # half a second
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    # Text stays text, and the same chart gives the same bytes.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "minidalle2", "font.size": 9}
    ):
        figure = Figure(figsize=(5, 2.3))
        axes = figure.add_axes((0.09, 0.11, 0.89, 0.84))
        for x, y, alpha, marker in lines:
            axes.plot(
                x, y, color=COLOUR, alpha=alpha, linewidth=2 if alpha == 1 else 1, marker=marker,
                clip_on=False,
            )  # fmt: skip
        axes.set_yscale(scale)
        if from_zero:
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=min(0, *(np.min(y) for _, y, *_ in lines)))
        axes.spines[:].set_visible(False)
        axes.grid(axis="y", color="#808080", alpha=0.3, clip_on=False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if scale == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(5))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            axis.set_minor_locator(NullLocator())
        text = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    svg = text.getvalue()
    # Identifiers repeat from chart to chart, and are not used but for markers' ("m...").
    svg = re.sub(r' (xmlns(:xlink)?|id)="(?!m[0-9a-f]{10}")[^"]*"', "", svg[svg.index("<svg") :])
    label = Markup('<svg role="img" aria-label="{}"').format(f"{title}, {caption}")
    return Chart(title=title, caption=caption, svg=Markup(svg.replace("<svg", str(label), 1)))


def curves(run: Path) -> list[Json]:
    """Return {name, summary, charts} of a run and of every run in its folder that has any, the
    known stages first."""
    runs = {path.parent.name: path.parent for path in run.glob(f"*/{METRICS_NAME}")}
    order = [*(n for n in RUN_ORDER if n in runs), *sorted(runs.keys() - set(RUN_ORDER))]
    pairs = [(run.resolve().name, run), *((name, runs[name]) for name in order)]
    shown = []
    for name, folder in pairs:
        lines = read_lines(folder / METRICS_NAME)
        charts: list[Chart | None] = []
        for key, title in TRAINING_CURVES.items():
            charts.append(line_chart(title, [
                (line["samples_seen"], line[key]) for line in lines if line.get(key) is not None
            ]))  # fmt: skip
        for file in (VALIDATION_NAME, WATCH_NAME):
            scored = [line for line in read_lines(folder / file) if line.get("step") is not None]
            for line in scored:
                rest = {k: v for k, v in line.items() if k not in ("step", "samples_seen")}
                line["scores"] = line.get("scores") or rest
            charts += _score_charts("step", scored)
        summary = ""
        if lines:
            summary = f"{lines[-1]['step']:,} steps, {lines[-1]['samples_seen']:,} samples"
        drawn = [chart for chart in charts if chart]
        if lines or drawn:
            shown.append({"name": name, "summary": summary, "charts": drawn})
    return shown


def sweep_charts(run: Path) -> list[Chart]:
    """Return the charts of scores over the scale of guidance (figure 11 of the paper)."""
    lines = [line for line in read_lines(run / SWEEP_NAME) if line.get("cfg_scale") is not None]
    return _score_charts("cfg_scale", lines)


def _score_charts(key: str, lines: list[Json]) -> list[Chart]:
    """Draw each score that has a better direction over the value of `key`."""
    series: dict[str, list[Point]] = {}
    for line in lines:
        for entry in entries(line.get("scores") or {}):
            series.setdefault(entry.path, []).append((float(line[key]), entry.value))
    known = {path: described(path) for path in series}
    charts = [
        point_chart(name, series[path], better)
        for path, (name, better, _) in known.items()
        if better
    ]
    return [chart for chart in charts if chart][:MAX_CHARTS]
