"""Laws of fetching rows: every row has an outcome, what may pass is tried again, deadlines hold."""

import hashlib
import time

import pytest
from _lists import fetcher_of

from ingest.fetching.decode import Resizer
from ingest.fetching.engine import EngineConfig, RowRequest, fetch_rows

RESIZER = Resizer(image_size=32, resize_mode="keep_ratio")


def gather(site, urls, *, hashes=None, resizer=RESIZER, **config):
    requests = [RowRequest(row=i, url=url, hashes=hashes or {}) for i, url in enumerate(urls)]
    given = {"num_threads": 4, "retries": 0, "deadline_seconds": None, **config}
    fetcher = fetcher_of(site, host_connections=8)
    return fetch_rows(requests, fetcher, resizer, EngineConfig(**given))


def test_every_row_has_an_outcome(site):
    urls = [site.put(f"/{i}", site.picture(40, 40, i)) for i in range(50)]
    urls[7:7] = [site.url("/gone"), None, "file:///etc/passwd", site.put("/html", b"<html>")]
    found = gather(site, urls)
    assert list(found) == list(range(54))
    assert [found[i].reason for i in (7, 8, 9, 10)] == [
        "not_found", "invalid_url", "invalid_url", "not_an_image",
    ]  # fmt: skip
    assert all((one.image is None) == (one.reason is not None) for one in found.values())
    assert found[0].sha256 == hashlib.sha256(site.picture(40, 40, 0)).hexdigest()


@pytest.mark.parametrize(
    ("status", "tries"), [(404, 1), (403, 1), (418, 1), (429, 3), (500, 3), (503, 3)]
)
def test_only_what_may_pass_is_tried_again(site, monkeypatch, status: int, tries: int):
    monkeypatch.setattr("ingest.fetching.engine.backoff_seconds", lambda number: 0.01)
    gather(site, [site.put("/a", status=status)], retries=2)
    assert len(site.hits) == tries


def test_a_host_that_asks_for_a_pause_gets_it_for_all_of_its_rows_and_they_succeed(site):
    times: list[float] = []
    refuse = site.answer(status=429, headers={"Retry-After": "1"})
    serve = site.answer(site.picture())

    def answer(handler) -> None:
        times.append(time.monotonic())
        (serve if len(times) > 1 else refuse)(handler)

    site.answers = {"/a": answer, "/b": answer}
    found = gather(site, [site.url("/a"), site.url("/b")], retries=1, num_threads=1)
    assert found[0].image is not None and found[1].image is not None
    assert times[1] - times[0] >= 0.99 and len(site.hits) == 3


def test_a_host_that_asks_for_too_long_a_pause_is_left(site):
    url = site.put("/a", status=429, headers={"Retry-After": "86400"})
    assert gather(site, [url], retries=5)[0].reason == "rate_limited"
    assert len(site.hits) == 1


def test_rows_left_at_the_deadline_have_that_reason(site):
    def slow(handler) -> None:
        time.sleep(0.3)
        handler.send_error(404)

    for i in range(40):
        site.answers[f"/{i}"] = slow
    urls = [site.url(f"/{i}") for i in range(40)]
    found = gather(site, urls, deadline_seconds=0.5, num_threads=2)
    reasons = [one.reason for one in found.values()]
    assert set(reasons) == {"not_found", "shard_deadline"} and len(reasons) == 40


def test_bytes_that_are_not_those_of_the_list_are_refused(site):
    body = site.picture()
    url = site.put("/a", body)
    right = {name: hashlib.new(name, body).hexdigest() for name in ("sha256", "md5")}
    assert gather(site, [url], hashes={"md5": right["md5"].upper()})[0].image is not None
    assert gather(site, [url], hashes=right)[0].image is not None
    assert gather(site, [url], hashes={**right, "sha256": "0" * 64})[0].reason == "hash_mismatch"


def test_an_error_of_our_own_is_raised(site):
    class Broken(Resizer):
        def __call__(self, data: bytes):
            raise OSError("disk gone")

    urls = [site.put(f"/{i}", site.picture()) for i in range(30)]
    with pytest.raises(OSError, match="disk gone"):
        gather(site, urls, resizer=Broken(image_size=8, resize_mode="no"), num_threads=3)
    assert len(site.hits) < 30
