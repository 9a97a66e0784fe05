"""The lines that a run leaves beside its checkpoints: one JSON object each."""

import json
from pathlib import Path

METRICS_NAME = "metrics.jsonl"
VALIDATION_NAME = "validation.jsonl"  # {"step", scores}: one line a validation


def read_lines(path: Path) -> list[dict]:
    """Read the whole lines of a metrics.jsonl; what a kill or a full disk cut short is left out."""
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
