"""Opt-outs that an answer states: X-Robots-Tag and tdm-reservation.

Pure functions and values; `ingest.fetching.robots` requests a host's robots.txt.
"""

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

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
