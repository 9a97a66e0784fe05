"""Names to addresses to sockets: which addresses are public, and connections with a deadline.

A thread opens its try with `begin`; whatever it waits for then, a lookup, a connection, a
handshake, a byte, ends when the try must end.
"""

import ipaddress
import socket
import ssl
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

NAT64 = ipaddress.ip_network("64:ff9b::/32")
NAMES_KEPT_SECONDS = 60.0
MAX_NAMES = 100_000
RESOLVER_THREADS = 32


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
