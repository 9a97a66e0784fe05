"""Names to addresses to sockets: which addresses are public, and connections with a deadline.

A thread opens its try with `begin`; whatever it waits for then, a lookup, a connection, a
handshake, a byte, ends when the try must end.
"""

import base64
import errno
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

NAT64 = ipaddress.ip_network("64:ff9b::/32")
NAMES_KEPT_SECONDS = 60.0
MAX_NAMES = 100_000
RESOLVER_THREADS = 32
MAX_HEAD_BYTES = 16 << 10  # of a proxy's answer


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


# -- one try's clock -------------------------------------------------------------------------------

_try = threading.local()  # .deadline on the monotonic clock; .connect and .read, seconds


def begin(total: float, connect: float, read: float) -> None:
    """Begin this thread's try: seconds in all, for one connection, and between two answers."""
    _try.deadline = time.monotonic() + total
    _try.connect, _try.read = connect, read


def deadline() -> float:
    """Return when this thread's try must end, on the monotonic clock."""
    return _try.deadline


def remaining(at_most: float = float("inf")) -> float:
    """Return the seconds left to this thread's try; TimeoutError if there are none."""
    left = _try.deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("deadline passed")
    return min(left, at_most)


class _DeadlineSocket(socket.socket):
    """Waits for the rest of the try, not anew for each byte that drips in."""

    def recv_into(self, *args: Any, **options: Any) -> int:
        self.settimeout(remaining(_try.read))
        return super().recv_into(*args, **options)

    def sendall(self, *args: Any, **options: Any) -> None:
        self.settimeout(remaining(_try.read))
        super().sendall(*args, **options)


class DeadlineTlsSocket(ssl.SSLSocket):
    """The same over TLS; its handshake has the time left when the connection was made."""

    def recv_into(self, *args: Any, **options: Any) -> int:
        self.settimeout(remaining(_try.read))
        return super().recv_into(*args, **options)

    def sendall(self, *args: Any, **options: Any) -> None:
        self.settimeout(remaining(_try.read))
        super().sendall(*args, **options)


def connect(address: str, port: int) -> socket.socket:
    """Open a TCP connection to an IP address within this thread's try."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = _DeadlineSocket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(remaining(_try.connect))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect((address, port))
    except OSError:
        sock.close()
        raise
    return sock


class Tunnel:
    """Connects through an HTTP proxy, to the very address that was checked: CONNECT names no host.

    proxy: http://[USER:PASSWORD@]HOST:PORT. A proxy that cannot be reached, or that refuses us, is
    our own network's fault.
    """

    def __init__(self, proxy: str) -> None:
        found, host, port = _split(proxy)
        if found is None or not host or not port:
            raise ValueError(
                f"--proxy: found {_without_password(proxy)!r}, expected http://HOST:PORT, or "
                "environment with HTTPS_PROXY set to one"
            )
        self._host, self._port, self._greeting = host, port, ""
        if found.username is not None:
            pair = f"{unquote(found.username)}:{unquote(found.password or '')}"
            told = base64.b64encode(pair.encode()).decode()
            self._greeting = f"Proxy-Authorization: Basic {told}\r\n"

    def __call__(self, address: str, port: int) -> socket.socket:
        """Open a connection to an IP address within this thread's try."""
        try:
            sock = connect(resolve(self._host, self._port)[0], self._port)
        except OSError as error:
            raise OSError(errno.ENETUNREACH, f"the proxy cannot be reached: {error}") from None
        there = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        try:
            request = f"CONNECT {there} HTTP/1.1\r\nHost: {there}\r\n{self._greeting}\r\n"
            sock.sendall(request.encode())
            answer = _head(sock).split(b" ", 2)
        except BaseException:
            sock.close()
            raise
        if answer[1:2] == [b"200"]:
            return sock
        sock.close()
        if answer[1:2] == [b"407"]:
            raise OSError(errno.ENETUNREACH, "the proxy asks for other credentials")
        raise ConnectionRefusedError(f"the proxy does not connect to {there}")


def _split(proxy: str) -> tuple[SplitResult | None, str | None, int | None]:
    """Return the parts of a proxy's URL, its host and its port; None for all that is none."""
    try:
        found = urlsplit(proxy)
        port = found.port
    except ValueError:  # whose message may hold a part of a password
        return None, None, None
    fits = found.scheme == "http" and not found.path.strip("/")
    return (found, found.hostname, port) if fits else (None, None, None)


def _without_password(proxy: str) -> str:
    """Return a proxy's URL, or what was given for one, without user and password."""
    scheme, slashes, _ = proxy.partition("://")
    plain = f"{scheme}{slashes}" if slashes and scheme.isalnum() else ""
    user, _, place = proxy.rpartition("@")
    return f"{plain}{place}" if user else place


def _head(sock: socket.socket) -> bytes:
    """Read an answer's head, and not a byte more."""
    head, byte = bytearray(), bytearray(1)
    while not head.endswith(b"\r\n\r\n") and len(head) < MAX_HEAD_BYTES:
        if not sock.recv_into(byte):
            raise ConnectionResetError("the proxy hung up")
        head += byte
    return bytes(head)


def resolve_proxy(proxy: str) -> str:
    """Return a proxy's URL: itself, that of HTTPS_PROXY for "environment", empty for none.

    Raises ValueError for what is none.
    """
    if proxy == "environment":
        proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or "no HTTPS_PROXY"
    if proxy:
        Tunnel(proxy)
    return proxy


def connector(proxy: str) -> Callable[[str, int], socket.socket]:
    """Return what opens connections: directly where `proxy` is empty, else through that URL."""
    return Tunnel(proxy) if proxy else connect


# -- names -----------------------------------------------------------------------------------------


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name, in the system's order of preference."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Resolver:
    """The system's resolver, which knows no deadline, behind threads that can be left waiting.

    A name's addresses are kept for a minute; what they may be used for is judged at every use.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(RESOLVER_THREADS, thread_name_prefix="resolver")
        self._lock = threading.Lock()
        self._names: OrderedDict[tuple[str, int], tuple[float, Future[list[str]]]] = OrderedDict()

    def __call__(self, host: str, port: int) -> list[str]:
        """Return the addresses of a name; OSError if it has none, TimeoutError if nobody says."""
        now = time.monotonic()
        with self._lock:
            until, future = self._names.get((host, port), (0.0, None))
            failed = future is not None and future.done() and future.exception() is not None
            if future is None or failed or until <= now:
                future = self._threads.submit(resolve, host, port)
                self._names[host, port] = (now + NAMES_KEPT_SECONDS, future)
            self._names.move_to_end((host, port))
            while len(self._names) > MAX_NAMES:
                self._names.popitem(last=False)
        return future.result(remaining())
