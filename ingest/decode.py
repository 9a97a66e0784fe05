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
# filter alone the result is at 40 dB or better, which is less than storing it as a JPEG costs.
MIN_OVERSAMPLING = 1.5
Decoded = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]
UNDECODABLE: Decoded = (None, None, None, None, None, "undecodable")
TOO_SMALL: Decoded = (None, None, None, None, None, "image too small")


@dataclass(frozen=True, kw_only=True)
class Resizer:
    """Stands where img2dataset expects its own Resizer. image_size, min_image_size: px.

    resize_mode: keep_ratio reduces the shorter side to image_size; center_crop then keeps the
    middle; keep_ratio_largest reduces the longer side; border then pads with white; no leaves the
    size alone. Nothing is enlarged.
    """

    image_size: int
    resize_mode: ResizeMode
    min_image_size: int = 0
    quality: int = 95

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: None = None) -> Decoded:
        """Return the JPEG, its width and height, the original's, and None; or why there is none.

        The original's size is that of the upright image.
        """
        from PIL import Image

        try:
            with Image.open(img_stream, formats=IMAGE_FORMATS) as image:
                width, height = _upright_size(image)
                if min(width, height) < self.min_image_size:
                    return TOO_SMALL
                resized = self._resize(self._decode(image, (width, height)), (width, height))
            file = io.BytesIO()
            resized.save(file, "JPEG", quality=self.quality)
        except Exception:  # noqa: BLE001 - decoders of a dozen formats raise whatever they like
            return UNDECODABLE
        return file.getvalue(), resized.width, resized.height, width, height, None

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
        return _over_white(ImageOps.exif_transpose(image))

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
    return image.convert("RGB")
