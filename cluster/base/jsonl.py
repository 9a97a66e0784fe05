"""Files of JSON lines, which any process may add to, be killed at, or find on a full disk."""

import json
import os
from pathlib import Path
from typing import Any


def add_line(path: Path, told: dict[str, Any]) -> None:
    """Add a line, in one write: it outlives this process at once.

    What a full disk has cut short before is ended first, so that the new line stands alone.
    """
    line = (json.dumps(told) + "\n").encode()
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)


def read_lines(path: Path) -> list[dict]:
    """Read the whole lines of a file; what a kill or a full disk cut short is left out."""
    return _lines_of(path.read_bytes())[0] if path.is_file() else []


def _lines_of(data: bytes) -> tuple[list[dict], int]:
    """Return the whole lines of a file's bytes, and how many bytes they are."""
    end, found = data.rfind(b"\n") + 1, []
    for line in data[:end].decode().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found, end


class NewLines:
    """The lines that a file has got since it was last looked at, at the cost of those alone.

    The first look finds all. Where a file was replaced by a shorter one, as by a run that goes back
    to a checkpoint, what lies beyond the lines known before is new.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._count, self._end, self._file = path, 0, 0, -1

    def read(self) -> list[dict]:
        """Return the new lines; none where there is no file."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            told, known = os.fstat(file.fileno()), self._count
            if told.st_ino != self._file or told.st_size < self._end:
                self._file, self._end, self._count = told.st_ino, 0, 0
            file.seek(self._end)
            found, size = _lines_of(file.read())
        start = max(0, known - self._count)
        self._end, self._count = self._end + size, self._count + len(found)
        return found[start:]
