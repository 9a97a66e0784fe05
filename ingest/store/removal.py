"""Removing samples from committed shards, and the requests that nothing of a list be stored again.

    <images>/_forgotten/<digest>.json    one request: when, and the sha256 of each URL and image

A shard is rewritten under its old name, as the next generation. Kept samples keep their bytes and
keys, and every row of the list keeps its row of the table: what was stored becomes filtered, with
a reason. Requests keep digests of URLs only, so the requested list itself need not be kept.
"""

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, cast
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from cluster.base.files import canonical_json, digest_of
from cluster.base.outcomes import RETRIED
from ingest.captions import FURTHER_ARRAYS, FurtherCaptions, further_columns
from ingest.lists.exclusions import Exclusions, decode_list, keys_of
from ingest.shards import (
    CAPTIONS_END,
    EMBED_ARRAYS,
    IMAGE_TOKENS,
    SIZE_COLUMNS,
    STORED,
    index_tar,
    outcome,
)
from ingest.store.commits import Attempt, Commit, is_record
from ingest.store.snapshots import FORGOTTEN_FOLDER
from ingest.store.storage import Root, is_remote, local_path, storage_of

FORGOTTEN = "forgotten"  # the reason of a row whose URL or image was requested to be forgotten


# -- requests ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    """urls: digests of hosts and URLs, see `url_digests`; images: sha256 of each image's bytes as
    fetched; all in hex."""

    urls: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()

    @classmethod
    def of(cls, lines: Iterable[str]) -> "Forgotten":
        """Parse a request: hosts and URLs as `Exclusions.of` takes them, and sha256 of images.

        Raises ValueError for a line that is none of them.
        """
        request = Exclusions.of(lines, images=True)
        return cls(urls=frozenset(map(_digest, request.keys)), images=request.images)

    def __bool__(self) -> bool:
        return bool(self.urls or self.images)

    def __or__(self, other: "Forgotten") -> "Forgotten":
        return Forgotten(urls=self.urls | other.urls, images=self.images | other.images)

    def matches(self, url: str | None, sha256: str | None = None) -> frozenset[str]:
        """Return which of its digests cover a row with this URL, or an image of this digest."""
        urls = self.urls.intersection(url_digests(url)) if self.urls and url is not None else ()
        return self.images.intersection([(sha256 or "").lower()]).union(urls)

    def covers(self, url: str | None, sha256: str | None = None) -> bool:
        """Return whether a row with this URL, or an image of this digest, is to be forgotten."""
        return bool(self.matches(url, sha256))


def url_digests(url: str) -> Iterator[str]:
    """Yield the digests by which a request may cover a URL: sha256, hex."""
    yield from map(_digest, keys_of(url))

    # Requests of earlier versions: case of scheme and host, and a fragment, do not matter
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        return
    user, at, host = parts.netloc.rpartition("@")
    netloc = user + at + host.lower()
    yield _digest(urlunsplit((parts.scheme.lower(), netloc, parts.path, parts.query, "")))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_request(path: str) -> Forgotten:
    """Read the file of a request; ValueError if it is absent or empty, or a line is invalid."""
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            request = Forgotten.of(decode_list(cast(IO[bytes], file).read()))
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise ValueError(f"--forget {path}: {error}") from None
    if not request:
        raise ValueError(f"--forget {path}: found nothing, expected hosts, URLs or sha256 digests")
    return request


def record_request(root: Root, request: Forgotten) -> None:
    """Record a request, which every later fetch honours; recording it again is no error."""
    content = {"urls": sorted(request.urls), "images": sorted(request.images)}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    data = canonical_json({"requested": now, **content})
    storage_of(root).create(f"{FORGOTTEN_FOLDER}/{digest_of(content)}.json", data)


def read_forgotten(root: Root) -> Forgotten:
    """Return the union of all requests so far."""
    names = storage_of(root).names(FORGOTTEN_FOLDER)
    return _read_records(os.fspath(root), tuple(filter(is_record, names)))


@lru_cache(maxsize=4)
def _read_records(root: str, names: tuple[str, ...]) -> Forgotten:
    union = Forgotten()
    for name in names:
        record = json.loads(storage_of(root).read(f"{FORGOTTEN_FOLDER}/{name}"))
        union |= Forgotten(urls=frozenset(record["urls"]), images=frozenset(record["images"]))
    return union


# -- rewriting shards ----------------------------------------------------------------------------


@contextmanager
def local_files(root: Root, commit: Commit) -> Iterator[Path]:
    """Yield a local folder that holds the files of a commit: the root itself, or a copy."""
    if not is_remote(root):
        yield local_path(root)
        return
    with tempfile.TemporaryDirectory(prefix="minidalle2-") as folder:
        for name in set(commit.own_names) & set(commit.files):
            with storage_of(root).open(name) as source, open(f"{folder}/{name}", "wb") as target:
                shutil.copyfileobj(source, target)
        yield Path(folder)


def copy_tar(source: Path, target: Path, *, without: Collection[str]) -> None:
    """Copy a tar byte for byte, except the members of some keys."""
    with tarfile.open(source, "r:") as old, tarfile.open(target, "x") as new:
        for member in old:
            if member.name.partition(".")[0] not in without:
                new.addfile(member, old.extractfile(member))


def keep_captions(source: Path, target: Path, name: str, removed: Sequence[int]) -> None:
    """Write the index and the captions of a shard whose tar is elsewhere, without some samples."""
    index = np.load(source / f"{name}.idx.npy", allow_pickle=False)
    kept = np.delete(index, removed, axis=0)
    captions = (source / f"{name}.captions").read_bytes()
    texts = [captions[start : start + size] for start, size in kept[:, 2:].tolist()]
    (target / f"{name}.captions").write_bytes(b"".join(texts) + CAPTIONS_END)
    kept[:, 2] = np.cumsum(kept[:, 3]) - kept[:, 3]
    np.save(target / f"{name}.idx.npy", kept, allow_pickle=False)


def remove_rows(root: Root, old: Commit, reasons: Mapping[int, str]) -> Commit:
    """Rewrite an image shard without the samples of some rows of its table.

    reasons: row of the table -> why it is removed; where that is FORGOTTEN, the table keeps nothing
    of the row but its key and outcome. The caller holds the folder (`exclusive`).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = old.shard
    with local_files(root, old) as folder, Attempt(root, name) as attempt:
        table = pq.ParquetFile(folder / f"{name}.parquet").read()
        columns = table.to_pydict()
        stored = [row for row, status in enumerate(columns["status"]) if status == STORED]

        # The tar, or the captions of one that is elsewhere, and the index, without the samples
        removed = [place for place, row in enumerate(stored) if row in reasons]
        if old.elsewhere:
            keep_captions(folder, attempt.path, name, removed)
        else:
            tar = attempt.path / f"{name}.tar"
            keys = {columns["key"][stored[place]] for place in removed}
            copy_tar(folder / tar.name, tar, without=keys)
            np.save(attempt.path / f"{name}.idx.npy", index_tar(tar), allow_pickle=False)

        # The table: every row stays, with another outcome; a failed row keeps its own
        for row, reason in reasons.items():
            if columns["status"][row] == STORED:
                columns["status"][row], columns["error"][row] = "filtered", reason
                for column in SIZE_COLUMNS:
                    columns[column][row] = None
            if reason == FORGOTTEN:
                for column in set(columns) - {"key", "status", "error"}:
                    columns[column][row] = None
        table = pa.table(columns, schema=table.schema)
        pq.write_table(table, attempt.path / f"{name}.parquet")

        outcomes = map(outcome, columns["status"], columns["error"])
        retried = {n: c for n, c in old.counts.items() if n.startswith(f"{RETRIED}:")}
        return attempt.supersede(
            old,
            removed,
            counts={**dict(sorted(Counter(outcomes).items())), **retried},
            config_hash=old.config_hash,
        )


def remove_embeddings(root: Root, old: Commit, images: Commit) -> Commit | None:
    """Rewrite an embedding shard without the samples that its image shard has lost since.

    None: nothing to do, or the shard was not made from an earlier generation of `images`.
    """
    import pyarrow.parquet as pq

    earlier = images.superseded.get(old.config_hash)
    if earlier is None:
        return None
    name, removed = old.shard, earlier["removed"]
    with local_files(root, old) as folder, Attempt(root, name) as attempt:
        has_tokens = f"{name}.{IMAGE_TOKENS}.npy" in old.files
        for column in (*EMBED_ARRAYS, *([IMAGE_TOKENS] if has_tokens else [])):
            array = np.load(folder / f"{name}.{column}.npy", allow_pickle=False)
            kept = np.delete(array, removed, axis=0)
            np.save(attempt.path / f"{name}.{column}.npy", kept, allow_pickle=False)
        table = pq.ParquetFile(folder / f"{name}.keys.parquet").read()
        rows = np.delete(np.arange(table.num_rows), removed)
        for column in further_columns(name, old.files):
            paths = (folder / f"{name}.{column}.{array}.npy" for array in FURTHER_ARRAYS)
            arrays = (np.load(path, allow_pickle=False) for path in paths)
            FurtherCaptions.of(*arrays).at(rows).write(attempt.path, f"{name}.{column}")
        numbers = np.arange(len(rows), dtype=np.int32)
        table = table.take(rows).set_column(0, table.schema.field("row"), [numbers])
        pq.write_table(table, attempt.path / f"{name}.keys.parquet")
        counts = {"embedded": len(rows)}
        return attempt.supersede(old, removed, counts=counts, config_hash=images.digest)
