"""Whatever the web calls an image becomes an upright RGB JPEG, or "undecodable"; never a crash."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from ingest.fetching import decode
from ingest.fetching.decode import (
    DecodeError,
    ImageLimits,
    Resizer,
    header_problem,
    square_pixels,
    stored_picture,
)

WHITE, RED, BLUE = (255, 255, 255), (220, 30, 30), (30, 30, 220)
KEEP = Resizer(image_size=64, resize_mode="keep_ratio")
CLOSE = 12  # of 255: what storing a flat colour as a JPEG may change


def encoded(image: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


def stored(file: io.BytesIO, resizer: Resizer = KEEP) -> Image.Image:
    """The image as a shard would hold it."""
    found = resizer(file.getvalue())
    image = Image.open(io.BytesIO(found.data))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (found.width, found.height))
    return image


def is_colour(pixel, colour) -> bool:
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= CLOSE


def flag(width: int = 96, height: int = 64) -> Image.Image:
    """Red above on the left, blue below on the right, white else: no two turns are alike."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(BLUE, (width // 2, height // 2, width, height))
    return image


# -- upright ---------------------------------------------------------------------------------------

UNDO = {  # orientation -> how a camera that tags it so has stored the upright image
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


@pytest.mark.parametrize("scale", [1, 8], ids=["as it is", "reduced while decoding"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright_and_forgotten(orientation: int, scale: int):
    upright = flag(96 * scale, 64 * scale)
    as_stored = upright.transpose(UNDO[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a camera's serial number"
    file = encoded(as_stored, "JPEG", quality=95, exif=exif.tobytes())
    found = KEEP(file.getvalue())
    assert (found.original_width, found.original_height) == upright.size
    image = stored(file)
    assert image.size == (96, 64) and not image.getexif()
    corners = [image.getpixel(xy) for xy in ((4, 4), (91, 4), (4, 59), (91, 59))]
    expected = (RED, WHITE, WHITE, BLUE)
    assert all(map(is_colour, corners, expected)), corners


# -- every kind of pixel ---------------------------------------------------------------------------


def half_transparent(mode: str) -> Image.Image:
    """Left half opaque red, right half transparent blue."""
    image = Image.new("RGBA", (80, 64), (*BLUE, 0))
    image.paste((*RED, 255), (0, 0, 40, 64))
    return image.convert(mode)


def palette_with_transparency() -> io.BytesIO:
    image = Image.new("P", (80, 64), 1)
    image.putpalette([*RED, *BLUE])
    image.paste(0, (0, 0, 40, 64))
    return encoded(image, "PNG", transparency=1)


def grey16(kind: str) -> io.BytesIO:
    values = np.full((64, 80), 1000, np.uint16)
    values[:, 40:] = 65535
    return encoded(Image.fromarray(values), kind)


@pytest.mark.parametrize(
    ("file", "left", "right"),
    [
        (encoded(half_transparent("RGBA")), RED, WHITE),
        (encoded(half_transparent("RGBA"), "WEBP", lossless=True), RED, WHITE),
        (encoded(half_transparent("LA")), (87, 87, 87), WHITE),
        (palette_with_transparency(), RED, WHITE),
        (encoded(Image.new("CMYK", (80, 64), (0, 220, 220, 20)), "JPEG", quality=95), None, None),
        (grey16("PNG"), (4, 4, 4), WHITE),
        (encoded(Image.new("1", (80, 64), 1)), WHITE, WHITE),
        (encoded(Image.new("L", (80, 64), 90), "JPEG"), (90, 90, 90), (90, 90, 90)),
        (encoded(Image.new("RGB", (80, 64), RED), "BMP"), RED, RED),
        (
            encoded(
                Image.new("RGB", (80, 64), RED), "GIF", save_all=True,
                append_images=[Image.new("RGB", (80, 64), BLUE)],
            ),
            RED, RED,
        ),
    ],
    ids=["RGBA", "WebP", "LA", "palette", "CMYK", "16 bit", "1 bit", "grey", "BMP", "animated"],
)  # fmt: skip
def test_every_mode_becomes_rgb_over_white(file: io.BytesIO, left, right):
    image = stored(file)
    assert image.size == (80, 64)
    if left is None:  # CMYK: the oracle is Pillow's own conversion
        left = right = Image.open(file).convert("RGB").getpixel((8, 8))
    assert is_colour(image.getpixel((8, 32)), left), image.getpixel((8, 32))
    assert is_colour(image.getpixel((72, 32)), right), image.getpixel((72, 32))


def grey_levels() -> io.BytesIO:
    """The flag of `flag`, in 16 bits of grey."""
    grey = np.asarray(flag().convert("L"), np.uint16)
    return encoded(Image.fromarray(grey * 257))


def turned(kind: str, **options) -> io.BytesIO:
    """The flag as a camera held on its side stores it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(flag().transpose(UNDO[6]), kind, exif=exif.tobytes(), **options)


def over_nothing(mode: str) -> io.BytesIO:
    """The flag with its white as nothing: black there, and transparent."""
    pixels = np.asarray(flag().convert("RGBA")).copy()
    pixels[(pixels[..., :3] == 255).all(-1)] = 0
    return encoded(Image.fromarray(pixels).convert(mode))


@pytest.mark.parametrize(
    ("file", "grey", "close"),
    [
        (turned("JPEG", quality=95), False, CLOSE),
        (turned("PNG"), False, 0),
        (turned("WEBP", lossless=True), False, 0),
        (over_nothing("RGBA"), False, 0),
        (encoded(flag().convert("P", palette=Image.Palette.ADAPTIVE)), False, 0),
        (encoded(flag().convert("CMYK"), "JPEG", quality=95), False, CLOSE),
        (encoded(flag().convert("L")), True, 0),
        (grey_levels(), True, 1),
    ],
    ids=["turned JPEG", "turned PNG", "turned WebP", "RGBA", "palette", "CMYK", "grey", "16 bit"],
)
def test_every_reader_sees_the_same_upright_picture_of_a_foreign_file(
    file: io.BytesIO, grey: bool, close: int
):
    from eval.features.decoding import picture_size, read_picture
    from models.clip import preprocess

    expected = np.asarray(flag().convert("L" if grey else "RGB").convert("RGB"), int)
    data = file.getvalue()
    picture = stored_picture(data)
    assert picture.mode == "RGB" and picture.size == (96, 64) == picture_size(data, "")
    away_from_edges = np.abs(np.asarray(picture, int) - expected)[:, :44]
    assert away_from_edges[:28].max() <= close and away_from_edges[36:].max() <= close
    square = square_pixels(data, 64)  # what training reads, embedding, and FID
    assert np.array_equal(square, preprocess(picture, 64))
    assert np.array_equal(np.asarray(picture), np.asarray(read_picture(data, "")))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_plain_jpeg_is_read_as_pillow_decodes_it(options: dict):
    file = encoded(photograph((96, 64)), "JPEG", **options)
    with Image.open(file) as image:
        assert np.array_equal(np.asarray(stored_picture(file.getvalue())), np.asarray(image))


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("keep_ratio", (640, 480), (85, 64)),
        ("keep_ratio", (480, 640), (64, 85)),
        ("keep_ratio", (3000, 64), (3000, 64)),
        ("keep_ratio", (50, 40), (50, 40)),
        ("center_crop", (640, 480), (64, 64)),
        ("center_crop", (100, 40), (64, 40)),
        ("keep_ratio_largest", (640, 480), (64, 48)),
        ("keep_ratio_largest", (50, 40), (50, 40)),
        ("border", (640, 480), (64, 64)),
        ("border", (20, 10), (64, 64)),
        ("no", (640, 480), (640, 480)),
        ("keep_ratio_largest", (3000, 10), (64, 1)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_sizes_by_mode_and_nothing_is_enlarged(kind: str, mode, size, expected):
    resizer = Resizer(image_size=64, resize_mode=mode)
    assert stored(encoded(flag(*size), kind), resizer).size == expected


def test_crop_and_border_are_centred():
    crop = stored(encoded(flag(128, 64)), Resizer(image_size=32, resize_mode="center_crop"))
    assert is_colour(crop.getpixel((4, 4)), RED) and is_colour(crop.getpixel((27, 27)), BLUE)
    red = encoded(Image.new("RGB", (64, 32), RED))
    border = stored(red, Resizer(image_size=64, resize_mode="border"))
    colours = [border.getpixel((32, y)) for y in (4, 32, 59)]
    assert all(map(is_colour, colours, (WHITE, RED, WHITE)))


def test_an_image_whose_shorter_side_is_too_small_is_refused():
    resizer = Resizer(image_size=64, resize_mode="no", min_image_side=40)
    with pytest.raises(DecodeError, match="too_small"):
        resizer(encoded(flag(90, 39)).getvalue())
    assert stored(encoded(flag(90, 40)), resizer).size == (90, 40)


# -- quality ---------------------------------------------------------------------------------------


def photograph(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture with the spectrum of photographs, amplitude 1/f, mostly of brightness, and a little
    sensor noise."""
    rng = np.random.default_rng(seed)
    width, height = (-(-side // 120) * 120 for side in size)  # cut to size: an FFT likes no primes
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    spectrum = np.fft.rfft2(rng.normal(size=(4, height, width)))
    fields = np.fft.irfft2(spectrum / np.maximum(frequency, 1 / max(size)), s=(height, width))
    brightness, *tints = fields[:, : size[1], : size[0]] / fields.std()
    values = 127 + 45 * brightness + 6 * np.stack(tints)
    values += rng.normal(0, 2, values.shape)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def psnr(one: Image.Image, other: Image.Image) -> float:
    difference = np.asarray(one, float) - np.asarray(other, float)
    return float(10 * np.log10(255**2 / np.square(difference).mean()))


@pytest.mark.parametrize("size", [(1024, 768), (1001, 701), (1112, 777), (701, 2003), (1601, 1201)])
def test_cheap_reduction_costs_no_more_than_the_jpeg_that_is_stored(size: tuple[int, int]):
    """Against a full decode and one bicubic filter."""
    picture = encoded(photograph(size), "JPEG", quality=90)
    cheap = stored(picture, Resizer(image_size=256, resize_mode="keep_ratio", quality=95))
    exact = Image.open(picture).convert("RGB").resize(cheap.size, Image.Resampling.BICUBIC)
    exact_stored = Image.open(encoded(exact, "JPEG", quality=95))
    assert psnr(cheap, exact) > psnr(exact_stored, exact) - 3.0
    assert psnr(cheap, exact) > 36
    sideways = Image.open(picture)
    exif = sideways.getexif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    sideways.save(turned, "JPEG", quality="keep", exif=exif)
    upright = stored(turned, Resizer(image_size=256, resize_mode="keep_ratio", quality=95))
    assert psnr(upright, exact.transpose(Image.Transpose.ROTATE_270)) > 36


# -- hostile bytes ---------------------------------------------------------------------------------


def test_damaged_images_are_stored_or_refused_and_nothing_else():
    picture = photograph((40, 32))
    originals = [
        encoded(picture, kind, **options).getvalue()
        for kind, options in (
            ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}),
            ("BMP", {}), ("AVIF", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
            ("JPEG2000", {}), ("ICO", {"sizes": [(32, 32)]}),
        )
    ]  # fmt: skip
    draw, outcomes = random.Random(0), {True: 0, False: 0}
    for number in range(10_000):
        data = bytearray(originals[number % len(originals)])
        for _ in range(draw.choice((1, 2, 8, 64))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if number % 10 == 0:
            del data[draw.randrange(1, len(data)) :]
        if header_problem(bytes(data), ImageLimits()):  # as before every decode
            outcomes[False] += 1
            continue
        try:
            KEEP(bytes(data))
        except DecodeError as error:
            assert error.reason == "undecodable" and error.__cause__ is None
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert min(outcomes.values()) > 150


@pytest.mark.parametrize("data", [b"", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"%!PS-Adobe"])
def test_what_is_no_image_is_refused(data: bytes):
    with pytest.raises(DecodeError, match="undecodable"):
        KEEP(data)


def test_an_error_that_nobody_foresaw_is_reported_and_a_lack_of_memory_is_no_fault_of_an_image(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    picture = encoded(flag()).getvalue()
    raised: list[Exception] = [ArithmeticError("a new bug"), MemoryError()]
    monkeypatch.setattr(decode, "decode_to", lambda *_: (_ for _ in ()).throw(raised.pop(0)))
    with pytest.raises(DecodeError, match="undecodable"):
        KEEP(picture)
    assert "not decoded: ArithmeticError('a new bug')" in capsys.readouterr().err
    with pytest.raises(MemoryError):
        KEEP(picture)


def test_the_size_of_an_adopted_image_is_that_of_what_readers_see_also_where_xmp_turns_it():
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, "JPEG", xmp=b'<r:Description tiff:Orientation="6"/>')
    size = decode.verify_image(file.getvalue(), decode.ImageLimits())
    assert size == decode.stored_picture(file.getvalue()).size == (20, 40)
