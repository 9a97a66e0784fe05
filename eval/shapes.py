"""Scores a drawing against its caption by arithmetic, with the renderer's own shapes as templates.

Pixels go to the nearest known colour; each captioned thing is looked for in its colour, and fitted
with every shape at every place and diameter nearby. What fits best is what was drawn. No judge is
learned, so nothing can be flattered; blurs and specks are forgiven, other things are not.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ingest.shapes import (
    BACKGROUNDS,
    DIAMETERS,
    PALETTE,
    SHAPES,
    UNIT_AREA,
    UNIT_CENTROID_Y,
    Scene,
    Thing,
    parse,
    shape_mask,
)

MIN_THING_PIXELS = 60  # a small cross has about 150
MIN_FIT = 0.7  # intersection over union of a thing and its best template
MAX_STRAY_PIXELS = 24  # solid pixels of a colour that the caption does not name
MAX_COLOUR_DISTANCE = 90.0  # RGB; known colours are at least 120 apart
SIZE_LIMIT = (DIAMETERS["small"][1] + DIAMETERS["large"][0]) / 2  # px, between small and large
SEARCH_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class ShapeScore:
    """all: everything right, nothing added; attribute: share of colours, shapes and sizes that are
    right; relation: None where the caption has one thing."""

    all: bool
    attribute: float
    relation: bool | None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What was found of a thing: its shape, diameter and centre (x, y) in px of a 64 px canvas."""

    shape: str
    diameter: float
    centre: tuple[float, float]
    overlap: float


def score(image: np.ndarray, caption: str) -> ShapeScore:
    """Score a drawing, uint8 [64, 64, 3], against a caption that `ingest.shapes.parse` reads.

    Raises ValueError for another caption or size.
    """
    if image.shape != (64, 64, 3):
        raise ValueError(f"image: found shape {image.shape}, expected (64, 64, 3)")
    scene = parse(caption)
    labels = _labels(image)
    masks = {thing.colour: _solid(labels == thing.colour) for thing in scene.things}
    fits = [_fit(thing.colour, masks) for thing in scene.things]
    right = [_attributes(thing, fit) for thing, fit in zip(scene.things, fits, strict=True)]
    attribute = float(np.mean(right))
    relation = None if scene.relation is None else _related(scene, fits)
    clean = _strays(labels, scene) <= MAX_STRAY_PIXELS
    everything = attribute == 1 and relation is not False and clean
    return ShapeScore(all=everything, attribute=attribute, relation=relation)


def summarise(scores: Iterable[ShapeScore]) -> dict[str, float | int | None]:
    """Return the means {all, attribute, relation, n}; relation None if no caption has one."""
    found = list(scores)
    relations = [s.relation for s in found if s.relation is not None]
    return {
        "all": float(np.mean([s.all for s in found])),
        "attribute": float(np.mean([s.attribute for s in found])),
        "relation": float(np.mean(relations)) if relations else None,
        "n": len(found),
    }


def _labels(image: np.ndarray) -> np.ndarray:
    """Name each pixel's colour, [64, 64] of str; "" where none is near."""
    names = np.array([*PALETTE, *BACKGROUNDS, ""])
    known = np.array([*PALETTE.values(), *BACKGROUNDS.values()], dtype=np.float32)
    distance = np.linalg.norm(image[:, :, None, :].astype(np.float32) - known, axis=-1)
    nearest = distance.argmin(-1)
    return names[np.where(distance.min(-1) <= MAX_COLOUR_DISTANCE, nearest, len(names) - 1)]


def _neighbours(mask: np.ndarray) -> np.ndarray:
    """Count the set pixels of each 3 x 3 neighbourhood, the pixel itself included."""
    padded = np.pad(mask.astype(np.int32), 1)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def _solid(mask: np.ndarray) -> np.ndarray:
    """Keep the pixels that most of their neighbourhood agrees with: specks and fringes go."""
    return mask & (_neighbours(mask) >= 5)


def _fit(colour: str, masks: dict[str, np.ndarray]) -> Fit | None:
    """Fit the thing of this colour; what the other thing covers is left out of account."""
    mask = masks[colour]
    if mask.sum() < MIN_THING_PIXELS:
        return None
    ignored = np.zeros_like(mask)
    for other, covering in masks.items():
        if other != colour:
            ignored |= _neighbours(covering) > 0
    hidden = ignored & _between(mask)
    fits = [_fit_shape(shape, mask, hidden) for shape in SHAPES]
    return max(fits, key=lambda fit: fit.overlap)


def _between(mask: np.ndarray) -> np.ndarray:
    """Return the pixels that `mask` surrounds by rows and by columns: its holes."""
    after = [np.logical_or.accumulate(mask, axis=axis) for axis in (0, 1)]
    before = [np.flip(np.logical_or.accumulate(np.flip(mask, a), axis=a), a) for a in (0, 1)]
    return after[0] & before[0] & after[1] & before[1]


def _fit_shape(shape: str, mask: np.ndarray, hidden: np.ndarray) -> Fit:
    """Climb to the place and diameter at which `shape` covers the mask best."""
    whole = mask | hidden
    ys, xs = np.nonzero(whole)
    diameter = 2 * float(np.sqrt(len(ys) / UNIT_AREA[shape]))
    x, y = float(xs.mean()) + 0.5, float(ys.mean()) + 0.5
    place = np.array([diameter, x, y - UNIT_CENTROID_Y[shape] * diameter / 2])
    best = _overlap(shape, place, mask, hidden)
    for step in np.geomspace(2.0, 0.5, SEARCH_ROUNDS):
        for axis in range(3):
            for sign in (-1.0, 1.0):
                tried = place.copy()
                tried[axis] += sign * step
                overlap = _overlap(shape, tried, mask, hidden)
                if overlap > best:
                    place, best = tried, overlap
    return Fit(
        shape=shape,
        diameter=float(place[0]),
        centre=(float(place[1]), float(place[2])),
        overlap=best,
    )


def _overlap(shape: str, place: np.ndarray, mask: np.ndarray, hidden: np.ndarray) -> float:
    """Return intersection over union of the template and the mask, away from hidden pixels."""
    template = shape_mask(shape, place[0], (place[1], place[2]), mask.shape[0]) > 0.5
    union = (template | mask) & ~hidden
    return float((template & mask & ~hidden).sum() / max(1, union.sum()))


def _attributes(thing: Thing, fit: Fit | None) -> tuple[bool, bool, bool]:
    """Say whether colour, shape and size are right; without the colour nothing is."""
    if fit is None:
        return False, False, False
    size = "small" if fit.diameter < SIZE_LIMIT else "large"
    return True, fit.shape == thing.shape and fit.overlap >= MIN_FIT, size == thing.size


def _related(scene: Scene, fits: list[Fit | None]) -> bool:
    """Say whether the first thing stands to the second as the caption says."""
    first, second = fits
    if first is None or second is None:
        return False
    (ax, ay), (bx, by) = first.centre, second.centre
    dx, dy = bx - ax, by - ay
    if np.hypot(dx, dy) < second.diameter / 4:
        return scene.relation == "inside" and first.diameter < second.diameter
    if abs(dx) > abs(dy):
        return scene.relation == ("left of" if dx > 0 else "right of")
    return scene.relation == ("above" if dy > 0 else "below")


def _strays(labels: np.ndarray, scene: Scene) -> int:
    """Count solid pixels of colours that the caption does not name."""
    named = {thing.colour for thing in scene.things}
    other = np.isin(labels, [colour for colour in PALETTE if colour not in named])
    return int((other & (_neighbours(other) >= 7)).sum())
