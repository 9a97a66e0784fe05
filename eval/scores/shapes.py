"""Scores a drawing against its caption by arithmetic, with the renderer's own shapes as templates.

Each pixel gets the nearest colour that forms a solid patch. The largest patch of each captioned
colour is fitted with every shape, at every place and diameter nearby; the best fit is the drawn
shape. Nothing is learned. Blur and specks are tolerated, additional things are not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ingest.shapes import (
    BACKGROUNDS,
    CONTAINER_DIAMETERS,
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

COLOURS = tuple(PALETTE)
NOTHING, OTHER = len(COLOURS), len(COLOURS) + 1  # labels: the background, a colour not in use
MAX_COLOUR_DISTANCE = 90.0  # RGB; known colours are at least 120 apart
CORE = np.ones((5, 5), bool)  # what holds no 5 x 5 patch is a speck or a fringe; a cross's arm does
MIN_THING_PIXELS = 60  # a small cross has about 150
# Least intersection over union with the template. True drawings, reduced to 32 px and with noise of
# 20 of 255, reach .93, .87 and .86; a diamond fits the circle at .87, an ellipse at .79.
MIN_FIT = {"circle": 0.88, "triangle": 0.82, "cross": 0.82}
SMALL_BELOW = (DIAMETERS["small"][1] + DIAMETERS["large"][0]) / 2  # px
LARGE_BELOW = CONTAINER_DIAMETERS[1] + 3.0  # px; beyond it fills the canvas and is no thing
MAX_TINT = 40  # spread of the background's channels: it is grey of some level
SEARCH_STEPS = (2.0, 1.0, 0.5)  # px


@dataclass(frozen=True, kw_only=True)
class ShapeScore:
    """all: everything right, nothing added; attribute: share of colours, shapes and sizes that are
    right; relation: None where the caption has one thing."""

    all: bool
    attribute: float
    relation: bool | None


@dataclass(frozen=True, kw_only=True)
class ShapeFit:
    """A template fitted to a patch: shape, diameter and centre (x, y) in px of a 64 px canvas.

    overlap: intersection over union of template and patch.
    """

    shape: str
    diameter: float
    centre: tuple[float, float]
    overlap: float

    def mask(self) -> np.ndarray:
        """Return the template's pixels, bool [64, 64]."""
        return shape_mask(self.shape, self.diameter, self.centre, 64) > 0.5


def score(image: np.ndarray, caption: str) -> ShapeScore:
    """Score a drawing, uint8 [64, 64, 3], against a caption that `ingest.shapes.parse` reads.

    Raises ValueError for another caption, size or dtype.
    """
    if image.shape != (64, 64, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"image: found {image.dtype} {list(image.shape)}, expected uint8 [64, 64, 3]"
        )
    scene = parse(caption)
    patches = _patches(image)
    fits = [_fit(thing.colour, patches) for thing in scene.things]
    right = [_attributes(thing, fit) for thing, fit in zip(scene.things, fits, strict=True)]
    attribute = float(np.mean(right))
    relation = None if scene.relation is None else _related(scene, fits)
    alone = len(patches) == len(scene.things)
    everything = attribute == 1 and relation is not False and alone
    return ShapeScore(all=everything, attribute=attribute, relation=relation)


def summarise(scores: Iterable[ShapeScore]) -> dict[str, float | int | None]:
    """Return the means {all, attribute, relation, n} and attribute_error; relation is None if no
    caption has one.

    attribute_error: standard error of the mean of the images' shares, their sample deviation over
    sqrt(n); None for one image. `all` and `relation` are shares of n images: n gives their error.
    Raises ValueError if there are no scores.
    """
    scores = list(scores)
    n = len(scores)
    if not n:
        raise ValueError("shape scores: found none, expected at least one drawing to summarise")
    relations = [s.relation for s in scores if s.relation is not None]
    attributes = np.array([s.attribute for s in scores])
    return {
        "all": float(np.mean([s.all for s in scores])),
        "attribute": float(attributes.mean()),
        "attribute_error": float(attributes.std(ddof=1)) / n**0.5 if n > 1 else None,
        "relation": float(np.mean(relations)) if relations else None,
        "n": n,
    }


def _patches(image: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Find the solid patches of colour: (name, bool [64, 64]); "" names a colour out of palette."""
    pixels = image.reshape(-1, 3).astype(np.float32)  # [4096, 3]
    known = np.array([*PALETTE.values(), _background(image)], np.float32)  # [C + 1, 3]
    distance = np.linalg.norm(pixels[:, None] - known, axis=-1)  # [4096, C + 1]
    nearest = np.where(distance.min(1) > MAX_COLOUR_DISTANCE, OTHER, distance.argmin(1))
    nearest = nearest.reshape(64, 64)
    solid = [label for label in range(len(COLOURS)) if _has_core(nearest == label)]
    # A fringe mixes two colours and may resemble a third: only colours seen solidly may have it.
    absent = [label for label in range(len(COLOURS)) if label not in solid]
    distance[:, absent] = np.inf
    labels = distance.argmin(1).reshape(64, 64)
    strange = ndimage.binary_opening(nearest == OTHER, CORE)
    labels[strange] = OTHER
    patches = []
    for label in [*solid, *([OTHER] if strange.any() else [])]:
        components = np.empty(labels.shape, np.int32)
        ndimage.label(labels == label, output=components)
        areas = np.bincount(components.ravel())[1:]
        name = COLOURS[label] if label < len(COLOURS) else ""
        patches += [(name, components == i + 1) for i in np.flatnonzero(areas >= CORE.size)]
    return [(name, mask) for name, mask in patches if _has_core(mask)]


def _background(image: np.ndarray) -> np.ndarray:
    """Return the median RGB of the border; the nearest known background where that is coloured."""
    edges = (image[:2], image[-2:], image[:, :2], image[:, -2:])
    border = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    if np.ptp(border) <= MAX_TINT:
        return border
    known = np.array([*BACKGROUNDS.values()])
    return known[np.linalg.norm(known - border, axis=1).argmin()]


def _has_core(mask: np.ndarray) -> bool:
    return bool(ndimage.binary_erosion(mask, CORE).any())


def _fit(colour: str, patches: list[tuple[str, np.ndarray]]) -> ShapeFit | None:
    """Fit the largest patch of a colour; its holes that other patches cover do not count."""
    mask = max((mask for name, mask in patches if name == colour), key=np.sum, default=None)
    if mask is None or mask.sum() < MIN_THING_PIXELS:
        return None
    others = np.zeros_like(mask)
    for _, other in patches:
        others |= other & ~mask
    fringed = np.asarray(ndimage.binary_dilation(others, np.ones((3, 3), bool)), bool)
    hidden = fringed & _between(mask) & ~mask
    starts = [_start(shape, mask, hidden) for shape in SHAPES]
    likely = sorted(starts, key=lambda fit: fit.overlap)[-2:]
    return max((_climb(fit, mask, hidden) for fit in likely), key=lambda fit: fit.overlap)


def _between(mask: np.ndarray) -> np.ndarray:
    """Return the pixels that `mask` surrounds by rows and by columns: its holes."""
    after = [np.logical_or.accumulate(mask, axis=axis) for axis in (0, 1)]
    before = [np.flip(np.logical_or.accumulate(np.flip(mask, a), axis=a), a) for a in (0, 1)]
    return after[0] & before[0] & after[1] & before[1]


def _start(shape: str, mask: np.ndarray, hidden: np.ndarray) -> ShapeFit:
    """Place `shape` with the area and the centroid of the patch."""
    ys, xs = np.nonzero(mask | hidden)
    diameter = 2 * float(np.sqrt(len(ys) / UNIT_AREA[shape]))
    x, y = float(xs.mean()) + 0.5, float(ys.mean()) + 0.5
    return _place(shape, (diameter, x, y - UNIT_CENTROID_Y[shape] * diameter / 2), mask, hidden)


def _climb(best: ShapeFit, mask: np.ndarray, hidden: np.ndarray) -> ShapeFit:
    """Move to the place and diameter nearby at which the shape covers the mask best."""
    for step in SEARCH_STEPS:
        for axis in range(3):
            for sign in (-1.0, 1.0):
                moved = [best.diameter, *best.centre]
                moved[axis] += sign * step
                best = max(best, _place(best.shape, moved, mask, hidden), key=lambda f: f.overlap)
    return best


def _place(shape: str, place: Sequence[float], mask: np.ndarray, hidden: np.ndarray) -> ShapeFit:
    """Fit (diameter, x, y): intersection over union, away from hidden pixels."""
    diameter, x, y = place
    fit = ShapeFit(shape=shape, diameter=diameter, centre=(x, y), overlap=0.0)
    template = fit.mask() & ~hidden
    overlap = float((template & mask).sum() / max(1, (template | mask).sum()))
    return ShapeFit(shape=shape, diameter=diameter, centre=(x, y), overlap=overlap)


def _attributes(thing: Thing, fit: ShapeFit | None) -> tuple[bool, bool, bool]:
    """Return whether colour, shape and size are right; without the colour nothing is."""
    if fit is None:
        return False, False, False
    size = "small" if fit.diameter < SMALL_BELOW else "large"
    shape = fit.shape == thing.shape and fit.overlap >= MIN_FIT[fit.shape]
    return True, shape, size == thing.size and fit.diameter < LARGE_BELOW


def _related(scene: Scene, fits: list[ShapeFit | None]) -> bool:
    """Return whether the first thing has the captioned relation to the second."""
    first, second = fits
    if first is None or second is None:
        return False
    a, b = first.mask(), second.mask()
    if (a & b).sum() >= 0.9 * min(a.sum(), b.sum()):  # one contains the other
        return scene.relation == "inside" and bool(a.sum() < b.sum())
    (ax, ay), (bx, by) = first.centre, second.centre
    dx, dy = bx - ax, by - ay
    if abs(dx) > abs(dy):
        return scene.relation == ("left of" if dx > 0 else "right of")
    return scene.relation == ("above" if dy > 0 else "below")
