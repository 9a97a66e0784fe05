"""The captioned pictures that benchmarks/pictures.py makes of packages, from a folder of a few."""

import io
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _runs import done, script
from _titles import TONES, Vocabulary, article, thing
from PIL import Image

from cluster.base.files import digest_file
from cluster.demo_data import given_pairs, read_pairs

TWO = '<circle cx="8" cy="8" r="6" fill="{}"/><path d="M2 1h4v5z" fill="{}"/>'
SHAPES = {
    "apple": TWO.format("red", "green"),
    "green-apple": TWO.format("lime", "brown"),
    "flag-togo": TWO.format("gold", "green"),
    **{f"waving-hand-{t.replace(' ', '-')}-skin-tone": TWO.format(c, "teal")
       for t, c in zip(TONES, ("#fdb", "#eca", "#c96", "#853", "#421"), strict=True)},
    # what is left out
    "blank": TWO.format("white", "#fefefe"),
    "silhouette": TWO.format("blue", "blue"),
    "moon": TWO.format("#999", "black"),
    "letters": TWO.format("red", "blue") + "<text>abc</text>",
    "broken": "<path",
    "twin": TWO.format("red", "green"),
    "firefox-logo": TWO.format("red", "orange"),
}  # fmt: skip
# a picture of each pair of words, so that the test set has some
ANIMALS = ("cat", "dog", "cow", "hen", "pig", "owl")
OBJECTS = ("hat", "cup", "box", "map", "key", "pen", "bed")
PAIRS = ["-".join(pair) for pair in itertools.product(ANIMALS, OBJECTS)]
LICENCES = {"twemoji": "CC-BY-4.0", "openmoji": "CC-BY-SA-4.0"}
CLIP_ART = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="dc" width="210mm" height="297mm">
<metadata><dc:title>{title}</dc:title><license resource="http://x/{licence}"/></metadata>
<g transform="scale(9)">{shapes}</g></svg>"""


def write_packages(root: Path) -> None:
    """Write two icon sets of the same names, the second with another blue, and some clip art."""
    for blue, (name, licence) in enumerate(LICENCES.items()):
        folder = root / name
        folder.mkdir(parents=True)
        tint = f"{99 * blue:02x}"
        pairs = {k: TWO.format(f"#{i:02x}80{tint}", "red") for i, k in enumerate(PAIRS, 99)}
        icons = {key: {"body": body} for key, body in {**SHAPES, **pairs}.items()}
        for file, content in (
            ("icons", {"icons": icons, "width": 16, "height": 16}),
            ("info", {"license": {"spdx": licence}, "author": {"name": name.title()}}),
            ("metadata", {"categories": {"Flags": ["flag-togo"]}}),
        ):
            (folder / f"{file}.json").write_text(json.dumps(content))
    drawings = root / "usr/share/openclipart/svg/food"
    drawings.mkdir(parents=True)
    for i, (file, title, licence) in enumerate((
        ("grapes_jane_doe_01", "Grapes", "PublicDomain"),  # the file's name confirms the title
        ("teapot2", "Clipart by Jane - bee", "PublicDomain"),  # it does not
        ("mela_02", "Mela", "PublicDomain"),  # not English
        ("pear", "Pear", "ByNC"),
        *((f"plate_{i:02d}", f"Plate {i}", "PublicDomain") for i in range(20)),  # a series
    )):  # fmt: skip
        shapes = TWO.format(f"#{i * 9:02x}5010", "green")
        svg = CLIP_ART.format(title=title, licence=licence, shapes=shapes)
        (drawings / f"{file}.svg").write_text(svg)
    dictionary = root / "usr/share/dict/american-english"
    dictionary.parent.mkdir(parents=True)
    dictionary.write_text("bee\ngrapes\nJane\npear\nplate\nteapot\n")


def draw(root: Path, name: str) -> subprocess.CompletedProcess[str]:
    return done(script("benchmarks/pictures.py", "--packages", root / "packages",
                       "--out", root / f"{name}.parquet"), 300)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    """A folder of packages, the rows of its Parquet file, and what the script printed."""
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("pictures")
    write_packages(root / "packages")
    ended = draw(root, "one")
    assert ended.returncode == 0, ended.stderr
    return root, pq.read_table(root / "one.parquet").to_pylist(), ended.stdout


def test_each_picture_has_a_caption_a_thing_and_its_packages_licence(made: tuple):
    _, rows, _ = made
    emoji = ("CC-BY-SA-4.0", "@iconify-json/openmoji by Openmoji")
    assert [
        (row["caption"], row["name"], row["licence"], row["source"])
        for row in rows
        if row["name"] in ("apple", "grape", "teapot", "togo")
    ] == [
        ("grapes, clip art", "grape", "public domain", "openclipart-svg of Debian"),
        ("a teapot, clip art", "teapot", "public domain", "openclipart-svg of Debian"),
        ("an apple, outlined emoji", "apple", *emoji),
        ("the flag of togo, outlined emoji", "togo", *emoji),
        ("a green apple, outlined emoji", "apple", *emoji),
    ]
    styles = {row["style"]: row["licence"] for row in rows}
    assert (styles["outlined emoji"], styles["twitter emoji"]) == ("CC-BY-SA-4.0", "CC-BY-4.0")
    assert all(row["caption"].endswith(f", {row['style']}") for row in rows)


def test_what_is_no_coloured_picture_is_left_out_and_counted(made: tuple):
    _, rows, printed = made
    counts = json.loads(printed.splitlines()[-1])
    hands = [row["caption"] for row in rows if row["name"] == "hand waving"]
    assert len(hands) == 3, "three skin tones of five"
    same_in_both = len(("apple", "green-apple", "flag-togo")) + len(hands)
    assert counts["left_out"] == {
        "serial title": 20,
        "equal to another": 2 + same_in_both,  # the twin, of both sets
        "other skin tones": 2 * 2,
        **dict.fromkeys(("one colour", "greys", "blank", "broken"), 2),
        "text or raster inside": 2,
        "brands, interfaces, hidden": 2,
        "no plain name": 1,
        "parts of interfaces, no licence stated": 1,
    }
    assert counts["pictures"] == len(rows) == 2 + 3 + len(hands) + 2 * len(PAIRS)
    assert sum(counts["by_licence"].values()) == sum(counts["by_style"].values()) == len(rows)


def test_the_pictures_are_whole_and_on_white(made: tuple):
    _, rows, _ = made
    for row in rows:
        picture = Image.open(io.BytesIO(row["image"]))
        assert picture.size == (128, 128) and picture.mode == "RGB"
        pixels = np.asarray(picture).astype(int)
        assert min(pixels[0].min(), pixels[-1].min(), pixels[:, 0].min()) > 230, "a white border"
        height, width = (np.ptp(np.flatnonzero((pixels < 240).any((2, side)))) for side in (1, 0))
        assert 110 < max(height, width) < 124, "the drawing fills the rest, wherever it was"


def test_the_demo_splits_by_thing(made: tuple):
    root, _, printed = made
    sets = given_pairs(root / "split", root / "one.parquet", 0)
    captions = {
        name: {row["caption"].rpartition(", ")[0] for row in read_pairs(path)}
        for name, path in sets.items()
    }
    things = {name: set(map(thing, found)) for name, found in captions.items()}
    assert things["train"].isdisjoint(things["test"]) and len(things["test"]) > 3
    counts = json.loads(printed.splitlines()[-1])
    assert {k: len(read_pairs(path)) for k, path in sets.items()} == {k: counts[k] for k in sets}


def test_the_same_packages_give_the_same_file(made: tuple):
    root, _, printed = made
    ended = draw(root, "two")
    assert (root / "two.parquet").read_bytes() == (root / "one.parquet").read_bytes()
    digests = [re.findall("sha256 ([0-9a-f]{64})", text) for text in (printed, ended.stdout)]
    assert digests[0] == digests[1] == [digest_file(root / "one.parquet")]


def test_an_icon_set_without_a_licence_is_refused(made: tuple, tmp_path: Path):
    shutil.copytree(made[0] / "packages" / "twemoji", tmp_path / "packages" / "twemoji")
    (tmp_path / "packages" / "twemoji" / "info.json").write_text("{}")
    ended = draw(tmp_path, "none")
    assert ended.returncode == 2 and "info.json: found no licence" in ended.stderr


@pytest.mark.parametrize(("phrases", "name"), [
    (("red apple", "green apples", "the apple"), "apple"),
    (("woman running", "man running facing right", "running"), "running"),
    (("christmas tree", "tree christmas"), "christmas tree"),
    (("cherries", "a small cherry"), "cherry"),
    (("blue heart", "heart blue"), "heart"),
    (("red",), "red"),
])  # fmt: skip
def test_variants_are_one_thing(phrases: tuple[str, ...], name: str):
    assert {thing(phrase) for phrase in phrases} == {name}


def test_titles_are_plain_english():
    phrases = ("apple", "glasses", "eye with tears", "unicorn", "hourglass", "bus stop")
    assert [article(phrase) for phrase in phrases] == [
        "an apple", "glasses", "an eye with tears", "a unicorn", "an hourglass", "a bus stop",
    ]  # fmt: skip
    words = Vocabulary(["paper", "clip", "Jane", "red", "apple"])
    assert words.split("redpaperclip") == ("red", "paper", "clip") and words.split("mela") == ()
    assert words.is_english(["red", "apple"]) and not words.is_english(["jane"])
