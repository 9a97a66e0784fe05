"""Fetch one URL from a hostile web: only public addresses, within a deadline and a byte limit.

The name is resolved once, every address it has must be public, and the connection goes to one of
those very addresses, so that no second lookup can answer otherwise. Each redirect is a new URL
and is judged as one. Proxies of the environment are not used. `Fetcher` takes its resolver,
connector and sleep as arguments.
"""

import http.client
import ipaddress
import random
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, IncompleteRead, LocationParseError, SSLError
from urllib3.util import Url, parse_url

from ingest.filters import header_problem, may_be_image, opted_out

RETRIED = frozenset({"unreachable", "timeout", "truncated", "rate_limited", "server_error"})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
STATUS_REASONS = {401: "forbidden", 403: "forbidden", 404: "not_found", 410: "not_found"}
STATUS_REASONS |= {408: "timeout", 429: "rate_limited", 451: "forbidden"}
PORTS = {"http": 80, "https": 443}
MAX_POOLS = 256  # hosts whose connections one process keeps alive
CHUNK_BYTES = 1 << 16
NAT64 = ipaddress.ip_network("64:ff9b::/32")


@dataclass(frozen=True, kw_only=True)
class FetchPolicy:
    """What is allowed of one fetch."""

    timeout_seconds: float = 10.0
    """Of one try, from the lookup of the name to the last byte, redirects included."""
    retries: int = 2
    max_bytes: int = 32 << 20
    """On the wire."""
    max_pixels: int = 50_000_000
    min_pixels: int = 0
    max_aspect_ratio: float | None = None
    max_redirects: int = 5
    allow_addresses: tuple[tuple[str, int], ...] = ()
    """(host, port) pairs, as a URL spells them, that need not be public."""
    user_agent: str = "minidalle2/0.1 (image-text data set builder)"


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Either the body, or a reason out of `ingest.filters.FAILED` or `FILTERED`."""

    body: bytes | None = None
    reason: str | None = None


class FetchError(Exception):
    """Ends a try. args: the reason, and the seconds the server asked us to wait, or None."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


def parse_allow_address(text: str) -> tuple[str, int]:
    """Read HOST:PORT, as given to --allow-address; ValueError for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ValueError(f"--allow-address: found {text!r}, expected HOST:PORT, as in localhost:80")
    return host.strip("[]").lower(), int(port)


def is_public(address: str) -> bool:
    """Say whether an IP address is a unicast address of the public internet.

    IPv6 forms that smuggle an IPv4 address (6to4, Teredo, NAT64) are not: a mapped one is judged
    as what it maps to.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip.sixtofour or ip.teredo or ip in NAT64:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


# -- sockets with a deadline ---------------------------------------------------------------------

_try = threading.local()  # .deadline: when this thread's try must end, on the monotonic clock


def _remaining() -> float:
    left = _try.deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("deadline passed")
    return left


class _DeadlineSocket(socket.socket):
    """Waits for the rest of the try, not anew for each byte that drips in."""

    def recv_into(self, *args: Any, **options: Any) -> int:
        self.settimeout(_remaining())
        return super().recv_into(*args, **options)


class _DeadlineTlsSocket(ssl.SSLSocket):
    def recv_into(self, *args: Any, **options: Any) -> int:
        self.settimeout(_remaining())
        return super().recv_into(*args, **options)


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name, in the system's order of preference."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def connect(address: str, port: int) -> socket.socket:
    """Open a TCP connection to an IP address within this thread's deadline."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = _DeadlineSocket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(_remaining())
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect((address, port))
    except OSError:
        sock.close()
        raise
    return sock


PoolKey = tuple[str, str, str, int]  # scheme, name, address, port


# -- the fetcher ---------------------------------------------------------------------------------


class Fetcher:
    """Fetches images under one policy; shared by the threads of a process, keeps connections."""

    def __init__(
        self,
        policy: FetchPolicy,
        *,
        resolve: Callable[[str, int], list[str]] = resolve,
        connect: Callable[[str, int], socket.socket] = connect,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.policy, self._resolve, self._sleep = policy, resolve, sleep
        self._lock = threading.Lock()
        self._pools: OrderedDict[PoolKey, urllib3.HTTPConnectionPool] = OrderedDict()
        dial = {"_new_conn": lambda connection: connect(connection.host, connection.port)}
        self._plain: Any = type("_PlainConnection", (HTTPConnection,), dial)
        self._secure: Any = type("_SecureConnection", (HTTPSConnection,), dial)
        self._tls = ssl.create_default_context()
        self._tls.sslsocket_class = _DeadlineTlsSocket

    def fetch(self, url: str | None) -> Fetched:
        """Return the image behind `url`, or the reason why not; raises for nobody's URL."""
        for number in range(self.policy.retries + 1):
            _try.deadline = time.monotonic() + self.policy.timeout_seconds
            try:
                body = self._follow(url or "")
            except FetchError as error:
                if error.reason not in RETRIED or number == self.policy.retries:
                    return Fetched(reason=error.reason)
                # Full jitter: the rows of one broken host must not come back all at once.
                pause = random.uniform(0, min(8.0, 0.5 * 2**number))
                self._sleep(max(pause, min(error.retry_after or 0.0, 30.0)))
                continue
            problem = header_problem(
                body,
                max_pixels=self.policy.max_pixels,
                min_pixels=self.policy.min_pixels,
                max_aspect_ratio=self.policy.max_aspect_ratio,
            )
            return Fetched(reason=problem) if problem else Fetched(body=body)
        raise AssertionError("the last try returns")

    def _follow(self, url: str) -> bytes:
        for _ in range(self.policy.max_redirects + 1):
            response = self._request(_parse(url))
            try:
                if response.status not in REDIRECTS:
                    return self._body(response)
                url = _redirected(url, response.headers.get("Location", ""))
            finally:
                response.close()  # read to its end, its connection is back in the pool already
        raise FetchError("too_many_redirects")

    def _request(self, url: Url) -> urllib3.BaseHTTPResponse:
        host, port = (url.host or "").strip("[]"), url.port or PORTS[url.scheme or ""]
        error = FetchError("unreachable")
        for address in self._addresses(host, port)[:3]:
            pool = self._pool(url.scheme or "", host, address, port)
            netloc = f"[{host}]" if ":" in host else host
            headers = {
                "Host": netloc if url.port is None else f"{netloc}:{url.port}",
                "User-Agent": self.policy.user_agent,
                "Accept": "image/*",
                "Accept-Encoding": "identity",
            }
            try:
                return pool.urlopen(
                    "GET",
                    url.request_uri,
                    headers=headers,
                    redirect=False,
                    retries=False,
                    assert_same_host=False,
                    preload_content=False,
                    decode_content=False,
                    timeout=_remaining(),
                )
            except (HTTPError, OSError, http.client.HTTPException, ValueError) as problem:
                error = FetchError(_connection_reason(problem))
        raise error

    def _addresses(self, host: str, port: int) -> list[str]:
        """Resolve a name once; all of its addresses must be public, or the pair be allowed."""
        try:
            addresses = self._resolve(host, port)
        except (OSError, UnicodeError):
            raise FetchError("unresolved") from None
        if (host.lower(), port) in self.policy.allow_addresses:
            return addresses
        if not all(is_public(address) for address in addresses):
            raise FetchError("address_refused")
        return addresses

    def _pool(self, scheme: str, host: str, address: str, port: int) -> urllib3.HTTPConnectionPool:
        key = (scheme, host, address, port)
        with self._lock:
            pool = self._pools.pop(key, None)
            if pool is None and scheme == "https":
                pool = urllib3.HTTPSConnectionPool(
                    address,
                    port,
                    maxsize=4,
                    ssl_context=self._tls,
                    server_hostname=host,
                    assert_hostname=host,
                )
                pool.ConnectionCls = self._secure
            elif pool is None:
                pool = urllib3.HTTPConnectionPool(address, port, maxsize=4)
                pool.ConnectionCls = self._plain
            self._pools[key] = pool
            while len(self._pools) > MAX_POOLS:
                self._pools.popitem(last=False)[1].close()
        return pool

    def _body(self, response: urllib3.BaseHTTPResponse) -> bytes:
        """Read the body under the byte limit, after everything the headers already tell."""
        headers: Mapping[str, str] = response.headers
        if response.status != 200:
            kind = "server_error" if response.status >= 500 else "client_error"
            wait = headers.get("Retry-After", "")
            seconds = float(wait) if wait.isascii() and wait.isdigit() else None
            raise FetchError(STATUS_REASONS.get(response.status, kind), seconds)
        if opted_out(response.headers.getlist("X-Robots-Tag")):
            raise FetchError("opted_out")
        if not may_be_image(headers.get("Content-Type")):
            raise FetchError("not_an_image")
        length = headers.get("Content-Length", "")
        if length.isascii() and length.isdigit() and int(length) > self.policy.max_bytes:
            raise FetchError("too_large")
        body = bytearray()
        try:
            while chunk := response.read1(CHUNK_BYTES):  # one receive at a time: deadline, limit
                body += chunk
                if len(body) > self.policy.max_bytes:
                    raise FetchError("too_large")
        except (HTTPError, OSError, http.client.HTTPException, ValueError) as problem:
            raise FetchError(_connection_reason(problem)) from None
        return bytes(body)


def _parse(url: str) -> Url:
    try:
        parsed = parse_url(url.strip())
    except (LocationParseError, ValueError):
        raise FetchError("invalid_url") from None
    if parsed.scheme not in PORTS or not parsed.host or parsed.auth:
        raise FetchError("invalid_url")
    return parsed


def _redirected(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:  # such as http://[bad/
        raise FetchError("invalid_url") from None


def _connection_reason(problem: Exception) -> str:
    """Name the reason behind what urllib3 wraps a failure in."""
    causes: list[BaseException | None] = [problem, problem.__cause__, problem.__context__]
    if time.monotonic() >= _try.deadline or any(isinstance(c, TimeoutError) for c in causes):
        return "timeout"
    if any(isinstance(cause, (IncompleteRead, http.client.IncompleteRead)) for cause in causes):
        return "truncated"
    tls = any(isinstance(cause, (SSLError, ssl.SSLError)) for cause in causes)
    return "tls_failed" if tls else "unreachable"
