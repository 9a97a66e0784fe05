"""Makes a Parquet file of captioned pictures, for the demo's --pairs, from packages.

    python benchmarks/pictures.py                          # fetches its packages first
    python benchmarks/pictures.py --packages FOLDER        # from unpacked ones
    make demo ARGS="--pairs data/pictures.parquet --run runs/pictures"

Debian's clip art and npm's icon sets in colour, drawn at 128 px on white. Columns: image (WebP),
caption, name (the thing, by which the demo splits), source, style, licence. What is fetched is
printed first. The same packages give the same file, whose SHA-256 is printed.
"""

import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from _common import BenchmarkConfig, run_benchmark
from _drawings import DEBIAN, SETS, Drawing, fetch, is_unpacked, read_package
from _titles import thing

from cluster.base.files import Json, atomic_write, digest_file

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SIZE, MARGIN = 128, 4  # px; the margin is on each side
RENDER, MIN_INK, MAX_RENDER = 256, 160, 2048  # px: a drawing in a corner of its page is enlarged
INK, MIN_CHROMA = 12, 40  # levels of 255: from white; between a pixel's channels
MIN_SHARE = 0.02  # of the solid pixels: a colour counts
# What fonts of this machine or a raster image would show
NOT_SHOWN = re.compile(r"<(?:\w+:)?(?:image\b|text\b[^>]*>\s*(?:<[^>]*>\s*)*[^<\s])")


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """What to draw, and where to write it."""

    out: str = "data/pictures.parquet"
    """the Parquet file"""
    packages: str | None = None
    """folder of unpacked packages: a folder a package of npm, as flat-color-icons/icons.json, and
    Debian's usr/; nothing is fetched. None: those that OUT.packages lacks are fetched into it"""
    sets: tuple[str, ...] = ()
    """packages to draw, as openclipart-svg flag twemoji; empty: all"""


def main(config: Config) -> int:
    """Print what is fetched and left out, and one JSON object as the last line."""
    out, names = Path(config.out), config.sets or (DEBIAN[0], *SETS)
    unknown = sorted(set(names) - {DEBIAN[0], *SETS})
    if unknown:
        raise ValueError(f"--sets {unknown[0]}: expected some of {DEBIAN[0]}, {', '.join(SETS)}")
    folder = Path(config.packages or out.with_suffix(".packages"))
    if config.packages is None:
        fetch(folder, names)
    present = [name for name in names if is_unpacked(folder, name)]
    if not present:
        raise ValueError(
            f"{folder}: found no unpacked package, expected some of {', '.join(names)}"
        )
    for name in sorted(set(names) - set(present)):
        print(f"{name}: not in {folder}, left out")
    left_out: Counter[str] = Counter()
    drawings = [each for name in present for each in read_package(folder, name, left_out)]
    rows = draw_all(drawings, left_out)
    write(out, rows)
    print(json.dumps(summary(rows, left_out)))
    return 0


def draw_all(drawings: list[Drawing], left_out: Counter[str]) -> list[Json]:
    """Draw on all cores; return the rows, without pictures that are not shown or equal another."""
    rows: list[Json] = []
    seen: set[bytes] = set()
    reported = ""
    print(f"drawing {len(drawings):,} pictures", flush=True)
    with get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        for drawing, (image, problem) in zip(
            drawings, pool.imap(draw, [each.svg for each in drawings], chunksize=32), strict=True
        ):
            if rows and rows[-1]["source"] not in (drawing.source, reported):
                reported = rows[-1]["source"]
                print(f"{reported}: drawn; {len(rows):,} pictures so far", flush=True)
            problem = problem or ("equal to another" if image in seen else "")
            if problem:
                left_out[problem] += 1
                continue
            seen.add(image)
            columns = ("caption", "source", "style", "licence")
            row = {"image": image, "name": thing(drawing.phrase)}
            rows.append(row | {column: getattr(drawing, column) for column in columns})
    return rows


def draw(svg: str) -> tuple[bytes, str]:
    """Draw an SVG on white, cut to its ink. Returns a WebP and "", or b"" and what it lacks."""
    import numpy as np
    import resvg_py
    from PIL import Image

    def render(side: int) -> Image.Image:
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=side, height=side, dpi=96, skip_system_fonts=True
        )
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")

    if NOT_SHOWN.search(svg):
        return b"", "text or raster inside"
    try:
        drawn = render(RENDER)
        box = ink_box(drawn)
        if box is None:
            return b"", "blank"
        ink = max(box[2] - box[0], box[3] - box[1])
        if ink < MIN_INK:
            drawn = render(min(MAX_RENDER, RENDER * RENDER // ink))
            box = ink_box(drawn) or box
    except ValueError:
        return b"", "broken"
    problem = colours_problem(np.asarray(drawn))
    if problem:
        return b"", problem
    white = Image.new("RGBA", drawn.size, "white")
    picture = Image.alpha_composite(white, drawn).convert("RGB").crop(box)
    picture.thumbnail((SIZE - 2 * MARGIN, SIZE - 2 * MARGIN), Image.Resampling.LANCZOS)
    page = Image.new("RGB", (SIZE, SIZE), "white")
    page.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2))
    file = io.BytesIO()
    page.save(file, "WEBP", quality=90, method=4)
    return file.getvalue(), ""


def ink_box(drawn: "Image.Image") -> tuple[int, int, int, int] | None:
    """Return the box of what is not white, or None for a blank picture."""
    import numpy as np
    from PIL import Image

    white = Image.new("RGBA", drawn.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, drawn).convert("RGB"))  # [H, W, 3]
    ink = pixels.min(2) < 255 - INK
    if ink.mean() < MIN_SHARE / 4:
        return None
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def colours_problem(pixels: "np.ndarray") -> str:
    """Return why a drawing, RGBA [H, W, 4], is no coloured picture, or "".

    A glyph has one colour, whatever it is; a drawing in greys has no colour.
    """
    import numpy as np

    solid = pixels[pixels[..., 3] >= 128][:, :3]  # [n, 3]
    counts = np.bincount((solid >> 4) @ np.array([1, 16, 256], np.int64))
    if (counts >= MIN_SHARE * len(solid)).sum() < 2:
        return "one colour"
    chroma = solid.max(1).astype(int) - solid.min(1)
    return "greys" if (chroma > MIN_CHROMA).mean() < MIN_SHARE else ""


def write(out: Path, rows: list[Json]) -> None:
    """Write the rows atomically, in row groups of a thousand."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, row_group_size=1000)
    print(f"{out}: {len(rows):,} pictures, sha256 {digest_file(out)}")


def summary(rows: list[Json], left_out: Counter[str]) -> Json:
    """Count pictures and things, and the sides of the demo's split."""
    from cluster.demo_data import is_held_out

    tests = sum(is_held_out(row["name"]) for row in rows)
    things = {row["name"] for row in rows}
    return {
        "pictures": len(rows),
        "things": len(things),
        "train": len(rows) - tests,
        "test": tests,
        "test_things": sum(map(is_held_out, things)),
        "by_style": dict(Counter(row["style"] for row in rows).most_common()),
        "by_licence": dict(Counter(row["licence"] for row in rows).most_common()),
        "left_out": dict(left_out.most_common()),
    }


if __name__ == "__main__":
    run_benchmark(Config, main, sets=("flag", "flat-color-icons", "twemoji"))
