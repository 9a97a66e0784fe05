"""Captions from files of several kinds, and protocols that say which to draw."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.protocol import FOLDER, prepare
from eval.sampling.captions import read_captions
from eval.sampling.image_source import open_images
from eval.sampling.sample_job import read_options


def test_a_text_file_is_a_caption_a_line(tmp_path: Path):
    (tmp_path / "color_val.txt").write_text("a green bench and a red car\n\n  a blue bowl \r\n")
    assert read_captions(str(tmp_path / "color_val.txt")) == [
        "a green bench and a red car", "a blue bowl",
    ]  # fmt: skip
    assert read_captions(str(tmp_path / "color_val.txt"), limit=1) == [
        "a green bench and a red car"
    ]


def test_genevals_lines_give_their_prompts(tmp_path: Path):
    line = {"tag": "counting", "include": [{"class": "clock", "count": 2}]}
    lines = [json.dumps({**line, "prompt": f"a photo of {n} clocks"}) for n in ("two", "four")]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(lines))
    found = read_captions(str(tmp_path / "evaluation_metadata.jsonl"))
    assert found == ["a photo of two clocks", "a photo of four clocks"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "a cat\u2028on\na dog\x85 out\r\na \x0bv\x0c tab\n",
         ["a cat\u2028on", "a dog\x85 out", "a \x0bv\x0c tab"]),
        ("drawbench.csv", 'Prompts,Category\n"A cat, a dog.",Counting\nA car.,Colors\n',
         ["A cat, a dog.", "A car."]),
        ("parti.tsv", "Prompt\tCategory\tNote\nbond\tAbstract\tx\n\"I\" am\tText\t-\n",
         ["bond", '"I" am']),
        ("own.csv", "id;CAPTION \n1;a, b\n", ["a, b"]),
        ("array.json", '[{"prompt": "a cat"}, "a dog",\n {"Prompt": "a cow"}]',
         ["a cat", "a dog", "a cow"]),
        ("one.json", '{"prompt": "a cat"}', ["a cat"]),
        ("captions_val.json", '{"images": [], "annotations": [{"id": 2, "caption": "a cat "}]}',
         ["a cat"]),
    ],
)  # fmt: skip
def test_prompts_are_read_as_the_field_publishes_them(
    name: str, content: str, expected: list[str], tmp_path: Path
):
    (tmp_path / name).write_bytes(content.encode())
    assert read_captions(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"Category,Note\na,b\n", "found columns Category, Note, expected one of prompt"),
        ("a.csv", b"prompt,x\na,b\nc\n", "row 2: found other cells than the header's 2"),
        ("a.csv", b"prompt,x\n,b\n", "row 1: prompt: found ''"),
        ("a.json", b'{"annotations": [{"id": 1}]}', "item 1: prompt: found None"),
        ("a.txt", b"", "found no captions"),
        ("a.txt", b"\xff\xfe\x00", "no UTF-8 text"),
        ("a.txt", b"a" * 20_000, "line 1: found 20000 characters"),
        ("a.txt", b"fine\na\0b", "line 2: .*null bytes"),
        ("a.jsonl", b'{"prompt": "fine"}\n{"text": "a"}', "line 2: prompt: found None"),
        ("a.jsonl", b"[1]", "item 1: prompt: found None"),
        ("a.jsonl", b"{", "line 1: found .*, expected JSON with a prompt"),
    ],
)
def test_broken_captions_are_refused(name: str, content: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_captions(str(tmp_path / name))


def test_absent_captions_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="found no such file or folder, expected captions"):
        read_captions(str(tmp_path / "absent.txt"))


def test_options_are_those_of_samples(tmp_path: Path):
    path = tmp_path / "settings.json"
    content = {"cfg_scale": 3.0, "seed": 4, "prior": "runs/p", "encoder_id": "x", "guide": "runs/g"}
    path.write_text(json.dumps({**content, "prior_weights": {}, "captions": ["a"]}))
    assert read_options(str(path)) == ({"cfg_scale": 3.0, "seed": 4}, "runs/g")
    path.write_text('{"cfg_scal": 3.0}')
    with pytest.raises(ValueError, match="--sampling: .*unknown key 'cfg_scal'; did you mean"):
        read_options(str(path))
    for name, value in (
        ("decoder_steps", "5"), ("decoder_steps", 2.5), ("guidance_interval", 0.5),
        ("guidance_interval", [0.1]), ("cfg_scale", None), ("seed", "x"), ("sampler", 3),
    ):  # fmt: skip
        path.write_text(json.dumps({name: value}))
        with pytest.raises(ValueError, match=f"--sampling: .*: {name}: found .*, expected "):
            read_options(str(path))
    with pytest.raises(ValueError, match="--sampling: absent.json"):
        read_options("absent.json")


# -- protocols -------------------------------------------------------------------------------------

EXPECTED = [  # by sha256("0:<image id>"), of `coco` below
    "image 447 caption 1",
    "image 294 caption 1",
    "image 247 caption 1",
    "image 341 caption 1",
    "image 141 caption 0",
]


def coco(root: Path, count: int = 12) -> Path:
    """A data set of COCO's layout: two captions an image, ids out of order."""
    (root / "val").mkdir(parents=True)
    ids = [7 * (i % 5) + 40 * i for i in range(count)]
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in reversed(ids)]
    for image in images:
        Image.new("RGB", (20, 16), (image["id"] % 256, 0, 0)).save(
            root / "val" / image["file_name"]
        )
    captions = [
        {"id": 2 * n + k, "image_id": i, "caption": f"image {i}\ncaption {k} "}
        for n, i in enumerate(ids)
        for k in (1, 0)
    ]
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return root


def protocol(path: Path, **changes: Any) -> str:
    content = json.loads((FOLDER / "coco30k.json").read_text())
    content |= {"images": "val", "annotations": "captions.json", "num_real": 12, "num_captions": 5,
             "image_size": 8}  # fmt: skip
    path.write_text(json.dumps({**content, **changes}))
    return str(path)


def test_coco_has_both_references(tmp_path: Path):
    data = coco(tmp_path / "coco")
    found = prepare(protocol(tmp_path / "p.json"), str(data), tmp_path)
    whole, matched = found.references["whole_validation"], found.references["matched"]
    assert list(found.references) == ["whole_validation", "matched"]
    assert (len(whole), len(matched), len(found.captions)) == (12, 5, 5)
    assert whole[0].size == (8, 8) and matched.parent is not None
    assert [p.name for p in whole.paths] == sorted(p.name for p in whole.paths)
    content = {int(caption.split()[1]) for caption in found.captions}
    assert {int(path.stem) for path in matched.paths} == content
    assert all("\n" not in caption for caption in found.captions)
    again = prepare(protocol(tmp_path / "p.json"), str(data), tmp_path)
    assert again.captions == found.captions
    assert again.about["captions_sha256"] == found.about["captions_sha256"]


def test_a_protocols_choices_are_its_own(tmp_path: Path):
    data = str(coco(tmp_path / "coco"))
    first = prepare(protocol(tmp_path / "p.json"), data, tmp_path).captions
    other = prepare(protocol(tmp_path / "q.json", caption_seed=1), data, tmp_path).captions
    assert set(first) != set(other)
    every = prepare(
        protocol(tmp_path / "r.json", captions="uniform", num_captions=24), data, tmp_path
    )
    assert len(set(every.captions)) == 24 and len(every.references["matched"]) == 12


def test_the_shipped_choice_never_changes(tmp_path: Path):
    """What was published with a protocol must be drawn again by every later version."""
    found = prepare(protocol(tmp_path / "p.json"), str(coco(tmp_path / "coco")), tmp_path)
    assert found.captions == EXPECTED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_real": 13}, "found 12 images of the annotations, expected 13"),
        ({"num_captions": 13}, "captions: found 12, expected 13"),
        ({"captions": "first"}, "captions: found 'first', expected one of one_per_image"),
        ({"kind": "cc3m"}, "kind: found 'cc3m', expected one of coco"),
        ({"references": ["train"]}, "references: found .*, expected some of whole_validation"),
        ({"image_size": -1}, "image_size: found -1"),
        ({"seed": "0"}, "seed: found '0', expected a whole number"),
        ({"annotations": "absent.json"}, "found no such file, expected COCO's captions"),
    ],
)
def test_a_protocol_that_does_not_fit_is_refused(changes: dict, message: str, tmp_path: Path):
    data = str(coco(tmp_path / "coco"))
    with pytest.raises(ValueError, match=message):
        prepare(protocol(tmp_path / "p.json", **changes), data, tmp_path)


def test_hostile_annotations_name_no_other_files(tmp_path: Path):
    data = coco(tmp_path / "coco")
    content = json.loads((data / "captions.json").read_text())
    content["images"][0]["file_name"] = "../../etc/passwd"
    (data / "captions.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="file_name: found '../../etc/passwd', expected a plain"):
        prepare(protocol(tmp_path / "p.json"), str(data), tmp_path)


def test_the_drawn_set_is_its_own_reference(tmp_path: Path):
    content = {**json.loads((FOLDER / "shapes.json").read_text()), "num_captions": 6}
    (tmp_path / "s.json").write_text(json.dumps(content))
    found = prepare(str(tmp_path / "s.json"), "", tmp_path)
    drawn = found.references["drawn"]
    assert len(drawn) == 6 and drawn.captions == found.captions and drawn[0].size == (64, 64)
    before = [path.stat().st_mtime_ns for path in drawn.paths]
    drawn.paths[0].write_bytes(b"damaged")
    prepare(str(tmp_path / "s.json"), "", tmp_path)
    after = [path.stat().st_mtime_ns for path in drawn.paths]
    assert before[1:] == after[1:] and drawn[0].size == (64, 64), "only the damaged one anew"


def test_every_shipped_protocol_reads(tmp_path: Path, write_data: Any):
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    assert names == ["coco30k", "emoji", "shapes"]
    data = write_data(tmp_path / "data", num_shards=1, samples_per_shard=6)
    found = prepare("emoji", str(data / "images"), tmp_path)
    assert found.captions == open_images(str(data / "images")).captions
    with pytest.raises(ValueError, match="--protocol-data: found nothing, expected a folder with"):
        prepare("coco30k", "", tmp_path)
    with pytest.raises(ValueError, match="expected a JSON file or one of coco30k, emoji, shapes"):
        prepare("coco", "", tmp_path)
