"""Every file of a folder is in one count; captions are what the folder says, byte for byte."""

import csv
import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _adopting import CAPTIONS, adopted, picture, rows, stored

from ingest.adopting.config import AdoptConfig
from ingest.adopting.sources import open_source

NAMES = ["a.png", "b.JPG", "c/a.webp", "c/d/e.png", "f g.jpeg", "z.png", "ü.png"]
KINDS = ["PNG", "JPEG", "WEBP", "PNG", "JPEG", "PNG", "PNG"]
PICTURES = [picture(n, kind) for n, kind in enumerate(KINDS)]
PAIRS = list(zip(PICTURES, CAPTIONS, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images, without captions."""
    root = tmp_path / "photos"
    for name, image in zip(NAMES, PICTURES, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image)
    return root


def write_jsonl(folder: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def write_parquet(folder: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


def write_csv(folder: Path, rows: list[dict], name: str = "metadata.csv") -> None:
    with open(folder / name, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_coco(folder: Path, rows: list[dict]) -> None:
    """As COCO has it: numbers for images, annotations in any order, several an image."""
    (folder / "annotations").mkdir()
    images = [{"id": 7 * n, "file_name": row["file_name"]} for n, row in enumerate(rows)]
    captions = [{"image_id": 7 * n, "id": n, "caption": row["text"]} for n, row in enumerate(rows)]
    content = {"info": {}, "images": images, "annotations": captions[::-1]}
    (folder / "annotations" / "captions_train2017.json").write_text(json.dumps(content))


def write_txt(folder: Path, rows: list[dict]) -> None:
    for row in rows:
        (folder / row["file_name"]).with_suffix(".txt").write_bytes(row["text"].encode())


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_csv, write_coco, write_txt])
def test_captions_are_stored_byte_for_byte_in_the_order_of_the_paths(
    write, folder: Path, tmp_path: Path
):
    pairs = list(zip(NAMES, CAPTIONS, strict=True))
    write(folder, [{"file_name": name, "text": caption} for name, caption in pairs[::-1]])
    assert adopted(folder, tmp_path / "out", samples_per_shard=3) == 0
    assert stored(tmp_path / "out") == PAIRS
    assert [row["source_key"] for row in rows(tmp_path / "out")] == NAMES


def test_a_folder_is_what_hugging_face_reads_as_imagefolder(folder: Path, tmp_path: Path):
    import datasets

    pairs = [{"file_name": n, "text": c} for n, c in zip(NAMES, CAPTIONS, strict=True)]
    write_jsonl(folder, pairs)
    read: Any = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    expected = {}
    for row in read.cast_column("image", datasets.Image(decode=False)):
        expected[os.path.relpath(row["image"]["path"], folder)] = row["text"]
    assert adopted(folder, tmp_path / "out") == 0
    assert {row["source_key"]: row["caption"] for row in rows(tmp_path / "out")} == expected


def test_rows_of_one_file_are_its_captions_and_other_columns_may_be_kept(
    folder: Path, tmp_path: Path
):
    write_csv(
        folder,
        [
            {"image": "a.png", "caption": "one", "score": 0.5, "url": "https://a.example/1"},
            {"image": "c/a.webp", "caption": "alone", "score": 1, "url": ""},
            {"image": "a.png", "caption": "two", "score": 3, "url": ""},
        ],
        "captions.csv",
    )  # fmt: skip
    assert adopted(folder, tmp_path / "out", keep_columns=("score",)) == 0
    table = {row["source_key"]: row for row in rows(tmp_path / "out") if row["status"] == "success"}
    assert table["a.png"]["captions_more"] == ["two"] and table["a.png"]["score"] == 0.5
    assert table["a.png"]["url"] == "https://a.example/1"
    assert table["c/a.webp"]["captions_more"] == []
    assert Counter(row["error"] for row in rows(tmp_path / "out")) == {None: 2, "no_caption": 5}


def test_file_names_in_a_table_may_be_relative_to_it_or_the_only_ones_of_their_name(
    folder: Path, tmp_path: Path
):
    write_jsonl(folder / "c", [
        {"file_name": "a.webp", "text": "beside"}, {"file_name": "../a.png", "text": "above"},
        {"file_name": "elsewhere/e.png", "text": "by name"}, {"file_name": "no.png", "text": "?"},
    ])  # fmt: skip
    assert adopted(folder, tmp_path / "out") == 0
    assert [caption for _, caption in stored(tmp_path / "out")] == [
        "above",
        "beside",
        "by name",
    ]
    errors = {row["source_key"]: row["error"] for row in rows(tmp_path / "out")}
    assert errors["no.png"] == "no_image"


def test_every_file_is_in_one_count(folder: Path, tmp_path: Path):
    write_txt(folder, [{"file_name": name, "text": "x"} for name in NAMES[:4]])
    (folder / "lonely.txt").write_text("a caption without image")
    (folder / "movie.mp4").write_bytes(b"0" * 100)
    (folder / ".DS_Store").write_bytes(b"mac")
    (folder / "c" / "._a.webp").write_bytes(b"mac")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.png").write_bytes(PICTURES[0])
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "broken.txt").write_bytes(b"of no image")
    (folder / "latin.png").write_bytes(PICTURES[0])
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    os.mkfifo(folder / "pipe.png")
    (folder / "pipe.txt").write_bytes(b"of a pipe")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "private.png").write_bytes(PICTURES[0])
    (outside / "private.txt").write_text("a secret")
    (folder / "link.png").symlink_to(outside / "private.png")
    (folder / "link.txt").symlink_to(outside / "private.txt")
    (folder / "linked").symlink_to(outside)
    (folder / "within.png").symlink_to(folder / "a.png")
    (folder / "within.txt").write_text("a link within")
    before = {path: path.lstat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    assert adopted(folder, tmp_path / "out", samples_per_shard=4) == 0
    errors = {row["source_key"]: row["error"] for row in rows(tmp_path / "out")}
    assert errors == {
        **dict.fromkeys(NAMES[:4]), **dict.fromkeys(NAMES[4:], "no_caption"), "within.png": None,
        "lonely.txt": "no_image", "movie.mp4": "other_file", "broken.png": "not_an_image",
        "latin.png": "bad_caption", "pipe.png": "no_image",
        ".DS_Store": "hidden_file", "c/._a.webp": "hidden_file", ".git/": "hidden_file",
        "link.png": "link_refused", "linked/": "link_refused",
    }  # fmt: skip
    assert list(errors) == sorted(errors), "the order is that of the paths"
    assert all(b"secret" not in path.read_bytes() for path in (tmp_path / "out").glob("0*"))
    after = {p: p.lstat().st_mtime_ns for p in sorted(tmp_path.rglob("*")) if p in before}
    assert after == before, "the source is as it was"


def test_files_that_vanish_meanwhile_are_counted(folder: Path, tmp_path: Path):
    write_txt(folder, [{"file_name": name, "text": "x"} for name in NAMES])
    source = open_source(AdoptConfig(source=str(folder)))
    (folder / NAMES[0]).unlink()
    (folder / NAMES[1]).with_suffix(".txt").unlink()
    (part,) = source.parts()
    problems = [sample.problem for sample in source.read(part)]
    assert problems == ["no_image", "no_caption", *[None] * 5]


def test_a_worker_gets_its_own_part_and_no_other(folder: Path):
    for name, caption in zip(NAMES, CAPTIONS, strict=True):
        (folder / name).with_suffix(".txt").write_bytes(caption.encode())
    columns = {"image": PICTURES, "text": CAPTIONS}
    pq.write_table(pa.table(columns), folder.parent / "a.parquet")
    for place in (folder, folder.parent / "a.parquet"):
        few, many = (
            open_source(AdoptConfig(source=str(place), samples_per_shard=n)) for n in (7, 1)
        )
        sent = pickle.dumps(many)
        assert len(sent) == len(pickle.dumps(few)) and not pickle.loads(sent).parts()
        samples = [s for part in many.parts() for s in pickle.loads(sent).read(part)]
        assert [(s.image, s.captions[0]) for s in samples] == PAIRS


def test_names_of_files_are_captions_on_request(folder: Path, tmp_path: Path):
    for name in ("red_cube-on__table_0012.png", "007.png", "IMG-1 (2).png", "3d cat.png"):
        (folder / name).write_bytes(picture(len(name)))
    assert adopted(folder, tmp_path / "out", captions="name") == 0
    table = {row["source_key"]: row["caption"] for row in rows(tmp_path / "out")}
    assert (
        table["red_cube-on__table_0012.png"] == "red cube on table"
        and table["IMG-1 (2).png"] == "IMG"
    )
    assert table["3d cat.png"] == "3d cat" and table["c/d/e.png"] == "e" and table["ü.png"] == "ü"
    assert [row["source_key"] for row in rows(tmp_path / "out") if row["error"]] == ["007.png"]


def test_what_is_unclear_is_refused_with_the_choices(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="found 7 images and no captions, .*--captions name"):
        adopted(folder, tmp_path / "out")
    pairs = [{"file_name": n, "text": c} for n, c in zip(NAMES, CAPTIONS, strict=True)]
    write_jsonl(folder, pairs)
    write_txt(folder, [{"file_name": NAMES[0], "text": "from txt"}])
    with pytest.raises(
        ValueError, match=r"several kinds, metadata .metadata.jsonl. and txt .a.txt.*"
    ):
        adopted(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="--captions coco: found none"):
        adopted(folder, tmp_path / "out", captions="coco")
    assert adopted(folder, tmp_path / "out", captions="txt") == 0
    assert stored(tmp_path / "out") == [(PICTURES[0], "from txt")]
    (folder / "metadata.jsonl").rename(tmp_path / "words.jsonl")
    assert adopted(folder, tmp_path / "other", captions=str(tmp_path / "words.jsonl")) == 0
    assert stored(tmp_path / "other") == PAIRS
    (tmp_path / "words.jsonl").rename(folder / "c" / "words.jsonl")
    assert adopted(folder, tmp_path / "within", captions="c/words.jsonl") == 0
    assert stored(tmp_path / "within") == PAIRS
    assert "c/words.jsonl" not in [row["source_key"] for row in rows(tmp_path / "within")]
    (folder / "metadata.csv").write_text("name,words\na.png,x\n")
    with pytest.raises(
        ValueError, match="metadata.csv: found columns name, words, expected .*caption"
    ):
        adopted(folder, tmp_path / "third", captions="metadata")
    empty = tmp_path / "empty"
    (empty / "x").mkdir(parents=True)
    with pytest.raises(ValueError, match="found no images"):
        adopted(empty, tmp_path / "third")


def test_a_folder_on_other_storage_is_read_alike(folder: Path, tmp_path: Path):
    import fsspec

    write_txt(folder, [{"file_name": n, "text": c} for n, c in zip(NAMES, CAPTIONS, strict=True)])
    (folder / ".hidden.png").write_bytes(b"")
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/photos/", recursive=True)
    try:
        assert adopted("memory://photos", tmp_path / "out") == 0
    finally:
        memory.rm("/photos", recursive=True)
    assert stored(tmp_path / "out") == PAIRS
    assert [row["error"] for row in rows(tmp_path / "out")] == ["hidden_file", *[None] * 7]
