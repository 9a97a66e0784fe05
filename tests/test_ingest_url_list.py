"""URL lists: the same rows in any format, from any storage, in order and never whole."""

import bz2
import csv
import gzip
import itertools
import json
import lzma
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _lists import download_of

from ingest.download import main
from ingest.lists.filters import MALFORMED, FilterConfig
from ingest.lists.formats import MAX_LINE_BYTES
from ingest.lists.url_list import FORMATS, UrlList, open_url_list
from ingest.shards import ImageShard

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
        ("l.csv", gzip.compress(b"url,text\na,b\n", mtime=0), "found gzip, expected text"),
        ("l.txt", "http://a".encode("utf-16"), "found UTF-16, expected UTF-8; convert the file"),
        ("l.txt", b"http://a\ta cat\n", "found a tab in the first line"),
        ("l.csv", b"http://a/1,x,y\n", "no header line and 3 columns, expected .*--columns"),
        ("l.csv.gz", gzip.compress(b"url,text\na,b\n" * 999, mtime=0)[:-20], "not valid csv: "),
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


# -- lists as the world has them -------------------------------------------------------------------


def read(path: Path, content: str | bytes, **options) -> list[tuple]:
    """Write a list and return its rows: what they hold, in the order of the columns."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [tuple(row.values()) for row in rows_of(open_url_list(path, **options))]


A, B, C = "http://a/1", "http://b/2", "http://c/3"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("l.csv", f"url;caption\n{A};a, b\n{B};c\n", [(A, "a, b"), (B, "c")]),
        ("l.csv", f"url|caption\n{A}|a, b\n", [(A, "a, b")]),
        ("l.csv", f"Url , ALT_TEXT\n{A}, a cat\n", [(A, " a cat")]),
        ("l.csv", f"url,caption,caption\n{A},first,second\n", [(A, "first")]),
        ("l.csv", f"\ufeffurl,caption\r\n\r\n{A},a\r\n  \r\n", [(A, "a")]),
        ("l.csv", f"url,caption\r{A},a\r{B},b\r", [(A, "a"), (B, "b")]),
        ("l.csv", f"url,caption\n{A},007\n{B},1e5\n", [(A, "007"), (B, "1e5")]),
        ("l.tsv", f"a cat\t{A}\na dog\t{B}\n", [(A, "a cat"), (B, "a dog")]),
        ("l.csv", f"{A};a cat\n{B};a dog\n", [(A, "a cat"), (B, "a dog")]),
        ("l.tsv", f'caption\turl\n" the end\t{A}\nthird\t{B}\n"so he" said\t{C}\n',
         [(A, '" the end'), (B, "third"), (C, '"so he" said')]),
        ("l.tsv", f'caption\turl\n"\t{A}\nthird\t{B}\n"\t{C}\n',
         [(A, '"'), (B, "third"), (C, '"')]),
        ("l.tsv", f'caption\turl\n"two\n""lines"""\t{A}\n', [(A, 'two\n"lines"')]),
        ("l.txt", f"\ufeff\n{A}\n\n{B}\n", [(A, ""), (B, "")]),
        ("l.jsonl", f'\ufeff{{"URL ": "{A}", "text": 7, "n": {2**70}}}\n', [(A, "7")]),
        ("l.json", f'[{{"url": "{A}", "text": "a"}},\n {{"url": "{B}"}}]', [(A, "a"), (B, None)]),
        ("l.jsonl", f'{{"url": "{A}", "text": ["a", null, "b"]}}\n{{"url": "{B}", "text": "d"}}',
         [(A, "a", ["b"]), (B, "d", [])]),
    ],
)  # fmt: skip
def test_text_lists_are_read_as_they_are_written(
    name: str, content: str, expected: list[tuple], tmp_path: Path
):
    assert read(tmp_path / name, content) == expected


def test_columns_without_a_header_have_the_names_that_are_given(tmp_path: Path):
    content = f"1\ta cat\t{A}\n2\ta dog\t{B}\n"
    options = {"columns": ("id", "caption", "url"), "keep_columns": ("id",)}
    assert read(tmp_path / "l.tsv", content, **options) == [(A, "a cat", 1), (B, "a dog", 2)]
    with pytest.raises(ValueError, match="--columns: found 2 names, expected 3"):
        read(tmp_path / "l.tsv", content, columns=("caption", "url"))
    with pytest.raises(ValueError, match="--columns: found the header caption, url, expected no"):
        read(tmp_path / "l.tsv", f"caption\turl\na\t{A}\n", columns=("caption", "url"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.csv", f"url,caption\n{A},a cat, a dog\n{B},b\n{C}\n"),
        ("l.csv", f'url,caption\n{A},"never closed\n{B},b\n{C},"x" y, z\n'),
        ("l.jsonl", f'{{"url": "{A}\n{{"url": "{B}", "caption": "b"}}\n[{C}]\n'),
        ("l.jsonl", f'{{"url": ["{A}"]}}\n{{"url": "{B}", "caption": "b"}}\n{{"caption": {{}}}}\n'),
        ("l.jsonl", '{"a":' * 100_000 + f'\n{{"url": "{B}", "caption": "b"}}\n{"1" * 9999}\n'),
    ],
)
def test_malformed_rows_are_marked_and_end_nothing(name: str, content: str, tmp_path: Path):
    (tmp_path / name).write_text(content)
    listed = open_url_list(tmp_path / name)
    rows = rows_of(listed)
    assert (rows[1]["url"], rows[1]["caption"]) == (B, "b") and listed.num_rows == 3
    never_closed = "never closed" in content  # whose cells are those of a row all the same
    assert [row[MALFORMED] for row in rows] == [not never_closed, False, True]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([0] * 1500 + [0.97], [0.0] * 1500 + [0.97]),
        ([None] * 1500 + [1], [None] * 1500 + [1]),
        ([2**64, 1], ["18446744073709551616", "1"]),
        (["x2", 1, None, True, [1]], ["x2", "1", None, "true", "[1]"]),
        ([2**60, 1], [2**60, 1]),
        ([2**60, 0.5], [str(2**60), "0.5"]),
        ([["a"], "b", None], [["a"], ["b"], None]),
    ],
)
def test_a_kept_column_has_the_type_that_holds_all_its_values(
    lines: list, expected: list, tmp_path: Path
):
    content = "".join(json.dumps({"url": A, "text": "a", "n": value}) + "\n" for value in lines)
    rows = read(tmp_path / "l.jsonl", content, keep_columns=("n",))
    assert [row[2] for row in rows] == expected


def test_cells_that_no_number_would_be_written_as_remain_text(tmp_path: Path):
    cells = {"n": ["007", "12"], "v": ["1.10", "2"], "i": ["", "7"], "f": ["0.5", "1"]}
    lines = [",".join(["url", "text", *cells]), *(
        ",".join([A, "a", *(values[row] for values in cells.values())]) for row in range(2)
    )]  # fmt: skip
    rows = read(tmp_path / "l.csv", "\n".join(lines), keep_columns=tuple(cells))
    assert rows == [(A, "a", "007", "1.10", None, 0.5), (A, "a", "12", "2", 7, 1.0)]


def test_parts_of_other_types_are_one_list(tmp_path: Path):
    for number, (kept, score) in enumerate([
        (pa.nulls(2), pa.array([0, 1])), (pa.array(["cc", None]), pa.array([0.97, 0.02])),
        (pa.array(["by", "cc"]).dictionary_encode(), pa.array([1, None], pa.float32())),
    ]):  # fmt: skip
        table = pa.table({"Url": [A, B], "Caption": ["a", "b"], "LICENCE": kept, "punsafe": score})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    filters = FilterConfig(max_punsafe=0.5)
    rows = rows_of(open_url_list(tmp_path, keep_columns=("licence",), filters=filters))
    assert [row["licence"] for row in rows] == [None, None, "cc", None, "by", "cc"]
    assert [row["punsafe"] for row in rows] == [0, 1, 0.97, 0.02, 1, None]


def test_digests_are_any_texts_and_scores_any_numbers(tmp_path: Path):
    text = pa.array(["ab", None], pa.string())
    kinds = (pa.large_string(), pa.string_view(), pa.binary())
    for digests in (*map(text.cast, kinds), text.dictionary_encode()):
        scores = pa.array([Decimal("0.5"), None])
        table = pa.table({"url": [A, B], "text": ["a", "b"], "SHA256": digests, "punsafe": scores})
        pq.write_table(table, tmp_path / "l.parquet")
        listed = open_url_list(tmp_path / "l.parquet", filters=FilterConfig(max_punsafe=0.1))
        assert [(row["SHA256"], row["punsafe"]) for row in rows_of(listed)] == [
            ("ab", 0.5), (None, None),
        ]  # fmt: skip
    with pytest.raises(ValueError, match="column punsafe holds no number, expected numbers"):
        content = f"url,text,punsafe\n{A},a,high\n{B},b,\n"
        read(tmp_path / "l.csv", content, filters=FilterConfig(max_punsafe=0.1))


def test_of_a_folder_hidden_files_marks_and_empty_parts_are_no_parts(tmp_path: Path, capsys):
    for name in ("._a.csv", "_SUCCESS", "_tmp.csv", "._SUCCESS.crc", "description.json", "1.csv"):
        (tmp_path / name).write_bytes(b"" if name == "1.csv" else b"\0\x05\x16\x07")
    for folder in ("year=2020", "year=2021/month=1", ".hidden=1", "other"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.csv").write_text(f"url,text\nhttp://{folder},a\n")
    (tmp_path / "0.csv").write_text(f"url,text\n{A},a\n")
    urls = [row["url"] for row in rows_of(open_url_list(tmp_path))]
    assert urls == [A, "http://year=2020", "http://year=2021/month=1"]
    assert "1.csv is empty" in capsys.readouterr().out
    assert len(rows_of(open_url_list(tmp_path / "*.csv"))) == 1


def test_a_line_without_end_is_one_malformed_row_that_is_not_held(tmp_path: Path):
    path = tmp_path / "l.jsonl"
    good = json.dumps({"url": A, "text": "a"})
    path.write_text(f"{good}\n" + '{"url": "' + "x" * (MAX_LINE_BYTES + 3_000_000) + f'"}}\n{good}')
    listed = open_url_list(path)
    assert [row["url"] for row in rows_of(listed)] == [A, None, A] and listed.num_malformed == 1


def test_a_download_counts_malformed_rows_and_stores_further_captions(site, tmp_path: Path, capsys):
    lines = [
        {"url": site.put(f"/{number}.png", site.picture()), "caption": [f" {number}", "", "more "]}
        for number in range(2)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines) + '{"url": \n'
    (tmp_path / "l.jsonl").write_text(content)
    assert main(download_of(site, str(tmp_path / "l.jsonl"), tmp_path / "images")) == 0
    out = capsys.readouterr().out
    assert "1 of 3 rows are malformed, the first is row 3" in out
    assert "3 rows = 2 stored + 0 filtered + 1 failed (malformed_row 1)" in out
    shard = ImageShard(str(tmp_path / "images"), "000000")
    assert [shard.caption(0), shard.further_captions("captions_more")[0]] == ["0", ["more"]]


def test_captions_in_another_encoding_are_counted_and_said(tmp_path: Path, capsys):
    rows = ["url,caption", "http://a/1,caf\xe9", "http://a/2,tea", "http://a/3,\xfcber"]
    (tmp_path / "l.csv").write_bytes("\n".join(rows).encode("cp1252"))
    assert open_url_list(str(tmp_path / "l.csv")).num_rows == 3
    assert "l.csv: 2 of 3 captions hold U+FFFD" in capsys.readouterr().out
    (tmp_path / "l.csv").write_text("\n".join(rows), encoding="utf-8")
    open_url_list(str(tmp_path / "l.csv"))
    assert "U+FFFD" not in capsys.readouterr().out
