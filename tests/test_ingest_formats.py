"""Every format that the web calls a picture: stored where all pixels of its first frame decode."""

import io
import re
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ingest.fetching.decode import (
    DecodeError,
    ImageLimits,
    Resizer,
    header_problem,
    square_pixels,
    stored_picture,
    verify_image,
)
from ingest.fetching.formats import begins_like_image, largest_coded_frame, report_missing_formats
from models.clip import MAX_ASPECT_RATIO, preprocess

SIZE = 96, 64
RED, BLUE, WHITE = (220, 30, 30), (30, 30, 220), (255, 255, 255)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
KEEP = Resizer(image_size=64, resize_mode="keep_ratio")
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF", "JPEG2000", "ICO")
MIB = 1 << 20


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flag(mode: str = "RGB", background=WHITE) -> Image.Image:
    """Red above on the left, blue below on the right; where modes have alpha, nothing else."""
    image = Image.new("RGBA", SIZE, (0, 0, 0, 0) if "A" in mode else (*background, 255))
    image.paste((*RED, 255), (0, 0, 48, 32))
    image.paste((*BLUE, 255), (48, 32, 96, 64))
    return image.convert("RGB" if mode == "CMYK" else "RGBA").convert(mode)


def outcome(data: bytes) -> str:
    """What becomes of a file in a download, and in an adoption that keeps its bytes."""
    problem = header_problem(data, ImageLimits())
    try:
        KEEP(data)
    except DecodeError as error:
        problem = problem or error.reason
    try:
        verify_image(data, ImageLimits())
        verified = "stored"
    except DecodeError as error:
        verified = error.reason
    assert verified == (problem or "stored")
    return verified


def tiff(pixels: bytes, **tags: int) -> bytes:
    """Return a TIFF of 64 x 64 px in one strip. tags: more of them, as t258=16."""
    values = {256: 64, 257: 64, 259: 1, 273: 8, 277: 1, 278: 64, 279: len(pixels)}
    values |= {int(name[1:]): value for name, value in tags.items()}
    entries = (struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(values.items()))
    end = struct.pack("<H", len(values)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + end


def test_formats_that_the_installed_pillow_lacks_are_reported(monkeypatch, capsys):
    report_missing_formats()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("PIL.features.check", lambda name: name != "avif")
    report_missing_formats()
    assert "reads no AVIF: such pictures fail" in capsys.readouterr().out


# -- pixels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("AVIF", "RGB", {"quality": 95}), ("AVIF", "RGBA", {"quality": 95}),
        ("AVIF", "RGB", {"quality": 95, "subsampling": "4:4:4", "tile_rows": 1, "tile_cols": 1}),
        ("TIFF", "RGB", {}), ("TIFF", "RGBA", {}), ("TIFF", "PA", {}), ("TIFF", "CMYK", {}),
        ("TIFF", "LAB", {}), ("TIFF", "YCbCr", {"compression": "jpeg", "quality": 95}),
        ("TIFF", "RGBA", {"compression": "tiff_lzw"}), ("TIFF", "RGB", {"big_tiff": True}),
        ("JPEG2000", "RGB", {}), ("JPEG2000", "RGBA", {}), ("JPEG2000", "RGB", {"no_jp2": True}),
        ("JPEG2000", "CMYK", {}),
    ],
)  # fmt: skip
def test_colours_of_every_format_are_stored_over_white(kind: str, mode: str, options: dict):
    image = flag("RGB").convert(mode) if mode in ("LAB", "YCbCr") else flag(mode)
    data = encoded(image, kind, **options)
    assert begins_like_image(data) and outcome(data) == "stored"
    picture = stored_picture(data)
    found = [picture.getpixel(xy) for xy in ((8, 8), (88, 56), (8, 56))]
    assert picture.size == SIZE
    assert np.abs(np.array(found, int) - [RED, BLUE, WHITE]).max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_every_format_that_states_an_orientation_is_turned_once(kind: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", SIZE, WHITE)
    image.paste(RED, (0, 0, 48, 32))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # numbers of Image.Transpose
    data = encoded(image.transpose(Image.Transpose(undo[orientation])), kind, exif=exif)
    picture = stored_picture(data)
    assert picture.size == SIZE == verify_image(data, ImageLimits())
    assert (KEEP(data).original_width, KEEP(data).original_height) == SIZE
    assert np.abs(np.array(picture.getpixel((8, 8)), int) - RED).max() <= 12
    assert np.abs(np.array(picture.getpixel((88, 56)), int) - WHITE).max() <= 12


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(struct.pack("<H", 0x8000) * 4096, t258=16, t262=1), 128),
        (tiff(struct.pack("<H", 0x4000) * 4096, t258=16, t262=0), 191),
        (tiff(bytes.fromhex("c00c00") * 2048, t258=12, t262=1), 191),
        (tiff(b"\xff" * 512, t258=1, t262=0), 0),
        (tiff(b"\xff" * 512, t258=1, t262=1), 255),
    ],
    ids=["16 bits", "16 bits, 0 is white", "12 bits", "1 bit, 0 is white", "1 bit"],
)
def test_grey_of_any_number_of_bits_keeps_its_black_and_white(data: bytes, expected: int):
    assert outcome(data) == "stored"
    assert np.abs(np.asarray(stored_picture(data), int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_refused_since_nothing_says_what_is_white(mode: str):
    assert outcome(encoded(flag("L").convert(mode), "TIFF")) == "undecodable"


@pytest.mark.parametrize("bitmap_format", ["png", "bmp"])
@pytest.mark.parametrize("side", [32, 256])
def test_an_icon_is_its_largest_picture(side: int, bitmap_format: str):
    icon = Image.new("RGBA", (side, side), (*RED, 255))
    sizes = [(16, 16), (side, side), (24, 24)]
    data = encoded(icon, "ICO", sizes=sizes, bitmap_format=bitmap_format)
    picture = stored_picture(data)
    assert outcome(data) == "stored"
    assert (picture.size, picture.getpixel((4, 4))) == ((side, side), RED)


# -- more than one picture, less than one, and what lies around ------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_the_first_frame_is_stored_and_limits_are_of_it(kind: str):
    other = Image.new("RGB", SIZE, BLUE)
    if kind == "TIFF":
        other = Image.new("1", (9000, 9000))  # a page, of any size: never read
    data = encoded(flag(), kind, save_all=True, append_images=[other])
    assert outcome(data) == "stored"
    assert np.abs(np.array(stored_picture(data).getpixel((8, 8)), int) - RED).max() <= 12


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_in_half_is_refused_and_one_with_a_tail_is_not(kind: str):
    options = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
    data = encoded(PHOTO.resize((64, 64)) if kind == "ICO" else PHOTO, kind, **options)
    assert outcome(data[: len(data) // 2]) in ("undecodable", "not_an_image")
    assert outcome(data + bytes(5000)) == "stored" == outcome(data)


JPEGS = {
    "plain": {}, "progressive": {"progressive": True}, "4:4:4": {"subsampling": 0},
    "optimised": {"optimize": True}, "restarts": {"restart_marker_blocks": 3},
    "turned": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
}  # fmt: skip


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_is_stored_and_one_that_lacks_pixels_is_not(mode: str, options):
    data = encoded(PHOTO.convert(mode), "JPEG", **options)
    for cut in (1, 2):
        assert outcome(data[:-cut]) == "stored"
        whole, cut_off = (np.asarray(stored_picture(each)) for each in (data, data[:-cut]))
        assert np.array_equal(whole, cut_off)
    accepted = []
    for cut in range(4, 400, 5):
        with suppress(DecodeError):
            accepted += [KEEP(data[:-cut])]
    assert len(accepted) <= ("progressive" in options)  # between two scans: coarser, but all there


def test_a_png_is_stored_whatever_its_texts_and_profile_and_turned_as_they_say():
    info = PngImagePlugin.PngInfo()
    for add in (info.add_text, info.add_itxt):
        add("workflow", "x" * 3 * MIB)
        add("prompt", "y" * 3 * MIB, zip=True)
    info.add_itxt("XML:com.adobe.xmp", '<r:Description tiff:Orientation="6"/>')
    turned = flag().transpose(Image.Transpose.ROTATE_90)
    data = encoded(turned, "PNG", pnginfo=info, icc_profile=bytes(3 * MIB))
    picture = stored_picture(data)
    assert outcome(data) == "stored"
    assert (picture.size, picture.getpixel((8, 8))) == (SIZE, RED)


def test_a_jpeg_is_stored_whatever_its_exif_and_profile():
    data = encoded(flag(), "JPEG", exif=b"Exif\0\0" + bytes(60_000), icc_profile=bytes(4 * MIB))
    assert outcome(data) == "stored"


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<?xml version='1.0'?><svg/>",
        b"%!PS-Adobe-3.0 EPSF-3.0", b"%PDF-1.7", b"8BPS\0\1", b"\0\0\0\x18ftypheic\0\0\0\0heic",
        b"\0\0\0\x18ftypmif1\0\0\0\0heic", b"\0\0\1\0", b"\0\0\1\0\xff\xff", b"\0\0\1\0\0\0",
        b"II*\0\x08\0\0\0", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n", b"BM", b"GIF89a",
    ],
)  # fmt: skip
def test_what_is_no_picture_of_these_formats_is_refused(data: bytes):
    assert outcome(data) == "not_an_image"


# -- sizes that a file hides -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("animated", [False, True])
def test_the_frames_of_an_avif_are_known_before_it_is_decoded(mode: str, animated: bool):
    more = {"save_all": True, "append_images": [Image.new(mode, (300, 200))]} if animated else {}
    data = bytearray(encoded(Image.new(mode, (300, 200), 9), "AVIF", **more))
    assert largest_coded_frame(bytes(data)) == 300 * 200
    place = data.index(b"ispe") + 8
    data[place : place + 8] = struct.pack(">II", 299, 200)
    assert outcome(bytes(data)) == "not_an_image"


@pytest.mark.parametrize("tile", [128, 16384])
def test_the_tiles_of_a_tiff_count_as_its_pixels(tile: int):
    tags = {"t258": 8, "t262": 1, "t322": tile, "t323": tile, "t324": 8, "t325": 128 * 128}
    data = tiff(bytes(128 * 128), **tags)
    assert header_problem(data, ImageLimits()) == (None if tile == 128 else "too_many_pixels")


@pytest.mark.parametrize("picture", ["png", "bitmap"])
def test_an_icon_is_as_large_as_its_picture_is(picture: str):
    large = Image.new("RGB", (300, 300))
    data = encoded(large, "PNG") if picture == "png" else encoded(large, "DIB")
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 24, len(data), 22) + data
    problem = header_problem(icon, ImageLimits(max_pixels=300 * 300 - 1))
    assert problem == ("too_many_pixels" if picture == "png" else "not_an_image")


def peak_growth(work) -> int:
    def memory(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(rf"{field}:\s+(\d+) kB", status)[0]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (2, 50_001)])
def test_a_thin_picture_takes_no_more_memory_than_another_and_every_reader_cuts_it_alike(size):
    picture = Image.new("RGB", size, "blue")
    short, middle = min(size), max(size) // 2
    along = size.index(max(size))
    box = [0, 0, *size]
    box[along], box[along + 2] = middle - 2 * short, middle + 2 * short
    picture.paste("red", tuple(box))
    data = encoded(picture, "PNG")
    squares = []
    growth = peak_growth(lambda: squares.append(square_pixels(data, 256)))
    growth = max(growth, peak_growth(lambda: squares.append(preprocess(picture, 256))))
    assert growth < 64 * MIB
    assert np.array_equal(*squares)
    assert (squares[0] == np.array([255, 0, 0])[:, None, None]).all()


def test_an_ordinary_picture_is_cut_as_before():
    wide = PHOTO.resize((64 * MAX_ASPECT_RATIO, 64)).crop((0, 0, 60 * MAX_ASPECT_RATIO + 3, 64))
    resized = wide.resize((int(32 * wide.width / 64), 32), Image.Resampling.BICUBIC)
    left = round((resized.width - 32) / 2)
    expected = np.asarray(resized.crop((left, 0, left + 32, 32))).transpose(2, 0, 1)
    assert np.array_equal(preprocess(wide, 32), expected)
