"""Who may write to a run in a bucket: one launch at a time, by a lease with a fencing token.

    lease/000003          created by the launch that got token 3; says where it runs
    lease/000003.alive    written again and again while it runs; .ended when it has ended
    lease/000003.group    which group of its workers trains; an earlier one was given up

The launch with the highest token holds the run. Tokens are created by conditional writes, so that
of two launches one gets the next. What writes a checkpoint's record looks first whether its token
is still the highest: a launch that was taken for dead writes nothing that counts.
"""

import json
import os
import re
import socket
import time
import uuid

from cluster.base.run_dir import LEASE_FOLDER, LEASE_SECONDS
from ingest.store.storage import Storage

LOOK_SECONDS = 1.0
KEPT_TOKENS = 4  # files of earlier launches that are left for who wants to know


class LeaseLostError(OSError):
    """Another launch has taken the run over; an OSError, which no rank reports as its own end."""


class Lease:
    """The lease of one launch; its workers know it by its token."""

    def __init__(self, storage: Storage, url: str, token: int) -> None:
        self._storage, self._url, self.token = storage, url, token
        self.group = ""  # of the worker that this is

    @classmethod
    def acquire(cls, storage: Storage, url: str) -> "Lease":
        """Get the lease, which may take as long as an earlier launch is not known to have ended.

        That is LEASE_SECONDS by the clock of this process after it was last seen to change. Raises
        ValueError where the earlier launch goes on.
        """
        token = newest_token(storage)
        if token and not _has_ended(storage, token):
            holder = storage.read(_name(token)).decode()
            print(f"{url}: held by {holder}; waits until it ends or is silent", flush=True)
            seen, deadline = _sign_of_life(storage, token), time.monotonic() + LEASE_SECONDS
            while time.monotonic() < deadline and not _has_ended(storage, token):
                time.sleep(LOOK_SECONDS)
                if _sign_of_life(storage, token) != seen:
                    raise ValueError(f"{url}: another process trains here: {holder}; end it first")
        owner = f"process {os.getpid()} of {socket.gethostname()}"
        if newest_token(storage) != token or not storage.create(_name(token + 1), owner.encode()):
            raise ValueError(f"{url}: another process has begun to train here; wait for it")
        lease = cls(storage, url, token + 1)
        lease.show_life()
        for old in _tokens(storage)[:-KEPT_TOKENS]:
            for suffix in ("", ".alive", ".group", ".ended"):
                storage.delete(f"{_name(old)}{suffix}")
        return lease

    def show_life(self) -> None:
        """Tell other launches that this one goes on."""
        line = json.dumps({"time": time.time()})
        self._storage.replace(f"{_name(self.token)}.alive", line.encode())

    def name_group(self) -> str:
        """Give a new group of workers a name, by which an earlier one knows that it was given up;
        return it."""
        group = uuid.uuid4().hex
        self._storage.replace(f"{_name(self.token)}.group", group.encode())
        return group

    def require(self) -> None:
        """Raise LeaseLostError where another launch, or group of workers, has taken over."""
        newest = newest_token(self._storage)
        if newest != self.token:
            raise LeaseLostError(
                f"{self._url}: found the lease {newest}, expected {self.token}: another launch has "
                "taken this run over"
            )
        if self.group and self._storage.read(f"{_name(self.token)}.group").decode() != self.group:
            raise LeaseLostError(f"{self._url}: another group of workers has taken this run over")

    def release(self) -> None:
        """Let the next launch begin at once."""
        self._storage.replace(f"{_name(self.token)}.ended", b"")


def newest_token(storage: Storage) -> int:
    """Return the token of the launch that holds a run, 0 where there was none."""
    return max(_tokens(storage), default=0)


def _tokens(storage: Storage) -> list[int]:
    names = storage.names(LEASE_FOLDER)
    return sorted(int(name) for name in names if re.fullmatch(r"\d{6,}", name))


def _name(token: int) -> str:
    return f"{LEASE_FOLDER}/{token:06d}"


def _has_ended(storage: Storage, token: int) -> bool:
    return storage.size(f"{_name(token)}.ended") is not None


def _sign_of_life(storage: Storage, token: int) -> bytes:
    try:
        return storage.read(f"{_name(token)}.alive")
    except FileNotFoundError:  # it ended between two writes
        return b""
