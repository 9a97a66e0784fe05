"""Fixtures shared by the tests: a small web on the loopback device."""

import http.server
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from PIL import Image

Handler = http.server.BaseHTTPRequestHandler


class Site:
    """A server on 127.0.0.1 with answers by path; `hits` lists the paths asked for."""

    def __init__(self, port: int) -> None:
        self.port, self.hits = port, list[str]()
        self.answers: dict[str, Callable[[Handler], None]] = {}

    @staticmethod
    def picture(width: int = 48, height: int = 40, red: int = 200) -> bytes:
        """Return a PNG of one colour."""
        buffer = io.BytesIO()
        Image.new("RGB", (width, height), (red, 40, 40)).save(buffer, "PNG")
        return buffer.getvalue()

    @property
    def address(self) -> str:
        """HOST:PORT, as --allow-address takes it."""
        return f"127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        """Return the URL of a path."""
        return f"http://{self.address}{path}"

    def put(
        self,
        path: str,
        body: bytes = b"",
        *,
        status: int = 200,
        kind: str = "image/png",
        headers: dict[str, str] | None = None,
    ) -> str:
        """Answer `path` with a body; return its URL."""

        def answer(handler: Handler) -> None:
            handler.send_response(status)
            for name, value in {"Content-Type": kind, **(headers or {})}.items():
                handler.send_header(name, value)
            if "Content-Length" not in (headers or {}):
                handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

        self.answers[path] = answer
        return self.url(path)


@contextmanager
def serve_site() -> Iterator[Site]:
    """Run a site until the block ends."""

    class Answering(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10

        def do_GET(self) -> None:
            site.hits.append(self.path)
            answer = site.answers.get(self.path)
            if answer is None:
                self.send_error(404)
            else:
                answer(self)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.daemon_threads = True
    site = Site(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    """A site to be fetched from."""
    with serve_site() as found:
        yield found


@pytest.fixture
def canary() -> Iterator[Site]:
    """A private service that nothing allows: it must never see a request."""
    with serve_site() as found:
        found.put("/", Site.picture())
        yield found
        assert found.hits == []
