"""Line charts as geometry: points, ticks and labels that a template draws as inline SVG."""

import math
from dataclasses import dataclass, field, replace

WIDTH, HEIGHT = 480.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 12.0, 26.0
MAX_POINTS = 240  # more cannot be told apart at this width
LOG_FROM = 30.0  # a range of this ratio hides its end on a linear axis

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A mark on an axis: where it stands, in the chart's units, and what it says."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A line to draw in a box of `width` by `height`; `raw` and `smooth` are SVG path data, `dots`
    the places of single points."""

    title: str
    raw: str
    smooth: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    told: str
    log: bool
    dots: list[Point] = field(default_factory=list)
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def line_chart(title: str, points: list[Point]) -> Chart | None:
    """Lay out the curve of `points` (samples seen, value); None if fewer than two are finite."""
    points = thinned(_finite(points))
    if len(points) < 2:
        return None
    ys = [y for _, y in points]
    log = min(ys) > 0 and max(ys) / min(ys) >= LOG_FROM
    x_high = max(x for x, _ in points)
    x_ticks = [x for x in linear_ticks(0, x_high) if x <= x_high * 1.001]
    y_ticks = log_ticks(min(ys), max(ys)) if log else linear_ticks(min(min(ys), 0), max(ys))
    box = _Box(low=(0.0, min(*ys, *y_ticks)), high=(x_high, max(*ys, *y_ticks)), log=log)
    smooth = list(zip((x for x, _ in points), smoothed(ys), strict=True))
    return _chart(title, box, (x_ticks, y_ticks), points, box.path(smooth))


def point_chart(title: str, points: list[Point], better: int) -> Chart | None:
    """Lay out few measured `points`, joined by a line, over their own range; None if fewer than two
    are finite. better: 1 where higher is, -1 where lower is."""
    points = sorted(_finite(points))
    if len(points) < 2:
        return None
    xs, ys = zip(*points, strict=True)
    spread = (max(ys) - min(ys)) or abs(ys[0]) or 1.0
    y_ticks = linear_ticks(min(ys) - 0.05 * spread, max(ys) + 0.05 * spread)
    x_ticks = [x for x in linear_ticks(xs[0], xs[-1]) if xs[0] <= x <= xs[-1] * 1.001]
    box = _Box(low=(xs[0], y_ticks[0]), high=(xs[-1], y_ticks[-1]), log=False)
    chart = _chart(title, box, (x_ticks, y_ticks), points, box.path(points))
    best = max(points, key=lambda point: point[1] * better)
    told = f"best {short(best[1])} at {short(best[0])}"
    return replace(chart, raw="", told=told, dots=[(box.x(x), box.y(y)) for x, y in points])


@dataclass(frozen=True, kw_only=True)
class _Box:
    """What the chart's corners stand for, and where in it a value lies."""

    low: Point
    high: Point
    log: bool

    def x(self, x: float) -> float:
        share = (x - self.low[0]) / ((self.high[0] - self.low[0]) or 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, y: float) -> float:
        low, high = self.low[1], self.high[1]
        straight = (y - low) / ((high - low) or 1)
        share = math.log(y / low) / math.log(high / low) if self.log else straight
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def path(self, points: list[Point]) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)


def _chart(
    title: str, box: _Box, ticks: tuple[list[float], list[float]], points: list[Point], smooth: str
) -> Chart:
    return Chart(
        title=title,
        raw=box.path(points),
        smooth=smooth,
        x_ticks=[Tick(at=box.x(x), label=short(x)) for x in ticks[0]],
        y_ticks=[Tick(at=box.y(y), label=short(y)) for y in ticks[1]],
        told=f"last {short(points[-1][1])}",
        log=box.log,
    )


def _finite(points: list[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thinned(points: list[Point]) -> list[Point]:
    """Return at most MAX_POINTS points, each the mean of its neighbours, at the last one's x."""
    if len(points) <= MAX_POINTS:
        return points
    bounds = [round(i * len(points) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    groups = [points[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def smoothed(values: list[float], weight: float = 0.8) -> list[float]:
    """Return the running mean of `values`, m <- w m + (1 - w) v, corrected for its start at 0."""
    mean, found = 0.0, []
    for i, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        found.append(mean / (1 - weight**i))
    return found


def linear_ticks(low: float, high: float) -> list[float]:
    """Return three to six round values, a multiple of 1, 2 or 5 apart, that enclose [low, high]."""
    spread = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(spread))
    step = next(power * m for m in (0.2, 0.5, 1, 2, 5) if spread / (power * m) <= 5)
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten that enclose [low, high], both positive."""
    return [10.0**i for i in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def short(value: float) -> str:
    """Show a value in at most six characters: 0.031, 12k, 1.5M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"
