"""A proxy is used when asked for alone, gets checked addresses, and its faults are our own."""

import base64
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from ingest.download import DownloadConfig, main
from ingest.fetching.fetch import Fetcher, FetchPolicy, parse_allow_address
from ingest.fetching.net import resolve_proxy
from ingest.shards import load_snapshot


@contextmanager
def serve_proxy(answer: bytes = b"", leads_to: tuple[str, int] | None = None) -> Iterator:
    """Run a proxy that answers so, or leads every CONNECT to one loopback address; yields its URL
    and the heads of the requests it got."""
    heads: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    ended = threading.Event()

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):  # either side hangs up, or has said nothing for long
            while data := source.recv(1 << 16):
                target.sendall(data)
        target.close()

    def handle(client: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        heads.append(head)
        if leads_to is None:
            client.sendall(answer)
            client.close()
            return
        far = socket.create_connection(leads_to, timeout=5)
        client.sendall(b"HTTP/1.1 200 Connection established\r\nVia: a proxy\r\n\r\n")
        threading.Thread(target=pump, args=(far, client), daemon=True).start()
        pump(client, far)

    def serve() -> None:
        while not ended.is_set():
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            client.settimeout(5)
            threading.Thread(target=handle, args=(client,), daemon=True).start()

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}", heads
    finally:
        ended.set()
        serving.join()
        server.close()


def through(proxy: str, address: str = "93.184.215.14", **policy) -> Fetcher:
    """A fetcher for whose proxy a.example has `address`."""
    settings = FetchPolicy(proxy=proxy, timeout_seconds=5.0, robots=False, host_rate=0, **policy)
    return Fetcher(settings, resolve=lambda *_: [address])


def test_the_proxy_is_led_to_the_address_that_was_checked(site):
    """It never learns the name; the host itself does."""
    seen: list[str] = []

    answer = site.answer(site.picture())
    site.answers["/a"] = lambda handler: (seen.append(handler.headers["Host"]), answer(handler))
    with serve_proxy(leads_to=(site.host, site.port)) as (url, heads):
        found = through(url)
        for _ in range(2):
            assert found.fetch("http://a.example/a").body == site.picture()
        assert through(url, address="2606:2800::1").fetch("http://a.example/a").body
    hosts = [head.split(b"\r\n")[0] for head in heads]
    assert hosts == [b"CONNECT 93.184.215.14:80 HTTP/1.1", b"CONNECT [2606:2800::1]:80 HTTP/1.1"]
    assert seen == ["a.example"] * 3  # the second one over the connection of the first


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::ffff:10.0.0.1"])
def test_a_private_address_is_refused_before_the_proxy_is_asked(address: str):
    with serve_proxy() as (url, heads):
        assert through(url, address).fetch("http://a.example/").reason == "address_refused"
    assert heads == []


def test_credentials_go_to_the_proxy():
    with serve_proxy(b"HTTP/1.1 403 no\r\n\r\n") as (url, heads):
        signed = url.replace("http://", "http://me:p%40ss@")
        assert through(signed).fetch("http://a.example/").reason == "unreachable"
    header = b"Proxy-Authorization: Basic " + base64.b64encode(b"me:p@ss") + b"\r\n"
    assert header in heads[0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 502 Bad gateway\r\n\r\n", "unreachable"),
        (b"HTTP/1.1 407 Sign in\r\n\r\n", "no_network"),
        (b"", "unreachable"),
        (b"x" * 100_000, "unreachable"),
    ],
)
def test_what_a_proxy_answers_otherwise_is_a_reason(answer: bytes, reason: str):
    with serve_proxy(answer) as (url, _):
        assert through(url).fetch("http://a.example/").reason == reason


def test_a_proxy_that_is_not_there_is_our_own_network():
    """Rows are then tried again later, and not counted against their hosts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    assert through(url).fetch("http://a.example/").reason == "no_network"


def test_the_environments_proxy_is_ignored_unless_asked_for(site, monkeypatch):
    with serve_proxy(leads_to=(site.host, site.port)) as (url, heads):
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, url)
        policy = FetchPolicy(allow_addresses=(parse_allow_address(site.address),), host_rate=0)
        assert Fetcher(policy).fetch(site.put("/a", site.picture())).body == site.picture()
        assert heads == [] and resolve_proxy("") == ""
        assert resolve_proxy("environment") == url


def test_a_download_goes_through_it(site, tmp_path):
    """The address in the list is public and is never dialled: the proxy leads to the site."""
    site.put("/a", site.picture(60, 40))
    (tmp_path / "list.csv").write_text("url,caption\nhttp://93.184.215.14/a,a picture\n")
    with serve_proxy(leads_to=(site.host, site.port)) as (url, heads):
        config = DownloadConfig(
            urls=str(tmp_path / "list.csv"), out=str(tmp_path / "images"), image_size=32,
            num_processes=0, robots=False, proxy=url,
        )  # fmt: skip
        assert main(config) == 0
    assert load_snapshot(config.out).num_samples == 1
    assert {head.split(b" ")[1] for head in heads} == {b"93.184.215.14:80"}


@pytest.mark.parametrize("proxy", ["localhost:3128", "socks5://a:1", "http://a", "http://a:1/x"])
def test_what_is_no_proxy_is_refused_before_anything_is_written(proxy: str, tmp_path):
    config = DownloadConfig(urls="list.csv", out=str(tmp_path / "images"), proxy=proxy)
    with pytest.raises(ValueError, match="--proxy: found .*, expected http://HOST:PORT"):
        main(config)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    "proxy",
    ["https://me:secret@a.example:1", "http://me:secret@a.example", "me:secret@a.example:1",
     "http://me:secret@a.example:1/x", "http://me:secret/@a.example:1", "http://me:secret@a.example:b",
     "http://me:se@secret@a.example", "http://[me:secret@a.example:1"],
)  # fmt: skip
def test_no_refusal_contains_a_password(proxy: str):
    with pytest.raises(ValueError, match=r"--proxy: found .*a\.example.*, expected") as caught:
        resolve_proxy(proxy)
    assert "secret" not in str(caught.value) and "me:" not in str(caught.value)
    assert caught.value.__context__ is None, "urllib's own words may hold a part of it"
    assert "secret" not in repr(FetchPolicy(proxy=proxy))


def test_an_environment_without_a_proxy_is_refused(monkeypatch):
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    with pytest.raises(ValueError, match="environment with HTTPS_PROXY set"):
        resolve_proxy("environment")
