"""URL lists: the same rows in any format, from any storage, in order and never whole."""

import bz2
import csv
import gzip
import itertools
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest.lists.url_list import FORMATS, UrlList, open_url_list

REAL_LIST = Path(__file__).parents[2] / "shared" / "data" / "laion" / "real_urls_10000.parquet"
ROWS = [
    {"URL": "http://a.example/1.jpg", "TEXT": "plain", "similarity": 0.25, "hash": 7},
    {"URL": "http://a/2?x=1,2", "TEXT": 'two\nlines, "quoted"', "similarity": 0.5, "hash": 8},
    {"URL": "http://b/\u00fc.jpg", "TEXT": "\u732b \U0001f431", "similarity": -1.0, "hash": 9},
    {"URL": "http://c.example/4.jpg", "TEXT": " spaces\tand tabs ", "similarity": 0.0, "hash": -1},
    {"URL": "http://c.example/5.jpg", "TEXT": "", "similarity": 1e-9, "hash": 0},
]


def write_list(path: Path, rows: list[dict], compress: Callable = bytes) -> Path:
    """Write rows with other libraries than ours; the name's first suffix says the format."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return path
    if ".jsonl" in path.suffixes:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        lines = path.with_name("plain")
        with lines.open("w", newline="") as file:
            delimiter = "\t" if ".tsv" in path.suffixes else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        text = lines.read_bytes().decode()
        lines.unlink()
    path.write_bytes(compress(text.encode()))
    return path


def rows_of(listed: UrlList, size: int = 2) -> list[dict]:
    return [row for table in listed.shards(size) for row in table.to_pylist()]


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("l.parquet", bytes), ("l.csv", bytes), ("l.tsv", bytes), ("l.jsonl", bytes),
        ("l.csv.gz", gzip.compress), ("l.jsonl.bz2", bz2.compress), ("l.tsv.xz", lzma.compress),
    ],
)  # fmt: skip
def test_the_same_rows_come_out_of_every_format(name: str, compress: Callable, tmp_path: Path):
    path = write_list(tmp_path / name, ROWS, compress)
    listed = open_url_list(path, keep_columns=["similarity", "hash"])
    assert (listed.url_column, listed.caption_column, listed.num_rows) == ("URL", "TEXT", 5)
    expected = [
        {"url": r["URL"], "caption": r["TEXT"], "similarity": r["similarity"], "hash": r["hash"]}
        for r in ROWS
    ]
    assert rows_of(listed) == expected


def test_a_text_file_is_urls_without_captions(tmp_path: Path):
    (tmp_path / "l.txt").write_bytes(b"http://a/1\n\n  http://a/2 \r\nhttp://a/\xff")
    listed = open_url_list(tmp_path / "l.txt")
    urls = ["http://a/1", "http://a/2", "http://a/\ufffd"]
    assert rows_of(listed) == [{"url": url, "caption": ""} for url in urls]
    assert listed.num_rows == 3
    (tmp_path / "m.txt").write_bytes(b"")  # an empty part is a part
    assert open_url_list(tmp_path).num_rows == 3
    with pytest.raises(ValueError, match="no caption column .*found url"):
        open_url_list(tmp_path / "l.txt", caption_column="TEXT")


def test_a_list_in_parts_is_one_list_in_name_order_on_any_storage(tmp_path: Path):
    for number in (2, 0, 1):
        write_list(tmp_path / f"part-{number}.csv", [{"url": f"{number}", "text": "x"}])
    (tmp_path / "_SUCCESS").write_bytes(b"")
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path) + "/", "/lists/", recursive=True)
    whole = open_url_list(tmp_path)
    for path in (tmp_path / "part-*.csv", "memory://lists", "memory://lists/part-?.csv"):
        listed = open_url_list(path)
        assert [row["url"] for row in rows_of(listed)] == ["0", "1", "2"]
        assert (listed.digest, listed.num_rows) == (whole.digest, 3)
    store.rm("/lists", recursive=True)


def test_a_name_with_a_bracket_is_a_name(tmp_path: Path):
    path = write_list(tmp_path / "l[1].csv", [{"url": "a", "text": "b"}])
    assert open_url_list(path).num_rows == 1


def test_text_that_is_no_text_is_mended_and_nothing_is_lost(tmp_path: Path):
    bad = pa.array([b"good", b"\xff\xfe", None, b"nul \x00"], pa.binary())
    text = pa.StringArray.from_buffers(4, bad.buffers()[1], bad.buffers()[2], bad.buffers()[0])
    pq.write_table(pa.table({"url": text, "text": text}), tmp_path / "l.parquet")
    mended = ["good", "\ufffd\ufffd", None, "nul \x00"]
    assert [row["caption"] for row in rows_of(open_url_list(tmp_path / "l.parquet"))] == mended
    (tmp_path / "l.jsonl").write_text('{"url": "a", "text": "half \\ud83d."}\n{"url": null}\n')
    found = rows_of(open_url_list(tmp_path / "l.jsonl"))
    assert found == [{"url": "a", "caption": "half \ufffd."}, {"url": None, "caption": None}]
    (tmp_path / "l.csv").write_bytes(b"url,text\na,caf\xe9\n")
    assert rows_of(open_url_list(tmp_path / "l.csv")) == [{"url": "a", "caption": "caf\ufffd"}]


def test_a_list_is_never_held_whole(tmp_path: Path):
    """Of 64 row groups of some 200 kB, a reader holds a few."""
    table = pa.table({"url": [f"{'x' * 200}{i}" for i in range(64_000)], "text": ["y"] * 64_000})
    pq.write_table(table, tmp_path / "l.parquet", row_group_size=1000, use_dictionary=False)
    size = table.nbytes
    del table
    before = pa.total_allocated_bytes()
    held, count = 0, 0
    for shard in open_url_list(tmp_path / "l.parquet").shards(500):
        held, count = max(held, pa.total_allocated_bytes() - before), count + shard.num_rows
    assert count == 64_000 and held < size / 8


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("l.csv", b"", "found no rows, expected a list"),
        ("l.csv", b"url,text\nc\n", "found 1 rows that are all malformed"),
        ("l.csv", b"url,text,cat\xe9gorie\na,b,c\n", "first line is not UTF-8 .* at byte 12"),
        ("l.csv", gzip.compress(b"url,text\na,b\n"), "found gzip, expected text"),
        ("l.txt", "http://a".encode("utf-16"), "found UTF-16, expected text"),
        ("l.csv", b"http://a/1,x,y\n", "no header line and 3 columns, expected .*--columns"),
        ("l.csv.gz", gzip.compress(b"url,text\na,b\n" * 999)[:-20], "not valid csv: "),
        ("l.jsonl", b"url,text\na,b\n", "found 'url,text', expected JSON objects"),
        ("l.json", b'[{"url": "a", "text": "b"}, {"url"', "found .* in the array, expected"),
        ("l.json", b'[{"url": "a", "text": "b"}] []', "found .* in the array, expected"),
        ("l.parquet", b"PAR0", "not valid parquet"),
        ("l.dat", b"x", "expected files of one kind out of .parquet, .csv"),
    ],
)
def test_a_broken_list_is_a_one_line_error_that_names_it(
    name: str, content: bytes, problem: str, tmp_path: Path
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem) as caught:
        rows_of(open_url_list(tmp_path / name))
    assert name in str(caught.value)


def test_lists_of_two_kinds_and_none_and_unknown_storage_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="not found; expected a list"):
        open_url_list(tmp_path)
    with pytest.raises(ValueError, match="--urls s3x://a/b: "):
        open_url_list("s3x://a/b")
    write_list(tmp_path / "a.csv", ROWS)
    write_list(tmp_path / "b.parquet", ROWS)
    with pytest.raises(ValueError, match=r"found a.csv, b.parquet, expected files of one kind"):
        open_url_list(tmp_path)


@pytest.mark.skipif(not REAL_LIST.is_file(), reason=f"{REAL_LIST} is absent")
def test_a_real_list_is_read_to_its_last_row():
    listed = open_url_list(REAL_LIST)
    assert (listed.url_column, listed.caption_column, listed.num_rows) == ("URL", "TEXT", 10_000)
    rows = rows_of(listed, 1000)
    truth = pq.read_table(REAL_LIST).to_pylist()
    assert [(r["url"], r["caption"]) for r in rows] == [(r["URL"], r["TEXT"]) for r in truth]
    assert set(FORMATS) >= {".parquet", ".csv", ".tsv", ".jsonl", ".txt"}


# -- columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("URL", "TEXT"), ("URL", "TEXT")),
        (("url", "text"), ("url", "text")),
        (("caption", "url", "key"), ("url", "caption")),
        (("id", "url", "text", "clip_similarity_vitb32"), ("url", "text")),
        (("uid", "url", "text", "sha256", "face_bboxes"), ("url", "text")),
    ],
)
def test_columns_of_the_laion_family_are_found(tmp_path, names, chosen):
    pq.write_table(pa.table({name: ["a"] for name in names}), tmp_path / "l.parquet")
    listed = open_url_list(tmp_path / "l.parquet")
    assert (listed.url_column, listed.caption_column) == chosen


def test_a_missing_column_is_named_with_those_found(tmp_path):
    pq.write_table(pa.table({"link": ["a"], "TEXT": ["b"]}), tmp_path / "l.parquet")
    with pytest.raises(ValueError, match=r"no url column .*found link, TEXT.*--url-column"):
        open_url_list(tmp_path / "l.parquet")
    assert open_url_list(tmp_path / "l.parquet", url_column="link").url_column == "link"


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_shards_cut_the_list_in_order_across_files_and_row_groups(tmp_path, size):
    for number, count in enumerate((10, 3, 8)):
        urls = [f"{number}-{i}" for i in range(count)]
        table = pa.table({"url": urls, "text": urls})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=3)
    listed = open_url_list(tmp_path)
    shards = [table["url"].to_pylist() for table in listed.shards(size)]
    whole = [f"{n}-{i}" for n, count in enumerate((10, 3, 8)) for i in range(count)]
    assert [*itertools.chain(*shards)] == whole and listed.num_rows == 21
    assert all(len(shard) == size for shard in shards[:-1])


def test_columns_that_cannot_be_stored_are_refused(tmp_path):
    columns = {"url": ["a"], "text": ["b"], "status": ["c"], "boxes": [[1, 2]]}
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    with pytest.raises(ValueError, match="shards use this name"):
        open_url_list(tmp_path / "l.parquet", keep_columns=["status"])
    with pytest.raises(ValueError, match="boxes is list<.*expected text, a list of texts, number"):
        open_url_list(tmp_path / "l.parquet", keep_columns=["boxes"])
