"""Rows of Parquet, Arrow and Hugging Face data sets become samples, each exactly once."""

import io
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _adopting import CAPTIONS, adopted, picture, rows, stored
from PIL import Image

from ingest.shards import ImageShard

EMOJI = Path(__file__).parents[2] / "shared" / "data" / "fluent_emoji_128.parquet"
PICTURES = [
    picture(n, kind) for n, kind in enumerate(("PNG", "JPEG", "WEBP", "PNG", "JPEG", "WEBP", "PNG"))
]
PAIRS = list(zip(PICTURES, CAPTIONS, strict=True))
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def with_paths(values: list[bytes]) -> pa.Array:
    return pa.array([{"bytes": value, "path": "a.png"} for value in values], HF_IMAGE)


@pytest.mark.parametrize("images", [pa.array, with_paths, lambda v: pa.array(v, pa.large_binary())])
@pytest.mark.parametrize(
    "captions",
    [
        pa.array,
        lambda v: pa.array(v, pa.large_string()),
        lambda v: pa.array(v).dictionary_encode(),
        lambda v: pa.array([[each] for each in v]),
    ],
    ids=["string", "large_string", "dictionary", "list"],
)
def test_a_parquet_file_is_stored_byte_for_byte(images, captions, tmp_path: Path):
    source = write(tmp_path / "a.parquet", {"jpg": images(PICTURES), "text": captions(CAPTIONS)})
    assert adopted(source, tmp_path / "out", samples_per_shard=3) == 0
    assert stored(tmp_path / "out") == PAIRS
    assert [row["source_key"] for row in rows(tmp_path / "out")] == [
        f"a.parquet:{n}" for n in range(7)
    ]


@pytest.mark.parametrize("row_group_size", [1, 2, 5, 7])
@pytest.mark.parametrize("samples_per_shard", [1, 3, 100])
def test_parts_follow_the_rows_and_not_the_row_groups(
    row_group_size: int, samples_per_shard: int, tmp_path: Path
):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("b", "a"):  # read in name order
        captions = [f"{name}{n}" for n in range(7)]
        columns = {"image": PICTURES, "caption": captions}
        write(folder / f"{name}.parquet", columns, row_group_size=row_group_size)
    (folder / "._a.parquet").write_bytes(b"hidden")
    assert adopted(folder, tmp_path / "out", samples_per_shard=samples_per_shard) == 0
    found = [caption for _, caption in stored(tmp_path / "out")]
    assert found == [f"{name}{n}" for name in "ab" for n in range(7)]


def test_further_captions_and_kept_columns_are_stored_beside_the_caption(tmp_path: Path):
    captions = [["one", "two"], ["alone"], [None, "after null"], [], None]
    further = [["x", None], [], None, ["y", "z"], []]
    source = write(
        tmp_path / "a.parquet",
        {
            "image": PICTURES[:5],
            "caption": captions,
            "url": [f"https://a.example/{n}" for n in range(5)],
            "score": [0.5, 1.5, 2.5, 3.5, 4.5],
            "licence": pa.array(["a", "b", None, "a", "b"]).dictionary_encode(),
            "alt": pa.array(further, pa.large_list(pa.string_view())),
        },
    )
    names = ("score", "licence", "alt")
    assert adopted(source, tmp_path / "out", keep_columns=names) == 0
    table = rows(tmp_path / "out")
    assert [row["captions_more"] for row in table] == [["two"], [], [], [], []]
    assert [row["caption"] for row in table[:3]] == ["one", "alone", "after null"]
    assert [row["error"] for row in table] == [None, None, None, "no_caption", "no_caption"]
    assert [(row["score"], row["licence"], row["url"]) for row in table[:2]] == [
        (0.5, "a", "https://a.example/0"), (1.5, "b", "https://a.example/1"),
    ]  # fmt: skip
    assert [row["alt"] for row in table] == further
    assert ImageShard(tmp_path / "out", "000000").further_captions("alt") == [["x"], [], []]


def test_a_malformed_row_is_a_counted_row(tmp_path: Path):
    images = [
        {"bytes": PICTURES[0], "path": None}, {"bytes": None, "path": "elsewhere.png"}, None,
        {"bytes": None, "path": None}, {"bytes": PICTURES[1], "path": None},
        {"bytes": PICTURES[4][:-60], "path": None},
        {"bytes": picture(6, size=(15, 40)), "path": ""},
    ]  # fmt: skip
    captions = pa.array([*[b"x"] * 4, b"\xff\xfe", b"x", b"x"])
    texts = pa.Array.from_buffers(pa.string(), 7, captions.buffers())  # of which one is not UTF-8
    source = write(tmp_path / "a.parquet", {"image": pa.array(images, HF_IMAGE), "text": texts})
    assert adopted(source, tmp_path / "out") == 0
    assert [row["error"] for row in rows(tmp_path / "out")] == [
        None, "no_image_bytes", "no_image", "no_image", "bad_caption", "undecodable", "too_small",
    ]  # fmt: skip
    assert stored(tmp_path / "out") == [(PICTURES[0], "x")]


def test_a_malformed_file_fails_its_part_and_the_others_go_in(tmp_path: Path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in "abc":
        write(folder / f"{name}.parquet", {"image": PICTURES, "caption": CAPTIONS})
    damaged = folder / "b.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert adopted(folder, tmp_path / "out") == 1
    assert stored(tmp_path / "out") == PAIRS * 2
    out = capsys.readouterr().out
    assert "shard 000001 failed: " in out and "b.parquet" in out


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"image": ["a.png"], "caption": ["x"]}, {}, "no column of image bytes.*image .string."),
        ({"image": [b"x"], "words": ["x"]}, {}, "no caption column .*found image, words; name one"),
        ({"a": ["b"], "text": ["x"]}, {"image_column": "a"}, "--image-column a: found string"),
        (
            {"image": [b"x"], "text": ["x"]},
            {"caption_key": "b"},
            "no caption column .b.*--caption-key",
        ),
        ({"image": [b"x"], "text": ["x"]}, {"keep_columns": ("b",)}, "one of text"),
        ({"image": [b"x"], "caption": ["x"]}, {"keep_columns": ("b",)}, "found b.* there is none"),
    ],
)
def test_a_missing_column_is_named_in_one_line(columns, options, message: str, tmp_path: Path):
    source = write(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=message) as error:
        adopted(source, tmp_path / "out", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# -- oracles ---------------------------------------------------------------------------------------


def hugging_face() -> Any:
    import datasets

    return datasets


def as_hugging_face_reads(dataset: Any) -> list[tuple[bytes, str]]:
    """Return image bytes and caption of each row, undecoded."""
    image = hugging_face().Image(decode=False)
    return [(row["image"]["bytes"], row["text"]) for row in dataset.cast_column("image", image)]


@pytest.fixture(scope="module")
def dataset() -> Any:
    datasets = hugging_face()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    images = [{"bytes": image, "path": None} for image in PICTURES]
    return datasets.Dataset.from_dict({"image": images, "text": CAPTIONS}, features=features)


def test_a_data_set_on_disk_is_what_hugging_face_reads(dataset, tmp_path: Path):
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    assert adopted(tmp_path / "saved", tmp_path / "out", samples_per_shard=3) == 0
    reread = hugging_face().load_from_disk(str(tmp_path / "saved"))
    assert stored(tmp_path / "out") == as_hugging_face_reads(reread) == PAIRS


def test_a_split_is_named_where_there_are_several(dataset, tmp_path: Path):
    splits = hugging_face().DatasetDict({"train": dataset, "test": dataset.select([1])})
    splits.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"found the splits train, test, .*/saved/train"):
        adopted(tmp_path / "saved", tmp_path / "out")
    assert adopted(tmp_path / "saved" / "test", tmp_path / "out") == 0
    assert stored(tmp_path / "out") == PAIRS[1:2]
    hub = tmp_path / "hub"
    hub.mkdir()
    for name in ("train", "test"):
        splits[name].to_parquet(hub / f"{name}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"the splits test, train, .*/hub/test-\*.parquet"):
        adopted(hub, tmp_path / "other")
    assert adopted(hub / "train-*.parquet", tmp_path / "other") == 0
    read = hugging_face().load_dataset(
        "parquet", data_dir=str(hub), split="train", cache_dir=tmp_path / "cache"
    )
    assert stored(tmp_path / "other") == as_hugging_face_reads(read) == PAIRS


@pytest.mark.parametrize("pattern", ["", "/*.parquet", "/{b,a}.parquet"])
def test_tables_on_other_storage_are_read_alike(pattern: str, tmp_path: Path):
    memory, buffer = fsspec.filesystem("memory"), io.BytesIO()
    pq.write_table(pa.table({"image": PICTURES, "caption": CAPTIONS}), buffer)
    for name in "ab":
        memory.pipe_file(f"/tables/{name}.parquet", buffer.getvalue())
    try:
        assert adopted(f"memory://tables{pattern}", tmp_path / "out") == 0
    finally:
        memory.rm("/tables", recursive=True)
    assert stored(tmp_path / "out") == PAIRS * 2
    keys = [row["source_key"].partition(":")[0] for row in rows(tmp_path / "out")]
    expected = ["a.parquet"] * 7 + ["b.parquet"] * 7
    assert keys == (expected[::-1] if "b,a" in pattern else expected)


@pytest.mark.parametrize("kind", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files_and_streams_are_read(kind, tmp_path: Path):
    table = pa.table({"image": PICTURES, "caption": CAPTIONS})
    with kind(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert adopted(tmp_path / "a.arrow", tmp_path / "out", samples_per_shard=3) == 0
    assert stored(tmp_path / "out") == PAIRS


@pytest.mark.skipif(not EMOJI.is_file(), reason=f"needs {EMOJI}")
def test_real_pictures_are_stored_as_they_are(tmp_path: Path):
    table = pq.read_table(EMOJI, columns=["image", "caption", "sha256", "name"]).slice(0, 60)
    source = tmp_path / "emoji.parquet"
    pq.write_table(table, source)
    assert adopted(source, tmp_path / "out", samples_per_shard=25, keep_columns=("name",)) == 0
    assert stored(tmp_path / "out") == list(
        zip(table["image"].to_pylist(), table["caption"].to_pylist(), strict=True)
    )
    found = rows(tmp_path / "out")
    assert [row["sha256"] for row in found] == table["sha256"].to_pylist()
    assert [row["name"] for row in found] == table["name"].to_pylist()
    with Image.open(io.BytesIO(stored(tmp_path / "out")[0][0])) as image:
        assert (found[0]["width"], found[0]["height"]) == image.size
