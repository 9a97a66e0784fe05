"""Opt-outs: answer headers, robots directives, lists of domains and URLs.

Pure functions and values; `ingest.fetching.robots` requests a host's robots.txt.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

OUR_AGENT = "minidalle2"  # as the user agent begins
VALUED_DIRECTIVES = frozenset(
    {"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"}
)
OPT_OUT_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_UNAVAILABLE_AFTER = re.compile(r"(?:^|,)\s*unavailable_after\s*:(.*)$", re.IGNORECASE)


def opted_out(robots_tags: Iterable[str], now: datetime | None = None) -> bool:
    """Return whether X-Robots-Tag header values forbid use, for everybody or in general.

    A value is "noai, noindex" or "agent: noai"; only our own agent's is for us. Some directives
    have a value of their own, as in "noai, max-snippet:-1" or "unavailable_after: 25 Jun 2010
    15:00:00 GMT", which forbids use once that moment has passed, and if it cannot be parsed.
    now: with a time zone; None for the clock's.
    """
    for value in robots_tags:
        agent, colon, rest = value.partition(":")
        agent = agent.strip().lower()
        if colon and "," not in agent and agent not in VALUED_DIRECTIVES:
            if agent != OUR_AGENT:
                continue
            value = rest
        if any(directive.strip().lower() in OPT_OUT_DIRECTIVES for directive in value.split(",")):
            return True
        dated = _UNAVAILABLE_AFTER.search(value)
        if dated is not None and _has_passed(dated[1], now or datetime.now(UTC)):
            return True
    return False


def reserved(tdm_reservation: str | None) -> bool:
    """Return whether a tdm-reservation header reserves the rights of text and data mining.

    TDM Reservation Protocol (W3C community group, 2024): "1" reserves them, "0" does not.
    """
    return (tdm_reservation or "").strip() == "1"


def _has_passed(text: str, now: datetime) -> bool:
    """Return whether the date that `text` starts with has passed; it may contain one comma."""
    first, comma, rest = text.partition(",")
    for date in (f"{first}{comma}{rest.partition(',')[0]}".strip(), first.strip()):
        for parse in (datetime.fromisoformat, parsedate_to_datetime):
            try:
                moment = parse(date)
            except ValueError:
                continue
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) <= now
    return True


@dataclass(frozen=True, kw_only=True)
class OptOuts:
    """Domains and URLs to leave out."""

    domains: frozenset[str]
    urls: frozenset[str]

    @classmethod
    def of(cls, lines: Iterable[str]) -> "OptOuts":
        """Parse lines such as example.com, *.example.com or https://example.com/a.jpg; blank lines
        and lines that start with # are skipped."""
        entries = {line.strip() for line in lines}
        entries = {entry for entry in entries if entry and not entry.startswith("#")}
        urls = {entry for entry in entries if "/" in entry}
        domains = (_ascii_host(entry.removeprefix("*.")) for entry in entries - urls)
        return cls(domains=frozenset(domains), urls=frozenset(urls))

    def forbid(self, url: str) -> bool:
        """Return whether `url`, its host or a domain above its host is to be left out."""
        try:
            host = _ascii_host(urlsplit(url.strip()).hostname or "")
        except ValueError:  # no URL: the fetcher says so
            return False
        labels = host.split(".")
        above = (".".join(labels[i:]) for i in range(len(labels)))
        return url.strip() in self.urls or any(domain in self.domains for domain in above)


def _ascii_host(host: str) -> str:
    host = host.lower().rstrip(".")
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError:  # too long or empty labels; no host of the web
        return host
