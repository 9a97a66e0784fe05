"""Fetch one URL from a hostile web: only public addresses, within deadlines and a byte limit.

A name is resolved once, all of its addresses must be public, and the connection goes to one of
them, so no second lookup can give another answer. Each redirect is checked like a new URL, by the
rules of its own host. A proxy is used on demand only, and gets the address, not the name.
"""

import errno
import http.client
import re
import socket
import ssl
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from urllib.parse import quote, urljoin

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, IncompleteRead, LocationParseError, SSLError
from urllib3.util import Url, parse_url

from cluster.base.files import Json
from ingest.fetching import net
from ingest.fetching.decode import ImageLimits, header_problem
from ingest.fetching.formats import HEAD_BYTES, begins_like_image
from ingest.fetching.rate_limit import HostLimits
from ingest.fetching.robots import MAX_BYTES as MAX_ROBOTS_BYTES
from ingest.fetching.robots import Origin, RobotsCache, RobotsUnavailableError
from ingest.lists.opt_outs import OUR_AGENT, opted_out, reserved

REDIRECTS = frozenset({301, 302, 303, 307, 308})
STATUS_REASONS = {401: "forbidden", 403: "forbidden", 404: "not_found", 410: "not_found"}
STATUS_REASONS |= {408: "timeout", 429: "rate_limited", 451: "forbidden"}
PORTS = {"http": 80, "https": 443}
MAX_POOLS = 256  # hosts whose connections one process keeps alive
CHUNK_BYTES = 1 << 16
WHOLE_RANGE = re.compile(r"bytes 0-(\d+)/(\d+)")
COMPRESSED = (b"\x1f\x8b", b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")  # gzip, deflate
MAX_ENCODINGS = 2  # of one body, each in the other
NO_NETWORK = frozenset({errno.ENETUNREACH, errno.ENETDOWN})


@dataclass(frozen=True, kw_only=True)
class FetchPolicy:
    """What is allowed of one fetch."""

    timeout_seconds: float = 10.0
    """Of one try, from the lookup of the name to the last byte, redirects included."""
    connect_seconds: float = 5.0
    """For one connection; a name may have several addresses."""
    read_seconds: float = 5.0
    """Without a byte."""
    max_bytes: int = 32 << 20
    """On the wire, and of what a compressed body holds."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    max_redirects: int = 5
    robots: bool = True
    """Request a host's robots.txt, and obey it."""
    host_connections: int = 4
    """At once per host."""
    host_rate: float = 10.0
    """Requests per second and host; 0: any number."""
    allow_addresses: tuple[tuple[str, int], ...] = ()
    """(host, port) pairs, as a URL spells them, that need not be public."""
    proxy: str = field(default="", repr=False)
    """URL of an HTTP proxy to connect through, maybe with a password; empty: none."""
    contact: str = ""
    """Where the operator of a host can complain: part of the user agent."""

    @property
    def user_agent(self) -> str:
        """The User-Agent header."""
        about = "; ".join(part for part in ("image-text data set builder", self.contact) if part)
        return f"{OUR_AGENT}/0.1 ({about})"


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Either the body, or a reason out of `cluster.base.outcomes`.

    retry_after: seconds for which the host, or we, asked for a pause.
    """

    body: bytes | None = None
    reason: str | None = None
    retry_after: float | None = None


class FetchError(OSError):
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


def host_of(url: str | None) -> str:
    """Return the host that a URL's request goes to first; "" for what is no URL."""
    try:
        return _parse(url or "").host or ""
    except FetchError:
        return ""


def connection_classes(connect: Callable[[str, int], socket.socket]) -> Json:
    """Return urllib3's connection class of each scheme, with sockets that `connect` opens.

    urllib3 has no public hook for this, so its private `_new_conn` is replaced. Raises ImportError
    where that method does not exist: the sockets would have neither a deadline nor a proxy.
    """
    if not hasattr(HTTPConnection, "_new_conn"):
        raise ImportError(
            "urllib3: HTTPConnection has no _new_conn; install the one of requirements.lock"
        )
    methods = {"_new_conn": lambda connection: connect(connection.host, connection.port)}
    bases = {"http": HTTPConnection, "https": HTTPSConnection}
    return {scheme: type(f"_{base.__name__}", (base,), methods) for scheme, base in bases.items()}


PoolKey = tuple[str, str, str, int]  # scheme, name, address, port


class Fetcher:
    """Fetches images under one policy; shared by the threads of a process, keeps connections.

    limits: of requests per host. A caller of `fetch` holds a connection and a token of the URL's
    own host already (see `RowQueue`); those of other hosts are taken here.
    """

    def __init__(
        self,
        policy: FetchPolicy,
        *,
        resolve: Callable[[str, int], list[str]] | None = None,
        connect: Callable[[str, int], socket.socket] | None = None,
    ) -> None:
        connect = connect or net.connector(policy.proxy)
        self.policy, self._resolve = policy, resolve or net.Resolver()
        self.limits = HostLimits(policy.host_connections, policy.host_rate)
        self._robots = RobotsCache(self._load_robots, OUR_AGENT)
        self._lock = threading.Lock()
        self._pools: OrderedDict[PoolKey, urllib3.HTTPConnectionPool] = OrderedDict()
        self._connections = connection_classes(connect)
        self._tls = ssl.create_default_context()
        self._tls.sslsocket_class = net.DeadlineTlsSocket

    def fetch(self, url: str | None) -> Fetched:
        """Try once; return the image behind `url`, or the reason why not. Raises for no URL."""
        policy = self.policy
        net.start_try(policy.timeout_seconds, policy.connect_seconds, policy.read_seconds)
        try:
            body = self._follow(url or "")
        except FetchError as error:
            return Fetched(reason=error.reason, retry_after=error.retry_after)
        problem = header_problem(body, policy.limits)
        return Fetched(reason=problem) if problem else Fetched(body=body)

    def _follow(self, url: str) -> bytes:
        """Follow redirects to an image, by the rules and limits of each host; return its bytes."""
        held = host_of(url)
        for hop in range(self.policy.max_redirects + 1):
            target = _parse(url)
            host = target.host or ""
            borrowed = hop > 0 and host != held
            if hop > 0:
                take = self.limits.acquire if borrowed else self.limits.take_token
                if not take(host, until=net.deadline()):
                    raise FetchError("timeout")
            try:
                self._require_robots(target)
                with self._responding(target) as response:
                    if response.status not in REDIRECTS:
                        self._require_served(response)
                        return self._read_image(response)
                    url = _redirected(url, response)
            finally:
                if borrowed:
                    self.limits.release(host)
        raise FetchError("too_many_redirects")

    @contextmanager
    def _responding(self, url: Url) -> Iterator[urllib3.BaseHTTPResponse]:
        response = self._request(url)
        try:
            yield response
        finally:
            self._finish(response)

    def _request(self, url: Url, accept: str = "image/*") -> urllib3.BaseHTTPResponse:
        host, port = (url.host or "").strip("[]"), url.port or PORTS[url.scheme or ""]

        # The name is resolved once; all of its addresses must be public, or the pair be allowed
        allowed = (host.lower(), port) in self.policy.allow_addresses
        if not allowed and port not in PORTS.values():
            raise FetchError("port_refused")
        try:
            addresses = self._resolve(host, port)
        except TimeoutError:
            raise FetchError("timeout") from None
        except socket.gaierror as error:
            passing = error.errno == socket.EAI_AGAIN
            raise FetchError("resolver_failed" if passing else "unresolved") from None
        except (OSError, UnicodeError):
            raise FetchError("unresolved") from None
        if not allowed and not all(net.is_public(address) for address in addresses):
            raise FetchError("address_refused")

        # The first address that answers
        netloc = f"[{host}]" if ":" in host else host
        headers = {
            "Host": netloc if url.port is None else f"{netloc}:{url.port}",
            "User-Agent": self.policy.user_agent,
            "Accept": accept,
            "Accept-Encoding": "identity",
        }
        failure = FetchError("unreachable")
        for address in addresses[:3]:
            pool = self._pool(url.scheme or "", host, address, port)
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
                    timeout=net.remaining(self.policy.connect_seconds),
                )
            except (HTTPError, OSError, http.client.HTTPException, ValueError) as problem:
                failure = FetchError(_connection_reason(problem))
        raise failure

    def _pool(self, scheme: str, host: str, address: str, port: int) -> urllib3.HTTPConnectionPool:
        key = (scheme, host, address, port)
        size = self.policy.host_connections
        with self._lock:
            pool = self._pools.pop(key, None)
            if pool is None and scheme == "https":
                pool = urllib3.HTTPSConnectionPool(
                    address,
                    port,
                    maxsize=size,
                    ssl_context=self._tls,
                    server_hostname=host,
                    assert_hostname=host,
                )
            elif pool is None:
                pool = urllib3.HTTPConnectionPool(address, port, maxsize=size)
            pool.ConnectionCls = self._connections[scheme]
            self._pools[key] = pool
            while len(self._pools) > MAX_POOLS:
                self._pools.popitem(last=False)[1].close()
        return pool

    # -- rules of a host ---------------------------------------------------------------------------

    def _require_robots(self, target: Url) -> None:
        if not self.policy.robots:
            return
        scheme, host = target.scheme or "", target.host or ""
        origin = (scheme, host, target.port or PORTS[scheme])
        try:
            allowed = self._robots.allowed(origin, target.url)
        except RobotsUnavailableError as error:
            raise FetchError(error.reason, error.retry_after) from None
        if not allowed:
            raise FetchError("robots_disallowed")

    def _load_robots(self, origin: Origin) -> tuple[int, bytes]:
        """Return the status and the start of a host's robots.txt, which may be redirected."""
        scheme, host, port = origin
        url = f"{scheme}://{host}:{port}/robots.txt"
        for _ in range(self.policy.max_redirects + 1):
            response = self._request(_parse(url), "text/plain, */*;q=0.1")
            try:
                if response.status == 200:
                    body = self._read(response, MAX_ROBOTS_BYTES)
                    return 200, _decompressed(body, MAX_ROBOTS_BYTES)[0]
                if response.status not in REDIRECTS:
                    return response.status, b""
                url = _redirected(url, response)
            finally:
                self._finish(response)
        return 404, b""  # section 2.3.1.2: so many redirects may count as none there

    # -- answers -----------------------------------------------------------------------------------

    def _require_served(self, response: urllib3.BaseHTTPResponse) -> None:
        """Raise FetchError for an answer that its status, its size or its owner's wish excludes.

        What its body is, its first bytes say: servers send pictures under any Content-Type.
        """
        headers = response.headers
        parts = WHOLE_RANGE.fullmatch(headers.get("Content-Range", "").strip())
        is_whole = parts is not None and int(parts[1]) + 1 == int(parts[2])
        if response.status not in (200, 203) and not (response.status == 206 and is_whole):
            kind = "server_error" if response.status >= 500 else "client_error"
            wait = _seconds_of(headers.get("Retry-After", ""))
            raise FetchError(STATUS_REASONS.get(response.status, kind), wait)
        robots_tags = headers.getlist("X-Robots-Tag")
        if opted_out(robots_tags) or reserved(headers.get("TDM-Reservation")):
            raise FetchError("opted_out")
        length = headers.get("Content-Length", "")
        if length.isascii() and length.isdigit() and int(length) > self.policy.max_bytes:
            raise FetchError("too_large")

    def _finish(self, response: urllib3.BaseHTTPResponse) -> None:
        """Close a response; read to its end, its connection is in the pool already.

        The short page that comes with a 404 is read for that.
        """
        if 0 <= (response.length_remaining or 0) <= CHUNK_BYTES:
            with suppress(FetchError):  # what there was to know is known
                self._read(response, CHUNK_BYTES)
        response.close()

    def _read_image(self, response: urllib3.BaseHTTPResponse) -> bytes:
        """Read a picture under the byte limit, gzip undone; FetchError as soon as it is none."""
        max_bytes, body, is_image = self.policy.max_bytes, bytearray(), False
        for chunk in self._chunks(response):
            body += chunk
            if len(body) > max_bytes:
                raise FetchError("too_large")
            head = b"" if is_image else _decompressed(body, CHUNK_BYTES)[0]
            if len(head) >= HEAD_BYTES or len(body) > CHUNK_BYTES:
                is_image = is_image or begins_like_image(head)
                if not is_image:
                    raise FetchError("not_an_image")
        image, is_complete = _decompressed(body, max_bytes + 1)
        if len(image) > max_bytes:
            raise FetchError("too_large")
        if not is_complete:
            raise FetchError("truncated")
        return image

    def _read(self, response: urllib3.BaseHTTPResponse, max_bytes: int) -> bytes:
        """Read the start of a body."""
        body = bytearray()
        for chunk in self._chunks(response):
            body += chunk
            if len(body) > max_bytes:
                break
        return bytes(body[:max_bytes])

    def _chunks(self, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        """Yield a body, one receive at a time, between which limits and deadlines hold."""
        try:
            while chunk := response.read1(CHUNK_BYTES):
                yield chunk
        except FetchError:
            raise
        except (HTTPError, OSError, http.client.HTTPException, ValueError) as problem:
            raise FetchError(_connection_reason(problem)) from None


def _decompressed(body: bytes | bytearray, max_bytes: int) -> tuple[bytes, bool]:
    """Return what a compressed body holds, up to max_bytes, and whether its end is there.

    Bodies are compressed that begin so, whatever their headers say; others are returned as they
    are, and nothing of damaged ones.
    """
    data, is_complete = bytes(body), True
    for _ in range(MAX_ENCODINGS):
        if not data.startswith(COMPRESSED):
            break
        inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
        try:
            data = inflate.decompress(data, max_bytes)
        except zlib.error:
            return b"", True
        is_complete = is_complete and inflate.eof
    return data, is_complete


def _parse(url: str) -> Url:
    try:
        parsed = parse_url(url.strip())
    except (LocationParseError, ValueError):
        raise FetchError("invalid_url") from None
    if parsed.scheme not in PORTS or not parsed.host or parsed.auth:
        raise FetchError("invalid_url")
    return parsed


def _redirected(url: str, response: urllib3.BaseHTTPResponse) -> str:
    """Return where a redirect leads, by its first Location, in which servers write any bytes."""
    raw = "".join(response.headers.getlist("Location")[:1]).encode("latin-1")
    try:
        location = raw.decode()
    except UnicodeDecodeError:
        location = quote(raw, safe=bytes(range(128)))
    try:
        return urljoin(url, location)
    except ValueError:  # such as http://[bad/
        raise FetchError("invalid_url") from None


def _seconds_of(retry_after: str) -> float | None:
    """Read a Retry-After header: seconds or a date; None for neither."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _connection_reason(problem: Exception) -> str:
    """Name the reason behind what urllib3 wraps a failure in."""
    causes: list[BaseException | None] = [problem, problem.__cause__, problem.__context__]
    if time.monotonic() >= net.deadline() or any(isinstance(c, TimeoutError) for c in causes):
        return "timeout"
    if any(isinstance(cause, (IncompleteRead, http.client.IncompleteRead)) for cause in causes):
        return "truncated"
    if any(isinstance(cause, OSError) and cause.errno in NO_NETWORK for cause in causes):
        return "no_network"
    tls = any(isinstance(cause, (SSLError, ssl.SSLError)) for cause in causes)
    return "tls_failed" if tls else "unreachable"
