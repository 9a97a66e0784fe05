"""All scores of a run, each with its method, beside those of earlier runs.

A score is compared with another run's only where both state the same about how they were made: the
features, the scoring CLIP and the number of images decide a distance as much as the model does.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeGuard

from cluster.base.files import Json
from cluster.base.options import read_yaml
from eval.html_report.formats import CAPTIONS_KEY, Scores, flatten, number

ELSEWHERE = ("ablation", "seconds", "sampling", "provenance")  # not scores, or in another table
TEXTS = read_yaml(Path(__file__).with_name("scores.yaml"))  # titles and methods
GROUPS: dict[str, str] = TEXTS["groups"]
KNOWN: dict[str, tuple[str, int, str]] = {key: tuple(text) for key, text in TEXTS["known"].items()}
PUBLISHED: dict[str, str] = TEXTS["published"]
HEADLINES: dict[str, str] = TEXTS["headlines"]
BASELINES: dict[str, str] = TEXTS["baselines"]
COUNTS: dict[str, str] = TEXTS["counts"]
SHAPE_SETS: dict[str, str] = TEXTS["shape_sets"]
ABLATION: dict[str, str] = TEXTS["ablation"]
SHAPE_SCORES = ("all", "attribute", "relation")
INCEPTION = ("features.inception.fd", "features.inception_clean.fd")
SPREADS = ("_ci95_low", "_ci95_high", "_std", "_error")  # shown in the row of their score
# Facts that identify a score without deciding it: where the images are, and their digest.
IDENTITY = ("digest", "source", "source_real", "train", "picture", "judge_relation", "quotable")
FACTS = ("n", "seed", "resolution", "fd_infinity_points", "fd_resamples")
FACT_PREFIXES = ("n_", "num_", "k_", "kid_subset")


@dataclass(frozen=True, kw_only=True)
class ScoreEntry:
    """One number of eval.json.

    made: the facts beside it that decide it; spread: its interval and baselines, as text.
    """

    path: str
    value: float
    made: Scores = field(default_factory=dict)
    spread: str = ""

    @property
    def group(self) -> str:
        """The first name of the path, of features the first two."""
        names = self.path.split(".")
        return ".".join(names[:2]) if names[0] == "features" else names[0]


def group_title(group: str) -> str:
    """Return the title of a group of scores."""
    return GROUPS.get(group, group.replace("_", " ").replace(".", ", ").capitalize())


def entries(value: object, path: str = "") -> Iterator[ScoreEntry]:
    """Yield every number of eval.json with the facts beside it: strings, counts and seeds.

    {"n": 9, "fd": 1.5} holds one score, made of 9 images. Inner objects inherit the facts.
    """
    if not isinstance(value, dict):
        return
    made = {
        key: item
        for key, item in value.items()
        if isinstance(item, (str, bool)) or key in FACTS or key.startswith(FACT_PREFIXES)
    }
    for key, item in value.items():
        inner_path = f"{path}.{key}" if path else str(key)
        if isinstance(item, dict) and key != "real":
            for entry in entries(item, inner_path):
                yield replace(entry, made={**made, **entry.made})
        elif _is_number(item) and key not in made and not _in_row_of_another(key, value):
            yield ScoreEntry(path=inner_path, value=item, made=made, spread=_spread(key, value))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _in_row_of_another(key: str, beside: Scores) -> bool:
    suffixes = [suffix for suffix in (*SPREADS, *BASELINES) if key.endswith(suffix)]
    of_score = any(_is_number(beside.get(key.removesuffix(suffix))) for suffix in suffixes)
    return of_score or (key == "real" and "all" in beside)


def _spread(key: str, beside: Scores) -> str:
    """State the interval or the deviation of a score, and its baselines."""
    texts = []
    low, high = beside.get(f"{key}_ci95_low"), beside.get(f"{key}_ci95_high")
    if _is_number(low) and _is_number(high):
        texts.append(f"95 %: {number(low)} to {number(high)}")
    deviation = beside.get(f"{key}_std", beside.get(f"{key}_error"))
    if not _is_number(deviation) and key in ("all", "relation"):
        share, n = beside.get(key), beside.get("n")
        if _is_number(share) and n and 0 <= share <= 1:
            deviation = math.sqrt(share * (1 - share) / n)
    if _is_number(deviation):
        texts.append(f"± {number(deviation)}")
    baselines = {name: beside.get(f"{key}{suffix}") for suffix, name in BASELINES.items()}
    real = beside.get("real")
    baselines["true drawings"] = (
        real.get(key) if isinstance(real, dict) else real if key == "all" else None
    )
    texts += [f"{name} {number(value)}" for name, value in baselines.items() if _is_number(value)]
    return ", ".join(texts)


def described(path: str, made: Scores | None = None) -> tuple[str, int, str]:
    """Return a score's name, which way is better (0: neither), and its method.

    made: the facts beside it; a distance is called FID only where they allow to quote it. A score
    that is not in `KNOWN` is called by its path.
    """
    names = path.split(".")
    last = names[-1]
    matching = [name for name in KNOWN if last == name or last.startswith(f"{name}_")]
    known = max(matching, key=len, default="")
    title, better, method = KNOWN.get(known, (last.replace("_", " "), 0, ""))
    if path in PUBLISHED and (made or {}).get("quotable", path not in INCEPTION):
        title = PUBLISHED[path]
    rest = last.removeprefix(known).replace("_", " ").strip() if known else ""
    if rest:  # something about the score, such as a baseline
        better, method = 0, ""
    inner = names[2 if names[0] == "features" else 1 : -1]
    before = [SHAPE_SETS.get(name, name.replace("_", " ")) for name in inner]
    if before:
        title = title[:1].lower() + title[1:]
    return ", ".join([*before, title, *([rest] if rest else [])]), better, method


def made_of(entry: ScoreEntry) -> str:
    """State of how many images a score is, in which space, and whether the model was trained on
    that."""
    keys = ("name", "features", "extractor", "judge", "judge_relation")
    texts: list[str] = []
    for text in (str(entry.made[key]) for key in keys if entry.made.get(key)):
        if not any(text in earlier for earlier in texts):
            texts.append(text)
    if entry.made.get("quotable") is False:
        texts.append("too few images, or other weights, to quote as FID")
    texts += [f"{_label(key)} {number(entry.made[key])}" for key in COUNTS if key in entry.made]
    return ", ".join(texts)


def _label(key: str) -> str:
    return COUNTS.get(key, key.replace("_", " "))


def score_tables(title: str, scores: Scores, others: dict[str, Scores]) -> list[Json]:
    """Return {title, note, columns, rows} for each group of scores, beside those of `others`, by
    the runs' names.

    The drawn set has a table of its own, and appears here only beside another run's.
    """
    theirs = [{entry.path: entry for entry in entries(other)} for other in others.values()]
    columns = ["score", title, *others, "interval and baselines", "method"]
    groups: dict[str, Json] = {}
    for entry in entries(scores):
        group = entry.group
        if group in ELSEWHERE or (group == "shapes" and not others):
            continue
        name, _, method = described(entry.path, entry.made)
        cells = [compared(entry, by_path.get(entry.path)) for by_path in theirs]
        note = "" if group == "shapes" else made_of(entry)
        new = {"title": group_title(group), "note": note, "columns": columns, "rows": []}
        row = [name, entry.value, *cells, entry.spread, method or entry.path]
        groups.setdefault(group, new)["rows"].append(row)
    order = dict.fromkeys([*(group for group in GROUPS if group in groups), *groups])
    return [groups[group] for group in order]


def compared(ours: ScoreEntry, theirs: ScoreEntry | None) -> str:
    """Show another run's score and the difference of ours to it, or why there is none."""
    if theirs is None:
        return "–"
    value, difference = number(theirs.value), ours.value - theirs.value
    unlike = unlike_of(ours, theirs)
    if unlike:
        return f"{value} (not compared: {unlike})"
    if not math.isfinite(difference):
        return value
    if difference == 0:
        return f"{value} (equal)"
    way = described(ours.path)[1] * difference
    verdict = ", better" if way > 0 else ", worse" if way < 0 else ""
    return f"{value} ({'+' if difference > 0 else '−'}{number(abs(difference))}{verdict})"


def unlike_of(ours: ScoreEntry, theirs: ScoreEntry) -> str:
    """Name the first fact in which two scores differ; "" where they may be compared."""
    last = ours.path.rpartition(".")[2]
    keys = sorted(ours.made.keys() | theirs.made.keys(), key=lambda key: (key == CAPTIONS_KEY, key))
    for key in keys:
        of_another = key.startswith(("kid_", "fd_", "k_")) and key.split("_")[0] not in last
        own, other = ours.made.get(key), theirs.made.get(key)
        if key in IDENTITY or of_another or own == other:
            continue
        if key == CAPTIONS_KEY:
            return "other captions" if own and other else "captions not stated"
        return f"{_label(key)} {number(other)}"
    return ""


def headlines(scores: Scores) -> list[dict[str, str]]:
    """Return the numbers that the page opens with: name, value, spread, method and scorer."""
    by_path = {entry.path: entry for entry in entries(scores)}
    tiles = []
    for path, name in HEADLINES.items():
        entry = by_path.get(path)
        if entry is None or (path in PUBLISHED and not entry.made.get("quotable")):
            continue
        method, count = described(path)[2], entry.made.get("n")
        if path.startswith("features."):
            method = f"{entry.made.get('name', method)}; lower is better"
        scorers = {"images": scored_by(scores), "shapes": "scored by arithmetic, without CLIP"}
        tiles.append({
            "name": name,
            "value": number(entry.value),
            "spread": entry.spread,
            "method": f"{method}; n = {count:,}" if count else method,
            "scorer": scorers.get(path.split(".")[0], str(entry.made.get("judge_relation", ""))),
        })  # fmt: skip
    return tiles


def scored_by(scores: Scores) -> str:
    """State which CLIP gave the image scores; "" if eval.json does not."""
    images = scores.get("images") or {}
    scorer = str(images.get("judge") or scores.get("judge") or "")
    if not scorer:
        return ""
    text = scorer if scorer.startswith("scored by") else f"scored by {scorer}"
    relation = str(images.get("judge_relation") or "")
    return f"{text}; {relation}" if relation not in text else text


def shape_table(shapes: Scores) -> Json:
    """Return {columns, rows} of the drawn set: scores with their standard errors and true
    drawings' scores."""
    by_path = {entry.path: entry for entry in entries(shapes)}
    rows = []
    for name, title in SHAPE_SETS.items():
        if not shapes.get(name):
            continue
        cells = []
        for entry in (by_path.get(f"{name}.{score}") for score in SHAPE_SCORES):
            cell = f"{number(entry.value)}, {entry.spread}".rstrip(", ") if entry else "–"
            cells.append(cell.replace(", ±", " ±"))
        rows.append([title, *cells, shapes[name].get("n")])
    return {"columns": ["captions", *SHAPE_SCORES, "n"], "rows": rows}


def ablation_table(ablation: Scores) -> Json:
    """Return {columns, rows} of what each input of the decoder reached: scores of drawings, or of
    CLIP elsewhere."""
    flat = {given: flatten(ablation[given]) for given in ABLATION if ablation.get(given)}
    paths = list(dict.fromkeys(path for cells in flat.values() for path in cells))
    drawn = [f"{name}.{score}" for name in SHAPE_SETS for score in SHAPE_SCORES]
    paths = [p for p in drawn if p in paths] or [p for p in paths if not p.endswith(".n")]
    columns = [path.replace("_", " ").replace(".", ": ") for path in paths]
    rows = [[ABLATION[given], *map(cells.get, paths)] for given, cells in flat.items()]
    return {"columns": ["decoder given", *columns], "rows": rows}
