"""Laws of the fetcher: public addresses only, one lookup, one deadline, one byte limit."""

import errno
import gzip
import socket
import ssl
import threading
import time
import zlib
from contextlib import suppress
from email.utils import formatdate
from urllib.parse import quote

import pytest
from _lists import fetcher_of
from conftest import Site

from cluster.base.outcomes import FAILED, FILTERED, TRANSIENT, status_of
from ingest.fetching.fetch import (
    Fetched,
    Fetcher,
    FetchPolicy,
    connection_classes,
    parse_allow_address,
)
from ingest.fetching.net import Resolver, connect, is_public


@pytest.mark.parametrize(
    "url",
    ["", None, "file:///etc/passwd", "data:image/png;base64,AA", "ftp://a.b/c", "http://", "//x/y",
     "http://user:secret@example.com/", "http://[::1", "http://a b.com/"],
)  # fmt: skip
def test_what_is_not_a_plain_web_url_is_refused_unresolved(site, url):
    def resolve(host: str, port: int) -> list[str]:
        raise AssertionError(f"looked up {host}")

    policy = FetchPolicy()
    assert Fetcher(policy, resolve=resolve).fetch(url).reason == "invalid_url"


@pytest.mark.parametrize(
    "spelling",
    ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0.0.0.0",
     "[::ffff:127.0.0.1]", "127.0.0.1."],
)  # fmt: skip
def test_the_private_canary_is_not_reached_in_any_spelling(site, canary, spelling):
    """Neither on the port where the canary sits, nor on one that is allowed for every host."""
    dialled: list[str] = []

    def dial(address: str, port: int) -> socket.socket:
        dialled.append(address)
        raise AssertionError("connected")

    found = Fetcher(FetchPolicy(), connect=dial)
    assert found.fetch(f"http://{spelling}:{canary.port}/").reason == "port_refused"
    assert found.fetch(f"http://{spelling}/").reason in ("address_refused", "unresolved")
    assert dialled == []


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
     "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "::ffff:10.0.0.1",
     "2002:7f00:1::", "64:ff9b::7f00:1", "ff02::1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are_public(address):
    assert is_public(address)


def test_one_private_address_among_public_ones_refuses_the_name():
    policy = FetchPolicy()
    mixed = Fetcher(policy, resolve=lambda *_: ["8.8.8.8", "127.0.0.1"], connect=_no_connection)
    assert mixed.fetch("http://rebinding.example/").reason == "address_refused"


def _no_connection(address: str, port: int) -> socket.socket:
    raise AssertionError(f"connected to {address}:{port}")


def test_the_connection_goes_to_the_address_that_was_checked(site):
    """A name is looked up once: a second answer, private this time, is never asked for."""
    answers, dialled = iter([["93.184.215.14"], ["127.0.0.1"]]), []

    def dial(address: str, port: int) -> socket.socket:
        dialled.append(address)
        return connect("127.0.0.1", site.port)

    site.put("/a", site.picture())
    policy = FetchPolicy(robots=False)
    twice = Fetcher(policy, resolve=lambda *_: next(answers), connect=dial)
    assert twice.fetch("http://rebinding.example/a").body == site.picture()
    assert set(dialled) == {"93.184.215.14"}


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_urllib3_opens_every_socket_by_our_function(scheme):
    """It fails where a new urllib3 no longer calls the private method that we replace."""
    opened: list[tuple[str, int]] = []

    def dial(address: str, port: int) -> socket.socket:
        opened.append((address, port))
        raise ConnectionRefusedError

    policy = FetchPolicy(robots=False)
    refused = Fetcher(policy, resolve=lambda *_: ["93.184.215.14"], connect=dial)
    assert refused.fetch(f"{scheme}://example.com/a").reason == "unreachable"
    assert opened == [("93.184.215.14", {"http": 80, "https": 443}[scheme])]


def test_a_urllib3_without_the_replaced_method_is_refused(monkeypatch):
    monkeypatch.delattr("urllib3.connection.HTTPConnection._new_conn")
    with pytest.raises(ImportError, match="requirements.lock"):
        connection_classes(_no_connection)


def test_allowing_an_address_allows_that_port_only(site, canary):
    site.put("/a", site.picture())
    assert fetcher_of(site).fetch(site.url("/a")).body
    assert fetcher_of(site).fetch(canary.url("/")).reason == "port_refused"


def test_redirects_are_followed_to_a_limit(site):
    site.put("/a", site.picture())
    to_a = site.put("/to-a", status=302, headers={"Location": "/a"})
    assert fetcher_of(site).fetch(to_a).body == site.picture()
    loop = site.put("/loop", status=302, headers={"Location": "/loop"})
    assert fetcher_of(site).fetch(loop).reason == "too_many_redirects"
    assert site.hits.count("/loop") == 6


@pytest.mark.parametrize(
    ("status", "reason"),
    [(404, "not_found"), (410, "not_found"), (403, "forbidden"), (418, "client_error"),
     (429, "rate_limited"), (500, "server_error"), (503, "server_error")],
)  # fmt: skip
def test_a_status_has_its_reason_and_is_asked_for_once(site, status, reason):
    url = site.put("/a", status=status, kind="text/html")
    assert fetcher_of(site).fetch(url).reason == reason
    assert site.hits == ["/a"] and (reason in TRANSIENT) == (status in (429, 500, 503))


def test_a_server_that_says_when_is_heard(site):
    found = fetcher_of(site)
    in_seconds = site.put("/a", status=429, headers={"Retry-After": "7"})
    assert found.fetch(in_seconds).retry_after == 7.0
    moment = formatdate(time.time() + 100, usegmt=True)
    at_a_time = site.put("/b", status=503, headers={"Retry-After": moment})
    assert 90 < (found.fetch(at_a_time).retry_after or 0) <= 100


# -- what servers send for a picture ---------------------------------------------------------------

SAY_OTHERWISE = [
    "Content-Type: text/plain", "Content-Type: text/html; charset=utf-8", "Content-Type: jpg",
    "Content-Type: application/force-download", "Content-Type: unknown/unknown", "Content-Type:",
    "content-TYPE: IMAGE/PNG ; q=1", "Content-Type: image/svg+xml", "X-None: of the type",
    "Content-Type: text/html\r\nContent-Type: image/png", "Content-Type: multipart/form-data",
    "Content-Encoding: gzip", "Content-Encoding: br", "Content-Disposition: attachment",
    "Content-Type: \xe9\xff", "X-Long: " + "a" * 60_000,
]  # fmt: skip


def answered(site: Site, head: str, body: bytes, status: str = "200 OK") -> Fetched:
    """Fetch what a server answers with these very headers, and closes the connection."""

    def send(handler) -> None:
        start = f"HTTP/1.1 {status}\r\n{head}\r\n\r\n"
        handler.wfile.write(start.encode("latin-1") + body)
        handler.close_connection = True

    site.answers["/odd"] = send
    return fetcher_of(site).fetch(site.url("/odd"))


@pytest.mark.parametrize("length", [True, False], ids=["length", "until the end"])
@pytest.mark.parametrize("header", SAY_OTHERWISE, ids=lambda header: header[:40])
def test_a_picture_is_one_whatever_its_headers_say(site, header: str, length: bool):
    body = site.picture()
    head = f"{header}\r\nContent-Length: {len(body)}" if length else header
    assert answered(site, head, body) == Fetched(body=body)


@pytest.mark.parametrize("kind", ["image/png", "text/html"])
@pytest.mark.parametrize("body", [b"<html>gone</html>", b"<svg/>", b"", b"%PDF-1.7 and much more"])
def test_what_does_not_begin_like_a_picture_is_none_whatever_its_headers_say(site, kind, body):
    assert answered(site, f"Content-Type: {kind}", body).reason == "not_an_image"


def test_the_rest_of_what_is_no_picture_is_not_transferred(site):
    sent: list[int] = []

    def send(handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 30000000\r\n\r\n<html>")
        handler.close_connection = True
        with suppress(OSError):
            for _ in range(300):
                sent.append(handler.wfile.write(b" " * 100_000))

    site.answers["/page"] = send
    assert fetcher_of(site).fetch(site.url("/page")).reason == "not_an_image"
    assert len(sent) < 300


@pytest.mark.parametrize(
    ("status", "head", "reason"),
    [
        ("203 Non-Authoritative", "X: y", None),
        ("206 Partial Content", "Content-Range: bytes 0-{last}/{size}", None),
        ("206 Partial Content", "Content-Range: bytes 0-{last}/*", "client_error"),
        ("206 Partial Content", "Content-Range: bytes 0-{size}/99999", "client_error"),
        ("206 Partial Content", "Content-Range: bytes 1-{last}/{size}", "client_error"),
        ("206 Partial Content", "X: y", "client_error"),
        ("202 Accepted", "Content-Range: bytes 0-{last}/{size}", "client_error"),
        ("200", "X: y", None),
    ],
)
def test_a_status_of_success_counts_if_the_whole_file_comes_with_it(site, status, head, reason):
    body = site.picture()
    head = head.format(last=len(body) - 1, size=len(body))
    assert answered(site, head, body, status).reason == reason


@pytest.mark.parametrize(
    ("pack", "reason"),
    [
        (gzip.compress, None),
        (zlib.compress, None),
        (lambda body: gzip.compress(gzip.compress(body)), None),
        (lambda body: gzip.compress(body)[:-20], "truncated"),
        (lambda body: gzip.compress(body)[:12], "truncated"),
        (lambda body: b"\x1f\x8b\x08\0" + body, "not_an_image"),
        (lambda body: gzip.compress(b"<html>" + body), "not_an_image"),
        (lambda body: gzip.compress(b""), "not_an_image"),
        (lambda body: gzip.compress(gzip.compress(gzip.compress(body))), "not_an_image"),
        (lambda body: gzip.compress(body + bytes(1 << 20)), "too_large"),
        (lambda body: gzip.compress(gzip.compress(body + bytes(1 << 25))), "too_large"),
        (lambda body: b"\x1f\x8b\x08\x08" + bytes(6) + b"name" * (1 << 18), "too_large"),
    ],
)
def test_gzip_is_undone_under_the_limit_of_bytes(site, pack, reason):
    body = site.picture()
    url = site.put("/a", pack(body), headers={"Content-Encoding": "gzip"})
    found = fetcher_of(site, max_bytes=1 << 20).fetch(url)
    assert found == (Fetched(reason=reason) if reason else Fetched(body=body))


@pytest.mark.parametrize(
    ("framing", "reason"),
    [
        ("Transfer-Encoding: chunked\r\n\r\n{hex}\r\n{body}\r\n0\r\nX-Sum: 1\r\n\r\n", None),
        ("Transfer-Encoding: chunked\r\n\r\n{hex};a=b\r\n{body}\r\n0\r\n\r\n", None),
        ("Transfer-Encoding: chunked\r\n\r\n{hex}\r\n{body}\r\n", "truncated"),
        ("Transfer-Encoding: chunked\r\n\r\nzz\r\n{body}", "truncated"),
        ("Content-Length: abc\r\n\r\n{body}", None),
        ("Content-Length: 0\r\n\r\n{body}", "not_an_image"),
        ("Content-Length: 12\r\n\r\n{body}", "not_an_image"),
        ("Content-Length: 99999\r\n\r\n{body}", "truncated"),
        ("Content-Length: {size}\r\nContent-Length: {size}\r\n\r\n{body}", None),
        ("X: y\r\n\r\n{body}", None),
    ],
)
def test_a_body_is_what_its_framing_says(site, framing: str, reason: str | None):
    body = site.picture()
    text = framing.format(hex=f"{len(body):x}", size=len(body), body=body.decode("latin-1"))
    head, _, rest = text.partition("\r\n\r\n")
    assert answered(site, head, rest.encode("latin-1")).reason == reason


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_redirect_may_name_its_target_in_raw_bytes(site, encoding: str):
    picture = site.picture()
    site.put(f"/{quote('blåbær Å', encoding=encoding)}.png", picture)

    def send(handler) -> None:
        location = "Location: /blåbær Å.png\r\n".encode(encoding)
        handler.wfile.write(b"HTTP/1.1 302 Found\r\n" + 2 * location + b"Content-Length: 0\r\n\r\n")

    site.answers["/to"] = send
    assert fetcher_of(site).fetch(site.url("/to")).body == picture


def test_rules_of_robots_hold_where_they_come_compressed(site):
    rules = gzip.compress(b"User-agent: *\nDisallow: /a\n")
    site.put("/robots.txt", rules, kind="text/plain", headers={"Content-Encoding": "gzip"})
    found = fetcher_of(site)
    assert found.fetch(site.put("/a", site.picture())).reason == "robots_disallowed"
    assert found.fetch(site.put("/b", site.picture())).body


def test_a_shortened_body_is_truncated(site):
    url = site.put("/a", site.picture()[:-9], headers={"Content-Length": str(len(site.picture()))})
    inner = site.answers["/a"]

    def cut(handler) -> None:
        inner(handler)
        handler.close_connection = True

    site.answers["/a"] = cut
    assert fetcher_of(site).fetch(url).reason == "truncated"


def test_headers_that_come_a_byte_at_a_time_do_not_outlive_the_deadline(site):
    def drip(handler) -> None:
        handler.close_connection = True
        try:
            for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"a" * 100:
                handler.wfile.write(bytes([byte]))
                time.sleep(0.05)
            sent_all.set()
        except OSError:
            return

    sent_all = threading.Event()
    site.answers["/drip"] = drip
    assert fetcher_of(site, timeout_seconds=0.5).fetch(site.url("/drip")).reason == "timeout"
    assert not sent_all.is_set()


def test_a_closed_port_is_unreachable(site):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        policy = FetchPolicy(allow_addresses=(("127.0.0.1", port),))
        assert Fetcher(policy).fetch(f"http://127.0.0.1:{port}/").reason == "unreachable"


def test_plain_http_behind_https_fails_in_tls(site):
    assert fetcher_of(site).fetch(f"https://{site.address}/").reason == "tls_failed"


def test_certificates_are_verified_for_the_name_not_the_address(monkeypatch):
    seen = {}

    def wrap(self, sock, server_hostname=None, **_):
        seen.update(name=server_hostname, mode=self.verify_mode, check=self.check_hostname)
        raise ssl.SSLError("enough")

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap)
    near, far = socket.socketpair()
    found = Fetcher(FetchPolicy(), resolve=lambda *_: ["8.8.8.8"], connect=lambda *_: near).fetch(
        "https://pictures.example/a"
    )
    far.close()
    assert found.reason == "tls_failed" and seen["name"] == "pictures.example"
    assert seen["mode"] is ssl.CERT_REQUIRED


def test_connections_are_kept_between_fetches(site):
    dialled: list[int] = []
    site.put("/robots.txt", status=404)

    def dial(address: str, port: int) -> socket.socket:
        dialled.append(port)
        return connect(address, port)

    kept = Fetcher(fetcher_of(site).policy, connect=dial)
    for path in ("/a", "/b", "/c"):
        assert kept.fetch(site.put(path, site.picture())).body
    assert len(dialled) == 1, "robots.txt and three images over one connection"


def test_spaces_and_letters_beyond_ascii_are_encoded(site):
    site.put("/b%C3%A4r%20eins", site.picture())
    assert fetcher_of(site).fetch(site.url("/bär eins")).body == site.picture()


def test_international_names_are_looked_up_in_ascii(site):
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    found = Fetcher(FetchPolicy(), resolve=resolve)
    assert found.fetch("http://b\u00fccher.example/\u00e4.png").reason == "unresolved"
    assert set(asked) == {"xn--bcher-kva.example"}


def test_a_resolver_that_is_down_is_not_a_name_that_does_not_exist():
    def resolve(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    assert Fetcher(FetchPolicy(), resolve=resolve).fetch("http://a.example/").reason in TRANSIENT


def test_a_resolver_that_hangs_does_not_outlive_the_deadline(monkeypatch):
    fetched = threading.Event()
    monkeypatch.setattr("ingest.fetching.net.resolve", lambda *_: fetched.wait() and [])
    policy = FetchPolicy(timeout_seconds=0.3)
    assert Fetcher(policy, resolve=Resolver()).fetch("http://a.example/").reason == "timeout"
    fetched.set()


def test_a_name_is_looked_up_once_a_minute(monkeypatch):
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["10.0.0.1"]

    monkeypatch.setattr("ingest.fetching.net.resolve", resolve)
    found = Fetcher(FetchPolicy())
    for path in "abc":
        assert found.fetch(f"http://inside.example/{path}").reason == "address_refused"
    assert asked == ["inside.example"]


def test_a_network_that_is_down_is_not_a_host_that_is():
    def dial(address: str, port: int) -> socket.socket:
        raise OSError(errno.ENETUNREACH, "network is unreachable")

    found = Fetcher(FetchPolicy(), resolve=lambda *_: ["93.184.215.14"], connect=dial)
    assert found.fetch("http://a.example/").reason == "no_network"


def test_the_user_agent_says_who_asks_and_where_to_complain(site):
    seen: list[str] = []

    def answer(handler) -> None:
        seen.append(handler.headers["User-Agent"])
        handler.send_error(404)

    site.answers["/a"] = answer
    fetcher_of(site, contact="https://example.com/bot").fetch(site.url("/a"))
    assert seen[0].startswith("minidalle2/") and "https://example.com/bot" in seen[0]


def test_an_answer_that_is_no_http_is_a_reason_and_not_an_error(site):
    bad = site.put("/bad", status=302, headers={"Location": "http://[bad/"})
    assert fetcher_of(site).fetch(bad).reason == "invalid_url"
    late = site.put("/late", status=429, headers={"Retry-After": "\u00b2"})
    assert fetcher_of(site).fetch(late).reason == "rate_limited"


def test_every_reason_has_one_status():
    assert {status_of(reason) for reason in FAILED} == {"failed"}
    assert {status_of(reason) for reason in FILTERED} == {"filtered"}
    assert not set(FAILED) & set(FILTERED) and set(FAILED) > TRANSIENT


@pytest.mark.parametrize("text", ["localhost", "localhost:", ":80", "http://localhost:80", "a:b"])
def test_allow_address_wants_host_and_port(text):
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        parse_allow_address(text)
