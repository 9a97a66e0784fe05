"""Files of JSON lines, which any process may append to, be killed at, or find on a full disk."""

import json
import os
from pathlib import Path

from cluster.base.files import Json


def add_line(path: Path, value: Json) -> None:
    """Append a line, in one write: it outlives this process at once.

    A line that a full disk has cut short is ended first, so that the new one is a line of its own.
    """
    line = (json.dumps(value) + "\n").encode()
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)


def read_lines(path: Path) -> list[Json]:
    """Read the complete lines of a file; what a kill or a full disk cut short is left out."""
    return NewLines(path).read()


class NewLines:
    """The lines that a file has got since it was last read, at the cost of those alone.

    The first call returns all. Where the file was replaced by a shorter one, as by a run that goes
    back to a checkpoint, the lines beyond the number known before are new, or with `again` all.
    """

    def __init__(self, path: Path, *, again: bool = False) -> None:
        self._path, self._again = path, again
        self._count, self._end, self._inode = 0, 0, -1

    def read(self) -> list[Json]:
        """Return the new lines; none where there is no file."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        known = self._count
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._end:
                self._inode, self._end, self._count = status.st_ino, 0, 0
            file.seek(self._end)
            data = file.read()
        size, lines = data.rfind(b"\n") + 1, []
        for text in data[:size].decode().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        start = 0 if self._again else max(0, known - self._count)
        self._end, self._count = self._end + size, self._count + len(lines)
        return lines[start:]
