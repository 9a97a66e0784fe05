"""Two tables of the report: of the drawn set's scores, and of what the decoder was given."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

from eval.html_report.formats import flatten
from eval.html_report.headlines import real_scores
from eval.html_report.score_table import SHAPE_SETS

SHAPE_SCORES = ("all", "attribute", "relation")
ABLATION = {
    "true_image_embed": "decoder given the true image embedding",
    "prior": "full chain: caption, prior, decoder",
    "text_embed": "text embedding in place of the prior's output",
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns under groups of columns: each group's name and width, each column's head."""

    groups: list[tuple[str, int]]
    heads: list[str]
    rows: list[dict[str, Any]]


def shape_rows(shapes: dict[str, Any]) -> list[dict[str, Any]]:
    """Lay out the shapes table: each score with its standard error and the true drawings'."""
    rows = []
    for drawn, title in SHAPE_SETS.items():
        cell = shapes.get(drawn)
        if not cell:
            continue
        real = real_scores(cell)
        scores = [
            {"value": cell.get(s), "real": real.get(s), "error": standard_error(s, cell)}
            for s in SHAPE_SCORES
        ]
        rows.append({"title": title, "n": cell.get("n"), "scores": scores})
    return rows


def standard_error(score: str, cell: dict[str, Any]) -> float | None:
    """Return the standard error of a score: sqrt(p (1 - p) / n) of a share of images; of attribute,
    a mean over images of several answers each, what the scorer found; None if it did not."""
    if score == "attribute":
        return cell.get("attribute_error")
    share, count = cell.get(score), cell.get("n")
    if share is None or not count or not 0 <= share <= 1:
        return None
    return math.sqrt(share * (1 - share) / count)


def ablation_table(ablation: dict[str, Any]) -> Table | None:
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
