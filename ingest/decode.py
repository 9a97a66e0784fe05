"""From whatever bytes the web calls an image to the JPEG that a shard stores.

Upright (EXIF orientation applied, all EXIF dropped), the first frame, RGB over white, reduced to
the size asked for. A JPEG much larger than that is decoded at half, a quarter or an eighth of its
size, which the format allows at a fraction of the cost.
"""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ingest.filters import IMAGE_FORMATS

if TYPE_CHECKING:
    from PIL import Image

ResizeMode = Literal["keep_ratio", "center_crop", "keep_ratio_largest", "border", "no"]
# Cheap reductions (a JPEG decoded at a fraction of its size, means of blocks of pixels) stop at so
# many times the size asked for; the rest is a bicubic filter's. Against a full decode and that
# filter alone the result differs by no more than what storing it as a JPEG changes.
MIN_OVERSAMPLING = 4 / 3


class DecodeError(Exception):
    """Bytes that become no sample. args: the reason, out of `ingest.filters`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is stored of an image. jpeg: its bytes; sizes in px, the original's when upright."""

    jpeg: bytes
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

    def __call__(self, data: bytes) -> Picture:
        """Return what is stored of an image file's bytes; DecodeError if nothing can be."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                width, height = _upright_size(image)
                if min(width, height) < self.min_image_side:
                    raise DecodeError("too_small")
                resized = self._resize(self._decode(image, (width, height)), (width, height))
            file = io.BytesIO()
            resized.save(file, "JPEG", quality=self.quality)
        except DecodeError:
            raise
        except Exception:  # noqa: BLE001 - decoders of a dozen formats raise whatever they like
            raise DecodeError("undecodable") from None
        return Picture(
            jpeg=file.getvalue(),
            width=resized.width,
            height=resized.height,
            original_width=width,
            original_height=height,
        )

    def _target(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size to which the whole image of `size` is scaled, before crop or border."""
        if self.resize_mode == "no":
            return size
        shorter = self.resize_mode in ("keep_ratio", "center_crop")
        scale = self.image_size / (min(size) if shorter else max(size))
        if scale >= 1:
            return size
        width, height = (max(1, round(side * scale)) for side in size)
        return width, height

    def _decode(self, image: "Image.Image", size: tuple[int, int]) -> "Image.Image":
        from PIL import ImageOps

        longer, shorter = (
            int(side * MIN_OVERSAMPLING) for side in sorted(self._target(size))[::-1]
        )
        sideways = image.width >= image.height  # as stored, which need not be upright
        image.draft(None, (longer, shorter) if sideways else (shorter, longer))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # an upright one is not copied
        return _over_white(image)

    def _resize(self, image: "Image.Image", original: tuple[int, int]) -> "Image.Image":
        from PIL import Image

        target = self._target(original)
        if image.size != target:
            filtered = Image.Resampling.BICUBIC
            image = image.resize(target, filtered, reducing_gap=MIN_OVERSAMPLING)
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


def _upright_size(image: "Image.Image") -> tuple[int, int]:
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientations by a quarter turn
    return (image.height, image.width) if turned else image.size


def _over_white(image: "Image.Image") -> "Image.Image":
    """Return `image` as RGB, transparency blended over white, 16 bits reduced to 8."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey, as PNG stores it
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")
