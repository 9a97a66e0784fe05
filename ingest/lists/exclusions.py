"""Lists of what its owners do not want used, in the forms that such lists have.

A host covers itself and the hosts below it. A URL that ends with a slash covers what is below it,
any other URL itself alone. Scheme, case of the host, fragment and percent-encoding do not matter.
"""

import csv
import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

SHA256 = re.compile(r"[0-9a-fA-F]{64}")
# Columns of a list with a header that name what is wanted out; further ones are notes
COLUMNS = {
    "domain", "domains", "host", "hosts", "hostname", "origin", "site", "website", "url", "urls",
    "sha256",
}  # fmt: skip
EXPECTED = "a host such as example.com, or a URL whose only * is a /* at its end"
_SCHEME = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]\s]+?)\.?(?::(\d*|\*))?", re.IGNORECASE)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NOTE = re.compile(r"\s+#.*")
_COMMENT = re.compile(r"[#!]|\[Adblock", re.IGNORECASE)
_COSMETIC = re.compile("#[@?$]?#")  # a filter list's rule on parts of a page
_DEFAULT_PORTS = ("", "*", "80", "443")


@dataclass(frozen=True, kw_only=True)
class Exclusions:
    """Keys of hosts and URLs, as `keys_of` has them, and sha256 digests of images, hex."""

    keys: frozenset[str]
    images: frozenset[str] = frozenset()

    @classmethod
    def of(cls, lines: Iterable[str], *, images: bool = False) -> "Exclusions":
        """Parse a list; images: digests may be in it as well.

        An entry a line: a host (also as *.host, .host, host:port or an origin), or a URL; or the
        first cell, or the columns of a known name, of CSV; or a line of a hosts file or of a filter
        list (||host^). Blank lines and comments are skipped. Raises ValueError with the number of a
        line that is understood as nothing.
        """
        keys, digests, columns = set(), set(), None
        for number, line in enumerate(lines, 1):
            text = _NOTE.sub("", line.removeprefix("\ufeff")).strip()
            if not text or _COMMENT.match(text):
                continue
            cells = _cells(text)
            if columns is None:  # the first line may be a header
                named = COLUMNS if images else COLUMNS - {"sha256"}
                columns = [i for i, cell in enumerate(cells) if cell.lower() in named]
                if columns:
                    continue
            wanted = [cells[i] for i in columns if i < len(cells)] if columns else cells[:1]
            if not columns and "," in text and "/" in cells[0] and not re.search(r'["\s]', text):
                wanted.append(text)  # a comma may be part of a URL: either is left out
            hashes = {e.lower() for e in wanted if images and SHA256.fullmatch(e)}
            found = {e: _keys_of_entry(e) for e in wanted if e and e.lower() not in hashes}
            if not (found or hashes) or not all(found.values()):
                raise ValueError(
                    f"line {number}: found {line.strip()[:80]!r}, expected {EXPECTED}"
                    f"{', or a sha256' if images else ''}"
                )
            keys.update(*found.values())
            digests |= hashes
        return cls(keys=frozenset(keys), images=frozenset(digests))

    def cover(self, url: str) -> bool:
        """Return whether a URL, or its host, is in the list."""
        return any(key in self.keys for key in keys_of(url))

    def __str__(self) -> str:
        num_urls = sum("/" in key for key in self.keys)
        digests = f", {len(self.images):,} images" if self.images else ""
        return f"{len(self.keys) - num_urls:,} hosts, {num_urls:,} URLs{digests}"


def keys_of(url: str) -> Iterator[str]:
    """Yield the keys by which a list may cover a URL: hosts such as example.com, then places such
    as example.com/a/ and example.com:8080/a/b.jpg?c=1; none for what is no URL."""
    try:
        parts = urlsplit(url.strip())
        host, port = ascii_host(parts.hostname or ""), str(parts.port or "")
    except ValueError:  # the fetcher says so
        return
    if not host:
        return
    labels = [host] if ":" in host else host.split(".")
    yield from (".".join(labels[i:]) for i in range(len(labels)))
    place, path = host if port in _DEFAULT_PORTS else f"{host}:{port}", unquote(parts.path) or "/"
    yield place + path + (f"?{unquote(parts.query)}" if parts.query else "")
    yield from (place + path[: i + 1] for i, sign in enumerate(path) if sign == "/")


def ascii_host(host: str) -> str:
    """Return a host in lower case, without a final dot, in Punycode."""
    host = host.lower().rstrip(".")
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError:  # too long or empty labels; no host of the web
        return host


def decode_list(data: bytes) -> list[str]:
    """Return the lines of a text file, UTF-8, or UTF-16 where it begins so."""
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return re.split(r"\r\n|\r|\n", data.decode("utf-16" if wide else "utf-8", "replace"))


def _cells(text: str) -> list[str]:
    """Split a line at the first of tab, semicolon and comma that it has, in this order; one of a
    hosts file stays whole."""
    if _is_sink(text.split()[0]):
        return [text]
    delimiter = next((sign for sign in "\t;," if sign in text), ",")
    return [cell.strip() for cell in next(csv.reader([text], delimiter=delimiter))]


def _keys_of_entry(entry: str) -> set[str]:
    """Return the keys of a host or URL, of all hosts of a line of a hosts file; empty for what is
    none."""
    first, *others = entry.split() or [""]
    if others and _is_sink(first):
        hosts = [ascii_host(each) for each in others]
        return set(hosts) if all(map(_is_host, hosts)) else set()
    if others or _COSMETIC.search(first):
        return set()
    rule = first.startswith("|")
    if rule:  # a filter list's; what it is limited to, after $, does not matter here
        first = first.lstrip("|").partition("$")[0].rstrip("^|")
    scheme = _SCHEME.match(first)
    rest = first[scheme.end() :] if scheme else first
    authority, slash, path = rest.partition("#")[0].partition("/")
    if scheme:
        authority = authority.rpartition("@")[2]
    named = _AUTHORITY.fullmatch(authority.removeprefix("*").removeprefix("."))
    if named is None:
        return set()
    host, port = ascii_host(named[1].strip("[]")), named[2] or ""
    certain = scheme or slash or rule or named[2] or authority[0] in "*." or "." in host
    if not _is_host(host) or not (certain or host == "localhost"):  # a word is no host
        return set()
    path = path.removesuffix("*") if path in ("*", "") or path.endswith("/*") else path
    if not path:
        return {host}
    if "*" in path or "^" in path:
        return set()
    place, query = host if port in _DEFAULT_PORTS else f"{host}:{port}", path.partition("?")
    key = f"{place}/{unquote(query[0])}" + (f"?{unquote(query[2])}" if query[2] else "")
    return {key, f"{key}/"} if rule and not key.endswith("/") else {key}


def _is_sink(text: str) -> bool:
    """Return whether a text is one of the addresses with which lines of hosts files begin."""
    if not _is_address(text):
        return False
    address = ipaddress.ip_address(text.partition("%")[0])
    local = address.is_loopback or address.is_link_local or address.is_multicast
    return local or address.is_unspecified or text == "255.255.255.255"


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True


def _is_host(host: str) -> bool:
    return _is_address(host) or (
        len(host) <= 253 and all(_LABEL.fullmatch(label) for label in host.split("."))
    )
