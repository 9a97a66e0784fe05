"""Draw and caption scenes of coloured shapes: an image-text set of known truth, no download.

A scene is one thing, or two in a relation, on a plain background that captions leave unsaid:

    "a small red circle"    "a large blue cross to the left of a small green triangle"

Chosen so that arithmetic (eval/scores/shapes.py) can recognise a right drawing, even after 32 px:
- colours are at least 120 apart in RGB, from each other and from every background;
- two things always differ in colour, so that a colour names a thing;
- three shapes that stay apart when small: a square of 9 px is a circle to a blur;
- "inside" is a small thing inside an extra large circle or triangle (a cross has no room).

Held out of training: about 10 % of the things (colour, shape, size), which occur neither alone nor
in a pair, and about 10 % of the pairs of (colour, shape), in both orders, because "A left of B"
draws the same as "B right of A".
"""

import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
from PIL import Image

PALETTE = {
    "red": (225, 45, 45),
    "green": (45, 165, 70),
    "blue": (45, 80, 215),
    "yellow": (245, 215, 50),
    "purple": (165, 60, 200),
    "cyan": (50, 205, 215),
}
BACKGROUNDS = {"white": (250, 250, 250), "grey": (190, 190, 190), "black": (15, 15, 15)}
SHAPES = ("circle", "triangle", "cross")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below", "inside")
SPLITS = ("train", "single", "seen", "held_out")
BLOCK = 4  # training rows that belong together: a scene and three hard negatives

# In px of a 64 px image. Two large things, a gap and both margins fit: 28 + 3 + 28 + 2 * 2 = 63.
CANVAS = 64
DIAMETERS = {"small": (19.0, 20.0), "large": (27.0, 28.0)}
CONTAINER_DIAMETERS, CONTAINED_DIAMETERS = (46.0, 48.0), (17.0, 18.0)
CONTAINERS = ("circle", "triangle")
MARGIN, GAP, JITTER = 2.0, 3.0, 2.0

# Unit shapes, in units of half the diameter, y downwards; all about as large to the eye.
TRIANGLE_HALF_HEIGHT = 0.9  # base of half width 1: 1.8 high, nearly equilateral (1.73)
CROSS_HALF_ARM = 0.32  # 3 px of arm left when a small cross is reduced to 32 px
UNIT_AREA = {
    "circle": np.pi,
    "triangle": 2 * TRIANGLE_HALF_HEIGHT,
    "cross": 8 * CROSS_HALF_ARM - 4 * CROSS_HALF_ARM**2,
}
UNIT_CENTROID_Y = dict.fromkeys(SHAPES, 0.0) | {"triangle": TRIANGLE_HALF_HEIGHT / 3}
SUPERSAMPLING = 4

HEADS = ("a", "a picture of a")  # one thing has the first alone: see clip_objective
RELATION_WORDS = {  # (short, long)
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "above"),
    "below": ("below", "below"),
    "inside": ("inside", "inside of"),
}
_THING = f"(?:{'|'.join(SIZES)}) (?:{'|'.join(PALETTE)}) (?:{'|'.join(SHAPES)})"
_RELATION = "|".join(form for forms in RELATION_WORDS.values() for form in forms)
GRAMMAR = re.compile(
    f"(?:{'|'.join(HEADS)}) (?P<first>{_THING})"
    f"(?: (?P<relation>{_RELATION}) a (?P<second>{_THING}))?"
)
# Changing a salt changes what is held out, and with it the meaning of every trained model's score.
THING_SALT, PAIR_SALT = "thing 14", "pair 29"
HELD_OUT_ONE_IN = 10

Spot = tuple[float, tuple[float, float]]  # diameter, centre (x, y)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One coloured shape out of `PALETTE`, `SHAPES`, `SIZES`; ValueError for another."""

    colour: str
    shape: str
    size: str

    def __post_init__(self):
        for name, known in (("colour", PALETTE), ("shape", SHAPES), ("size", SIZES)):
            _require_known(name, getattr(self, name), known)

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One thing (relation None), or two, the first in `relation` to the second.

    background None means any. Raises ValueError for a scene that cannot be drawn (see above).
    """

    things: tuple[Thing, ...]
    relation: str | None = None
    background: str | None = None

    def __post_init__(self):
        if self.relation is not None:
            _require_known("relation", self.relation, RELATIONS)
        if self.background is not None:
            _require_known("background", self.background, BACKGROUNDS)
        fault = _fault(self.things, self.relation)
        if fault:
            raise ValueError(f"scene of {', '.join(map(str, self.things))}: {fault}")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A row of the set: the caption, its drawing as JPEG, and the truth behind both."""

    caption: str
    image_bytes: bytes
    scene: Scene
    split: str


def shape_mask(shape: str, diameter: float, centre: tuple[float, float], size: int) -> np.ndarray:
    """Cover a canvas with a shape: the fraction of each pixel inside it.

    diameter, centre (x, y): px, pixel i spanning [i, i + 1); 4 x 4 points are tried per pixel.
    Returns float32 [size, size] in [0, 1]. Raises ValueError for an unknown shape.
    """
    _require_known("shape", shape, SHAPES)
    half = diameter / 2
    mask = np.zeros((size, size), np.float32)
    # Only the shape's bounding box is computed: a scorer calls this thousands of times.
    x0, y0 = (max(0, int(np.floor(c - half))) for c in centre)
    x1, y1 = (min(size, int(np.ceil(c + half))) for c in centre)
    if x0 >= x1 or y0 >= y1:
        return mask
    x, y = (
        (np.arange(a * SUPERSAMPLING, b * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - c
        for a, b, c in ((x0, x1, centre[0]), (y0, y1, centre[1]))
    )
    u, v = (x / half)[None, :], (y / half)[:, None]
    if shape == "circle":
        inside = u**2 + v**2 <= 1
    elif shape == "triangle":
        top = TRIANGLE_HALF_HEIGHT
        inside = (v <= top) & (abs(u) <= (v + top) / (2 * top))
    else:
        bars = (abs(u) <= CROSS_HALF_ARM) | (abs(v) <= CROSS_HALF_ARM)
        inside = bars & (abs(u) <= 1) & (abs(v) <= 1)
    mask[y0:y1, x0:x1] = _pool(_pool(inside.view(np.uint8)).T).T / np.float32(SUPERSAMPLING**2)
    return mask


def _pool(rows: np.ndarray) -> np.ndarray:
    """Sum every four rows; six times as fast as a mean over two axes."""
    return rows[0::4] + rows[1::4] + rows[2::4] + rows[3::4]


def draw(scene: Scene, rng: np.random.Generator, size: int = CANVAS) -> np.ndarray:
    """Draw a scene at jittered places and diameters, on a random background if it names none.

    Returns uint8 [size, size, 3]. Everything scales with `size`: the figures above are for 64.
    """
    background = scene.background or str(rng.choice(list(BACKGROUNDS)))
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[background]
    scale = size / CANVAS
    placed = list(zip(scene.things, _place(scene, rng), strict=True))
    for thing, (diameter, (x, y)) in reversed(placed):  # what is inside is named first
        mask = shape_mask(thing.shape, diameter * scale, (x * scale, y * scale), size)
        image += mask[..., None] * (np.array(PALETTE[thing.colour], np.float32) - image)
    return np.rint(image).astype(np.uint8)


def _place(scene: Scene, rng: np.random.Generator) -> list[Spot]:
    """Choose (diameter, (x, y)) of each thing, in px of a 64 px canvas: near the middle, jittered.

    Captions state no places beyond the relation, so a decoder has to invent them. They vary little:
    the set is to be learned in minutes.
    """
    diameters = [rng.uniform(*DIAMETERS[thing.size]) for thing in scene.things]
    middle = CANVAS / 2
    if scene.relation is None:
        x, y = middle + rng.uniform(-JITTER, JITTER, 2)
        return [(diameters[0], (x, y))]
    if scene.relation == "inside":
        outer = rng.uniform(*CONTAINER_DIAMETERS)
        inner = rng.uniform(*CONTAINED_DIAMETERS)
        x, y = middle + rng.uniform(-JITTER, JITTER, 2)
        # The widest room in a triangle is below its middle: .4 leaves room around a small circle.
        in_triangle = scene.things[1].shape == "triangle"
        down, sway = (0.4 * outer / 2, 0.8) if in_triangle else (0.0, 2.0)
        dx, dy = rng.uniform(-sway, sway, 2)
        return [(inner, (x + dx, y + down + dy)), (outer, (x, y))]
    # Left to right, or top to bottom: the spare room goes to the start, the gap and the end.
    reverse = scene.relation in ("right of", "below")
    first, second = reversed(diameters) if reverse else diameters
    spare = CANVAS - 2 * MARGIN - GAP - first - second
    start, end = rng.uniform(0.25, 0.35, 2) * spare
    along = (MARGIN + start + first / 2, CANVAS - MARGIN - end - second / 2)
    across = middle + rng.uniform(-JITTER, JITTER, 2)
    centres = list(zip(along, across, strict=True))
    if scene.relation in ("above", "below"):
        centres = [(x, y) for y, x in centres]
    spots = list(zip((first, second), centres, strict=True))
    return spots[::-1] if reverse else spots


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """Caption a scene in a phrasing of at most 19 CLIP tokens, which `parse` inverts."""
    if scene.relation is None:
        return f"{HEADS[0]} {scene.things[0]}"
    head, phrase = (str(rng.choice(list(of))) for of in (HEADS, RELATION_WORDS[scene.relation]))
    return f"{head} {scene.things[0]} {phrase} a {scene.things[1]}"


def parse(caption: str) -> Scene:
    """Read a caption back: the scene's things and relation, background None.

    Raises ValueError naming the caption if no phrasing fits, or if the scene cannot be drawn.
    """
    match = GRAMMAR.fullmatch(caption.strip().rstrip(".").lower())
    if not match:
        raise ValueError(
            f"caption {caption!r}: expected 'a SIZE COLOUR SHAPE', or two joined by a RELATION:"
            f" {'; '.join(', '.join(phrase) for phrase in (SIZES, PALETTE, SHAPES, RELATIONS))}"
        )
    first, phrase, second = match.group("first", "relation", "second")
    relation = next((name for name, forms in RELATION_WORDS.items() if phrase in forms), None)
    try:
        triples = (thing.split() for thing in (first, second) if thing)
        things = tuple(Thing(size=a, colour=b, shape=c) for a, b, c in triples)
        return Scene(things=things, relation=relation)
    except ValueError as error:
        raise ValueError(f"caption {caption!r}: {error}") from None


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene is kept out of training: for one of its things, or for its pair."""
    return any(map(_is_thing_held_out, scene.things)) or _is_pair_held_out(scene.things)


@cache
def _is_thing_held_out(thing: Thing) -> bool:
    return zlib.crc32(f"{THING_SALT}: {thing}".encode()) % HELD_OUT_ONE_IN == 0


@cache
def _is_pair_held_out(things: tuple[Thing, ...]) -> bool:
    if len(things) < 2:
        return False
    names = " and ".join(sorted(f"{thing.colour} {thing.shape}" for thing in things))
    return zlib.crc32(f"{PAIR_SALT}: {names}".encode()) % HELD_OUT_ONE_IN == 0


def sample_scene(rng: np.random.Generator, held_out: bool, num_things: int) -> Scene:
    """Draw a scene at random: of training (held_out False), or held out.

    A held-out scene of two is a held-out pair of things that each occur in training: only their
    combination is new. Raises ValueError if num_things is neither 1 nor 2.
    """
    if num_things not in (1, 2):
        raise ValueError(f"sample_scene: num_things is {num_things}; expected 1 or 2")

    def sample_thing() -> Thing:
        colour, shape, size = (str(rng.choice(list(names))) for names in (PALETTE, SHAPES, SIZES))
        return Thing(colour=colour, shape=shape, size=size)

    while True:
        relation = str(rng.choice(RELATIONS)) if num_things == 2 else None
        things = tuple(sample_thing() for _ in range(num_things))
        if relation == "inside":
            things = (replace(things[0], size="small"), replace(things[1], size="large"))
        if _fault(things, relation):
            continue
        unseen_thing = any(map(_is_thing_held_out, things))
        if num_things == 1:
            wanted = unseen_thing == held_out
        else:
            wanted = _is_pair_held_out(things) == held_out and not unseen_thing
        if wanted:
            background = str(rng.choice(list(BACKGROUNDS)))
            return Scene(things=things, relation=relation, background=background)


def make_pairs(num_samples: int, seed: int, split: str) -> Iterator[Pair]:
    """Make the first `num_samples` rows of a split; row i depends on (seed, split, i) alone.

    train: blocks of four rows, the last three unlike the first in one attribute (colour, shape,
    size, relation or order): hard negatives for a contrastive loss. One block in four shows one
    thing. Nothing is held out.
    single: one held-out thing. seen: two things as in training. held_out: two, the pair held out.
    Raises ValueError for an unknown split or a negative number.
    """
    _require_known("split", split, SPLITS)
    for name, value in (("num_samples", num_samples), ("seed", seed)):
        if value < 0:
            raise ValueError(f"make_pairs: {name} is {value}; expected at least 0")
    return _rows(num_samples, seed, split)


def _rows(num_samples: int, seed: int, split: str) -> Iterator[Pair]:
    stream = (seed, zlib.crc32(split.encode()))
    for start in range(0, num_samples, BLOCK):
        rng = np.random.default_rng((*stream, start))
        if split == "train":
            scene = sample_scene(rng, False, 1 if rng.integers(4) == 0 else 2)
            scenes = [scene, *_hard_negatives(scene, rng)]
        else:
            num_things = 1 if split == "single" else 2
            scenes = [sample_scene(rng, split != "seen", num_things) for _ in range(BLOCK)]
        for row in range(min(BLOCK, num_samples - start)):
            rng = np.random.default_rng((*stream, start, row + 1))
            caption, image = describe(scenes[row], rng), encode_jpeg(draw(scenes[row], rng))
            yield Pair(caption=caption, image_bytes=image, scene=scenes[row], split=split)


def _hard_negatives(scene: Scene, rng: np.random.Generator) -> list[Scene]:
    """Choose three training scenes of other meanings, each unlike `scene` in one attribute.

    The first swaps the two things: their order is what a CLIP learns last.
    """
    things, relation = scene.things, scene.relation

    def training_scenes(options: list[tuple[tuple[Thing, ...], str | None]]) -> list[Scene]:
        scenes = [replace(scene, things=a, relation=b) for a, b in options if not _fault(a, b)]
        return [other for other in scenes if other != scene and not is_held_out(other)]

    # By attribute, the scenes that differ in it alone
    kinds = []
    for name, values in (("colour", PALETTE), ("shape", SHAPES), ("size", SIZES)):
        places = product(range(len(things)), values)
        changes = [(i, replace(things[i], **{name: value})) for i, value in places]
        options = [((*things[:i], new, *things[i + 1 :]), relation) for i, new in changes]
        kinds.append(training_scenes(options))
    if relation is not None:
        kinds.append(training_scenes([(things, other) for other in RELATIONS]))
    kinds = [kind for kind in kinds if kind]

    chosen = {_meaning(other): other for other in training_scenes([(things[::-1], relation)])}
    while len(chosen) < BLOCK - 1:  # each of another attribute, as long as there are others
        for kind in rng.permutation(len(kinds)):
            other = kinds[kind][rng.integers(len(kinds[kind]))]
            chosen.setdefault(_meaning(other), other)
    return list(chosen.values())[: BLOCK - 1]


def _meaning(scene: Scene) -> tuple:
    """Return what a scene shows: "A right of B" and "B left of A" mean the same."""
    mirrored = {"right of": "left of", "below": "above"}.get(scene.relation or "")
    return (scene.things[::-1], mirrored) if mirrored else (scene.things, scene.relation)


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3] as JPEG of quality 95, colour at full resolution lest it bleeds."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _fault(things: tuple[Thing, ...], relation: str | None) -> str | None:
    """Return why these things in this relation cannot be a scene; None if they can."""
    if len(things) != (1 if relation is None else 2):
        return f"{len(things)} things, relation {relation}; expected one without, or two with one"
    if relation is None:
        return None
    first, second = things
    if first.colour == second.colour:
        return f"both things are {first.colour}; expected two colours"
    fits = (first.size, second.size) == SIZES and second.shape in CONTAINERS
    if relation == "inside" and not fits:
        return f"does not fit; expected a small thing inside a large {' or '.join(CONTAINERS)}"
    return None


def _require_known(name: str, value: str, known) -> None:
    if value not in known:
        raise ValueError(f"shapes: {name} is {value!r}; expected one of {', '.join(known)}")
