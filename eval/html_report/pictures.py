"""The pictures of the report, inline: samples, grids, sweeps of edits, nearest neighbours.

<run>/samples/samples.jsonl and its images     <run>/samples/ablation.png, ablation.json
<run>/edits/<any name>/edits.jsonl and its images: what eval/sample.py's sub-commands wrote
<run>/samples/neighbours.png, neighbours.json: what eval/fid.py --train wrote
"""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cluster.base.jsonl import read_lines
from eval.sampling.image_source import SAMPLES_NAME

EDITS_NAME = "edits.jsonl"
MAX_SIDE = 384  # px of an inline picture; a page of 1024 px ones would not open on a phone
MAX_WIDE = 1600  # px of a grid, which is many pictures in one
MAX_SAMPLES = 24
MAX_ROWS = 8  # of a strip
FIGURES = {
    "grid": "Captions that training never saw, and what the full chain makes of them.",
    "ablation": "The same captions, with what the decoder is given exchanged.",
    "neighbours": "Generated images above, below each the training image that is nearest to it.",
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image to inline; `pixelated`: so small that it is shown enlarged, pixel by pixel."""

    source: str
    width: int
    height: int

    @property
    def pixelated(self) -> bool:
        return max(self.width, self.height) <= 128


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture and its caption."""

    picture: Picture
    caption: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One picture that holds many, with its captions: of each cell in reading order, or of each
    column."""

    name: str
    title: str
    picture: Picture
    captions: list[str]


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Rows of pictures under heads: what changes along a row, and what each row is."""

    command: str
    title: str
    note: str
    heads: list[str]
    rows: list[tuple[str, list[Picture]]]
    settings: dict[str, Any]


STRIPS = {  # in this order
    "guidance": (
        "Guidance",
        "One image embedding a row, decoded at several scales of guidance (figure 9 of the paper): "
        "the content stays, and what guidance adds or takes away shows.",
    ),
    "pca": (
        "What the embedding holds",
        "Images from the first principal components of their embedding, as many as the head says; "
        "at the right the whole embedding (figure 7 of the paper). Coarse meaning comes first.",
    ),
    "variations": ("Variations", "DDIM with fresh noise from an image's own latents (figure 3)."),
    "interpolate": ("Interpolation", "From one image to the next over both latents (figure 4)."),
    "textdiff": ("Text differences", "Images turned toward a caption, by theta (figure 5)."),
    "inpaint": ("Inpainting", "Parts of images drawn anew."),
}


def inline(path: Path, most: int = MAX_SIDE) -> Picture:
    """Return an image of at most `most` px a side: a small one's own bytes, a larger one reduced.

    Raises ValueError where the file is no image that a page can show.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind, whole = (image.format or "").lower(), image.size
            image.load()
            if max(whole) > most or kind not in ("png", "jpeg", "webp"):
                content, kind, whole = _reduced(image, most)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: found {content[:8]!r} at its start, expected a PNG image ({error})"
        ) from None
    source = f"data:image/{kind};base64," + base64.b64encode(content).decode()
    return Picture(source=source, width=whole[0], height=whole[1])


def _reduced(image: Image.Image, most: int) -> tuple[bytes, str, tuple[int, int]]:
    small = image.convert("RGB")
    small.thumbnail((most, most), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return buffer.getvalue(), "jpeg", small.size


def samples(folder: Path) -> list[Shown]:
    """Return images of a folder of samples, spread over its captions; none where it has no list."""
    lines = read_lines(folder / SAMPLES_NAME)
    step = max(1, len(lines) // MAX_SAMPLES)
    chosen = lines[::step][:MAX_SAMPLES]
    return [
        Shown(picture=inline(inside(folder, line["file"])), caption=str(line["caption"]))
        for line in chosen
    ]


def inside(folder: Path, name: Any) -> Path:
    """Return the path of a file that a list names; ValueError for one outside its folder."""
    path = (folder / str(name)).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise ValueError(f"{folder}: found {str(name)!r} in a list, expected a file in that folder")
    return path


def figure(folder: Path, name: str) -> Figure | None:
    """Return <folder>/<name>.png with the captions in the .json beside it; None if it is absent."""
    path = folder / f"{name}.png"
    if not path.is_file():
        return None
    sidecar = read_json(path.with_suffix(".json"), (list, dict)) or []
    captions = sidecar.get("captions") or [] if isinstance(sidecar, dict) else sidecar
    return Figure(
        name=name,
        title=FIGURES[name],
        picture=inline(path, MAX_WIDE),
        captions=[str(caption) for caption in captions],
    )


def strips(run: Path) -> list[Strip]:
    """Return the edits below <run>/edits, guidance and principal components first."""
    found = [_strip(path.parent) for path in sorted(run.glob(f"edits/*/{EDITS_NAME}"))]
    order = list(STRIPS)
    known = [strip for strip in found if strip is not None]
    return sorted(known, key=lambda strip: order.index(strip.command))


def _strip(folder: Path) -> Strip | None:
    lines = read_lines(folder / EDITS_NAME)
    if not lines or lines[0].get("command") not in STRIPS:
        return None
    command = lines[0]["command"]
    width = len({line["file"].partition("_")[2] for line in lines})
    heads = [str(line["column"]) for line in lines[:width]]
    rows = [lines[start : start + width] for start in range(0, len(lines), width)][:MAX_ROWS]
    title, note = STRIPS[command]
    return Strip(
        command=command,
        title=title,
        note=note,
        heads=heads,
        rows=[(str(r[0]["row"]), [inline(inside(folder, x["file"])) for x in r]) for r in rows],
        settings=lines[0].get("settings") or {},
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
