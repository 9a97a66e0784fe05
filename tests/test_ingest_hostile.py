"""A hostile web, case by case and all together: nothing is reached that must not be, memory and
deadlines hold, and every row is accounted for."""

import gzip
import io
import json
import re
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from _lists import download_of, fetched_rows, fetcher_of
from conftest import Site
from PIL import Image, PngImagePlugin

from ingest.download import main
from ingest.fetching.decode import Resizer
from ingest.fetching.engine import RowRequest, require_our_transport
from ingest.fetching.fetch import Fetcher
from ingest.fetching.net import connect
from ingest.lists.filters import MAX_CAPTION_CHARS
from ingest.shards import ImageShard, committed

MIB = 1 << 20
MOST_GROWTH = 300 * MIB
TIMEOUT_SECONDS = 2.0
GOOD = "good"  # in place of a reason


def encoded(size: tuple[int, int], mode: str, kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, options.pop("color", 0)).save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int, color_type: int) -> bytes:
    """Return the start of a PNG that claims to be huge."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(chunk))
    end = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + crc + end


def png_with_text_bomb(name: str) -> bytes:
    """Return a small picture with a text of 50 MB, compressed."""
    info = PngImagePlugin.PngInfo()
    info.add_text(name, "\0" * (50 * MIB), zip=True)
    return encoded((64, 64), "RGB", "PNG", pnginfo=info)


def avif_that_says_less() -> bytes:
    """Return an AVIF of 16 MP whose boxes state 64 px."""
    data = bytearray(encoded((4000, 4000), "RGB", "AVIF", speed=10))
    place = data.index(b"ispe") + 8
    data[place : place + 8] = struct.pack(">II", 64, 64)
    return bytes(data)


def tiff_with_a_large_tile() -> bytes:
    """Return a TIFF of 64 px in one tile of 8192 px, which decompresses to 192 MiB."""
    pixels = zlib.compress(bytes(3 * 8192 * 8192))
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 2, 277: 3, 322: 8192, 323: 8192, 324: 8}
    tags[325] = len(pixels)
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    end = struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + end


def icon_of(picture: bytes) -> bytes:
    """Return an icon that states 32 px, of any picture."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(picture), 22) + picture


# What servers answer with, and what becomes of it.
BODIES = {
    "a good picture": (lambda: encoded((64, 48), "RGB", "PNG"), GOOD),
    "a 6000 x 6000 RGBA PNG of 140 KB": (
        lambda: encoded((6000, 6000), "RGBA", "PNG"), "too_many_pixels",
    ),
    "a 30000 x 30000 PNG": (lambda: png_header(30_000, 30_000, 2), "too_many_pixels"),
    "a 100 MP JPEG": (lambda: encoded((10_000, 10_000), "L", "JPEG"), "too_many_pixels"),
    "a 49 MP RGB PNG": (lambda: encoded((7000, 7000), "RGB", "PNG"), GOOD),
    "a 49 MP JPEG": (lambda: encoded((7000, 7000), "RGB", "JPEG", quality=10), GOOD),
    "a 25 MP progressive JPEG": (
        lambda: encoded((4990, 4990), "RGB", "JPEG", progressive=True, subsampling=0), GOOD,
    ),
    "a 49 MP progressive JPEG": (
        lambda: encoded((7000, 7000), "RGB", "JPEG", progressive=True), "too_many_pixels",
    ),
    "a 12 MP RGBA PNG": (lambda: encoded((3500, 3500), "RGBA", "PNG"), GOOD),
    "a 10 MP WebP": (lambda: encoded((3150, 3150), "RGBA", "WEBP", method=0), GOOD),
    "a 12 MP CMYK JPEG": (lambda: encoded((3500, 3500), "CMYK", "JPEG"), GOOD),
    "a 12 MP 16-bit PNG": (lambda: encoded((3500, 3500), "I;16", "PNG"), GOOD),
    "a 12 MP GIF": (lambda: encoded((3500, 3500), "P", "GIF", transparency=0), GOOD),
    "a 16 MP AVIF": (lambda: encoded((4000, 4000), "RGB", "AVIF", speed=10), GOOD),
    "a 10 MP AVIF with alpha": (lambda: encoded((3100, 3100), "RGBA", "AVIF", speed=10), GOOD),
    "an AVIF that says less": (avif_that_says_less, "not_an_image"),
    "a 12 MP JPEG 2000": (lambda: encoded((3500, 3500), "RGB", "JPEG2000"), GOOD),
    "a 25 MP TIFF": (lambda: encoded((4990, 4990), "RGB", "TIFF", compression="tiff_lzw"), GOOD),
    "a 12 MP RGBA TIFF": (
        lambda: encoded((3500, 3500), "RGBA", "TIFF", compression="tiff_lzw"), GOOD,
    ),
    "a TIFF with a large tile": (tiff_with_a_large_tile, "too_many_pixels"),
    "an icon of a 30000 x 30000 PNG": (
        lambda: icon_of(png_header(30_000, 30_000, 2)), "too_many_pixels",
    ),
    "an icon of a large bitmap": (
        lambda: icon_of(encoded((5000, 5000), "RGB", "DIB")[:4096]), "not_an_image",
    ),
    "a comment of 50 MB": (lambda: png_with_text_bomb("Comment"), GOOD),
    "an orientation of 50 MB": (
        lambda: png_with_text_bomb("Raw profile type exif"), "not_an_image",
    ),
    "a 49 MP JPEG without end": (
        lambda: encoded((7000, 7000), "RGB", "JPEG", quality=10)[:-2], GOOD,
    ),
    "a truncated JPEG": (
        lambda: encoded((640, 480), "RGB", "JPEG", color=(200, 10, 10))[:2000], "undecodable",
    ),
    "HTML as an image": (lambda: b"<html><body>not here</body></html>", "not_an_image"),
    "nothing": (lambda: b"", "not_an_image"),
}  # fmt: skip


def _drip(handler) -> None:
    """One byte a second."""
    handler.send_response(200)
    handler.send_header("Content-Type", "image/png")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.close_connection = True
    try:
        for _ in range(20):
            handler.wfile.write(b"\x89")
            time.sleep(1)
    except OSError:
        return


def _endless(handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "image/png")
    handler.end_headers()
    handler.close_connection = True
    try:
        handler.wfile.write(Site.picture())
        for _ in range(2000):  # 500 MB
            handler.wfile.write(b"\0" * (MIB // 4))
    except OSError:
        return


@pytest.fixture(scope="module")
def bodies() -> dict[str, bytes]:
    return {name: build() for name, (build, _) in BODIES.items()}


@pytest.fixture
def cases(site, canary, bodies) -> Iterator[dict[str, tuple[str, str]]]:
    """Return the URL and the outcome of every case; nothing but the site may be connected to."""
    found = {}
    for number, (name, (_, reason)) in enumerate(BODIES.items()):
        found[name] = (site.put(f"/body/{number}", bodies[name]), reason)

    def add(name: str, reason: str, body: bytes = b"", **answer) -> None:
        found[name] = (site.put(f"/{len(found)}", body, **answer), reason)

    hops = {
        "the canary": (canary.url("/"), "port_refused"),
        "the canary, mapped": (f"http://[::ffff:127.0.0.2]:{canary.port}/", "port_refused"),
        "a private port 80": ("http://127.0.0.2/", "address_refused"),
        "a private address, decimal": ("http://2130706434/", "address_refused"),
        "a private address, hex": ("http://0x7f000002/", "address_refused"),
        "a private address, mapped": ("http://[::ffff:7f00:2]/", "address_refused"),
        "a private address through NAT64": ("http://[64:ff9b::7f00:2]/", "address_refused"),
        "a private address through 6to4": ("http://[2002:7f00:2::]/", "address_refused"),
        "the metadata service": ("http://169.254.169.254/latest/", "address_refused"),
        "a file": ("file:///etc/passwd", "invalid_url"),
        "data": ("data:image/png;base64,iVBORw0KGgo=", "invalid_url"),
        "a user's name": ("http://user:secret@127.0.0.1/", "invalid_url"),
    }
    found |= hops
    for name, (target, reason) in hops.items():
        add(f"a redirect to {name}", reason, status=302, headers={"Location": target})
    loop = site.put("/loop", status=301, headers={"Location": "/loop"})
    found["a redirect loop"] = (loop, "too_many_redirects")
    site.answers["/drip"], site.answers["/endless"] = _drip, _endless
    found["one byte a second"] = (site.url("/drip"), "timeout")
    found["a body without end"] = (site.url("/endless"), "too_large")
    add("10 GB declared", "too_large", headers={"Content-Length": str(10 * 1024 * MIB)})
    bomb = gzip.compress(b"\0" * (64 * MIB))
    add("a gzip bomb", "not_an_image", bomb, headers={"Content-Encoding": "gzip"})
    bomb = gzip.compress(gzip.compress(site.picture() + bytes(64 * MIB)))
    add("a gzip bomb that begins as a picture", "too_large", bomb)
    add("HTML as text", "not_an_image", b"<html>not here</html>", kind="text/html")
    add("SVG as a picture", "not_an_image", b'<?xml version="1.0"?><svg/>')
    add("SVG", "not_an_image", b"<svg/>", kind="image/svg+xml")
    add("429 with Retry-After", "rate_limited", status=429, headers={"Retry-After": "1"})
    add("503", "server_error", status=503)
    picture = site.picture()
    add("noai", "opted_out", picture, headers={"X-Robots-Tag": "noai"})
    past = {"X-Robots-Tag": "unavailable_after: 25 Jun 2010 15:00:00 GMT"}
    add("unavailable after a day that has passed", "opted_out", picture, headers=past)
    add("rights reserved", "opted_out", picture, headers={"TDM-Reservation": "1"})
    site.put("/b%C3%A4r%20%E7%86%8A.png", picture)
    found["a URL beyond ASCII"] = (site.url("/bär 熊.png"), GOOD)
    yield found


@pytest.fixture
def dialled(monkeypatch) -> list[tuple[str, int]]:
    """Record every connection that is opened."""
    made: list[tuple[str, int]] = []

    def dial(address: str, port: int):
        made.append((address, port))
        return connect(address, port)

    monkeypatch.setattr(Fetcher.__init__, "__kwdefaults__", {"resolve": None, "connect": dial})
    return made


def _memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+) kB", status)[0]) * 1024


def test_no_case_takes_too_long_or_too_much_memory_or_leads_astray(site, cases, dialled):
    policy = fetcher_of(site, timeout_seconds=TIMEOUT_SECONDS).policy
    resizer = Resizer(image_size=64, resize_mode="keep_ratio")
    problems = []
    require_our_transport()  # which imports img2dataset
    for name, (url, reason) in cases.items():
        fetcher = Fetcher(policy)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, started = _memory("VmRSS"), time.monotonic()
        found = fetched_rows([RowRequest(row=0, url=url)], fetcher, resizer)[0]
        seconds, growth = time.monotonic() - started, _memory("VmHWM") - before
        if (found.reason or GOOD) != reason:
            problems.append(f"{name}: {found.reason}, expected {reason}")
        fetching = seconds if reason != GOOD else 0.0  # decoding is not the fetch's deadline
        if growth > MOST_GROWTH or fetching > TIMEOUT_SECONDS + 2:
            problems.append(f"{name}: {growth / MIB:.0f} MiB, {seconds:.1f} s")
        print(f"{name:45s} {found.reason or GOOD:20s} {growth / MIB:6.0f} MiB {seconds:6.2f} s")
    assert problems == []
    assert set(dialled) == {("127.0.0.1", site.port)}


def test_a_list_of_all_cases_adds_up(site, cases, dialled, tmp_path, capsys):
    """With every kind of caption, in JSON lines, which can spell what is no text."""
    long = '"' + "long " * 1_000_000 + '"'
    captions = ['"x"', "null", '"a\\u0000b"', '"lone \\ud800 surrogate"', long]
    lines, expected = [], Counter()
    for number, (url, reason) in enumerate(cases.values()):
        lines.append(f'{{"url": {json.dumps(url)}, "caption": {captions[number % 5]}}}')
        expected[reason] += 1
    lines.append('{"url": null, "caption": "no URL"}')
    lines.append('{"url": "http://127.0.0.1:99999/", "caption": "no port"}')
    expected["invalid_url"] += 2
    data = "\n".join(lines).encode() + b'\n{"url": "", "caption": "not \xff UTF-8"}\n'
    expected["invalid_url"] += 1
    (tmp_path / "list.jsonl").write_bytes(data)
    config = download_of(
        site, str(tmp_path / "list.jsonl"), tmp_path / "images", image_size=64,
        samples_per_shard=20, num_threads=4, timeout=TIMEOUT_SECONDS,
    )  # fmt: skip
    assert main(config) == 0
    counted: Counter[str] = Counter()
    for commit in committed(config.out).values():
        for name, count in commit.counts.items():
            counted[name.partition(":")[2] or GOOD] += count
    assert counted == expected and sum(counted.values()) == len(cases) + 3
    assert f"{expected[GOOD]} stored" in capsys.readouterr().out
    for name, commit in committed(config.out).items():
        shard = ImageShard(config.out, name)
        for i in range(commit.num_samples):
            caption = shard.caption(i)
            assert len(caption) <= MAX_CAPTION_CHARS and "\0" not in caption
    assert set(dialled) == {("127.0.0.1", site.port)}
