"""How the report shows values: scores, counts, durations, sizes, and nested objects as one; and
what stands beside scores and tells them apart."""

import math
from typing import Any

CAPTIONS_KEY = "captions_sha256"  # beside scores: only those of the same captions are compared


def number(value: Any) -> str:
    """Show a score to three digits, a count whole, None as a dash."""
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


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return nested objects as one: {"a": {"b": 1}} is {"a.b": 1}."""
    if not isinstance(value, dict):
        return {path: ", ".join(map(str, value)) if isinstance(value, list) else value}
    inner = (flatten(item, f"{path}.{key}" if path else str(key)) for key, item in value.items())
    return {key: item for part in inner for key, item in part.items()}
