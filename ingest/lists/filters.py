"""Which rows of a list are left out before they are fetched, and what captions are stored as.

A `RowFilter` is small and travels with every shard; the list of opt-outs stays on storage.
"""

import hashlib
import math
import os
import unicodedata
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import UseAppendAction

from cluster.base.files import Json
from ingest.lists.columns import FURTHER_CAPTIONS, Column, find_name, require_fit
from ingest.lists.exclusions import Exclusions, decode_list

if TYPE_CHECKING:
    import pyarrow as pa

# For each limit: the columns in which lists of the LAION family keep what it needs, and its reason.
SCORES = {
    "min_similarity": (
        ("similarity", "clip_similarity_vitb32", "clip_b32_similarity_score"),
        "low_similarity",
    ),
    "min_aesthetic": (
        ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score_laion_v2"),
        "low_aesthetic",
    ),
    "max_punsafe": (("punsafe", "nsfw_score_opennsfw2"), "unsafe"),
    "max_pwatermark": (("pwatermark", "watermark_score"), "watermarked"),
}
TAGS = {"nsfw": (("NSFW", "nsfw"), "nsfw"), "language": (("LANGUAGE", "language"), "language")}
LIMITS = {**SCORES, **TAGS}
HASHES = ("sha256", "md5")  # a column of either name, in any case, is verified; the first decides
MAX_CAPTION_CHARS = 4096
# Columns of a shard's table, bool: an earlier row of the list has this URL; the row has no such
# cells as its list
REPEATED, MALFORMED = "_repeated", "_malformed"


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
    """list of hosts and URLs to leave out: a text or CSV file, a hosts file, or a filter list"""
    min_pixels: int = 0
    """least area of the image as fetched, px"""
    max_aspect_ratio: float | None = None
    """greatest ratio of the image's longer side to its shorter one"""


@dataclass(frozen=True, kw_only=True)
class RowFilter:
    """The filters of a download, checked against the list's columns.

    columns: of the list, by the limit of `LIMITS` that needs it; hashes: columns of the digests
    that the fetched bytes must have, by algorithm.
    """

    config: FilterConfig
    columns: dict[str, str]
    hashes: dict[str, str]
    opt_out_digest: str = ""

    @classmethod
    def open(cls, config: FilterConfig, schema: "pa.Schema") -> "RowFilter":
        """Check `config` against the list's columns; ValueError names what does not fit."""
        import pyarrow as pa

        for name in ("min_caption_chars", "min_caption_tokens", "min_pixels"):
            if getattr(config, name) < 0:
                flag = name.replace("_", "-")
                raise ValueError(f"--filters.{flag}: found {getattr(config, name)}, expected >= 0")
        if config.max_aspect_ratio is not None and config.max_aspect_ratio < 1:
            raise ValueError(
                f"--filters.max-aspect-ratio: found {config.max_aspect_ratio}, expected 1 or more"
            )

        # Columns of scores and tags
        columns = {}
        for limit, (names, _) in LIMITS.items():
            if getattr(config, limit) in (None, ()):
                continue
            column = find_name(names, schema.names)
            if column is None:
                raise ValueError(
                    f"--filters.{limit.replace('_', '-')}: no column ({', '.join(names)}); "
                    f"found {', '.join(schema.names)}"
                )
            columns[limit] = column

        # Columns of digests
        found = {kind: find_name((kind,), schema.names) for kind in HASHES}
        hashes = {kind: name for kind, name in found.items() if name is not None}
        if config.require_hash and not hashes:
            raise ValueError(
                "--filters.require-hash: no column (sha256, md5); found " + ", ".join(schema.names)
            )
        if config.opt_out and "://" not in config.opt_out:  # a worker has another working directory
            config = replace(config, opt_out=os.path.abspath(config.opt_out))
        digest = hashlib.sha256(_read_file(config.opt_out)).hexdigest() if config.opt_out else ""
        if digest:
            print(f"opt-out list: {_read_opt_outs(config.opt_out, digest)}", flush=True)
        row_filter = cls(config=config, columns=columns, hashes=hashes, opt_out_digest=digest)
        for name in row_filter.scores:
            column = Column(name=name, source=name, need="number", type=pa.float64())
            require_fit(schema.field(name).type, column)
        return row_filter

    @property
    def scores(self) -> tuple[str, ...]:
        """The list's columns of numbers that the rows given to this filter must have."""
        return tuple(column for limit, column in self.columns.items() if limit in SCORES)

    @property
    def texts(self) -> tuple[str, ...]:
        """The list's columns of tags and digests that the rows given to this filter must have."""
        tags = (column for limit, column in self.columns.items() if limit in TAGS)
        return (*tags, *self.hashes.values())

    def problems(self, rows: "pa.Table") -> dict[int, str]:
        """Return the reason of each row that is left out before it is fetched, by its number.

        rows: url, caption (normalised), `scores`, `texts`, `MALFORMED` where there are such rows,
        and, if repeated rows are left out, `REPEATED`.
        """
        problems = {
            n: "malformed_row" if row.get(MALFORMED) else self._problem(row)
            for n, row in enumerate(rows.to_pylist())
        }
        return {number: problem for number, problem in problems.items() if problem is not None}

    def _problem(self, row: Json) -> str | None:
        config = self.config

        # The row's URL and digests
        if config.opt_out:
            opt_outs = _read_opt_outs(config.opt_out, self.opt_out_digest)
            if opt_outs.cover(row["url"] or ""):
                return "opt_out_list"
        if "urls" in config.unique and row[REPEATED]:
            return "duplicate_url"
        if config.require_hash and not any(row[name] for name in self.hashes.values()):
            return "no_hash"

        # Scores and tags
        for limit, column in self.columns.items():
            value, bound = row[column], getattr(config, limit)
            if value is None or (isinstance(value, float) and math.isnan(value)):
                if not config.null_scores:
                    return "null_score"
                continue
            if limit in TAGS:
                passes = str(value).lower() in {tag.lower() for tag in bound}
            else:
                passes = value >= bound if limit.startswith("min") else value <= bound
            if not passes:
                return LIMITS[limit][1]

        # The caption
        caption = row["caption"] or ""
        if len(caption) < config.min_caption_chars:
            return "short_caption"
        if config.max_caption_chars is not None and len(caption) > config.max_caption_chars:
            return "long_caption"
        if config.min_caption_tokens or config.max_caption_tokens is not None:
            num_tokens = len(_tokenizer().encode(caption))
            if num_tokens < config.min_caption_tokens:
                return "few_tokens"
            if config.max_caption_tokens is not None and num_tokens > config.max_caption_tokens:
                return "many_tokens"
        return None


@lru_cache(maxsize=1)
def _tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@lru_cache(maxsize=1)
def _read_opt_outs(path: str, digest: str) -> Exclusions:
    """Read the list once a process; OSError if it is not the one that the download began with,
    ValueError for a line that says nothing."""
    data = _read_file(path)
    if hashlib.sha256(data).hexdigest() != digest:
        raise OSError(f"{path}: the opt-out list changed during the download; rerun")
    try:
        return Exclusions.of(decode_list(data))
    except ValueError as error:
        raise ValueError(f"--filters.opt-out {path}: {error}") from None


def _read_file(path: str) -> bytes:
    from fsspec.core import url_to_fs

    try:
        storage, name = url_to_fs(path)
        return bytes(storage.cat_file(name))
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise ValueError(f"--filters.opt-out {path}: {error}") from None


def normalised(rows: "pa.Table") -> "pa.Table":
    """Return `rows` with every caption normalised, further ones too; null becomes empty."""
    import pyarrow as pa

    captions = [normalise_caption(caption) for caption in rows["caption"].to_pylist()]
    column = rows.column_names.index("caption")
    rows = rows.set_column(column, "caption", pa.array(captions, pa.string()))
    if FURTHER_CAPTIONS in rows.column_names:
        column = rows.column_names.index(FURTHER_CAPTIONS)
        lists = [[normalise_caption(text) for text in v or ()] for v in rows[column].to_pylist()]
        more = [[text for text in texts if text] for texts in lists]
        rows = rows.set_column(column, FURTHER_CAPTIONS, pa.array(more, pa.list_(pa.string())))
    return rows


def normalise_caption(caption: str | None) -> str:
    """Return a caption in NFC, without control characters, each run of spaces reduced to one, at
    most 4,096 characters long; "" for null."""
    text = unicodedata.normalize("NFC", (caption or "")[: 4 * MAX_CAPTION_CHARS])
    printable = (" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join("".join(printable).split())[:MAX_CAPTION_CHARS].rstrip()
