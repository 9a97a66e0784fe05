"""Laws of the engine: every row has an outcome, what may pass is tried again, deadlines hold."""

import hashlib
import io
import os
import signal
import tarfile
import threading
import time
import traceback
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from _lists import download_of, fetched_rows, fetcher_of, write_list

from ingest.download import main
from ingest.fetching import engine
from ingest.fetching.decode import Resizer
from ingest.fetching.engine import RowRequest, ShardDownload

RESIZER = Resizer(image_size=32, resize_mode="keep_ratio")


def gather(site, urls, *, hashes=None, resizer: Callable = RESIZER, left_out=None, **config):
    rows = [i for i in range(len(urls)) if i not in (left_out or {})]
    requests = [RowRequest(row=i, url=urls[i], hashes=hashes or {}) for i in rows]
    fetcher = fetcher_of(site, host_connections=8)
    results = fetched_rows(requests, fetcher, resizer, left_out, **{"num_threads": 4, **config})
    assert list(results) == list(range(len(urls)))
    return results


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


def test_fetched_images_do_not_wait_for_the_resizer_beyond_the_deadline(site, monkeypatch):
    """Else a shard of huge images would end its worker, which is given a minute, in every try."""
    monkeypatch.setattr(engine, "RESIZE_GRACE_SECONDS", 0.0)
    resized: list[bytes] = []

    def slow(data: bytes):
        resized.append(data)
        time.sleep(0.4)
        return RESIZER(data)

    urls = [site.put(f"/{i}", site.picture()) for i in range(20)]
    found = gather(site, urls, resizer=slow, deadline_seconds=0.9, num_threads=8)
    reasons = [result.reason for result in found.values()]
    assert reasons.count(None) == len(resized) < len(site.hits)
    assert set(reasons) == {None, "shard_deadline"}


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


def test_rows_that_are_left_out_are_not_fetched_and_keep_their_reason(site):
    urls = [site.put(f"/{i}", site.picture()) for i in range(6)]
    found = gather(site, urls, left_out={1: "opted_out", 4: "repeated"})
    assert [found[i].reason for i in range(6)] == [None, "opted_out", None, None, "repeated", None]
    assert sorted(site.hits) == ["/0", "/2", "/3", "/5"]


def test_a_slow_host_holds_no_thread_while_another_can_be_fetched(site):
    """With two threads and one connection a host: in the list's order all would wait for it."""
    release = threading.Event()
    serve = site.answer(site.picture())

    def slow(handler) -> None:
        release.wait(10)
        serve(handler)

    for i in range(4):
        site.answers[f"/slow/{i}"] = slow
    fast = [site.put(f"/{i}", site.picture()) for i in range(10)]
    urls = [site.url(f"/slow/{i}") for i in range(4)]
    urls += [url.replace("127.0.0.1", "localhost") for url in fast]
    fetcher = fetcher_of(site, host_connections=1, allow_addresses=(
        ("127.0.0.1", site.port), ("localhost", site.port),
    ))  # fmt: skip
    served: list[str] = []

    class Watching:
        def __call__(self, data: bytes):
            served.append(site.hits[-1])
            if len(served) == 10:
                release.set()
            return RESIZER(data)

    requests = [RowRequest(row=i, url=url) for i, url in enumerate(urls)]
    found = fetched_rows(requests, fetcher, Watching(), num_threads=2)
    assert release.is_set() and all(result.image is not None for result in found.values())


def test_img2dataset_and_webdataset_make_the_shard(site, tmp_path, monkeypatch):
    """As the stack says at the moment when a member of the tar is written."""
    stacks: list[list[traceback.FrameSummary]] = []
    addfile = tarfile.TarFile.addfile

    def watched(*arguments):
        stacks.append(list(traceback.extract_stack()))
        return addfile(*arguments)

    monkeypatch.setattr(tarfile.TarFile, "addfile", watched)
    urls = write_list(tmp_path / "list.parquet", [site.put("/a", site.picture())])
    assert main(download_of(site, urls, tmp_path / "images")) == 0
    assert len(stacks) == 3
    for stack in stacks:
        calls = [(frame.filename.rpartition("site-packages/")[2], frame.name) for frame in stack]
        downloads = calls.index(("img2dataset/downloader.py", "download_shard"))
        assert downloads < calls.index(("webdataset/writer.py", "write"))


def test_an_img2dataset_that_would_bypass_our_transport_is_refused(site, tmp_path, monkeypatch):
    import img2dataset.downloader as library

    fetched: list[tuple] = []
    bypassing = lambda row, **_: fetched.append(row) or (row[0], None, "no route")  # noqa: E731
    monkeypatch.setattr(library, "download_image", bypassing)
    engine.require_our_transport.cache_clear()
    urls = write_list(tmp_path / "list.parquet", [site.put("/a", site.picture())] * 3)
    with pytest.raises(ValueError, match="img2dataset: does not fetch through"):
        main(download_of(site, urls, tmp_path / "images", samples_per_shard=1))
    assert len(fetched) == 1 and ".invalid" in fetched[0][1] and site.hits == []
    assert not list((tmp_path / "images").glob("*.tar"))


def test_a_row_that_img2dataset_loses_fails_the_shard(site, monkeypatch):
    write, calls = ShardDownload.write, iter(range(9))

    def losing(self, *arguments):
        if next(calls) == 2:
            raise ValueError("img2dataset prints this, and goes on")
        write(self, *arguments)

    monkeypatch.setattr(ShardDownload, "write", losing)
    with pytest.raises(RuntimeError, match="lost 1 rows"):
        gather(site, [site.put(f"/{i}", site.picture()) for i in range(9)])


def test_an_interrupt_ends_a_shard_although_rows_are_left(site):
    interrupts = iter([signal.SIGINT])

    def resizer(data: bytes):
        for number in interrupts:
            os.kill(os.getpid(), number)
        return RESIZER(data)

    urls = [site.put(f"/{i}", site.picture()) for i in range(60)]
    with pytest.raises(KeyboardInterrupt):
        gather(site, urls, resizer=resizer, num_threads=2)
    assert len(site.hits) < 60


def test_further_interrupts_leave_no_shard_behind(site):
    """Else multiprocessing, when the process ends, would wait for img2dataset's pool for ever."""
    asked = threading.Event()

    def slow(handler) -> None:
        asked.set()
        time.sleep(1)
        handler.send_error(404)

    def interrupt() -> None:
        asked.wait(30)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    for i in range(60):
        site.answers[f"/{i}"] = slow
    engine.require_our_transport()  # which imports img2dataset
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        gather(site, [site.url(f"/{i}") for i in range(60)], num_threads=2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shard")]


@pytest.mark.parametrize("where", ["transport", "resizer"])
def test_what_is_no_exception_ends_the_shard_as_well(site, monkeypatch, where: str):
    """It would end a thread of img2dataset's pool, which would wait for that row for ever."""

    class PanicError(BaseException):
        """As PyO3 raises."""

    calls = iter(range(60))

    def panic(*arguments):
        if next(calls) == 5:
            raise PanicError("unreachable code")
        return RESIZER(*arguments) if where == "resizer" else fetch(*arguments)

    fetch = engine.Fetcher.fetch
    if where == "transport":
        monkeypatch.setattr(engine.Fetcher, "fetch", panic)
    urls = [site.put(f"/{i}", site.picture()) for i in range(60)]
    with pytest.raises(PanicError):
        gather(site, urls, resizer=panic if where == "resizer" else RESIZER)


def test_an_image_that_img2dataset_drops_for_a_lack_of_memory_fails_the_shard(site, monkeypatch):
    class Bytes(io.BytesIO):
        def read(self, *arguments):
            raise MemoryError("no room")

    monkeypatch.setattr(engine, "io", SimpleNamespace(BytesIO=Bytes))
    with pytest.raises(RuntimeError, match="lost 3 fetched images"):
        gather(site, [site.put(f"/{i}", site.picture()) for i in range(3)])
