"""Why a row did not become a sample: the closed set of reasons, and the predicates behind them.

Pure functions over bytes, headers and sizes; nothing here opens a file or a connection.
"""

import io
import warnings
from collections.abc import Iterable

# The row was attempted and could not be had.
FAILED = (
    "invalid_url", "unresolved", "address_refused", "unreachable", "tls_failed", "timeout",
    "truncated", "too_large", "too_many_redirects", "not_found", "forbidden", "rate_limited",
    "client_error", "server_error", "not_an_image", "undecodable",
)  # fmt: skip
# The row could be had and is left out on purpose.
FILTERED = ("opted_out", "too_small", "too_many_pixels")

OPT_OUT_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def outcome(error: str | None) -> tuple[str, str | None]:
    """Sort an error into ("success" | "filtered" | "failed", reason).

    error: None, one of the reasons above, or the free text of img2dataset's Resizer, which is
    "image too small" or whatever the decoder said.
    """
    if error is None:
        return "success", None
    reason = "too_small" if error == "image too small" else error
    if reason in FILTERED:
        return "filtered", reason
    return "failed", reason if reason in FAILED else "undecodable"


def opted_out(robots_tags: Iterable[str]) -> bool:
    """Say whether X-Robots-Tag header values forbid use, for everybody or in general.

    A value is "noai, noindex" or "agent: noai"; the latter addresses another agent than ours.
    """
    for value in robots_tags:
        if ":" in value:
            continue
        if any(part.strip().lower() in OPT_OUT_DIRECTIVES for part in value.split(",")):
            return True
    return False


def may_be_image(content_type: str | None) -> bool:
    """Say whether a Content-Type can announce an image; servers that say nothing may."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    return kind in ("", "application/octet-stream", "binary/octet-stream") or (
        kind.startswith("image/") and kind != "image/svg+xml"
    )


def header_problem(data: bytes, *, max_pixels: int) -> str | None:
    """Judge an image by its header, before anything is decoded; None if it may be.

    An image with transparency counts four times: blending it onto white is done in float64.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
                pixels = image.width * image.height * (4 if transparent else 1)
    except Image.DecompressionBombError:
        return "too_many_pixels"
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for bytes of no such format
        return "not_an_image"
    return "too_many_pixels" if pixels > max_pixels else None
