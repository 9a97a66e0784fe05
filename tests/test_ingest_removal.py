"""Requests to forget: what they may say, and which rows they cover."""

import hashlib

import pytest

from ingest.store.removal import (
    Forgotten,
    read_forgotten,
    read_request,
    record_request,
    url_digests,
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://a/b\nnonsense\n", "line 2: found 'nonsense', expected a host .* or a sha256"),
        ("# nothing\n\n", "found nothing"),
        (None, "forget.txt"),
    ],
)
def test_a_request_that_says_nothing_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "forget.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_request(str(tmp_path / "forget.txt"))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("http://Example.com/a", " HTTP://example.COM/a#x ", True),
        ("http://example.com/a", "https://example.com:443/%61", True),
        ("http://u:P@Example.com/a", "http://example.com/a", True),
        ("http://example.com/a", "http://example.com/A", False),
        ("http://example.com/a?x=1", "http://example.com/a?x=2", False),
        ("http://example.com/a?x=1", "http://example.com/a", False),
        ("http://example.com/a/", "http://example.com/a/b.jpg", True),
        ("www.example.com", "http://example.com/", False),
        ("example.com", "http://www.example.com/a", True),
    ],
)
def test_urls_are_compared_as_the_web_would(a, b, same):
    assert Forgotten.of([a]).covers(b) is same


def test_what_is_no_url_has_digests_as_well_and_requests_of_earlier_versions_are_known():
    for url in ("http://[bad/", "http://e\udc80/", "", "http://a:b/"):
        list(url_digests(url))
    known = hashlib.sha256(b"http://example.com/a").hexdigest()  # as version 0.1 recorded it
    assert Forgotten(urls=frozenset([known])).covers("HTTP://Example.com/a#x")


def test_requests_add_up_and_may_be_repeated(tmp_path):
    first, second = Forgotten.of(["http://a/1", "AB" * 32]), Forgotten.of(["http://a/2"])
    assert not read_forgotten(tmp_path)
    for request in (first, second, first):
        record_request(tmp_path, request)
    known = read_forgotten(tmp_path)
    assert known == first | second and len(list((tmp_path / "_forgotten").iterdir())) == 2
    assert known.covers("http://A/1") and known.covers(None, "ab" * 32)
    assert not known.covers("http://a/3", "cd" * 32) and not known.covers(None)
    assert all(b"http" not in path.read_bytes() for path in (tmp_path / "_forgotten").iterdir())
