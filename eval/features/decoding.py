"""Pictures as extractors take them: 8-bit RGB, or a one-line error."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from PIL import Image, ImageOps, UnidentifiedImageError

from ingest.fetching.decode import decode_to, upright_size

PLAIN_MODES = ("RGB", "L", "CMYK", "YCbCr", "1", "P")
MODES = {
    "F": "float pixels",
    "I": "32-bit integer pixels",
    "I;16": "16-bit pixels",
    "I;16B": "16-bit pixels",
}


@contextmanager
def _opened(file: Path | bytes, where: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            yield image
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        raise ValueError(
            f"{where}: found a file that is no picture, expected one; leave it out"
        ) from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{where}: found a picture that does not decode ({error}), expected a complete one; "
            "make it again or leave it out"
        ) from None


def picture_size(file: Path | bytes, where: str) -> tuple[int, int]:
    """Return width and height in px, reading no pixels; errors as of `read_picture`."""
    with _opened(file, where) as image:
        if image.format == "PNG" and "exif" not in image.info:  # to look further takes its pixels
            return image.size
        return upright_size(image)


def read_picture(file: Path | bytes, where: str) -> Image.Image:
    """Decode a picture completely, to upright RGB; `where` names it in errors.

    file: a path, or the bytes of a shard's image, which are decoded as training does: over white.
    Of a path, grey becomes equal channels, and a fully opaque alpha channel is dropped. Raises
    ValueError for a file that does not decode, and, of a path, for pixels of more than 8 bits and
    for transparency: the background is the user's choice, and would be part of the score.
    """
    with _opened(file, where) as image:
        if isinstance(file, bytes):
            return decode_to(image, image.size)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode not in (*PLAIN_MODES, "RGBA", "LA", "PA"):
            pixels = MODES.get(image.mode, f"mode {image.mode}")
            raise ValueError(
                f"{where}: found {pixels}, expected 8-bit RGB or grey; convert it first"
            )
        if not image.has_transparency_data:
            return image.convert("RGB")
        lowest = cast(int, image.convert("RGBA").getchannel("A").getextrema()[0])
        if lowest < 255:
            raise ValueError(
                f"{where}: found mode {image.mode} with transparency, expected 8-bit RGB or grey; "
                "lay it over a background first"
            )
        return image.convert("RGBA").convert("RGB")


def fitted(image: Image.Image, size: int) -> Image.Image:
    """Crop the centre square and resize it to `size` px (Pillow's bicubic, antialiased)."""
    side = min(image.size)
    if image.size == (size, size):
        return image
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=square)
