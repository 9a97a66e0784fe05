"""Pictures as extractors take them: 8-bit RGB, or a one-line error."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from PIL import Image, ImageOps, UnidentifiedImageError

from ingest.fetching.decode import BAD_BYTES, stored_picture, upright_size
from ingest.fetching.formats import open_complete, open_image

PLAIN_MODES = ("RGB", "L", "CMYK", "YCbCr", "1", "P")
MODES = {
    "F": "float pixels",
    "I": "32-bit integer pixels",
    "I;16": "16-bit pixels",
    "I;16B": "16-bit pixels",
}


@contextmanager
def _errors_of(where: str) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError:
        raise ValueError(
            f"{where}: found a file that is no picture, expected one; leave it out"
        ) from None
    except (*BAD_BYTES, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{where}: found a picture that does not decode ({error}), expected a complete one; "
            "make it again or leave it out"
        ) from None


def picture_size(file: Path | bytes, where: str) -> tuple[int, int]:
    """Return width and height in px, reading no pixels; errors as of `read_picture`."""
    data = file if isinstance(file, bytes) else file.read_bytes()
    with _errors_of(where), open_image(data) as image:
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
    if isinstance(file, bytes):
        with _errors_of(where):
            return stored_picture(file)
    data = file.read_bytes()
    with _errors_of(where), open_image(data) as image:
        mode = image.mode
    if mode not in (*PLAIN_MODES, "RGBA", "LA", "PA"):
        pixels = MODES.get(mode, f"mode {mode}")
        raise ValueError(f"{where}: found {pixels}, expected 8-bit RGB or grey; convert it first")
    with _errors_of(where), open_complete(data) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if not image.has_transparency_data:
            return image.convert("RGB")
        rgba = image.convert("RGBA")
    if cast(int, rgba.getchannel("A").getextrema()[0]) < 255:
        raise ValueError(
            f"{where}: found mode {mode} with transparency, expected 8-bit RGB or grey; "
            "lay it over a background first"
        )
    return rgba.convert("RGB")


def fitted(image: Image.Image, size: int) -> Image.Image:
    """Crop the centre square and resize it to `size` px (Pillow's bicubic, antialiased)."""
    side = min(image.size)
    if image.size == (size, size):
        return image
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=square)
