"""All scores of a run, each with its method, beside those of earlier runs.

A score is compared with another run's only where both say the same of how they were made: the
features, the judge and the number of images decide a distance as much as the model does.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from eval.html_report.formats import CAPTIONS_KEY, number

GROUPS = {  # by the head of a score's path, in this order
    "images": "Images",
    "features.inception": "Inception",
    "features.inception_clean": "Inception, antialiased resize",
    "features.dinov2": "DINOv2",
    "features.clip": "CLIP features",
    "protocol": "Protocol",
    "memorisation": "Nearest training images",
    "shapes": "Drawings",
    "prior": "Prior",
    "clip": "Encoder",
}
ELSEWHERE = ("ablation", "seconds", "sampling", "provenance")  # not scores, or in another table
HIGHER, LOWER = 1, -1
# By the last part of a score's path: what it is called, which way is better, how it is made.
# The longest name that the last part begins with holds.
KNOWN: dict[str, tuple[str, int, str]] = {
    "fd": ("Fréchet distance", LOWER, "Heusel et al. 2017, eq. 6; float64"),
    "fd_infinity": ("Fréchet distance, n → ∞", LOWER, "line in 1/n, Chong and Forsyth 2020"),
    "fd_clip": ("CLIP Fréchet distance", LOWER, "between CLIP image embeddings"),
    "kid": ("KID", LOWER, "unbiased cubic MMD², Bińkowski et al. 2018"),
    "cmmd": ("CMMD", LOWER, "1000 MMD², Gaussian kernel, Jayasumana et al. 2024"),
    "precision": (
        "Precision",
        HIGHER,
        "generated images among real ones, Kynkäänniemi et al. 2019",
    ),
    "recall": ("Recall", HIGHER, "real images among generated ones, Kynkäänniemi et al. 2019"),
    "density": (
        "Density",
        HIGHER,
        "real neighbourhoods around generated images, Naeem et al. 2020",
    ),
    "coverage": ("Coverage", HIGHER, "real images with a generated one near by, Naeem et al. 2020"),
    "clip_score": ("CLIP score", HIGHER, "mean cosine of an image's embedding and its caption's"),
    "retrieval_at_1": ("Retrieval@1", HIGHER, "an embedding finds one of its caption first"),
    "retrieval_at_5": ("Retrieval@5", HIGHER, "an embedding finds one of its caption among five"),
    "cos": ("Cosine to the image", HIGHER, "mean cosine of predicted and true image embedding"),
    "cos_text": ("Cosine to the caption", 0, "mean cosine of prediction and text embedding"),
    "mse": ("Squared error", LOWER, "of the predicted embedding, mean over dimensions"),
    "all": ("All right", HIGHER, "share of drawings right in everything their caption says"),
    "attribute": ("Attributes", HIGHER, "mean share of a drawing's right attributes"),
    "relation": ("Relation", HIGHER, "share of drawings with the right relation"),
    "mean": ("Mean distance", 0, "to the nearest training image"),
    "p05": ("5 % quantile of the distance", 0, "to the nearest training image"),
    "share_closer": (
        "Share closer than real",
        LOWER,
        "generated images nearer to training than 95 % of real ones: .05 where nothing is copied",
    ),
}
SPREADS = ("_ci95_low", "_ci95_high", "_std", "_error")  # folded into the row of their score,
BASELINES = {  # like what it is held against
    "_shuffled": "shuffled captions",
    "_real_halves": "halves of the real images",
    "_real": "real images",
}
INCEPTION = ("features.inception.fd", "features.inception_clean.fd")
NAMED = {  # by their whole path, once the features are what that name means
    "features.inception.fd": "FID",
    "features.inception.fd_infinity": "FID∞",
    "features.inception_clean.fd": "clean-FID",
    "features.dinov2.fd": "FD-DINOv2",
    "features.clip.fd": "FD-CLIP",
}
# What tells a score apart but does not decide it: where the images lay, whose digest they have.
OWN = ("digest", "source", "source_real", "train", "picture", "judge_relation", "quotable")
COUNTS = {"n": "n =", "n_real": "real images", "n_train": "training images"}
SHAPE_SETS = {
    "single": "one shape",
    "seen": "two shapes, combination seen in training",
    "held_out": "two shapes, combination held out",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One number of eval.json: its path, its value, what stands beside it that decides it, and its
    spread in words."""

    path: str
    value: float
    made: dict[str, Any] = field(default_factory=dict)
    spread: str = ""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Another run's value: the difference of ours to it, whether ours is better, or why the two
    cannot be compared."""

    value: float | None
    difference: float | None = None
    better: bool | None = None
    unlike: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One score beside other runs'."""

    path: str
    name: str
    note: str
    value: float
    spread: str
    others: list[Cell]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Scores of one kind, and what holds for all of them."""

    title: str
    note: str
    rows: list[Row]


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """The scores of this run in groups, a column for each of `runs`."""

    runs: list[str]
    groups: list[Group]


def entries(value: Any, path: str = "") -> list[Entry]:
    """List every number of eval.json with what its neighbours say of how it was made.

    {"n": 9, "fd": 1.5} holds one score, made of 9 images. Objects inside inherit it.
    """
    if not isinstance(value, dict):
        return []
    made = {key: item for key, item in value.items() if _tells(key, item)}
    found: list[Entry] = []
    for key, item in value.items():
        where = f"{path}.{key}" if path else str(key)
        if isinstance(item, dict) and key != "real":
            inner = entries(item, where)
            found += [replace(e, made={**made, **e.made}) for e in inner]
        elif _is_score(item) and key not in made and not _folded(key, value):
            found.append(Entry(path=where, value=item, made=made, spread=_spread(key, value)))
    return found


def _folded(key: str, beside: dict[str, Any]) -> bool:
    """Say whether a number is shown in the row of another one."""
    ends = [end for end in (*SPREADS, *BASELINES) if key.endswith(end)]
    return any(_is_score(beside.get(key.removesuffix(end))) for end in ends) or (
        key == "real" and "all" in beside
    )


def _tells(key: str, item: Any) -> bool:
    """Say whether a key tells how its neighbours were made: strings, counts and seeds do."""
    counts = ("n", "seed", "resolution", "fd_infinity_points", "fd_resamples")
    starts = ("n_", "num_", "k_", "kid_subset")
    return isinstance(item, (str, bool)) or key in counts or key.startswith(starts)


def _is_score(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _spread(key: str, beside: dict[str, Any]) -> str:
    """Say the interval or the deviation of a score, and what it is held against."""
    low, high = beside.get(f"{key}_ci95_low"), beside.get(f"{key}_ci95_high")
    words = []
    if _is_score(low) and _is_score(high):
        words.append(f"95 %: {number(low)} to {number(high)}")
    deviation = beside.get(f"{key}_std", beside.get(f"{key}_error"))
    if _is_score(deviation):
        words.append(f"± {number(deviation)}")
    held = {f"{key}{end}": name for end, name in BASELINES.items()}
    words += [f"{name} {number(beside[k])}" for k, name in held.items() if _is_score(beside.get(k))]
    real = beside.get("real")
    real = real.get(key) if isinstance(real, dict) else real if key == "all" else None
    return ", ".join([*words, *([f"true drawings {number(real)}"] if _is_score(real) else [])])


def score_table(scores: dict[str, Any], others: dict[str, dict[str, Any]]) -> ScoreTable:
    """Lay out every score of this run beside those of `others`, by the other runs' names.

    The drawn set's have a table of their own, and stand here only beside another run's.
    """
    theirs = [{e.path: e for e in entries(other)} for other in others.values()]
    groups: dict[str, Group] = {}
    for entry in entries(scores):
        head = _head(entry.path)
        if head in ELSEWHERE or (head == "shapes" and not others):
            continue
        name, _, note = described(entry.path, entry.made)
        row = Row(
            path=entry.path, name=name, note=note or entry.path, value=entry.value,
            spread=entry.spread, others=[_cell(entry, found.get(entry.path)) for found in theirs],
        )  # fmt: skip
        groups.setdefault(
            head, Group(title=title_of(entry.path), note=_group_note(entry), rows=[])
        ).rows.append(row)
    order = [head for head in GROUPS if head in groups]
    ordered = [*order, *(head for head in groups if head not in order)]
    return ScoreTable(runs=list(others), groups=[groups[head] for head in ordered])


def title_of(path: str) -> str:
    """Return the title of a score's group."""
    head = _head(path)
    return GROUPS.get(head, head.replace("_", " ").replace(".", ", ").capitalize())


def _head(path: str) -> str:
    """Return the group of a score: the first part of its path, of features the first two."""
    parts = path.split(".")
    return ".".join(parts[:2]) if parts[0] == "features" else parts[0]


def made_of(entry: Entry) -> str:
    """Say of how many images a score is, and in which space."""
    words = [str(entry.made[key]) for key in ("name", "features", "judge") if entry.made.get(key)]
    if entry.made.get("quotable") is False:
        words.append("too few images, or other weights, to quote as FID")
    counts = [key for key in COUNTS if key in entry.made]
    words += [f"{_word(key)} {number(entry.made[key])}" for key in counts]
    return ", ".join(dict.fromkeys(words))


def _group_note(entry: Entry) -> str:
    """Say what holds for all of a group's scores; each set of drawings has its own count."""
    return "" if entry.path.startswith("shapes.") else made_of(entry)


def _word(key: str) -> str:
    return COUNTS.get(key, key.replace("_", " "))


def described(path: str, made: dict[str, Any] | None = None) -> tuple[str, int, str]:
    """Return a score's name, which way is better (0: neither) and how it is made; an unknown one
    is called by its path.

    made: what stands beside it; a distance is called FID only where that allows to quote it.
    """
    parts = path.split(".")
    last = parts[-1]
    known = max((name for name in KNOWN if _begins(last, name)), key=len, default="")
    title, better, note = KNOWN.get(known, (last.replace("_", " "), 0, ""))
    if path in NAMED and (made or {}).get("quotable", path not in INCEPTION):
        title = NAMED[path]
    rest = last.removeprefix(known).replace("_", " ").strip() if known else ""
    if rest:
        better = 0  # not what the name says, such as what a score is held against
    start = 2 if parts[0] == "features" else 1
    between = [SHAPE_SETS.get(part, part.replace("_", " ")) for part in parts[start:-1]]
    name = ", ".join([*between, title[:1].lower() + title[1:]]) if between else title
    return ", ".join([name, *([rest] if rest else [])]), better, "" if rest else note


def _begins(last: str, name: str) -> bool:
    return last == name or last.startswith(f"{name}_")


def _cell(ours: Entry, theirs: Entry | None) -> Cell:
    if theirs is None:
        return Cell(value=None)
    unlike = unlike_of(ours, theirs)
    if unlike:
        return Cell(value=theirs.value, unlike=unlike)
    difference, way = ours.value - theirs.value, described(ours.path)[1]
    if not math.isfinite(difference):
        return Cell(value=theirs.value)
    better = difference * way > 0 if way and difference else None
    return Cell(value=theirs.value, difference=difference, better=better)


def unlike_of(ours: Entry, theirs: Entry) -> str:
    """Name the first thing by which two scores were made differently; empty where they may be
    compared."""
    last = ours.path.rpartition(".")[2]
    keys = sorted(ours.made.keys() | theirs.made.keys(), key=lambda key: (key == CAPTIONS_KEY, key))
    for key in keys:
        of_another = key.startswith(("kid_", "fd_", "k_")) and key.split("_")[0] not in last
        mine, other = ours.made.get(key), theirs.made.get(key)
        if key in OWN or of_another or mine == other:
            continue
        if key == CAPTIONS_KEY:
            return "other captions" if mine and other else "captions not told"
        return f"{_word(key)} {number(other)}"
    return ""
