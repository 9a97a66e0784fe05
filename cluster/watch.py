"""A live page of what runs, from Prometheus, where there is no Grafana.

    python cluster/watch.py --prometheus http://127.0.0.1:9090       # then http://127.0.0.1:9480
    python cluster/watch.py --address 10.0.0.5 --token-file watch.token

It queries the panels of cluster/monitoring/panels.yaml, runs and alerts, and passes on no other
query.
"""

import base64
import hashlib
import hmac
import http.server
import ipaddress
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qs, urlsplit

from tyro.conf import UseAppendAction

from cluster.base.cli import DONE, parse, run_script
from cluster.monitoring.queries import PANELS, WINDOWS, PrometheusClient, PrometheusError, layout

PAGE = Path(__file__).with_name("watch.html")
COOKIE = "minidalle2_watch"
MIN_TOKEN = 16  # characters
MAX_AT_ONCE = 16  # requests being answered


@dataclass(frozen=True, kw_only=True)
class WatchPageConfig:
    """Served on the loopback unless --address says otherwise, which takes a token."""

    prometheus: str = "http://127.0.0.1:9090"
    """where Prometheus answers"""
    address: str = "127.0.0.1"
    """to listen on; any but the loopback needs --token-file"""
    port: int = 9480
    """to listen on; 0 = any free one"""
    token_file: str = ""
    """file of a token, 16 characters or more; a browser is given it once: http://.../?token=TOKEN"""
    allow_host: Annotated[tuple[str, ...], UseAppendAction] = ()
    """further name, without the port, that browsers may call this machine; repeatable"""
    every: float = 5.0
    """seconds between two updates"""


def main(config: WatchPageConfig) -> int:
    """Serve the page until interrupted."""
    server = open_server(config)
    print(f"watch: http://{server.shown}/", flush=True)
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        print("watch: ended")
    finally:
        server.server_close()
    return DONE


def open_server(config: WatchPageConfig) -> "WatchServer":
    """Check the configuration and listen; raises ValueError where that fails."""
    if config.every <= 0:
        raise ValueError(f"--every: found {config.every}, expected seconds above 0")
    parts = urlsplit(config.prometheus)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--prometheus: found {config.prometheus!r}, expected http://HOST:PORT")
    token = _token(config)
    try:
        return WatchServer(config, token)
    except (OSError, OverflowError) as error:
        problem = getattr(error, "strerror", None) or error
        where = f"{config.address} port {config.port}"
        raise ValueError(
            f"{where}: found {problem}, expected an address of this machine and a free port"
        ) from error


def _token(config: WatchPageConfig) -> str:
    """Read the token; ValueError where there must be one, or it is short."""
    if not config.token_file:
        if not is_loopback(config.address):
            raise ValueError(
                f"--address: found {config.address}, which others can reach, without "
                "--token-file, expected both; ssh -L 9480:127.0.0.1:9480 needs neither"
            )
        return ""
    path = Path(config.token_file)
    token = path.read_text().strip() if path.is_file() else ""
    if len(token) < MIN_TOKEN or not re.fullmatch(r"[\w.~-]+", token, re.ASCII):
        raise ValueError(
            f"--token-file: found {len(token)} characters in {path}, expected {MIN_TOKEN} or more "
            "letters and digits, as `openssl rand -hex 16` makes them"
        )
    return token


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


class WatchServer(http.server.ThreadingHTTPServer):
    """Holds who may ask, by which name and with which token, and what is answered."""

    daemon_threads = True

    def __init__(self, config: WatchPageConfig, token: str) -> None:
        super().__init__((config.address, config.port), WatchHandler)
        self.token = token
        self.prometheus = PrometheusClient(config.prometheus.rstrip("/"))
        self.layout = {"dashboards": layout(), "every": config.every, "windows": list(WINDOWS)}
        self.free = threading.BoundedSemaphore(MAX_AT_ONCE)
        port = self.server_address[1]
        self.shown = f"{config.address}:{port}"
        names = {config.address, *config.allow_host}
        if is_loopback(config.address):
            names |= {"127.0.0.1", "localhost"}
        # Another site whose name points here is refused by that name
        self.hosts = {f"{name.lower()}:{port}" for name in names}
        if port == 80:
            self.hosts |= {name.lower() for name in names}
        self.page, self.policy = read_page()

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: browsers hang up all the time."""


def read_page() -> tuple[bytes, str]:
    """Return the page and the policy that lets a browser run its own script and style alone."""
    text = PAGE.read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        encoded = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        return f"'sha256-{encoded}'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return text.encode(), policy


class WatchHandler(http.server.BaseHTTPRequestHandler):
    """Answers GET: the page, its layout, lines of a panel, runs and alerts."""

    @property
    def _owner(self) -> WatchServer:
        assert isinstance(self.server, WatchServer)
        return self.server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "watch", ""
    timeout = 20

    def do_GET(self) -> None:
        """Answer, or refuse."""
        with self._owner.free:
            refusal = self._refusal()
            if refusal:
                self._send(*refusal)
            else:
                self._answer()

    def _refusal(self) -> tuple[int, bytes] | None:
        """Return why this request is not answered: a status and a line."""
        if self.headers.get("Host", "").lower() not in self._owner.hosts:
            return 403, b"this name is not allowed; see --allow-host\n"
        link = self.headers.get("Sec-Fetch-Mode") == "navigate" and self._path() == "/"
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none") and not link:
            return 403, b"not from another site\n"
        if self._owner.token and not self._has_token():
            return 401, b"open http://.../?token=TOKEN once\n"
        return None

    def _path(self) -> str:
        return urlsplit(self.path).path

    def _has_token(self) -> bool:
        header = self.headers.get("Authorization", "").removeprefix("Bearer ")
        pairs = [pair.strip().partition("=") for pair in self.headers.get("Cookie", "").split(";")]
        cookie = next((value for name, _, value in pairs if name == COOKIE), "")
        query = parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        tokens = (header, cookie, query if self._path() == "/" else "")
        expected = self._owner.token.encode()
        return any(hmac.compare_digest(token.encode(), expected) for token in tokens)

    def _answer(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        match self._path():
            case "/" if "token" in query:  # into a cookie, and out of the address
                cookie = f"{COOKIE}={self._owner.token}; HttpOnly; SameSite=Strict; Path=/"
                more = {"Location": "/", "Set-Cookie": cookie} if self._owner.token else {}
                self._send(303 if more else 200, b"" if more else self._owner.page, "html", more)
            case "/":
                self._send(200, self._owner.page, "html")
            case "/api/layout":
                self._send_json(lambda: self._owner.layout)
            case "/api/lines":
                key, window = (query.get(name, [""])[0] for name in ("panel", "window"))
                if key in PANELS and window in WINDOWS:
                    self._send_json(lambda: self._owner.prometheus.lines(key, window, time.time()))
                else:
                    self._send(400, b"no such panel or window\n")
            case "/api/runs":
                self._send_json(self._owner.prometheus.runs)
            case "/api/alerts":
                self._send_json(self._owner.prometheus.alerts)
            case _:
                self._send(404, b"no such page\n")

    def _send_json(self, make: Callable[[], object]) -> None:
        try:
            self._send(200, self._owner.prometheus.answer(make), "json")
        except PrometheusError as error:
            self._send(502, json.dumps({"error": str(error)}).encode(), "json")

    def _send(
        self, status: int, body: bytes, kind: str = "plain", more: dict[str, str] | None = None
    ) -> None:
        media = {"html": "text/html", "json": "application/json", "plain": "text/plain"}[kind]
        self.send_response(status)
        headers = {
            "Content-Type": f"{media}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": self._owner.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        for name, value in (headers | (more or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: there is a request every few seconds."""


if __name__ == "__main__":
    run_script(lambda: main(parse(WatchPageConfig)))
