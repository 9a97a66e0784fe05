"""The few numbers that a report opens with."""

from dataclasses import dataclass
from typing import Any

from eval.html_report.formats import number
from eval.html_report.score_table import NAMED


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A number with what makes it one: its method, its count, and what to hold it against."""

    name: str
    value: str
    against: str | None
    method: str
    label: str | None = None


def headlines(scores: dict[str, Any]) -> list[Headline]:
    """Choose the numbers that the page opens with; those that `scores` lacks are left out."""
    clip, prior, images = (scores.get(part) or {} for part in ("clip", "prior", "images"))
    count, label = images.get("n"), judged_by(scores)
    halves = counted("real halves", images.get("n_real_halves"))
    distance = (
        "between the embeddings of generated and real images; lower is better (Heusel et al. "
        "2017, float64, symmetric form)"
    )
    found = [
        *_quotable(scores),
        _shape_headline(scores, "held_out", "Two held-out shapes, all right"),
        _shape_headline(scores, "single", "One shape, all right"),
        _headline(
            images,
            ("clip_score", "clip_score_shuffled", "shuffled captions"),
            "CLIP score",
            counted("mean cosine of a generated image's embedding and its caption's", count),
            label,
        ),
        _headline(
            images,
            ("fd_clip", "fd_clip_real_halves", halves),
            "CLIP Fréchet distance",
            counted(distance, count),
            label,
        ),
        _headline(
            prior,
            ("cos", "cos_shuffled", "shuffled captions"),
            "Prior cosine",
            counted("mean cosine of predicted and true image embedding", prior.get("n")),
        ),
        _headline(
            prior,
            ("retrieval_at_1", None, ""),
            "Prior retrieval@1",
            counted(
                "predicted embedding finds an image of its caption's meaning first", prior.get("n")
            ),
        ),
        _headline(
            clip,
            ("retrieval_at_1", None, ""),
            "CLIP retrieval@1",
            counted("caption finds an image of its meaning first", clip.get("n")),
        ),
    ]
    return [headline for headline in found if headline]


def judged_by(scores: dict[str, Any]) -> str | None:
    """Say which CLIP gave the image scores; None if eval.json does not."""
    judge = (scores.get("images") or {}).get("judge") or scores.get("judge")
    if not judge:
        return None
    label = str(judge) if str(judge).startswith("scored by") else f"scored by {judge}"
    relation = (scores.get("images") or {}).get("judge_relation")
    return f"{label}; {relation}" if relation and str(relation) not in label else label


def _quotable(scores: dict[str, Any]) -> list[Headline]:
    """Return FID and FD-DINOv2, where weights and counts allow to quote them."""
    found = []
    for path in ("features.inception.fd", "features.dinov2.fd"):
        space = (scores.get("features") or {}).get(path.split(".")[1]) or {}
        if not space.get("quotable") or space.get("fd") is None:
            continue
        halves = counted("real halves", space.get("n_real_halves"))
        told = str(space.get("name", "Heusel et al. 2017"))
        name = NAMED[path]
        found.append(_headline(space, ("fd", "fd_real_halves", halves), name,
                               counted(f"{told}; lower is better", space.get("n"))))  # fmt: skip
    return [headline for headline in found if headline]


def _headline(
    scores: dict[str, Any],
    keys: tuple[str, str | None, str],
    name: str,
    method: str,
    label: str | None = None,
) -> Headline | None:
    """Make one headline of `keys`: the value's, its baseline's, and the baseline in words."""
    key, baseline, against = keys
    if scores.get(key) is None:
        return None
    found = scores.get(baseline) if baseline else None
    held = f"{against}: {number(found)}" if found is not None else None
    return Headline(name=name, value=number(scores[key]), against=held, method=method, label=label)


def _shape_headline(scores: dict[str, Any], drawn: str, name: str) -> Headline | None:
    cell = (scores.get("shapes") or {}).get(drawn) or {}
    if cell.get("all") is None:
        return None
    real = real_scores(cell).get("all")
    return Headline(
        name=name,
        value=number(cell["all"]),
        against=f"true drawings: {number(real)}" if real is not None else None,
        method=counted(
            "share of images in which every shape, colour and relation is as said", cell.get("n")
        ),
        label="scored by reading the drawing, without CLIP",
    )


def counted(method: str, count: int | None) -> str:
    """Add a count to a method."""
    return f"{method}; n = {count:,}" if count else method


def real_scores(cell: dict[str, Any]) -> dict[str, Any]:
    """Return what the scorer gives true drawings: per score, or of `all` where it is one number."""
    real = cell.get("real")
    return real if isinstance(real, dict) else {"all": real}
