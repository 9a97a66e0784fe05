"""Images as people see them: 8-bit pixels, labelled grids, PNG files."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor


def pixels(image: Tensor) -> Tensor:
    """Map uint8 [B, 3, H, W] to float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> np.ndarray:
    """Map [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3]."""
    return ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(
    images: list[list[np.ndarray]], rows: list[str], columns: list[str], zoom: int = 2
) -> Image.Image:
    """Lay out uint8 [H, W, 3] images in labelled rows and columns."""
    side = images[0][0].shape[0] * zoom
    left = 8 + max([0, *(7 * len(row) for row in rows)])
    top = 20 if columns else 4
    canvas = Image.new(
        "RGB", (left + len(images[0]) * (side + 4), top + len(images) * (side + 4)), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for y, line in enumerate(images):
        if rows:
            draw.text((4, top + y * (side + 4) + side // 2 - 6), rows[y], fill="black")
        for x, image in enumerate(line):
            tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + x * (side + 4), top + y * (side + 4)))
    for x, label in enumerate(columns):
        draw.text((left + x * (side + 4) + 2, 4), label, fill="black")
    return canvas


def save_png(path: Path, image: np.ndarray | Image.Image) -> None:
    """Write a picture as PNG, its folder made where it is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(path)
