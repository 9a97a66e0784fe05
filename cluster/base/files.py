"""Small files: written atomically, identified by digests, locked between processes."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

BLOCK_BYTES = 1 << 20  # read at once while a digest is computed

Json = dict[str, Any]  # an object of JSON: a record, a message, a configuration
AnyPath = str | os.PathLike[str]


@contextmanager
def atomic_write(path: AnyPath, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` when the block succeeds.

    If the block fails, nothing remains: half a file would keep a full disk full. Two processes may
    write the same path; the last one wins. durable: the file reaches the disk before it gets its
    name, so that it outlives a loss of power.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: AnyPath, text: str, *, durable: bool = True) -> Path:
    """Write a UTF-8 text file atomically; return its path."""
    with atomic_write(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(
    path: AnyPath, value: object, *, indent: int | None = None, durable: bool = True
) -> Path:
    """Write a value as JSON atomically; return its path."""
    return write_text(path, json.dumps(value, indent=indent), durable=durable)


def update_files(texts: dict[Path, str], *, check: bool) -> bool:
    """Write each generated file whose text is another, or with `check` only name it; return whether
    all were as they should be."""
    stale = {p: text for p, text in texts.items() if not p.is_file() or p.read_text() != text}
    for path, text in stale.items():
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        print(f"{path}: {'out of date' if check else 'written'}")
    if not stale:
        print(f"{os.path.commonpath(texts)}: nothing to change")
    return not stale


def canonical_json(value: object) -> bytes:
    """Encode a value so that equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest_of(value: object) -> str:
    """Return the sha256 of a JSON-able value, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_file(path: AnyPath) -> str:
    """Return the sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return digest_stream(file)


def digest_stream(file: IO[bytes]) -> str:
    """Return the sha256 of what is left of an open file, in hex."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def try_lock(file: IO[str] | IO[bytes], *, shared: bool = False) -> bool:
    """Try to lock an open file until it is closed; return whether this succeeded.

    The kernel releases the lock when the process ends, however it ends.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
