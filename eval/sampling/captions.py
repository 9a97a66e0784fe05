"""Captions to draw, from files as the field publishes them, or the captions of image shards.

a caption a line                                  T2I-CompBench's *_val.txt, and your own
{"prompt": "a photo of two clocks", ...} a line   GenEval's evaluation_metadata.jsonl
a column Prompts, Prompt or caption               DrawBench's .csv, PartiPrompts' .tsv
[{"prompt": "..."}, "...", ...]                   a JSON array of such objects, or of texts
{"annotations": [{"caption": "..."}, ...]}        COCO's captions_*.json
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

from ingest.lists.columns import find_name
from ingest.lists.formats import find_layout, read_rows

MAX_CHARACTERS = 10_000  # of a caption; encoders read some 300
KEYS = ("prompt", "prompts", "caption")  # in any case


def read_captions(source: str, limit: int = 0) -> list[str]:
    """Return the captions of `source` in its order; limit: only the first, 0 = all.

    Raises ValueError for a file that is no text, a line without a prompt, and no captions at all.
    """
    path = Path(source)
    if path.is_dir():
        from eval.sampling.image_source import open_images

        captions = open_images(source).captions
    elif path.is_file():
        captions = _read_file(path)
    else:
        raise ValueError(
            f"{source}: found no such file or folder, expected captions, one a line, or image "
            "shards"
        )
    if not captions:
        raise ValueError(f"{source}: found no captions, expected at least one")
    return captions[: limit or None]


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # which reads every end of a line as "\n"
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found bytes that are no UTF-8 text ({error.reason})") from None
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        found = _in_table(path, text)
    elif suffix in (".jsonl", ".json"):
        found = _in_json(path, text)
    else:
        lines = enumerate(text.split("\n"), 1)
        found = ((f"{path}: line {n}", line) for n, line in lines if line.strip())
    captions = []
    for where, value in found:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: prompt: found {value!r}, expected text")
        caption = value.strip()
        if len(caption) > MAX_CHARACTERS or "\0" in caption:
            raise ValueError(
                f"{where}: found {len(caption)} characters, expected a caption of at most "
                f"{MAX_CHARACTERS}, without null bytes"
            )
        captions.append(caption)
    return captions


def _in_table(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """Yield the cells of the column of captions, each with where it is."""
    stream = io.BytesIO(text.encode())
    layout = find_layout(stream, path.suffix.lower(), KEYS)
    column = find_name(KEYS, layout.names)
    if column is None:
        found = ", ".join(layout.names)
        raise ValueError(f"{path}: found columns {found}, expected one of {', '.join(KEYS)}")
    stream.seek(0)
    for number, row in enumerate(read_rows(stream, layout), 1):
        if row is None:
            raise ValueError(
                f"{path}: row {number}: found other cells than the header's {len(layout.names)}"
            )
        yield f"{path}: row {number}", layout.column([row], column)[0]


def _in_json(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """Yield the captions of an array, of COCO's annotations or of lines, each with where it is."""
    try:
        content = json.loads(text)
        items = content.get("annotations", [content]) if isinstance(content, dict) else content
        what = "item"
    except (json.JSONDecodeError, RecursionError):
        items, what = text.split("\n"), "line"
    for number, item in enumerate(items if isinstance(items, list) else [items], 1):
        where = f"{path}: {what} {number}"
        if what == "line" and not item.strip():
            continue
        try:
            record = json.loads(item) if what == "line" else item
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: found {error}, expected JSON with a prompt") from None
        if isinstance(record, dict):
            key = find_name(KEYS, [*record])
            yield where, None if key is None else record[key]
        else:
            yield where, record if what == "item" and isinstance(record, str) else None
