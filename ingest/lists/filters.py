"""Why a row did not become a sample: the closed set of reasons, and the predicates behind them.

Pure functions over rows, bytes, headers and sizes; nothing here opens a file or a connection.
"""

import hashlib
import io
import math
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction

from cluster.base.metrics import FAILURES

if TYPE_CHECKING:
    from PIL import Image

# Of the failures, what may pass: the try is repeated, and so is the row by --retry-failed.
TRANSIENT = frozenset(FAILURES[FAILURES.index("unreachable") :])
# The row could be had and is left out on purpose.
FILTERED = (
    "opted_out", "robots_disallowed", "too_small", "too_many_pixels", "too_few_pixels",
    "aspect_ratio", "opt_out_list", "forgotten", "duplicate_url", "duplicate_image", "no_hash",
    "low_similarity", "low_aesthetic", "unsafe", "watermarked", "nsfw", "language", "null_score",
    "short_caption", "long_caption", "few_tokens", "many_tokens",
)  # fmt: skip

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
PLAIN_MODES = ("1", "L", "P", "RGB")


def status_of(reason: str) -> str:
    """Say whether a row with `reason` is "failed" or "filtered"."""
    return "filtered" if reason in FILTERED else "failed"


def may_be_image(content_type: str | None) -> bool:
    """Say whether a Content-Type can announce an image; servers that say nothing may."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    return kind in ("", "application/octet-stream", "binary/octet-stream") or (
        kind.startswith("image/") and kind != "image/svg+xml"
    )


def header_problem(
    data: bytes, *, max_pixels: int, min_pixels: int = 0, max_aspect_ratio: float | None = None
) -> str | None:
    """Judge an image by its header, before anything is decoded; None if it may be.

    Against `max_pixels` an image counts as often as `_weight` says.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                weight = _weight(image)
                short, long = sorted(image.size)
    except Image.DecompressionBombError:
        return "too_many_pixels"
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for bytes of no such format
        return "not_an_image"
    if short * long * weight > max_pixels:
        return "too_many_pixels"
    if short * long < min_pixels:
        return "too_few_pixels"
    if max_aspect_ratio is not None and long > max_aspect_ratio * short:
        return "aspect_ratio"
    return None


def _weight(image: "Image.Image") -> int:
    """Return how many times the memory of an RGB image the decoding takes.

    Blending over white and 16 bits hold several copies, WebP's decoder two canvases of its own; a
    progressive JPEG keeps all its coefficients, 2 bytes each, however small it is decoded.
    """
    if image.format == "WEBP":
        return 5
    if "transparency" in image.info or image.mode not in PLAIN_MODES:
        return 4
    return 2 if "progressive" in image.info else 1


# -- rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What is left out of a list; by default nothing is."""

    min_similarity: float | None = None
    """least cosine of image and caption, by the list's own column"""
    min_aesthetic: float | None = None
    """least aesthetic score"""
    max_punsafe: float | None = None
    """greatest probability of unsafe content, 0 to 1"""
    max_pwatermark: float | None = None
    """greatest probability of a watermark, 0 to 1"""
    nsfw: Annotated[tuple[str, ...], UseAppendAction] = ()
    """tag of the NSFW column that passes, such as UNLIKELY; repeatable; none = all"""
    language: Annotated[tuple[str, ...], UseAppendAction] = ()
    """language that passes, as the list spells it; repeatable; none = all"""
    null_scores: bool = False
    """let rows pass whose score, tag or language is null; otherwise they count as null_score"""
    min_caption_chars: int = 0
    """least length of a caption, characters"""
    max_caption_chars: int | None = None
    """leave out longer captions, characters; longer than 4,096 are cut in any case"""
    min_caption_tokens: int = 0
    """least length of a caption in tokens of CLIP's vocabulary, without start and end"""
    max_caption_tokens: int | None = None
    """greatest length of a caption, tokens"""
    unique: Annotated[tuple[Literal["urls", "images"], ...], UseAppendAction] = ()
    """leave out rows whose URL, or image (by the sha256 of what was fetched), an earlier row of
    the list has; repeatable"""
    require_hash: bool = False
    """leave out rows without a sha256 or md5 to verify the fetched bytes by"""
    opt_out: str = ""
    """text file of domains and URLs to leave out, one a line; a domain covers those below it"""
    min_pixels: int = 0
    """least area of the image as fetched, px"""
    max_aspect_ratio: float | None = None
    """greatest ratio of the image's longer side to its shorter one"""


@dataclass(frozen=True, kw_only=True)
class Column:
    """Where the LAION family keeps what a filter looks at, and the reason that the filter gives."""

    names: tuple[str, ...]
    reason: str


SCORES = {
    "min_similarity": Column(
        names=("similarity", "clip_similarity_vitb32", "clip_b32_similarity_score"),
        reason="low_similarity",
    ),
    "min_aesthetic": Column(
        names=("aesthetic", "AESTHETIC_SCORE", "aesthetic_score_laion_v2"), reason="low_aesthetic"
    ),
    "max_punsafe": Column(names=("punsafe", "nsfw_score_opennsfw2"), reason="unsafe"),
    "max_pwatermark": Column(names=("pwatermark", "watermark_score"), reason="watermarked"),
}
TAGS = {
    "nsfw": Column(names=("NSFW", "nsfw"), reason="nsfw"),
    "language": Column(names=("LANGUAGE", "language"), reason="language"),
}
COLUMNS = {**SCORES, **TAGS}
HASHES = ("sha256", "md5")  # a column of either name, in any case, is verified; the first decides
MAX_CAPTION_CHARS = 4096


def filter_columns(config: FilterConfig, found: Sequence[str]) -> dict[str, str]:
    """Return the list's column for each filter that is set and needs one.

    Raises ValueError for one that the list lacks, naming the columns `found`.
    """
    columns = {}
    for name, column in COLUMNS.items():
        if getattr(config, name) in (None, ()):
            continue
        present = next((known for known in column.names if known in found), None)
        if present is None:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--filters.{flag}: no column ({', '.join(column.names)}); found {', '.join(found)}"
            )
        columns[name] = present
    return columns


def hash_columns(found: Sequence[str]) -> dict[str, str]:
    """Return the list's column for each of `HASHES` that it has."""
    return {kind: name for kind in HASHES for name in found if name.lower() == kind}


def hash_problem(data: bytes, expected: Mapping[str, str]) -> str | None:
    """Compare bytes with their expected digests, hex, by algorithm."""
    for kind, wanted in expected.items():
        if hashlib.new(kind, data, usedforsecurity=False).hexdigest() != wanted.strip().lower():
            return "hash_mismatch"
    return None


def row_problem(
    config: FilterConfig,
    columns: Mapping[str, str],
    row: Mapping[str, Any],
    count_tokens: Callable[[str], int],
) -> str | None:
    """Return why a row is left out before it is fetched, or None.

    columns: of `filter_columns`; row: the list's, with a normalised caption.
    """
    for name, column in columns.items():
        value = row[column]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            if not config.null_scores:
                return "null_score"
        elif not _passes(name, getattr(config, name), value):
            return COLUMNS[name].reason
    caption = row["caption"] or ""
    if len(caption) < config.min_caption_chars:
        return "short_caption"
    if config.max_caption_chars is not None and len(caption) > config.max_caption_chars:
        return "long_caption"
    if config.min_caption_tokens or config.max_caption_tokens is not None:
        tokens = count_tokens(caption)
        if tokens < config.min_caption_tokens:
            return "few_tokens"
        if config.max_caption_tokens is not None and tokens > config.max_caption_tokens:
            return "many_tokens"
    return None


def _passes(name: str, limit: Any, value: Any) -> bool:
    if name in TAGS:
        return str(value).lower() in {tag.lower() for tag in limit}
    return value >= limit if name.startswith("min") else value <= limit


def normalise_caption(caption: str | None) -> str:
    """Return a caption in NFC, without control characters, blanks made single, at most 4,096
    characters long; "" for null."""
    text = unicodedata.normalize("NFC", (caption or "")[: 4 * MAX_CAPTION_CHARS])
    printable = (" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join("".join(printable).split())[:MAX_CAPTION_CHARS].rstrip()
