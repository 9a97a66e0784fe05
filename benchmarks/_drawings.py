"""Drawings with captions from packages: Debian's openclipart-svg, npm's icon sets in colour."""

import json
import re
import shutil
import subprocess
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path

from _titles import COUNTS, MAKER, TONE, TONES, Vocabulary, article, singular, words

from cluster.base.files import Json

DEBIAN = ("openclipart-svg", "wamerican")  # drawings, and the English words that titles consist of
CLIP_ART, DICTIONARY = "usr/share/openclipart/svg", "usr/share/dict/american-english"
UNTITLED = ("computer/buttons/", "computer/icons/", "logos/", "special/", "unsorted/duplicates/")
BRANDS = re.compile(
    "logo|regional|google|android|facebook|twitter|dropbox|amazon|apple-|microsoft|adobe|paypal|visa-"
    "|mastercard|github|reddit|youtube|instagram|linkedin|skype|whatsapp|wikipedia|blackberry|kirby"
    "|firefox|chrome|playstation|xbox|nintendo|html|benz|charlie|debian|r2d2|bluetooth|kindle"
)
PUBLIC_DOMAIN = ("/PublicDomain", "/publicdomain/", "Public Domain")
SERIAL = 15  # drawings of one title: more are a series, of cards, stars or buttons


@dataclass(frozen=True, kw_only=True)
class IconSet:
    """A package @iconify-json/NAME."""

    version: str
    style: str
    """as the captions name it"""
    is_icon: bool = False
    """names are not always nouns ("add image"), so that captions have no article"""
    endings: tuple[str, ...] = ()
    """of the names, by size or form: the first that a name has is drawn; others are left out"""


PIXELS = tuple(f"-{size}" for size in (48, 32, 28, 24, 20, 16))
SETS = {
    "circle-flags": IconSet(version="1.2.11", style="round icon"),
    "emojione": IconSet(version="1.2.3", style="emojione emoji"),
    "emojione-v1": IconSet(version="1.2.3", style="old emojione emoji"),
    "flag": IconSet(version="1.2.12", style="rectangle", endings=("-4x3",)),
    "flat-color-icons": IconSet(version="1.2.3", style="flat icon", is_icon=True),
    "fluent-color": IconSet(
        version="1.2.21", style="gradient icon", is_icon=True, endings=PIXELS),
    "fluent-emoji": IconSet(version="1.2.7", style="glossy emoji"),
    "fluent-emoji-flat": IconSet(version="1.2.6", style="flat emoji"),
    "fxemoji": IconSet(version="1.2.2", style="firefox emoji"),
    "icon-park": IconSet(version="1.2.4", style="blue line icon", is_icon=True),
    "meteocons": IconSet(
        version="1.2.4", style="weather icon", is_icon=True, endings=("-fill",)),
    "openmoji": IconSet(version="1.2.29", style="outlined emoji"),
    "streamline-emojis": IconSet(version="1.2.4", style="cartoon emoji"),
    "streamline-cyber-color": IconSet(
        version="1.2.2", style="blue outlined icon", is_icon=True),
    "streamline-kameleon-color": IconSet(
        version="1.2.2", style="round flat icon", is_icon=True, endings=("", "-duo")),
    "streamline-plump-color": IconSet(
        version="1.2.2", style="two-tone blue icon", is_icon=True, endings=("", "-flat")),
    "streamline-stickies-color": IconSet(
        version="1.2.2", style="sticker", is_icon=True, endings=("", "-duo")),
    "streamline-freehand-color": IconSet(version="1.2.2", style="hand-drawn icon", is_icon=True),
    "streamline-ultimate-color": IconSet(version="1.2.2", style="pastel line icon", is_icon=True),
    "twemoji": IconSet(version="1.2.5", style="twitter emoji"),
}  # fmt: skip
# What icon sets draw besides things: brands, parts of user interfaces, and letters of flags
LEFT_OUT = {
    *("Abstract", "Arrows", "Base", "Brand", "Components", "Datas", "Edit", "Logos", "Modifiers"),
    *("Extras Openmoji", "InterfaceEssential"),
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """An SVG with its caption."""

    key: str
    """its name in its source"""
    svg: str
    phrase: str
    """what it shows, without article, tone and style"""
    caption: str
    source: str
    style: str
    licence: str


def is_unpacked(folder: Path, name: str) -> bool:
    if name == DEBIAN[0]:
        return (folder / CLIP_ART).is_dir() and (folder / DICTIONARY).is_file()
    return (folder / name / "icons.json").is_file()


def fetch(folder: Path, names: Iterable[str]) -> None:
    """Fetch and unpack what `folder` lacks, by apt-get and npm, without installing anything."""
    missing = [name for name in names if not is_unpacked(folder, name)]
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    for name in missing:
        if name == DEBIAN[0]:
            print(f"fetching {' and '.join(DEBIAN)} of Debian (25 MB) into {folder}", flush=True)
            _run("apt-get", "download", *DEBIAN, cwd=archives)
            for package in DEBIAN:
                _run("dpkg-deb", "-x", str(next(archives.glob(f"{package}_*.deb"))), str(folder))
            continue
        package = f"@iconify-json/{name}@{SETS[name].version}"
        print(f"fetching {package} of npm into {folder}", flush=True)
        _run("npm", "pack", "--silent", package, cwd=archives)
        archive = archives / f"iconify-json-{name}-{SETS[name].version}.tgz"
        shutil.unpack_archive(archive, archives / name, filter="data")
        (archives / name / "package").rename(folder / name)
    shutil.rmtree(archives)


def _run(*command: str, cwd: Path | None = None) -> None:
    """Run a package manager. Raises ValueError where there is none, or it fails."""
    remedy = "; or unpack the packages elsewhere and name their folder: --packages FOLDER"
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]}: found no such command, expected it on PATH{remedy}")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ValueError(f"{' '.join(command)}: exit code {done.returncode}, {said}{remedy}")


def read_package(
    folder: Path, name: str, left_out: Counter[str]
) -> Iterator[Drawing]:
    if name == DEBIAN[0]:
        return read_clip_art(folder, left_out)
    return read_icons(folder, name, left_out)


# -- icons


def read_icons(
    folder: Path, name: str, left_out: Counter[str]
) -> Iterator[Drawing]:
    """Yield the drawings of an icon set, in the order of their names."""
    of_set = SETS[name]
    found, info = (json.loads((folder / name / f"{f}.json").read_text()) for f in ("icons", "info"))
    licence, author = info.get("license", {}), info.get("author", {}).get("name", "unknown")
    if not licence.get("spdx") and not licence.get("title"):
        raise ValueError(f"{folder / name}/info.json: found no licence, expected one; leave it out")
    phrases = _icon_phrases(folder, name, found["icons"], left_out)
    for key, (phrase, tone) in sorted(phrases.items()):
        body = {**{"width": 16, "height": 16, "left": 0, "top": 0}, **found, **found["icons"][key]}
        box = " ".join(str(body[side]) for side in ("left", "top", "width", "height"))
        spoken = phrase if of_set.is_icon or "flag of" in phrase else article(phrase)
        yield Drawing(
            key=key,
            svg='<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            f' viewBox="{box}">{body["body"]}</svg>',
            phrase=phrase,
            caption=", ".join(part for part in (spoken, tone, of_set.style) if part),
            source=f"@iconify-json/{name} by {author}",
            style=of_set.style,
            licence=licence.get("spdx") or licence["title"],
        )


def _icon_phrases(
    folder: Path, name: str, icons: Json, left_out: Counter[str]
) -> dict[str, tuple[str, str]]:
    """Return the phrase and the skin tone of each icon that is to be drawn."""
    metadata, endings = _json(folder / name / "metadata.json"), SETS[name].endings
    categories = {icon: c for c, names in metadata.get("categories", {}).items() for icon in names}
    countries = _countries(folder) if name in ("circle-flags", "flag") else None
    vocabulary = _words_of_names(folder) if name == "fxemoji" else None
    phrases: dict[str, tuple[str, str]] = {}
    for key in sorted(icons):
        category, base = categories.get(key, ""), key
        if endings:
            base = re.sub(rf"(?:{'|'.join(endings)})$", "", key)
            first = next((base + end for end in endings if base + end in icons), None)
            if first != key:
                left_out["other sizes and forms"] += 1
                continue
        if icons[key].get("hidden") or category in LEFT_OUT or BRANDS.search(key):
            left_out["brands, interfaces, hidden"] += 1
            continue
        phrase, tone = _icon_phrase(base, "" if SETS[name].is_icon else category, icons)
        if countries is not None:
            phrase = f"the flag of {countries[base]}" if base in countries else ""
        elif vocabulary is not None:
            phrase = " ".join(vocabulary.split(key)) if category != "Flags" else ""
        if not phrase:
            left_out["no plain name"] += 1
        elif tone and not _is_shown(tone, phrase):
            left_out["other skin tones"] += 1
        else:
            phrases[key] = (phrase, f"{tone} skin tone" if tone else "")
    return phrases


def _is_shown(tone: str, phrase: str) -> bool:
    """Return whether a skin tone is one of the three of five that are drawn of a thing."""
    place = TONES.index(tone) if tone in TONES else -1
    return place >= 0 and (place - zlib.crc32(phrase.encode())) % len(TONES) in (0, 2, 3)


def _icon_phrase(key: str, category: str, icons: Json) -> tuple[str, str]:
    """Return what an icon shows, and its skin tone or ""; of two tones, both."""
    text = key.replace("-", " ")
    tones = [found.group(1) for found in TONE.finditer(text)]
    base, _, short = key.rpartition("-")
    if short in TONES and not tones and base.removesuffix("-medium") in icons:  # fluent-emoji
        is_medium = base.endswith("-medium") and short != "medium"
        tones = [f"medium {short}" if is_medium else short]
        text = base.removesuffix("-medium").replace("-", " ")
    text = re.sub(r"(?<!keycap)(?: \d+)+$", "", " ".join(TONE.sub("", text).split()))
    text = re.sub(r"\b((?:wo)?m[ae]n)s\b", r"\1's", text).replace("oclock", "o'clock")
    text = re.sub(r"^\w+ (?:thirty|o'clock)$", r"clock at \g<0>", text)
    while text.split()[-1] in COUNTS and " " in text and category != "Symbols":
        text = text.rpartition(" ")[0]
    country = re.fullmatch(r"flag (?:for )?(?:flag )?(?!in hole)(.+)(?<! flag)|(.+) flag", text)
    if country and category and (country[1] or category == "Extras Unicode"):
        text = f"the flag of {country[1] or country[2]}"
    elif category == "Flags" and "flag" not in text:
        text = f"the flag of {text}"
    return text, " and ".join(tones)


def _json(path: Path) -> Json:
    return json.loads(path.read_text()) if path.is_file() else {}


def _countries(folder: Path) -> dict[str, str]:
    """Return the names of countries by their two letters, as the emoji of flags are named."""
    names: dict[str, str] = {}
    for code, name in _json(folder / "twemoji" / "chars.json").items():
        if re.fullmatch("1f1..-1f1..", code):
            letters = "".join(chr(int(part, 16) - 0x1F1E6 + ord("a")) for part in code.split("-"))
            names[letters] = re.sub("^flag-(?:for-flag-)?", "", name).replace("-", " ")
    return names


def _words_of_names(folder: Path) -> Vocabulary:
    """Return the words of the other sets' names, of which those of fxemoji are joined."""
    names = (name for other in SETS if other != "fxemoji"
             for name in _json(folder / other / "icons.json").get("icons", {}))  # fmt: skip
    return Vocabulary([word for name in names for word in name.split("-")])


def read_vocabulary(folder: Path) -> Vocabulary:
    """Raises ValueError where the words are not there."""
    path = folder / DICTIONARY
    if not path.is_file():
        raise ValueError(f"{path}: found no such file, expected the words of Debian's {DEBIAN[1]}")
    return Vocabulary(path.read_text(encoding="utf-8").splitlines())


# -- clip art


def read_clip_art(folder: Path, left_out: Counter[str]) -> Iterator[Drawing]:
    """Yield the drawings of openclipart-svg whose title or file name is plain English.

    A title counts where the file name confirms it: many are of another drawing. Titles that more
    than SERIAL drawings have are left out.
    """
    vocabulary, root = read_vocabulary(folder), folder / CLIP_ART
    countries = set(_countries(folder).values())
    svgs: dict[str, str] = {}
    phrases: dict[str, str] = {}
    for path in sorted(root.rglob("*.svg")):
        key, svg = str(path.relative_to(root)), path.read_text(encoding="utf-8", errors="replace")
        if key.startswith(UNTITLED) or not any(domain in svg for domain in PUBLIC_DOMAIN):
            left_out["parts of interfaces, no licence stated"] += 1
            continue
        title = _clip_art_title(key, svg, vocabulary, countries)
        if "/flags/" in key and title:
            title = f"the flag of {re.sub('^(?:(?:the|official|national|of) )+', '', title)}"
        svgs[key], phrases[key] = svg, title
    many = Counter(singular(phrase) for phrase in phrases.values())
    for key, phrase in phrases.items():
        if not phrase or many[singular(phrase)] > SERIAL:
            left_out["serial title" if phrase else "no plain name"] += 1
            continue
        spoken = phrase if phrase.startswith("the ") else article(phrase)
        yield Drawing(
            key=key,
            svg=svgs[key],
            phrase=phrase,
            caption=f"{spoken}, clip art",
            source="openclipart-svg of Debian",
            style="clip art",
            licence="public domain",
        )


def _clip_art_title(key: str, svg: str, vocabulary: Vocabulary, countries: set[str]) -> str:
    """Return the title where the file name confirms it, else the file name; "" if not English."""
    dropped = MAKER | {"flag"} if "/flags/" in key else MAKER
    stem = [word.rstrip("0123456789") for word in words(Path(key).stem)]
    for title in (words((_tags("title", svg) or [""])[0]), stem):
        parts = (vocabulary.parts(word.rstrip("0123456789")) for word in title)
        shown = [part for of_word in parts for part in of_word]
        shown = [word for word in shown if len(word) > 1 and word not in dropped]
        confirmed = sum(any(word[:6] in part for part in stem) for word in shown)
        known = vocabulary.is_english(shown) or " ".join(shown) in countries
        if known and 2 * confirmed >= len(shown) and len(shown) <= 6:
            return " ".join(shown)
    return ""


def _tags(name: str, svg: str) -> list[str]:
    """Return the texts of elements of Dublin Core or RDF, of any prefix."""
    found = re.findall(rf"<(?:\w+:)?{name}\b[^>]*>([^<]*)<", svg)
    return [unescape(text).strip() for text in found]
