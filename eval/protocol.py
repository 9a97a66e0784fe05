"""Protocols: which captions, which real images, which size and which seed, written down in JSON.

    eval/protocols/coco30k.json    30,000 captions of MS-COCO 2014 validation, both references
    eval/protocols/shapes.json     the drawn set, made on the spot
    eval/protocols/emoji.json      test shards of pictures of your own

Choices are keyed by sha256, so that another program, in another language, makes the same ones.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cluster.base.files import Json, digest_file, digest_of
from eval.sampling.image_source import ImageSet, open_images

FOLDER = Path(__file__).parent / "protocols"
REFERENCES = {  # by kind
    "coco": ("whole_validation", "matched"),
    "shapes": ("drawn",),
    "shards": ("held_out",),
}
CHOICES = ("one_per_image", "uniform")
FIELDS: dict[str, dict[str, type]] = {  # of every protocol, and of each kind
    "": {"name": str, "kind": str, "source": str, "image_size": int, "seed": int,
         "features": list, "references": list},
    "coco": {"images": str, "annotations": str, "num_real": int, "num_captions": int,
             "captions": str, "caption_seed": int},
    "shapes": {"num_captions": int, "splits": list, "caption_seed": int},
    "shards": {"images": str},
}  # fmt: skip
TYPE_NAMES = {str: "text", int: "a whole number", list: "a list"}

Captions = list[str]
References = dict[str, ImageSet]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A protocol with its data on this machine.

    references: by name, the headline's first; about: what eval.json states of the protocol.
    """

    captions: Captions
    references: References
    image_size: int
    seed: int
    features: tuple[str, ...]
    about: Json


def prepare(name: str, data: str, work: Path) -> Prepared:
    """Read a protocol, by the name of a shipped one or the path of a JSON file, and find its data.

    data: folder of the data; empty = where the protocol states. work: folder for a set that is
    drawn here. Raises ValueError naming the field, the file or the count that differs from the
    protocol.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.json")))
        raise ValueError(f"--protocol: found {name!r}, expected a JSON file or one of {known}")
    protocol = _read_protocol(path)
    makers = {"coco": _coco, "shapes": _shapes, "shards": _shards}
    captions, references = makers[protocol["kind"]](protocol, data, work)
    size = protocol["image_size"]
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
        references={name: references[name].fitted(size) for name in protocol["references"]},
        image_size=size,
        seed=protocol["seed"],
        features=tuple(protocol["features"]),
        about=about,
    )


def _read_protocol(path: Path) -> Json:
    try:
        protocol = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: found {error}, expected JSON") from None
    if not isinstance(protocol, dict):
        raise ValueError(f"{path}: found a {type(protocol).__name__}, expected an object")
    _require_fields(path, protocol, "")
    kind, chosen = protocol["kind"], protocol["references"]
    if kind not in REFERENCES:
        kinds = ", ".join(REFERENCES)
        raise ValueError(f"{path}: kind: found {kind!r}, expected one of {kinds}")
    if not chosen or not set(chosen) <= set(REFERENCES[kind]):
        known = ", ".join(REFERENCES[kind])
        raise ValueError(f"{path}: references: found {chosen}, expected some of {known}")
    _require_fields(path, protocol, kind)
    return protocol


def _require_fields(path: Path, protocol: Json, kind: str) -> None:
    for name, field_type in FIELDS[kind].items():
        value = protocol.get(name)
        if type(value) is not field_type or (isinstance(value, int) and value < 0):
            expected = TYPE_NAMES[field_type]
            raise ValueError(f"{path}: {name}: found {value!r}, expected {expected}")


# -- MS-COCO ---------------------------------------------------------------------------------------


def _coco(protocol: Json, data: str, work: Path) -> tuple[Captions, References]:
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
        content = json.loads(path.read_text(encoding="utf-8"))
        files = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        rows = sorted((int(a["id"]), int(a["image_id"]), str(a["caption"]))
                      for a in content["annotations"])  # fmt: skip
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


def _choose(captions: dict[int, list[str]], protocol: Json) -> list[tuple[int, str]]:
    """Return the (image id, caption) pairs of the least keys, sha256("seed:image[:caption]").

    one_per_image: of each image one caption, number key mod count; uniform: of all captions, so
    that an image may occur more than once.
    """
    seed, how, count = (protocol[n] for n in ("caption_seed", "captions", "num_captions"))
    if how not in CHOICES:
        raise ValueError(f"captions: found {how!r}, expected one of {', '.join(CHOICES)}")
    pairs = []
    for image, candidates in captions.items():
        if how == "uniform":
            keyed = enumerate(candidates)
            pairs += [(_key(seed, image, i), image, caption) for i, caption in keyed]
        else:
            key = _key(seed, image)
            pairs.append((key, image, candidates[key % len(candidates)]))
    if len(pairs) < count:
        raise ValueError(f"captions: found {len(pairs)}, expected {count}")
    return [(image, caption) for _, image, caption in sorted(pairs)[:count]]


def _key(*parts: int) -> int:
    return int(sha256(":".join(map(str, parts)).encode()).hexdigest(), 16)


# -- what runs on any machine ----------------------------------------------------------------------


def _shapes(protocol: Json, data: str, work: Path) -> tuple[Captions, References]:
    """Draw the real set, or find it drawn; a training set never holds these captions' kinds."""
    from ingest.shapes import make_pairs

    if data:
        raise ValueError("--protocol-data: found it with a protocol that draws its own data")
    splits: list[str] = protocol["splits"]
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
            path.write_bytes(pair.image_bytes)  # a file cut short is written again next time
    captions = [pair.caption for pair in pairs]
    return captions, {
        "drawn": ImageSet(source="shapes, drawn anew", captions=captions, paths=paths)
    }


def _shards(protocol: Json, data: str, work: Path) -> tuple[Captions, References]:
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
