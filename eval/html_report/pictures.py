"""The report's pictures, inline: samples, sheets of many images, rows of edits.

<run>/samples/samples.jsonl and its images     <run>/samples/grid.png, grid.json
<run>/samples/ablation.png, ablation.json      <run>/samples/neighbours.png, neighbours.json
<run>/edits/<any name>/edits.jsonl and its images, as eval/sample.py's sub-commands write them
"""

import base64
import io
from pathlib import Path

from PIL import Image

from cluster.base.files import Json
from cluster.base.jsonl import read_lines
from eval.html_report.formats import flatten, read_json
from eval.sampling.edits import COMMANDS
from eval.sampling.image_source import EDITS_NAME, SAMPLES_NAME

MAX_SIDE = 384  # px of an inline picture; a page of 1024 px ones would not open on a phone
MAX_SHEET_SIDE = 1600  # px of a sheet, which is many images in one
MAX_SAMPLES = 24
MAX_ROWS = 8  # of edits


def inline_image(path: Path, max_side: int = MAX_SIDE) -> Json:
    """Return {source, width, height} of an image: a small file's own bytes, a larger image reduced
    to `max_side` px.

    Raises ValueError where the file is no image that a page can show.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind, (width, height) = (image.format or "").lower(), image.size
            image.load()
            if max(width, height) > max_side or kind not in ("png", "jpeg", "webp"):
                small, buffer, kind = image.convert("RGB"), io.BytesIO(), "jpeg"
                small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
                small.save(buffer, "JPEG", quality=90)
                content, (width, height) = buffer.getvalue(), small.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: found {content[:8]!r} at its start, expected a PNG image ({error})"
        ) from None
    source = f"data:image/{kind};base64," + base64.b64encode(content).decode()
    return {"source": source, "width": width, "height": height}


def _listed_image(folder: Path, line: Json) -> Json:
    """Return the image that a line of a list names; ValueError for one outside its folder."""
    path = (folder / str(line["file"])).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise ValueError(
            f"{folder}: found {line['file']!r} in a list, expected a file in that folder"
        )
    return inline_image(path)


def gallery(folder: Path) -> list[Json]:
    """Return samples with their captions, spread over the captions; none without a list."""
    lines = read_lines(folder / SAMPLES_NAME)
    chosen = lines[:: max(1, len(lines) // MAX_SAMPLES)][:MAX_SAMPLES]
    return [_listed_image(folder, line) | {"caption": line["caption"]} for line in chosen]


def sheet(folder: Path, name: str) -> Json | None:
    """Return <folder>/<name>.png with the captions in the .json beside it; None if absent."""
    path = folder / f"{name}.png"
    if not path.is_file():
        return None
    captions = read_json(path.with_suffix(".json"), (list, dict)) or []
    if isinstance(captions, dict):
        captions = captions.get("captions") or []
    return inline_image(path, MAX_SHEET_SIDE) | {"captions": captions}


def edits(run: Path) -> dict[str, list[Json]]:
    """Return the grids below <run>/edits by their command: {heads, rows, settings}.

    Unknown commands are left out.
    """
    by_command: dict[str, list[Json]] = {}
    for path in sorted(run.glob(f"edits/*/{EDITS_NAME}")):
        lines = read_lines(path)
        if not lines or lines[0].get("command") not in COMMANDS:
            continue
        width = len({line["file"].partition("_")[2] for line in lines})
        starts = range(0, min(len(lines), width * MAX_ROWS), width)
        rows = [
            {
                "name": lines[start]["row"],
                "images": [_listed_image(path.parent, line) for line in lines[start:][:width]],
            }
            for start in starts
        ]
        heads = [line["column"] for line in lines[:width]]
        settings = flatten(lines[0].get("settings") or {})
        strip = {"heads": heads, "rows": rows, "settings": list(settings.items())}
        by_command.setdefault(lines[0]["command"], []).append(strip)
    return by_command
