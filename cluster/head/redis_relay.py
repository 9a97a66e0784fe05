"""The way from Ray's head to a Redis that has TLS and a password, without the password in Ray.

Ray has no other way to pass a password than the command lines of its processes, on which every
user of the machine can read it. So Ray connects without one to a relay on the loopback, which
admits the processes of its own user alone and opens each connection to Redis with TLS and AUTH.
"""

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ANSWER_SECONDS = 10.0
IDLE_SECONDS = 120.0  # without a connection: the head is gone, and another start has another relay
BLOCK_BYTES = 1 << 16
SOCKETS = Path("/proc/net/tcp")  # of this machine, with the user of each
ESTABLISHED = "01"  # a state of theirs
PASSWORD_VARIABLE = "REDIS_PASSWORD"


@dataclass(frozen=True, kw_only=True)
class Redis:
    """Where Redis is and how it is entered; ca: file of the authorities, empty = the system's."""

    host: str
    port: int
    password: str = field(repr=False)
    ca: str = ""

    @property
    def name(self) -> str:
        """Return HOST:PORT."""
        return f"{self.host}:{self.port}"

    def context(self) -> ssl.SSLContext:
        """Return what verifies the server's certificate and name; ValueError if `ca` is no file of
        certificates."""
        try:
            return ssl.create_default_context(cafile=self.ca or None)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(
                f"--redis-ca {self.ca}: found {error}, expected a file of certificates (PEM)"
            ) from None

    def require(self) -> None:
        """Raise ValueError unless Redis answers to this password, and to nobody without one."""
        try:
            without, right = self._answer("PING"), self._answer("AUTH", self.password)
        except ssl.SSLError as error:
            why = getattr(error, "verify_message", "") or error.reason or error
            raise ValueError(
                f"--redis {self.name}: found {why}, expected TLS with a certificate of this host; "
                "name its authority by --redis-ca"
            ) from None
        except OSError as error:
            raise ValueError(
                f"--redis {self.name}: found {error or type(error).__name__}, expected a Redis "
                "with TLS; start it, or mend the address"
            ) from None
        if not without.startswith("-NOAUTH"):
            raise ValueError(
                f"--redis {self.name}: found {without or 'no answer'} to who has no password, "
                "expected NOAUTH; set requirepass in its configuration"
            )
        if right != "+OK":
            raise ValueError(
                f"--redis {self.name}: found {right.partition(' ')[0] or 'no answer'}, expected "
                "the password that opens it; mend REDIS_PASSWORD or --redis-password-file"
            )

    def _answer(self, *words: str) -> str:
        with (
            socket.create_connection((self.host, self.port), timeout=ANSWER_SECONDS) as plain,
            self.context().wrap_socket(plain, server_hostname=self.host) as connection,
        ):
            connection.sendall(encoded(*words))
            with connection.makefile("rb") as answers:
                return answers.readline(1024).decode(errors="replace").strip()


def read_password(path: Path) -> str:
    """Return the password of the environment, else of a file that its owner alone can read."""
    password = os.environ.get(PASSWORD_VARIABLE, "")
    if not password and path.expanduser().is_file():
        require_private(path.expanduser(), "a password")
        password = path.expanduser().read_text().strip()
    if not password:
        raise ValueError(
            f"--redis: found no password in {PASSWORD_VARIABLE} or {path}, expected that of Redis"
        )
    return password


def require_private(path: Path, what: str) -> None:
    """Raise ValueError for a secret of this user that others can read."""
    if path.stat().st_mode & 0o077 and path.stat().st_uid == os.getuid():
        raise ValueError(f"{path}: found {what} that others can read; run chmod 600 {path}")


def encoded(*words: str) -> bytes:
    """Return a command as Redis reads it: an array of strings with their lengths."""
    parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
    return f"*{len(words)}\r\n{''.join(parts)}".encode()


def start_relay(redis: Redis) -> int:
    """Start a relay as a process of its own, which ends when nothing has used it for
    `IDLE_SECONDS`; returns its port on the loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if os.fork():
        listener.close()
        return port
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    code = 1
    try:
        asyncio.run(_serve(redis, listener))
        code = 0
    finally:
        os._exit(code)


async def _serve(redis: Redis, listener: socket.socket) -> None:
    """Pass connections on until there has been none for `IDLE_SECONDS`."""
    context = redis.context()
    num_open = 0
    idle_since = asyncio.get_running_loop().time()

    async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_open, idle_since
        num_open += 1
        with contextlib.suppress(OSError):
            ends = (writer.get_extra_info(end)[1] for end in ("peername", "sockname"))
            if user_of(*ends) == os.getuid():
                await _pass_on(redis, context, reader, writer)
        writer.close()
        num_open -= 1
        idle_since = asyncio.get_running_loop().time()

    async with await asyncio.start_server(admit, sock=listener):
        while num_open or asyncio.get_running_loop().time() - idle_since < IDLE_SECONDS:
            await asyncio.sleep(1)


async def _pass_on(
    redis: Redis,
    context: ssl.SSLContext,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Open a connection to Redis with the password, and copy bytes both ways until one ends."""
    opened = asyncio.open_connection(redis.host, redis.port, ssl=context)
    answers, questions = await asyncio.wait_for(opened, ANSWER_SECONDS)
    try:
        questions.write(encoded("AUTH", redis.password))
        if await asyncio.wait_for(answers.readline(), ANSWER_SECONDS) != b"+OK\r\n":
            return
        copies = [
            asyncio.create_task(_copy(*pair)) for pair in ((reader, questions), (answers, writer))
        ]
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        for copy in copies:
            copy.cancel()
    finally:
        questions.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while block := await reader.read(BLOCK_BYTES):
            writer.write(block)
            await writer.drain()


def user_of(port: int, target: int) -> int | None:
    """Return the user whose socket is connected from this port of 127.0.0.1 to another; None if
    there is none. A port alone may be that of several users, each connected to another target."""
    host = f"{struct.unpack('=I', socket.inet_aton('127.0.0.1'))[0]:08X}"
    wanted = [f"{host}:{port:04X}", f"{host}:{target:04X}", ESTABLISHED]
    for line in _rows():
        if line[1:4] == wanted:
            return int(line[7])
    return None


def _rows() -> Iterator[list[str]]:
    with SOCKETS.open() as file:
        next(file)  # names of columns
        for line in file:
            yield line.split()
