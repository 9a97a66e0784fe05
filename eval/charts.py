"""Line charts as geometry: points, ticks and labels that a template draws as inline SVG."""

import math
from dataclasses import dataclass

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
    """A line to draw in a box of `width` by `height`; `raw` and `smooth` are SVG path data."""

    title: str
    raw: str
    smooth: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    last: str
    log: bool
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def line_chart(title: str, points: list[Point]) -> Chart | None:
    """Lay out the chart of `points` (samples seen, value); None if fewer than two are finite."""
    points = thinned([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
    if len(points) < 2:
        return None
    xs, ys = zip(*points, strict=True)
    log = min(ys) > 0 and max(ys) / min(ys) >= LOG_FROM
    x_ticks = [x for x in linear_ticks(0, max(xs)) if x <= max(xs) * 1.001]
    y_ticks = log_ticks(min(ys), max(ys)) if log else linear_ticks(min(min(ys), 0), max(ys))
    low, high = min(*ys, *y_ticks), max(*ys, *y_ticks)

    def place_x(x: float) -> float:
        return LEFT + (x / (max(xs) or 1)) * (WIDTH - LEFT - RIGHT)

    def place_y(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low or 1)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def path(values: list[float]) -> str:
        placed = (f"{place_x(x):.1f} {place_y(y):.1f}" for x, y in zip(xs, values, strict=True))
        return "M" + "L".join(placed)

    return Chart(
        title=title,
        raw=path(list(ys)),
        smooth=path(smoothed(list(ys))),
        x_ticks=[Tick(at=place_x(x), label=short(x)) for x in x_ticks],
        y_ticks=[Tick(at=place_y(y), label=short(y)) for y in y_ticks],
        last=short(ys[-1]),
        log=log,
    )


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
