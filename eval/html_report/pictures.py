"""The report's pictures, inline: samples, sheets of many images, rows of edits.

<run>/samples/samples.jsonl and its images     <run>/samples/grid.png, grid.json
<run>/samples/ablation.png, ablation.json      <run>/samples/neighbours.png, neighbours.json
<run>/edits/<any name>/edits.jsonl and its images, as eval/sample.py's sub-commands write them
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from cluster.base.files import Json
from cluster.base.jsonl import read_lines
from eval.html_report.formats import details, element, flatten, note, table
from eval.sampling.image_source import SAMPLES_NAME

EDITS_NAME = "edits.jsonl"
MAX_SIDE = 384  # px of an inline picture; a page of 1024 px ones would not open on a phone
MAX_SHEET_SIDE = 1600  # px of a sheet, which is many images in one
MAX_SAMPLES = 24
MAX_ROWS = 8  # of edits
SHEETS = {
    "grid": "Captions that training never saw, and what the full chain makes of them.",
    "ablation": "The same captions, with what the decoder is given exchanged.",
    "neighbours": "Generated images above, below each the training image that is nearest to it.",
}
EDITS = {  # in this order
    "guidance": ("Guidance", "One image embedding a row, decoded at several scales of guidance "
                 "(figure 9 of the paper): the content stays, and the effect of guidance shows."),
    "pca": ("What the embedding holds", "Images from the first principal components of their "
            "embedding, as many as the head says; at the right the complete embedding (figure 7 of "
            "the paper). Coarse meaning comes first."),
    "variations": ("Variations", "DDIM with fresh noise from an image's own latents (figure 3)."),
    "interpolate": ("Interpolation", "From one image to the next over both latents (figure 4)."),
    "textdiff": ("Text differences", "Images turned toward a caption, by theta (figure 5)."),
    "inpaint": ("Inpainting", "Parts of images drawn again."),
}  # fmt: skip


def image_tag(path: Path, alt: str, max_side: int = MAX_SIDE) -> Markup:
    """Return an inline image: a small one's own bytes, a larger one reduced to `max_side` px.

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
    enlarged = "pixelated" if max(width, height) <= 128 else ""
    return Markup('<img class="{}" src="{}" width="{}" height="{}" alt="{}">').format(
        enlarged, source, width, height, alt
    )


def file_in(folder: Path, name: Any) -> Path:
    """Return the path of a file that a list names; ValueError for one outside its folder."""
    path = (folder / str(name)).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise ValueError(f"{folder}: found {str(name)!r} in a list, expected a file in that folder")
    return path


def gallery(folder: Path) -> Markup:
    """Return samples with their captions, spread over the captions; nothing without a list."""
    lines = read_lines(folder / SAMPLES_NAME)
    chosen = lines[:: max(1, len(lines) // MAX_SAMPLES)][:MAX_SAMPLES]
    figures = [
        _figure(image_tag(file_in(folder, line["file"]), str(line["caption"])), line["caption"])
        for line in chosen
    ]
    return element("div", figures, "gallery")


def _figure(image: Markup, caption: str, css_class: str = "") -> Markup:
    return element("figure", [image, element("figcaption", str(caption))], css_class)


def sheet(folder: Path, name: str, summary: str, *, is_open: bool = False) -> Markup:
    """Return <folder>/<name>.png with the captions in the .json beside it; nothing if absent."""
    path = folder / f"{name}.png"
    if not path.is_file():
        return Markup()
    captions = read_json(path.with_suffix(".json"), (list, dict)) or []
    if isinstance(captions, dict):
        captions = captions.get("captions") or []
    picture = _figure(image_tag(path, SHEETS[name], MAX_SHEET_SIDE), SHEETS[name], "sheet")
    listed = element("ol", [element("li", str(caption)) for caption in captions], "captions")
    return picture + details(summary, listed, is_open=is_open)


def edits(run: Path) -> Markup:
    """Return the edits below <run>/edits in the order of `EDITS`; unknown commands are left out."""
    by_command: dict[str, list[Markup]] = {command: [] for command in EDITS}
    for path in sorted(run.glob(f"edits/*/{EDITS_NAME}")):
        lines = read_lines(path)
        command = lines[0].get("command") if lines else None
        if command in EDITS:
            by_command[command].append(_edit_rows(path.parent, *EDITS[command], lines))
    return Markup().join(block for blocks in by_command.values() for block in blocks)


def _edit_rows(folder: Path, title: str, text: str, lines: list[Json]) -> Markup:
    """Return a grid with a column for each head and a row for each name."""
    width = len({line["file"].partition("_")[2] for line in lines})
    cells = [Markup("<span></span>")]
    cells += [element("span", str(line["column"]), "head") for line in lines[:width]]
    for number, line in enumerate(lines[: width * MAX_ROWS]):
        if number % width == 0:
            cells.append(element("span", str(line["row"]), "name"))
        alt = f"{line['row']}, {line['column']}"
        cells.append(image_tag(file_in(folder, line["file"]), alt))
    settings = table(flatten(lines[0].get("settings") or {}).items(), ("option", "value"))
    grid = Markup('<div class="strip" style="--columns: {}">{}</div>').format(
        width, Markup().join(cells)
    )
    return (
        element("h2", title, "edit") + note(text) + grid + details("How they were made", settings)
    )


def read_json(path: Path, kind: type | tuple[type, ...]) -> Any:
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
