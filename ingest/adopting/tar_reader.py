"""One tar: its samples grouped by webdataset's rule, its bytes by their place, its digest.

Nothing of a tar is ever run, unpickled or written by its name: members are read by their place.
"""

import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from ingest.adopting.sources import open_place
from ingest.fetching.formats import FOUND_EXTENSIONS
from ingest.store.storage import is_remote, local_path

IMAGE_EXTENSIONS = (*FOUND_EXTENSIONS, "img")
MAGIC = re.compile(rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|GIF8|BM", re.DOTALL)  # of image formats
COMPRESSIONS = {  # first bytes -> fsspec's name
    b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd",
}  # fmt: skip
MEMBER_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # webdataset's: key and extension
META_NAME = re.compile(r"__[^/]*__($|/)")  # webdataset's: members of no sample
BLOCK = 512  # of a tar, bytes
OCTAL = re.compile(rb"[0-7]+")
TIME_ALONE = re.compile(rb"\d+ mtime=[0-9.]+\n\0*")  # a pax header as webdataset writes it
READ_BYTES = 1 << 20
HASH_BEHIND_BYTES = 8 << 20  # the digest is made of bytes that were just read, from memory


class NoDecompressorError(ValueError):
    """No package that decompresses a tar is installed."""


class Span(NamedTuple):
    """The place of a member's bytes in its tar."""

    offset: int
    size: int


@dataclass(kw_only=True)
class TarSample:
    """Members that have a key in common, one after the other, by extension in lower case."""

    key: str
    members: dict[str, Span] = field(default_factory=dict)
    problem: str | None = None


class TarReader:
    """One plain tar on this machine: its samples in order, bytes by their place, its digest."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=1 << 16)  # noqa: SIM115 - closed by the caller
        self.size = os.fstat(self._file.fileno()).st_size
        self._sha256, self._hashed = hashlib.sha256(), 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, span: Span) -> bytes:
        """Return the bytes of a member."""
        return os.pread(self._file.fileno(), span.size, span.offset)

    def samples(self) -> Iterator[TarSample]:
        """Yield the samples; ValueError where the tar is damaged or ends too early."""
        sample = None
        for name, span in self._members():
            if span.offset - self._hashed > HASH_BEHIND_BYTES:
                self._hash_until(span.offset)
            match = MEMBER_NAME.fullmatch(name)
            if META_NAME.match(name) or match is None:
                continue
            key, extension = match[1], match[2].lower()
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample = TarSample(key=key)
            if extension in sample.members:
                sample.problem = "duplicate_member"
            sample.members[extension] = span
        if sample is not None:
            yield sample

    def _members(self) -> Iterator[tuple[str, Span]]:
        """Yield name and place of every regular member.

        tarfile reads all but plain headers; iterated, it would keep every member in memory.
        """
        end = 0
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                while True:
                    header = self.read(Span(end, 3 * BLOCK))
                    if len(header) < BLOCK:  # a complete tar ends in a block of zeros
                        raise ValueError(f"truncated: has {self.size} bytes, expected more")
                    if not any(header[:BLOCK]):
                        break
                    plain = None if tar.pax_headers else _plain_member(header, end + BLOCK)
                    if plain is not None:
                        yield plain
                        end = plain[1].offset + _padded(plain[1].size)
                        continue
                    self._file.seek(end)
                    member = tarfile.TarInfo.fromtarfile(tar)
                    if member.issparse():
                        raise ValueError(f"{member.name} is a sparse file: pack it as a plain one")
                    end = member.offset_data
                    if not (member.isdir() or member.issym() or member.islnk() or member.isdev()):
                        end += _padded(member.size)
                    if member.isreg():
                        yield member.name, Span(member.offset_data, member.size)
        except tarfile.TarError as error:
            raise ValueError(f"not a complete tar: {error}, after {end} bytes") from None
        for start in range(end, self.size, READ_BYTES):
            if any(self.read(Span(start, READ_BYTES))):
                raise ValueError(f"several tars in one file: the first ends after {end} bytes")

    def _hash_until(self, end: int) -> None:
        while self._hashed < end:
            block = self.read(Span(self._hashed, min(READ_BYTES, end - self._hashed)))
            if not block:
                raise ValueError("it was cut while it was read")
            self._sha256.update(block)
            self._hashed += len(block)

    def digest(self) -> str:
        """Return the sha256 of the whole file."""
        self._hash_until(self.size)
        return self._sha256.hexdigest()

    def image_span(self, sample: TarSample) -> Span | None:
        """Return where the image of a sample is: the member whose content is one, by its first
        bytes; one whose extension says so comes first."""
        spans = sample.members
        named = [spans[extension] for extension in IMAGE_EXTENSIONS if extension in spans]
        if len(named) == 1:
            return named[0]
        others = [spans[e] for e in spans if e.rpartition(".")[2] in IMAGE_EXTENSIONS]
        for span in dict.fromkeys([*named, *others, *spans.values()]):
            if MAGIC.match(self.read(Span(span.offset, min(16, span.size)))):
                return span
        return named[0] if named else None


def _plain_member(header: bytes, offset: int) -> tuple[str, Span] | None:
    """Return a regular member by its header, None if that is more than a plain one.

    Plain are those of nearly all tars, with a time in fractions before them or not; tarfile takes
    about 2.5 times as long. header: up to three blocks; offset: of what follows the first one.
    """
    if header[156:157] == b"x" and TIME_ALONE.fullmatch(header, BLOCK, 2 * BLOCK):
        header, offset = header[2 * BLOCK :], offset + 2 * BLOCK
    name, size, total = header[:100].rstrip(b"\0"), header[124:135], header[148:154]
    plain = header[156:157] == b"0" and header[257:262] == b"ustar" and header[345:346] == b"\0"
    if not plain or b"\0" in name or not (OCTAL.fullmatch(size) and OCTAL.fullmatch(total)):
        return None
    if int(total, 8) != sum(header[:148]) + sum(header[156:BLOCK]) + 8 * ord(" "):
        return None
    return name.decode("utf-8", "surrogateescape"), Span(offset, int(size, 8))


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


@contextmanager
def plain_tar(place: str, *, decompress: bool = True) -> Iterator[Path]:
    """Yield the path of a tar on this machine: its own, or that of a copy that is deleted again.

    Raises ValueError for a compressed one that is not to be, or cannot be, decompressed.
    """
    with tempfile.TemporaryDirectory(prefix="minidalle2-") as temporary:
        path = local_path(place)
        if is_remote(place):
            path = Path(temporary) / "remote.tar"
            with open_place(place) as source, open(path, "xb") as target:
                shutil.copyfileobj(source, target, READ_BYTES)
        with open(path, "rb") as file:
            compression = compression_of(file.read(BLOCK))
            if compression is not None and not decompress:
                raise ValueError("is compressed, so it needs --copy, into another --out")
            if compression is not None:
                file.seek(0)
                path = Path(temporary) / "plain.tar"
                try:
                    with decompressed(file, compression) as source, open(path, "xb") as target:
                        shutil.copyfileobj(source, target, READ_BYTES)
                except (OSError, MemoryError):
                    raise
                except Exception as error:  # every package has errors of its own
                    raise ValueError(f"not a complete {compression} file: {error}") from None
        yield path


def compression_of(header: bytes) -> str | None:
    """Return how a file is compressed, by its first 512 bytes; None for a plain tar, which may
    begin with any name."""
    if header[257:262] == b"ustar":
        return None
    return next((COMPRESSIONS[magic] for magic in COMPRESSIONS if header.startswith(magic)), None)


def decompressed(file: IO[bytes], compression: str | None) -> IO[bytes]:
    """Return a stream of what a file holds; NoDecompressorError where a package is missing."""
    from fsspec.compression import compr

    if compression not in compr:
        raise NoDecompressorError(
            f"is compressed by {compression}: install the package zstandard, or decompress it"
        )
    return compr[compression](file, mode="r")
