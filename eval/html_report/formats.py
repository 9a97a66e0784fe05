"""How the report shows values; the key that tells scores of other captions apart."""

import json
import math
from pathlib import Path
from typing import TypeVar

from cluster.base.files import Json

Scores = Json  # eval.json, or an object inside it
CAPTIONS_KEY = "captions_sha256"  # beside scores: only those of the same captions are compared
Kind = TypeVar("Kind")


def number(value: object) -> str:
    """Show a score to three digits, a count in full, None as a dash, text as it is."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    digits = next((d for limit, d in ((0.01, 5), (10, 3), (100, 2)) if abs(value) < limit), 1)
    return f"{value:,.{digits if value else 3}f}"


def short(value: float) -> str:
    """Show a value in at most six characters: 0.031, 12k, 1.5M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Show seconds as 7.5 s, 12 min 05 s or 2 h 03 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float | None) -> str:
    """Show bytes as MiB or GiB."""
    if not num_bytes:
        return "–"
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:,.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"


def flatten(value: object, path: str = "") -> Json:
    """Return nested objects as one: {"a": {"b": 1}} is {"a.b": 1}."""
    if not isinstance(value, dict):
        return {path: ", ".join(map(str, value)) if isinstance(value, list) else value}
    inner = (flatten(item, f"{path}.{key}" if path else str(key)) for key, item in value.items())
    return {key: item for flat in inner for key, item in flat.items()}


def read_json(path: Path, kind: type[Kind] | tuple[type[Kind], ...]) -> Kind | None:
    """Read a JSON file; None if it is absent, ValueError if it is not JSON of that kind."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: found {error}, expected JSON; rerun the stage that wrote it"
        ) from error
    if not isinstance(content, kind):
        raise ValueError(
            f"{path}: found a JSON {type(content).__name__}, expected another kind of value"
        )
    return content
