"""Names to addresses to sockets: which addresses are public, and connections with a deadline.

A thread starts a try with `start_try`. Every later wait, for a lookup, a connection, a handshake or
a byte, ends at that try's deadline.
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
from urllib.parse import unquote, urlsplit

NAT64 = ipaddress.ip_network("64:ff9b::/32")
NAMES_KEPT_SECONDS = 60.0
MAX_NAMES = 100_000
RESOLVER_THREADS = 32
MAX_HEAD_BYTES = 16 << 10  # of a proxy's answer


def is_public(address: str) -> bool:
    """Return whether an IP address is a unicast address of the public internet.

    IPv6 forms that contain an IPv4 address (6to4, Teredo, NAT64) are not; a mapped address counts
    as the one that it maps to.
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


def start_try(total: float, connect: float, read: float) -> None:
    """Start this thread's try: seconds in all, for one connection, and without a byte."""
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
    """Waits for the rest of the try in all, not again for each byte that arrives."""

    def recv_into(self, *args: Any, **options: Any) -> int:
        self.settimeout(remaining(_try.read))
        return super().recv_into(*args, **options)

    def sendall(self, *args: Any, **options: Any) -> None:
        self.settimeout(remaining(_try.read))
        super().sendall(*args, **options)


class DeadlineTlsSocket(ssl.SSLSocket):
    """The same over TLS; its handshake has the time left when the connection was made."""

    def recv_into(self, *args: Any, **options: Any) -> int:
        """Receive, within this thread's try."""
        self.settimeout(remaining(_try.read))
        return super().recv_into(*args, **options)

    def sendall(self, *args: Any, **options: Any) -> None:
        """Send, within this thread's try."""
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
    """Connects through an HTTP proxy to the very address that was checked: CONNECT names no host.

    proxy: http://[USER:PASSWORD@]HOST:PORT. A proxy that cannot be reached, or that refuses us, is
    our own network's fault.
    """

    def __init__(self, proxy: str) -> None:
        try:
            url = urlsplit(proxy)
            self._host, self._port = url.hostname or "", url.port or 0
            valid = url.scheme == "http" and not url.path.strip("/") and self._host and self._port
        except ValueError:  # whose message may contain a part of a password
            url, valid = None, False
        if url is None or not valid:
            # The message contains no user and no password
            scheme, slashes, _ = proxy.partition("://")
            start = f"{scheme}{slashes}" if slashes and scheme.isalnum() else ""
            user, _, place = proxy.rpartition("@")
            shown = start + place if user else place
            raise ValueError(
                f"--proxy: found {shown!r}, expected http://HOST:PORT, or environment with "
                "HTTPS_PROXY set to one"
            )
        self._authorization = ""
        if url.username is not None:
            pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
            credentials = base64.b64encode(pair.encode()).decode()
            self._authorization = f"Proxy-Authorization: Basic {credentials}\r\n"

    def __call__(self, address: str, port: int) -> socket.socket:
        """Open a connection to an IP address within this thread's try."""
        try:
            sock = connect(resolve(self._host, self._port)[0], self._port)
        except OSError as error:
            raise OSError(errno.ENETUNREACH, f"the proxy cannot be reached: {error}") from None
        target = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        head, byte = bytearray(), bytearray(1)
        try:
            request = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{self._authorization}\r\n"
            sock.sendall(request.encode())
            # The answer's head, and not a byte more: what follows is the target's
            while not head.endswith(b"\r\n\r\n") and len(head) < MAX_HEAD_BYTES:
                if not sock.recv_into(byte):
                    raise ConnectionResetError("the proxy hung up")
                head += byte
        except BaseException:
            sock.close()
            raise
        status = bytes(head).split(b" ", 2)[1:2]
        if status == [b"200"]:
            return sock
        sock.close()
        if status == [b"407"]:
            raise OSError(errno.ENETUNREACH, "the proxy asks for other credentials")
        raise ConnectionRefusedError(f"the proxy does not connect to {target}")


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
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


class Resolver:
    """The system's resolver, which has no deadline, in threads that can be left waiting.

    A name's addresses are kept for a minute; whether they are public is checked at every use.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(RESOLVER_THREADS, thread_name_prefix="resolver")
        self._lock = threading.Lock()
        self._names: OrderedDict[tuple[str, int], tuple[float, Future[list[str]]]] = OrderedDict()

    def __call__(self, host: str, port: int) -> list[str]:
        """Return the addresses of a name; OSError for none, TimeoutError without an answer."""
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
