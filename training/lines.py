"""Files of JSON lines, which any process may add to, be killed at, or find on a full disk."""

import json
import os
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"
VALIDATION_NAME = "validation.jsonl"  # {"step", scores}: one line a validation


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
    if not path.is_file():
        return []
    text = path.read_text()
    found = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
