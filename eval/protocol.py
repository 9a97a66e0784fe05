"""Protocols: which captions, which real images, which size and which seed, written down in JSON.

    eval/protocols/coco30k.json    30,000 captions of MS-COCO 2014 validation, both references
    eval/protocols/shapes.json     the drawn set, made on the spot
    eval/protocols/emoji.json      test shards of pictures of your own

Choices are keyed by sha256, so that another program, in another language, makes the same ones.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cluster.base.files import digest_file, digest_of
from eval.sampling.image_source import ImageSet, open_images

FOLDER = Path(__file__).parent / "protocols"
KINDS = ("coco", "shapes", "shards")
REFERENCES = {
    "coco": ("whole_validation", "matched"),
    "shapes": ("drawn",),
    "shards": ("held_out",),
}
CHOICES = ("one_per_image", "uniform")
FIELDS: dict[str, type] = {  # that every protocol has
    "name": str,
    "kind": str,
    "source": str,
    "image_size": int,
    "seed": int,
    "features": list,
    "references": list,
}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a protocol comes to on this machine.

    references: by name, the first one being the headline's; about: what eval.json says of it.
    """

    captions: list[str]
    references: dict[str, ImageSet]
    image_size: int
    seed: int
    features: tuple[str, ...]
    about: dict[str, Any]


def prepare(name: str, data: str, work: Path) -> Prepared:
    """Read a protocol, by the name of a shipped one or the path of a JSON file, and find its data.

    data: folder of the data; empty = where the protocol says. work: where a set that is drawn on
    the spot is kept. Raises ValueError naming the field, the file or the count that is not as the
    protocol says.
    """
    path = _path(name)
    protocol = _read(path)
    makers = {"coco": _coco, "shapes": _shapes, "shards": _shards}
    captions, references = makers[protocol["kind"]](protocol, data, work)
    size = protocol["image_size"]
    chosen = {name: references[name].fitted(size) for name in protocol["references"]}
    about = {
        "name": protocol["name"],
        "sha256": digest_file(path),
        "n": len(captions),
        "captions_sha256": digest_of(captions),
        "image_size": size,
        "seed": protocol["seed"],
        "headline": protocol["references"][0],
    }
    return Prepared(
        captions=captions,
        references=chosen,
        image_size=size,
        seed=protocol["seed"],
        features=tuple(protocol["features"]),
        about=about,
    )


def _path(name: str) -> Path:
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.json")))
        raise ValueError(f"--protocol: found {name!r}, expected a JSON file or one of {known}")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: found {error}, expected JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: found a {type(found).__name__}, expected an object")
    for name, kind in FIELDS.items():
        _require(path, found, name, kind)
    if found["kind"] not in KINDS:
        raise ValueError(
            f"{path}: kind: found {found['kind']!r}, expected one of {', '.join(KINDS)}"
        )
    known = REFERENCES[found["kind"]]
    if not found["references"] or not set(found["references"]) <= set(known):
        raise ValueError(
            f"{path}: references: found {found['references']}, expected some of {', '.join(known)}"
        )
    own = {
        "coco": {"images": str, "annotations": str, "num_real": int, "num_captions": int,
                 "captions": str, "caption_seed": int},
        "shapes": {"num_captions": int, "splits": list, "caption_seed": int},
        "shards": {"images": str},
    }  # fmt: skip
    for name, kind in own[found["kind"]].items():
        _require(path, found, name, kind)
    return found


def _require(path: Path, found: dict[str, Any], name: str, kind: type) -> None:
    if type(found.get(name)) is not kind or (kind is int and found[name] < 0):
        words = {str: "text", int: "a whole number", list: "a list"}
        raise ValueError(f"{path}: {name}: found {found.get(name)!r}, expected {words[kind]}")


# -- MS-COCO ---------------------------------------------------------------------------------------


def _coco(protocol: dict[str, Any], data: str, work: Path) -> tuple[list[str], dict[str, ImageSet]]:
    """Choose captions of the validation set; its images are read in the order of their ids."""
    if not data:
        raise ValueError(
            f"--protocol-data: found nothing, expected a folder with {protocol['images']} and "
            f"{protocol['annotations']}; get them from {protocol['source']}"
        )
    root = Path(data).absolute()
    files, captions = _annotations(root / protocol["annotations"])
    paths = [root / protocol["images"] / files[image] for image in sorted(files)]
    missing = [path for path in paths if not path.is_file()]
    if missing or len(paths) != protocol["num_real"]:
        raise ValueError(
            f"{root}: found {len(paths) - len(missing)} images of the annotations, expected "
            f"{protocol['num_real']}" + (f"; {missing[0]} is missing" if missing else "")
        )
    whole = ImageSet(
        source=f"{protocol['name']} whole validation set", captions=[], paths=tuple(paths)
    )
    chosen = _choose(captions, protocol)
    place = {image: number for number, image in enumerate(sorted(files))}
    matched = sorted({image for image, _ in chosen})
    return [caption for _, caption in chosen], {
        "whole_validation": whole,
        "matched": whole.picked(
            [place[image] for image in matched], f"{protocol['name']} images of the captions"
        ),
    }


def _annotations(path: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Read COCO's captions: file by image id, and captions by image id in order of their ids."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        files = {int(image["id"]): str(image["file_name"]) for image in found["images"]}
        rows = sorted((int(a["id"]), int(a["image_id"]), str(a["caption"]))
                      for a in found["annotations"])  # fmt: skip
    except FileNotFoundError:
        raise ValueError(f"{path}: found no such file, expected COCO's captions") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: found no captions of COCO ({error!r})") from None
    captions: dict[int, list[str]] = defaultdict(list)
    for _, image, caption in rows:
        if image not in files:
            raise ValueError(f"{path}: found a caption of image {image}, which is not listed")
        captions[image].append(" ".join(caption.split()))
    outside = [name for name in files.values() if Path(name).name != name]
    if outside:
        raise ValueError(f"{path}: file_name: found {outside[0]!r}, expected a plain name")
    return files, captions


def _choose(captions: dict[int, list[str]], protocol: dict[str, Any]) -> list[tuple[int, str]]:
    """Return (image id, caption) pairs: those of the least sha256("seed:image[:caption]").

    one_per_image: of each image the caption whose place is that number modulo their count; uniform:
    of all captions alike, so that an image may come more than once.
    """
    seed, how, count = (protocol[n] for n in ("caption_seed", "captions", "num_captions"))
    if how not in CHOICES:
        raise ValueError(f"captions: found {how!r}, expected one of {', '.join(CHOICES)}")
    pairs = []
    for image, found in captions.items():
        if how == "uniform":
            pairs += [(_key(seed, image, i), image, caption) for i, caption in enumerate(found)]
        else:
            key = _key(seed, image)
            pairs.append((key, image, found[key % len(found)]))
    if len(pairs) < count:
        raise ValueError(f"captions: found {len(pairs)}, expected {count}")
    return [(image, caption) for _, image, caption in sorted(pairs)[:count]]


def _key(*parts: int) -> int:
    return int(sha256(":".join(map(str, parts)).encode()).hexdigest(), 16)


# -- what runs on any machine ----------------------------------------------------------------------


def _shapes(
    protocol: dict[str, Any], data: str, work: Path
) -> tuple[list[str], dict[str, ImageSet]]:
    """Draw the real set anew, or find it drawn; a training set never holds these captions' kinds.

    data: not used, for there is none.
    """
    from ingest.shapes import make_pairs

    if data:
        raise ValueError("--protocol-data: found it with a protocol that draws its own data")
    splits: Sequence[Any] = protocol["splits"]
    share, rest = divmod(protocol["num_captions"], len(splits))
    if rest or not share:
        raise ValueError(
            f"num_captions: found {protocol['num_captions']}, expected a multiple of the "
            f"{len(splits)} splits"
        )
    pairs = [p for split in splits for p in make_pairs(share, protocol["caption_seed"], split)]
    folder = (work / "protocol_shapes").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"{number:06d}.jpg" for number in range(len(pairs)))
    for path, pair in zip(paths, pairs, strict=True):
        if not path.is_file() or path.read_bytes() != pair.image_bytes:
            part = path.with_suffix(".part")
            part.write_bytes(pair.image_bytes)
            part.replace(path)
    captions = [pair.caption for pair in pairs]
    return captions, {
        "drawn": ImageSet(source="shapes, drawn anew", captions=captions, paths=paths)
    }


def _shards(
    protocol: dict[str, Any], data: str, work: Path
) -> tuple[list[str], dict[str, ImageSet]]:
    """Open the shards whose captions are drawn and whose images are the reference."""
    where = data or protocol["images"]
    if not Path(where).is_dir():
        raise ValueError(
            f"{where}: found no such folder, expected the shards of {protocol['name']}; make them "
            f"with {protocol['source']}, or name theirs by --protocol-data"
        )
    images = open_images(where)
    if not images.captions:
        raise ValueError(f"{where}: found images without captions, expected shards")
    return images.captions, {"held_out": images}
