"""Laws of robots.txt: asked for once a host, kept to at every hop; in doubt nothing is taken."""

from collections.abc import Callable

import pytest
from _lists import fetcher_of

from ingest.fetching.robots import (
    FAILURE_KEPT_SECONDS,
    KEPT_SECONDS,
    RobotsCache,
    RobotsUnavailableError,
)

ORIGIN = ("http", "a.example", 80)


def test_it_is_asked_for_once_and_kept_to(site):
    site.put("/robots.txt", b"User-agent: *\nDisallow: /private/\n", kind="text/plain")
    found = fetcher_of(site)
    for path in ("/a", "/b"):
        assert found.fetch(site.put(path, site.picture())).body
    hidden = site.put("/private/a", site.picture())
    assert found.fetch(hidden).reason == "robots_disallowed"
    assert site.robots_hits == 1 and site.hits == ["/a", "/b"]


def test_it_is_not_asked_for_when_switched_off(site):
    site.put("/robots.txt", b"User-agent: *\nDisallow: /\n", kind="text/plain")
    assert fetcher_of(site, robots=False).fetch(site.put("/a", site.picture())).body
    assert site.robots_hits == 0


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (b"User-agent: minidalle2\nDisallow: /\n\nUser-agent: *\nAllow: /\n", "robots_disallowed"),
        (b"User-agent: otherbot\nDisallow: /\n", None),
        (b"User-agent: *\nDisallow: /\n\nUser-agent: MiniDALLE2\nAllow: /\n", None),
        (b"User-agent: *\nDisallow: /*.png$\n", "robots_disallowed"),
        (b"User-agent: *\nDisallow: /\nAllow: /a\n", None),
        (b"\xff\xfe\x00 what is this", None),
        (b"", None),
    ],
)
def test_rules_by_agent_and_pattern(site, rules: bytes, reason: str | None):
    site.put("/robots.txt", rules, kind="text/plain")
    assert fetcher_of(site).fetch(site.put("/a/1.png", site.picture())).reason == reason


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_where_there_is_none_everything_is_allowed(site, status: int):
    site.put("/robots.txt", status=status)
    assert fetcher_of(site).fetch(site.put("/a", site.picture())).body


@pytest.mark.parametrize("status", [429, 500, 503])
def test_while_the_host_cannot_say_nothing_is_taken(site, status: int):
    site.put("/robots.txt", status=status)
    found = fetcher_of(site)
    got = found.fetch(site.put("/a", site.picture()))
    assert got.reason == "robots_unavailable" and (got.retry_after or 0) > 0
    assert found.fetch(site.url("/a")).reason == "robots_unavailable"
    assert site.hits == [] and site.robots_hits == 1


def test_the_rules_of_every_host_on_the_way_count(site, canary):
    """The second hop's host is the canary, allowed here for once, which forbids everything."""
    canary.put("/robots.txt", b"User-agent: *\nDisallow: /\n", kind="text/plain")
    site.put("/a", status=302, headers={"Location": canary.url("/")})
    assert fetcher_of(site, canary).fetch(site.url("/a")).reason == "robots_disallowed"
    assert canary.hits == []
    canary.robots_hits = 0


def test_they_are_followed_to_where_they_moved(site):
    site.put("/robots.txt", status=301, headers={"Location": "/rules"})
    site.put("/rules", b"User-agent: *\nDisallow: /a\n", kind="text/plain")
    assert fetcher_of(site).fetch(site.put("/a", site.picture())).reason == "robots_disallowed"


def test_they_do_not_lead_inside(site, canary):
    site.put("/robots.txt", status=302, headers={"Location": canary.url("/robots.txt")})
    assert fetcher_of(site).fetch(site.put("/a", site.picture())).reason == "port_refused"


def test_endless_rules_are_read_to_a_limit(site):
    lines = b"User-agent: *\nDisallow: /a\n" + b"# padding\n" * 200_000
    site.put("/robots.txt", lines, kind="text/plain")
    found = fetcher_of(site)
    assert found.fetch(site.put("/a", site.picture())).reason == "robots_disallowed"
    assert found.fetch(site.put("/b", site.picture())).body


def answering(*answers: Exception | tuple[int, bytes]) -> Callable:
    """Return what gives one answer after the other."""
    left = iter(answers)

    def load(_):
        answer = next(left)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return load


def test_rules_and_failures_are_kept_for_their_time_only():
    now, rules = [0.0], (200, b"User-agent: *\nDisallow: /\n")
    load = answering(OSError("timeout"), rules, (404, b""))
    cache = RobotsCache(load, "minidalle2", clock=lambda: now[0])
    for _ in range(2):
        with pytest.raises(RobotsUnavailableError, match="timeout"):
            cache.allowed(ORIGIN, "http://a.example/x")
    now[0] += FAILURE_KEPT_SECONDS
    assert not cache.allowed(ORIGIN, "http://a.example/x")
    now[0] += KEPT_SECONDS - 1
    assert not cache.allowed(ORIGIN, "http://a.example/x")
    now[0] += 1
    assert cache.allowed(ORIGIN, "http://a.example/x")


def test_an_error_reaches_everyone_and_is_not_kept():
    cache = RobotsCache(answering(RuntimeError("broken"), (404, b"")), "minidalle2")
    with pytest.raises(RuntimeError, match="broken"):
        cache.allowed(ORIGIN, "http://a.example/x")
    assert cache.allowed(ORIGIN, "http://a.example/x")
