"""Lists of hosts and URLs to leave out: each usual form is understood, or refused by its line."""

import random

import pytest

from ingest.lists.exclusions import Exclusions, decode_list, keys_of

BELOW, BESIDE = "http://img.example.com:8080/a/b.jpg", "http://notexample.com/example.com"


def covers(entry: str, url: str) -> bool:
    return Exclusions.of(entry.split("\n")).cover(url)


@pytest.mark.parametrize(
    "entry",
    [
        "example.com", "Example.COM.", "*.example.com", ".example.com", "example.com/",
        "example.com:8080", "http://example.com", "https://example.com/", "//example.com",
        "http://example.com:8931/", "https://user@example.com/*", "example.com # asked in May",
        "example.com\t# asked", "\ufeffexample.com", "example.com,asked in May",
        "example.com;asked", "example.com\tasked, in May", '"example.com","by mail, in May"',
        "0.0.0.0 example.com", "127.0.0.1\texample.com www.example.com", "::1 example.com",
        "||example.com^", "||example.com^$third-party", "||example.com/", "|https://example.com|",
        "! a comment\n[Adblock Plus 2.0]\n\n# another\nexample.com",
        "domain,reason\nexample.com,by mail", "Reason;Host\nby mail;example.com",
        "url\nhttp://example.com", "127.0.0.1 localhost\n0.0.0.0 example.com",
        "255.255.255.255 broadcasthost\nfe80::1%lo0 localhost\nexample.com",
    ],
)  # fmt: skip
def test_a_host_covers_itself_and_what_is_below_it(entry: str):
    assert covers(entry, "https://example.com/x.png") and covers(entry, BELOW)
    assert not covers(entry, BESIDE) and not covers(entry, "http://example.com.evil.org/a")


@pytest.mark.parametrize(
    ("entry", "inside", "outside"),
    [
        ("https://c.org/one.jpg", "http://C.org/one.jpg#top", "https://c.org/two.jpg"),
        ("https://c.org/one.jpg", "https://c.org:443/%6Fne.jpg", "https://c.org/one.jpg?size=1"),
        ("https://c.org/i?id=5&b", "https://c.org/i?id=5&b", "https://c.org/i?id=6&b"),
        ("https://c.org/i,5.jpg", "https://c.org/i,5.jpg", "https://c.org/i,6.jpg"),
        ("https://c.org/i.jpg,by mail", "https://c.org/i.jpg", "https://c.org/"),
        ("https://c.org/i.jpg,mail", "https://c.org/i.jpg", "https://c.org/i"),
        ('"https://c.org/i,5.jpg",mail', "https://c.org/i,5.jpg", "https://c.org/i"),
        ("c.org/photos/", "https://c.org/photos/2/a.jpg", "https://c.org/photos.jpg"),
        ("https://c.org/photos/*", "https://c.org/photos/a.jpg", "https://c.org/photo"),
        ("||c.org/photos^", "https://c.org/photos", "https://c.org/photos2"),
        ("||c.org/photos", "https://c.org/photos/a.jpg", "https://d.org/photos/a.jpg"),
        ("http://c.org:81/a", "http://c.org:81/a", "http://c.org/a"),
        ("http://nas/a.jpg", "http://nas/a.jpg", "http://nas/b.jpg"),
        ("localhost:8931", "http://localhost:8931/p.jpg", "http://local/p.jpg"),
        ("*.b\u00fccher.example", "http://xn--bcher-kva.example/a", "http://cher.example/"),
        ("xn--bcher-kva.example", "http://b\u00fccher.example/a", "http://cher.example/"),
        ("192.0.2.7\tasked in May", "http://192.0.2.7/a", "http://192.0.2.70/a"),
        ("http://[2001:db8::1]:81", "http://[2001:DB8::1]/a", "http://[2001:db8::2]/a"),
        (".gov", "https://www.nasa.gov/a.jpg", "https://gov.example/"),
    ],
)
def test_a_url_covers_itself_and_one_that_ends_with_a_slash_what_is_below(
    entry: str, inside: str, outside: str
):
    assert covers(entry, inside) and not covers(entry, outside)


@pytest.mark.parametrize(
    "line",
    [
        "reason", "the owner of example.com", "example.com asked", "me@example.com", "a..com", "||",
        "https://c.org/img_*", "*", "c.org/*/a", "@@||example.com^", "example.com##.banner",
        "User-agent: *", "Disallow: /", "http://c.org/a b", '["example.com"]', "http://",
        "/banner/*", ",example.com", "exa mple.com", "-example.com", "c.org:port",
        "https://[::1", f"{'a' * 64}.com", "a" * 64,
    ],
)  # fmt: skip
def test_a_line_that_says_nothing_is_refused_by_its_number(line: str):
    with pytest.raises(ValueError, match=r"^line 3: found .*, expected a host") as error:
        Exclusions.of(["# list", "example.com", line])
    assert "\n" not in str(error.value)


def test_an_empty_cell_under_the_header_is_refused_and_notes_are_not_read():
    with pytest.raises(ValueError, match="line 2"):
        Exclusions.of(["domain,reason", ",example.com"])
    found = Exclusions.of(["url,domain,reason", ",example.com,see b.org", "http://c.org/a,,x"])
    assert found.keys == {"example.com", "c.org/a"}
    assert str(found) == "1 hosts, 1 URLs"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_text_file_is_read(encoding: str, end: str):
    lines = ["# Stra\u00dfe", "example.com", "http://c.org/\u00df\x0ba", ""]
    assert decode_list(end.join(lines).encode(encoding))[1:] == lines[1:]


def test_no_text_ends_in_another_error_and_no_url_has_a_key_of_another_host():
    """2,000 random lines of what such lists are made of."""
    draw, parts = random.Random(3), [*"ab.:/*|^$#,;@[]%?& \t\"'\\\u00df\u2028", "://", "com", "||"]
    for _ in range(2000):
        line = "".join(draw.choices(parts, k=draw.randrange(12)))
        try:
            keys = Exclusions.of([line], images=True).keys
        except ValueError as error:
            assert str(error).startswith("line 1: found ")
        else:
            assert not keys & {*keys_of("http://other.example/ab")}, line
        list(keys_of(line))
