"""How the report shows values and tables; the key that tells scores of other captions apart."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from cluster.base.files import Json

Scores = Json  # eval.json, or an object inside it
CAPTIONS_KEY = "captions_sha256"  # beside scores: only those of the same captions are compared


def number(value: Any) -> str:
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


def flatten(value: Any, path: str = "") -> Json:
    """Return nested objects as one: {"a": {"b": 1}} is {"a.b": 1}."""
    if not isinstance(value, dict):
        return {path: ", ".join(map(str, value)) if isinstance(value, list) else value}
    inner = (flatten(item, f"{path}.{key}" if path else str(key)) for key, item in value.items())
    return {key: item for flat in inner for key, item in flat.items()}


def table(rows: Iterable[Sequence[Any]], columns: Sequence[str]) -> Markup:
    """Return an HTML table of values as `number` shows them, all escaped; nothing without rows."""
    import pandas as pd

    cells = [[number(value) for value in row] for row in rows]
    if not cells:
        return Markup()
    with pd.option_context("display.max_colwidth", None):  # else long texts are cut
        html = pd.DataFrame(cells, columns=pd.Index(columns)).to_html(
            index=False, border=0, escape=True, justify="unset"
        )
    return element("div", Markup(html), "scroll")


def element(tag: str, content: Iterable[Markup | str] | str, css_class: str = "") -> Markup:
    """Return <tag class="..."> with its content, escaped unless it is Markup; "" without any."""
    inner = Markup().join([content] if isinstance(content, str) else content)
    return Markup('<{0} class="{1}">{2}</{0}>').format(tag, css_class, inner) if inner else inner


def details(summary: str, content: Markup, *, is_open: bool = False) -> Markup:
    """Return a block that opens at a click on its summary; nothing without content."""
    tag = Markup("<details open>") if is_open else Markup("<details>")
    block = Markup("{}<summary>{}</summary>{}</details>").format(tag, summary, content)
    return block if content else content


def note(text: str) -> Markup:
    """Return a paragraph of explanation; nothing without text."""
    return element("p", text, "note")
