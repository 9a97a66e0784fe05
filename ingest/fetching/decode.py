"""From whatever bytes the web calls an image to the JPEG that a shard stores.

Upright (EXIF orientation applied, all EXIF dropped), the first frame, RGB over white, reduced to
the size asked for. A JPEG much larger than that is decoded at half, a quarter or an eighth of its
size, which the format allows at a fraction of the cost.
"""

import io
import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ingest.fetching.formats import open_complete, open_image

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MAX_PIXELS = 50_000_000  # of an image that is decoded: see `header_problem`
PLAIN_MODES = ("1", "L", "P", "RGB")
ResizeMode = Literal["keep_ratio", "center_crop", "keep_ratio_largest", "border", "no"]
BAD_BYTES = (  # what Pillow raises for bytes that are no image, or a damaged one
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, RuntimeError, struct.error,
)  # fmt: skip
# Cheap reductions (a JPEG decoded at a fraction of its size, means of blocks of pixels) stop at so
# many times the size asked for; the rest is a bicubic filter's. Against a full decode and that
# filter alone the result differs by no more than what storing it as a JPEG changes.
MIN_OVERSAMPLING = 4 / 3
MIN_IMAGE_SIDE = 16  # px, by default: what is smaller is mostly a tracking pixel
ORIENTATION = 0x0112  # EXIF's tag
BITS, PHOTOMETRIC, TILE_WIDTH, TILE_HEIGHT = 258, 262, 322, 323  # TIFF's
TURNS = {  # its values -> how Pillow's Transpose calls what turns such an image upright
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
SIDEWAYS = (5, 6, 7, 8)  # those that mean a quarter turn


class DecodeError(Exception):
    """Bytes that become no sample. reason: out of `cluster.base.outcomes`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What an image is left out for; sides in px. See `header_problem`."""

    min_side: int = 0
    max_pixels: int = MAX_PIXELS
    min_pixels: int = 0
    max_aspect_ratio: float | None = None


def header_problem(data: bytes, limits: ImageLimits) -> str | None:
    """Return why an image is left out by its header, before anything is decoded; None if it is not.

    Against `max_pixels` the area counts `_memory_factor` times.
    """
    try:
        _opened(data, limits).close()
    except DecodeError as error:
        return error.reason
    return None


def _opened(data: bytes, limits: ImageLimits) -> "Image.Image":
    """Open an image, of which nothing is decoded yet; DecodeError for one that is left out."""
    from PIL import Image

    try:
        image = open_image(data)
    except Image.DecompressionBombError:
        raise DecodeError("too_many_pixels") from None
    except BAD_BYTES:
        raise DecodeError("not_an_image") from None
    short, long = sorted(image.size)
    ratio = limits.max_aspect_ratio
    if _decoded_pixels(image) * _memory_factor(image) > limits.max_pixels:
        raise DecodeError("too_many_pixels")
    if short * long < limits.min_pixels:
        raise DecodeError("too_few_pixels")
    if ratio is not None and long > ratio * short:
        raise DecodeError("aspect_ratio")
    if short < limits.min_side:
        raise DecodeError("too_small")
    return image


def _memory_factor(image: "Image.Image") -> int:
    """Return how many times the memory of an RGB image the decoding takes.

    Blending over white and 16 bits hold several copies, WebP's decoder two canvases of its own,
    AVIF's its planes and two copies, JPEG 2000's 4 bytes a channel twice. A progressive JPEG keeps
    all its coefficients, 2 bytes each, however small it is decoded; a TIFF has strips or tiles.
    """
    own = {"WEBP": 5, "AVIF": 3, "JPEG2000": 4}.get(image.format or "")
    if "transparency" in image.info or image.mode not in PLAIN_MODES:
        return 5 if own else 4
    if own:
        return own
    return 2 if "progressive" in image.info or image.format == "TIFF" else 1


def _decoded_pixels(image: "Image.Image") -> int:
    """Return the area of an image, or that of a tile, which a TIFF may have larger."""
    width, height = image.size
    if (tags := getattr(image, "tag_v2", None)) is None:
        return width * height
    return max(width * height, tags.get(TILE_WIDTH, 0) * tags.get(TILE_HEIGHT, 0))


def verify_image(data: bytes, limits: ImageLimits) -> tuple[int, int]:
    """Decode every pixel of an image, as cheaply as that is possible; return its upright size, px.

    A JPEG is decoded at an eighth of its size and without its colours, for which all of its
    coefficients are read. Raises DecodeError for what is left out.
    """
    _opened(data, limits).close()
    try:
        with open_complete(data) as image:
            size = upright_size(image)
            image.draft("L", (1, 1))
            image.load()
    except MemoryError:
        raise
    except Exception:  # Pillow's parsers are many: see `Resizer`
        raise DecodeError("undecodable") from None
    return size


@dataclass(frozen=True, kw_only=True)
class ResizedImage:
    """What is stored of an image; sizes in px, the original's when upright."""

    data: bytes
    width: int
    height: int
    original_width: int
    original_height: int


@dataclass(frozen=True, kw_only=True)
class Resizer:
    """image_size, min_image_side: px; quality: of the JPEG, 1 to 95.

    resize_mode: keep_ratio reduces the shorter side to image_size; center_crop then keeps the
    middle; keep_ratio_largest reduces the longer side; border then pads with white; no leaves the
    size alone. Nothing is enlarged.
    """

    image_size: int
    resize_mode: ResizeMode
    min_image_side: int = 0
    quality: int = 95

    def __call__(self, data: bytes) -> ResizedImage:
        """Return what is stored of an image file's bytes; DecodeError if nothing can be."""
        try:
            with open_complete(data) as image:
                width, height = upright_size(image)
                if min(width, height) < self.min_image_side:
                    raise DecodeError("too_small")
                resized = self._fitted(decode_to(image, self._target(image.size)))
            file = io.BytesIO()
            resized.save(file, "JPEG", quality=self.quality)
        except (DecodeError, MemoryError):  # a lack of memory is no fault of the image
            raise
        except BAD_BYTES:
            raise DecodeError("undecodable") from None
        except Exception as error:
            # The web is hostile and Pillow's parsers are many: an error that nobody has seen yet
            # must not end the shard, which would meet it again in every try. It is reported.
            print(f"warning: an image was not decoded: {error!r}", file=sys.stderr, flush=True)
            raise DecodeError("undecodable") from error
        return ResizedImage(
            data=file.getvalue(),
            width=resized.width,
            height=resized.height,
            original_width=width,
            original_height=height,
        )

    def _target(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size to which an image of `size` is scaled, before crop or border."""
        if self.resize_mode == "no":
            return size
        shorter = self.resize_mode in ("keep_ratio", "center_crop")
        scale = self.image_size / (min(size) if shorter else max(size))
        if scale >= 1:
            return size
        width, height = (max(1, round(side * scale)) for side in size)
        return width, height

    def _fitted(self, image: "Image.Image") -> "Image.Image":
        """Crop or pad an upright image, if the mode says so."""
        from PIL import Image

        side = self.image_size
        if self.resize_mode == "center_crop":
            width, height = min(side, image.width), min(side, image.height)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            return image.crop((left, top, left + width, top + height))
        if self.resize_mode == "border" and image.size != (side, side):
            canvas = Image.new("RGB", (side, side), "white")
            canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            return canvas
        return image


def decode_to(image: "Image.Image", target: tuple[int, int]) -> "Image.Image":
    """Decode an opened image to upright RGB over white.

    target: the size that it is scaled to, (width, height) in px, as it is stored: not upright.
    """
    from PIL import Image

    original, orientation = image.size, _orientation(image)
    # Half of an odd side ends in the middle of a pixel: the box says where, to a fraction.
    # Without it the picture is stretched by up to a pixel, which costs 7 dB.
    width, height = (int(side * MIN_OVERSAMPLING) for side in target)
    decoded = image.draft(None, (width, height))
    box = decoded[1] if decoded is not None else (0, 0, *original)
    image.load()
    # RGB: 16 bits are reduced to 8, transparency is blended over white
    if image.mode.startswith("I;16"):
        image = _grey_of_16_bits(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if target != original:
        image = image.resize(
            target, Image.Resampling.BICUBIC, box=box, reducing_gap=MIN_OVERSAMPLING
        )
    if orientation in TURNS:
        image = image.transpose(Image.Transpose[TURNS[orientation]])
    return image


def _grey_of_16_bits(image: "Image.Image") -> "Image.Image":
    """Return 16 bits of grey as 8; of a TIFF, 12 may be used, and 0 may be white."""
    tags = getattr(image, "tag_v2", {})
    scale = 255 / (4095 if tags.get(BITS) == (12,) else 65535)
    first, scale = (255.0, -scale) if tags.get(PHOTOMETRIC) == 0 else (0.0, scale)
    return image.convert("I").point(lambda value: value * scale + first).convert("L")


def _orientation(image: "Image.Image") -> int:
    """Return the orientation of an opened image; 1 for a TIFF, which Pillow turns itself."""
    return 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)


def upright_size(image: "Image.Image") -> tuple[int, int]:
    """Return width and height in px of an opened image as `decode_to` turns it."""
    sideways = _orientation(image) in SIDEWAYS
    width, height = image.size
    return (height, width) if sideways else (width, height)


def stored_picture(data: bytes) -> "Image.Image":
    """Return a stored image as every reader sees it: in full, upright, RGB over white.

    A download stores only such pictures; those of adopted files are as somebody made them.
    Raises one of `BAD_BYTES` for bytes that do not decode.
    """
    with open_complete(data) as image:
        return decode_to(image, image.size)


def square_pixels(data: bytes, size: int) -> "np.ndarray":
    """Return the centre square of `stored_picture`, its short side resized to `size` px: uint8 [3,
    size, size].

    For training on pixels. What an encoder sees is decoded in full: `models.clip.preprocess`.
    """
    import numpy as np

    from models.clip import MAX_ASPECT_RATIO, preprocess

    with open_complete(data) as image:
        short, long = sorted(image.size)
        if long > MAX_ASPECT_RATIO * short:
            return preprocess(decode_to(image, image.size), size)
        width, height = (max(size, round(side * size / short)) for side in image.size)
        image = decode_to(image, (width, height))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    square = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
