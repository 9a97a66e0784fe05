"""What must never be stored again: URLs and images that somebody asked to be forgotten.

    <images>/_forgotten/<digest>.json    one request: when, and the sha256 of each URL and image

URLs are kept as digests only: the list itself need not be kept to be honoured.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from urllib.parse import urlsplit, urlunsplit

from cluster.base.files import canonical_json, digest_of
from ingest.store.storage import storage_of

FORGOTTEN = "forgotten"  # the reason of a row whose URL or image is to be forgotten
SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    """urls: of each URL its `url_digest`; images: sha256 of the bytes as fetched, hex."""

    urls: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()

    @classmethod
    def of(cls, lines: Iterable[str]) -> "Forgotten":
        """Read a request: a URL or the sha256 of an image a line; blank lines and # are left out.

        Raises ValueError for a line that is neither.
        """
        urls, images = set(), set()
        for number, line in enumerate(lines, 1):
            entry = line.strip()
            if not entry or entry.startswith("#"):
                continue
            if SHA256.fullmatch(entry):
                images.add(entry.lower())
            elif "://" in entry:
                urls.add(url_digest(entry))
            else:
                raise ValueError(f"line {number}: found {entry[:80]!r}, expected a URL or a sha256")
        return cls(urls=frozenset(urls), images=frozenset(images))

    def __bool__(self) -> bool:
        return bool(self.urls or self.images)

    def __or__(self, other: "Forgotten") -> "Forgotten":
        return Forgotten(urls=self.urls | other.urls, images=self.images | other.images)

    def covers(self, url: str | None, sha256: str | None = None) -> bool:
        """Say whether a row with this URL, or an image of this digest, is to be forgotten."""
        of_url = bool(self.urls) and url is not None and url_digest(url) in self.urls
        return of_url or (sha256 is not None and sha256.lower() in self.images)


def url_digest(url: str) -> str:
    """Return the sha256 of a URL, hex; case of scheme and host, and a fragment, do not matter."""
    text = url.strip()
    try:
        parts = urlsplit(text)
    except ValueError:  # no URL: compared as it is
        spelt = text
    else:
        _, at, host = parts.netloc.rpartition("@")
        netloc = parts.netloc[: len(parts.netloc) - len(host)] + host.lower()
        spelt = urlunsplit((parts.scheme.lower(), netloc, parts.path, parts.query, ""))
    return hashlib.sha256(spelt.encode("utf-8", "surrogatepass")).hexdigest()


def read_request(path: str) -> Forgotten:
    """Read the file of a request; ValueError where it is absent, empty, or a line is neither."""
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            lines = file.read().decode("utf-8", "surrogateescape").splitlines()  # type: ignore[union-attr]
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise ValueError(f"--forget {path}: {error}") from None
    try:
        found = Forgotten.of(lines)
    except ValueError as error:
        raise ValueError(f"--forget {path}: {error}") from None
    if not found:
        raise ValueError(f"--forget {path}: found nothing, expected a URL or a sha256 a line")
    return found


def record(root: str | os.PathLike[str], request: Forgotten) -> None:
    """Write a request down, from when on every fetch honours it; again is no error."""
    content = {"urls": sorted(request.urls), "images": sorted(request.images)}
    moment = datetime.now(UTC).isoformat(timespec="seconds")
    data = canonical_json({"requested": moment, **content})
    storage_of(root).create(f"_forgotten/{digest_of(content)}.json", data)


def read_forgotten(root: str | os.PathLike[str]) -> Forgotten:
    """Return everything that was to be forgotten so far."""
    names = (name for name in storage_of(root).names("_forgotten") if name.endswith(".json"))
    return _read(os.fspath(root), tuple(name for name in names if not name.startswith(".")))


@lru_cache(maxsize=4)
def _read(root: str, names: tuple[str, ...]) -> Forgotten:
    found = Forgotten()
    for name in names:
        request = json.loads(storage_of(root).read(f"_forgotten/{name}"))
        found |= Forgotten(urls=frozenset(request["urls"]), images=frozenset(request["images"]))
    return found
