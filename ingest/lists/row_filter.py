"""The filters of one download, as its shard tasks carry them: the opt-out list stays on storage."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from ingest.lists.filters import (
    SCORES,
    FilterConfig,
    filter_columns,
    hash_columns,
    normalise_caption,
    row_problem,
)
from ingest.lists.opt_outs import OptOuts

if TYPE_CHECKING:
    import pyarrow as pa

REPEATED = "_repeated"  # column of a shard's table: bool, an earlier row of the list has this URL


@dataclass(frozen=True, kw_only=True)
class RowFilter:
    """Small enough to travel with every task. columns: filter -> column of the list; hashes:
    algorithm -> column of the digests that the fetched bytes must have."""

    config: FilterConfig
    columns: dict[str, str]
    hashes: dict[str, str]
    opt_out_digest: str = ""

    @classmethod
    def open(cls, config: FilterConfig, schema: "pa.Schema") -> "RowFilter":
        """Check `config` against the list's columns; ValueError names what does not fit."""
        from pyarrow import types

        for name in ("min_caption_chars", "min_caption_tokens", "min_pixels"):
            if getattr(config, name) < 0:
                flag = name.replace("_", "-")
                raise ValueError(f"--filters.{flag}: found {getattr(config, name)}, expected >= 0")
        if config.max_aspect_ratio is not None and config.max_aspect_ratio < 1:
            raise ValueError(
                f"--filters.max-aspect-ratio: found {config.max_aspect_ratio}, expected 1 or more"
            )
        columns = filter_columns(config, schema.names)
        hashes = hash_columns(schema.names)
        if config.require_hash and not hashes:
            raise ValueError(
                "--filters.require-hash: no column (sha256, md5); found " + ", ".join(schema.names)
            )
        for column in hashes.values():
            if not (types.is_string(kind := schema.field(column).type) or types.is_null(kind)):
                raise ValueError(f"--urls: column {column} is {kind}, expected digests in hex")
        for column in (columns[name] for name in SCORES if name in columns):
            kind = schema.field(column).type
            if not (types.is_floating(kind) or types.is_integer(kind) or types.is_null(kind)):
                raise ValueError(f"--filters: column {column} is {kind}, expected numbers")
        if config.opt_out and "://" not in config.opt_out:  # a worker has a folder of its own
            config = replace(config, opt_out=os.path.abspath(config.opt_out))
        digest = hashlib.sha256(_read(config.opt_out)).hexdigest() if config.opt_out else ""
        return cls(config=config, columns=columns, hashes=hashes, opt_out_digest=digest)

    @property
    def looked_at(self) -> tuple[str, ...]:
        """The list's columns that the rows given to this filter must have."""
        return (*self.columns.values(), *self.hashes.values())

    def problems(self, rows: "pa.Table") -> dict[int, str]:
        """Return the reason of each row that is left out before it is fetched, by its number.

        rows: url, caption (normalised), the columns looked at and, if repeated rows are left out,
        `REPEATED`.
        """
        config, count = self.config, _token_counter()
        opt_outs = _opt_outs(config.opt_out, self.opt_out_digest) if config.opt_out else None
        found = {}
        for number, row in enumerate(rows.to_pylist()):
            if opt_outs is not None and opt_outs.forbid(row["url"] or ""):
                problem = "opt_out_list"
            elif "urls" in config.unique and row[REPEATED]:
                problem = "duplicate_url"
            elif config.require_hash and not any(row[name] for name in self.hashes.values()):
                problem = "no_hash"
            else:
                problem = row_problem(config, self.columns, row, count)
            if problem is not None:
                found[number] = problem
        return found


def normalised(rows: "pa.Table") -> "pa.Table":
    """Return `rows` with every caption normalised; null becomes empty."""
    import pyarrow as pa

    captions = [normalise_caption(caption) for caption in rows["caption"].to_pylist()]
    place = rows.column_names.index("caption")
    return rows.set_column(place, "caption", pa.array(captions, pa.string()))


def _token_counter() -> Callable[[str], int]:
    """Return what counts tokens of CLIP's vocabulary; open_clip is imported at its first use."""

    def count(caption: str) -> int:
        return len(_tokenizer().encode(caption))

    return count


@lru_cache(maxsize=1)
def _tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@lru_cache(maxsize=1)
def _opt_outs(path: str, digest: str) -> OptOuts:
    """Read the list once a process; OSError if it is not the one that the download began with."""
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != digest:
        raise OSError(f"{path}: the opt-out list changed during the download; rerun")
    return OptOuts.of(data.decode("utf-8", "replace").splitlines())


def _read(path: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return file.read()  # type: ignore[union-attr]
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise ValueError(f"--filters.opt-out {path}: {error}") from None
