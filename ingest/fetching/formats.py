"""Which bytes are pictures, and how Pillow opens them: by what they begin with, never by a name.

Some files are changed first, in memory, since Pillow would refuse them, take another picture of
theirs, or take more memory than their size says:

- a PNG loses long text and colour profiles, which no reader looks at;
- a JPEG without its end marker gets one;
- an icon is its largest picture alone, of the size that its directory states;
- an AVIF is its primary image, not its animation, and codes no larger frame than its size.
"""

import io
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from PIL import Image

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF", "JPEG2000", "ICO")
EXTENSIONS = ("jpg", "png", "webp")  # of images in our shards
FOUND_EXTENSIONS = (  # of the files of others
    "jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "avif", "tif", "tiff", "jp2", "j2k", "ico",
)  # fmt: skip
HEAD_BYTES = 16  # of a file, which say whether it is a picture
FEATURES = {"AVIF": "avif", "JPEG2000": "jpg_2000", "TIFF": "libtiff", "WEBP": "webp"}

PNG, JPEG, ICON = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\0\0\1\0"
SCAN, END = b"\xff\xda", b"\xff\xd9"  # markers of a JPEG: pixels follow; nothing follows
NEXT_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # a marker that is none among pixels
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
ORIENTING_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
# Ends of a JPEG, by which pixels differ that are not in the file: a decoder takes missing bits for
# zeros; those of the others are mostly ones, before and after every restart marker, of which one
# that is expected later is not read.
_NOISE = bytes(range(254, 0, -1))
_RESTARTS = [b"\xff" + bytes([0xD0 + i]) + _NOISE for i in range(8)]
TAILS = (END, *(_NOISE + b"".join(_RESTARTS[i:] + _RESTARTS[:i]) + END for i in (0, 4)))
STRIP_ROWS = 256
MAX_BOXES, MAX_ITEMS, MAX_EXTENTS, MAX_OBUS = 1000, 4096, 16, 1000  # of an AVIF


def image_extension(data: bytes) -> str | None:
    """Return what a shard's member with these bytes is named by; None: stored as JPEG only."""
    if data.startswith(JPEG):
        return "jpg"
    if data.startswith(PNG):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def begins_like_image(data: bytes) -> bool:
    """Return whether data begins as a file of one of `IMAGE_FORMATS` does."""
    return any(accept(data[:HEAD_BYTES]) is True for accept in _accepts())


@lru_cache(maxsize=1)
def _accepts() -> list[Callable[[bytes], bool | str]]:
    from PIL import Image

    Image.init()
    accepts = (Image.OPEN[kind][1] for kind in IMAGE_FORMATS if kind in Image.OPEN)
    return [accept for accept in accepts if accept is not None]


def report_missing_formats() -> None:
    """Print the formats that the installed Pillow was built without, in one line."""
    from PIL import features

    missing = [kind for kind, name in FEATURES.items() if not features.check(name)]
    if missing:
        print(f"warning: this Pillow reads no {', '.join(missing)}: such pictures fail", flush=True)


def open_image(data: bytes) -> "Image.Image":
    """Open a file's first or largest picture, of which nothing but an icon is decoded yet.

    Raises what Pillow raises for bytes that are none; see `decode.BAD_BYTES`.
    """
    is_avif = data[4:8] == b"ftyp"
    if data.startswith(ICON):
        data = _largest_icon(data)
    if data.startswith(PNG):
        data = _without_long_texts(data)
    elif _lacks_end(data):
        data = data.rstrip(b"\xff") + END
    elif is_avif:
        data = data[:8] + b"avif" + data[12:]  # "avis" would be read as an animation
    image = _opened(data)
    if is_avif and largest_coded_frame(data) > image.width * image.height:
        raise ValueError("found an AVIF whose frames are larger than it says")
    return image


def _opened(data: bytes) -> "Image.Image":
    from PIL import Image

    with warnings.catch_warnings():  # of damaged tags, and of pictures that our limits leave out
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)


def open_complete(data: bytes) -> "Image.Image":
    """Open a picture that is to be decoded, as `open_image` does.

    Raises OSError for a JPEG without end that lacks pixels, and ValueError for 32-bit pixels.
    """
    if _lacks_end(data):
        pixels = data[data.rfind(SCAN) + 2 :].rstrip(b"\xff")
        digests = {_digest(data.rstrip(b"\xff") + tail) for tail in TAILS}
        if NEXT_SCAN.search(pixels) or len(digests) > 1:
            raise OSError("found a JPEG that ends among its pixels")
    image = open_image(data)
    if image.mode in ("I", "F"):
        raise ValueError(f"found pixels of 32 bits, mode {image.mode}, whose white nothing states")
    return image


def _lacks_end(data: bytes) -> bool:
    return data.startswith(JPEG) and data.rfind(END) < data.rfind(SCAN)


def _digest(data: bytes) -> int:
    """Return a checksum of the pixels, which are in memory once."""
    digest = 0
    with _opened(data) as image:
        for top in range(0, image.height, STRIP_ROWS):
            bottom = min(top + STRIP_ROWS, image.height)
            digest = crc32(image.crop((0, top, image.width, bottom)).tobytes(), digest)
    return digest


def _without_long_texts(data: bytes) -> bytes:
    """Return a PNG without texts and colour profile, but for texts that may hold its orientation.

    Pillow refuses a picture whose texts are longer, decompressed, than it thinks fit.
    """
    view, start = memoryview(data), 8
    kept: list[bytes | memoryview] = [data[:8]]
    while start + 8 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        is_text = data[start + 4 : start + 8] in TEXT_CHUNKS
        if not is_text or data.startswith(ORIENTING_TEXTS, start + 8):
            kept.append(view[start:end])
        start = end
    return b"".join(kept)


def _largest_icon(data: bytes) -> bytes:
    """Return the largest picture of an icon, of the most bits: as a PNG, or an icon of it alone."""
    count = int.from_bytes(data[4:6], "little")
    entries = [struct.unpack_from("<BBBBHHII", data, 6 + 16 * i) for i in range(count)]
    best = max(entries, key=lambda entry: ((entry[0] or 256) * (entry[1] or 256), entry[5]))
    size, start = best[-2:]
    picture = data[start : start + size]
    if picture.startswith(PNG):
        return picture
    stated = best[0] or 256, 2 * (best[1] or 256)  # twice as high: a mask lies below
    if struct.unpack_from("<II", picture, 4) != stated:
        raise ValueError("found an icon of another size than its directory states")
    return ICON + b"\1\0" + struct.pack("<BBBBHHII", *best[:-1], 22) + picture


# -- AVIF ------------------------------------------------------------------------------------------


def largest_coded_frame(data: bytes) -> int:
    """Return the most pixels of a frame in any image of an AVIF file, by its sequence headers.

    The decoder allocates and decodes frames of that size, whatever size the file's boxes state.
    Raises ValueError or LookupError for what is no such file.
    """
    boxes = {kind: place for kind, *place in _boxes(data, 0, len(data))}
    start, end = boxes[b"meta"]
    meta = {kind: place for kind, *place in _boxes(data, start + 4, end)}
    items = _items(data, meta[b"iloc"][0], idat=meta.get(b"idat", [0])[0])
    return max((area for item in items for area in _frame_areas(item)), default=0)


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the boxes between two places: type, start and end of what is in each."""
    for _ in range(MAX_BOXES):
        if start + 8 > end:
            return
        size, head = int.from_bytes(data[start : start + 4]), 8
        if size == 1:
            size, head = int.from_bytes(data[start + 8 : start + 16]), 16
        size = size or end - start  # 0: to the end
        if size < head:
            raise ValueError(f"found a box of {size} bytes")
        yield data[start + 4 : start + 8], start + head, min(start + size, end)
        start += size
    raise ValueError(f"found more than {MAX_BOXES} boxes")


def _items(data: bytes, place: int, idat: int) -> Iterator[bytes]:
    """Yield the bytes of every item that a box iloc lists (ISO 14496-12, 8.11.3)."""

    def number(num_bytes: int, most: int | None = None) -> int:
        nonlocal place
        place += num_bytes
        value = int.from_bytes(data[place - num_bytes : place])
        if place > len(data) or (most is not None and value > most):
            raise ValueError(f"found {value} in an AVIF's box iloc, expected {most} or less")
        return value

    version, offsets, bases = number(1), number(4) & 255, number(1)
    wide, left = 4 if version == 2 else 2, len(data)
    for _ in range(number(wide, MAX_ITEMS)):
        number(wide)  # its name
        method = number(2) if version else 0
        number(2)  # of the file that it is in: this one
        base = number(bases >> 4) + (idat if method == 1 else 0)
        parts = []
        for _ in range(number(2, MAX_EXTENTS)):
            number(bases & 15 if version else 0)
            start = base + number(offsets >> 4)
            length = number(offsets & 15)
            parts.append(data[start : start + length if length else None])
        item = b"".join(parts)
        left -= len(item)
        if left < 0:
            raise ValueError("found an AVIF whose items overlap")
        yield item


def _frame_areas(item: bytes) -> Iterator[int]:
    """Yield the largest frame that each sequence header of an AV1 stream allows, px (AV1, 5.3)."""
    place = 0
    for _ in range(MAX_OBUS):
        if place >= len(item):
            return
        head = item[place]
        place += 2 if head & 4 else 1
        size = len(item) - place
        if head & 2:  # the size follows, 7 bits a byte
            num_bytes = next((n for n in range(8) if item[place + n] < 128), 7) + 1
            size = sum((item[place + n] & 127) << 7 * n for n in range(num_bytes))
            place += num_bytes
        if head >> 3 == 1:
            yield _frame_area(item[place : place + min(size, 128)])
        place += size
    raise ValueError(f"found more than {MAX_OBUS} units in an AVIF")


def _frame_area(header: bytes) -> int:
    """Return max_frame_width x max_frame_height of a sequence header (AV1, 5.5.1)."""
    bits, place = "".join(f"{byte:08b}" for byte in header), 0

    def number(num_bits: int) -> int:
        nonlocal place
        place += num_bits
        return int(bits[place - num_bits : place], 2)

    number(4)  # profile, still_picture
    if number(1):  # reduced_still_picture_header
        number(5)
    else:
        if number(1):
            raise ValueError("found an AV1 stream with times, expected a still picture")
        delays = number(1)
        for _ in range(number(5) + 1):  # operating points
            number(12)
            if number(5) > 7:
                number(1)
            if delays and number(1):
                number(4)
    widths, heights = number(4) + 1, number(4) + 1
    return (number(widths) + 1) * (number(heights) + 1)
