"""Rows of lists as the world has them: random files, read as plain Python reads them."""

import csv
import gzip
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest.lists.filters import MALFORMED, FilterConfig
from ingest.lists.url_list import open_url_list

CASES = 2000
WORDS = ["a cat", "two\u2028lines", "caf\u00e9", "\u732b", "it's 5\" wide", "x; y, z | w", " 007"]
SPELLED = {
    "url": ["url", "URL", " Url", "image_url"], "caption": ["caption", "TEXT", "Alt_Text "],
    "score": ["punsafe", "PUNSAFE", " punsafe"], "kept": ["id", "ID", "Id "],
}  # fmt: skip
SCORES = [[0, 1], [0, 0.97, 0.02], [0.5, None], [1e-9, "0.25", ""], [0, "high"]]
IDS = [
    ["007", "12"], [1, -3], [2**64, 5], [0.5, 2], ["1.10", "2"], [None], [True], [1, "x2"],
    [2**60, 0.5], [[1], {"a": 2}], ["", "7"], ["1e5", "2"],
]  # fmt: skip
Rows = list[dict | None]  # url, caption, more captions, score, kept, as plain Python reads them


class Case:
    """One file: what is in it is drawn once, and written and read by this test's own means."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        pick = self.draw.choice
        self.kind = pick(["csv", "csv", "tsv", "jsonl", "json", "parquet", "txt"])
        self.names = {what: pick(names) for what, names in SPELLED.items()}
        self.broken = self.draw.random() < 0.5
        self.scores, self.ids = pick(SCORES), pick(IDS)
        self.size = self.draw.randrange(1, 14)

    def row(self, number: int) -> dict:
        """Draw a row. The first is always whole, so that a file has one."""
        pick = self.draw.choice
        url = f"http://h{number}.example/{pick(['a.jpg', 'b.jpg?x=1', 'ü.png'])}"
        caption = pick(WORDS) if self.draw.random() < 0.8 else f"{pick(WORDS)}\n\"{pick(WORDS)}\""
        score = 0.5 if number == 0 else pick(self.scores)
        return {"url": url, "caption": caption, "score": score, "kept": pick(self.ids)}


def as_cell(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else repr(value)


def write_csv(case: Case) -> tuple[bytes, Rows]:
    """A table of cells, properly quoted, or without any quoting, where quotes mean nothing."""
    draw, pick = case.draw, case.draw.choice
    delimiter = "\t" if case.kind == "tsv" else pick(",,;|\t")
    quoting = pick(["minimal", "all", None])
    fields = [*draw.sample([*case.names, "unused"], 5)]
    header = [case.names.get(field, pick(["x", "similarity", "caption2"])) for field in fields]
    lines = io.StringIO()
    style = csv.QUOTE_ALL if quoting == "all" else csv.QUOTE_MINIMAL
    ends = pick(["\n", "\r\n"])
    writer = csv.writer(lines, delimiter=delimiter, lineterminator=ends, quoting=style)
    end = "\n"

    def write(cells: list[str]) -> None:
        if quoting is None:
            lines.write(delimiter.join(cells) + end)
        else:
            writer.writerow(cells)

    write(header)
    for number in range(case.size):
        row = case.row(number)
        cells = [as_cell(row.get(field, "-")) for field in fields]
        if quoting is None:
            cells = [c.translate(dict.fromkeys(map(ord, f"\n{delimiter}"), "/")) for c in cells]
            place = fields.index("caption")
            stray = pick(["", '" the end of ', '"so" said ', ""])
            cells[place] = stray + cells[place].replace('"', "'")
        if case.broken and number and draw.random() < 0.3:
            cells = pick([[*cells, "more"], cells[:-1], [*cells, "", ""]])
        write(cells)
        if case.broken and draw.random() < 0.2:
            lines.write(pick(["\n", "  \n", "\n\n"]))
    data = lines.getvalue().encode()
    if case.broken:
        data = data.replace(b"a cat", pick([b"a cat", b"a \xff cat"]))
    data = pick([b"", b"\xef\xbb\xbf"]) + data

    # Read all of it at once, by the standard library
    text = data.decode("utf-8-sig", "replace")
    found = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    if quoting is None:
        found = (line.split(delimiter) for line in text.split("\n"))
    rows = [cells for cells in found if cells and (len(cells) > 1 or cells[0].strip())][1:]
    return data, [plain(dict(zip(fields, c, strict=True))) if len(c) == 5 else None for c in rows]


def write_headerless(case: Case) -> tuple[bytes, Rows]:
    """Caption and URL, or URL and caption, without a header, as CC3M."""
    delimiter = "\t" if case.kind == "tsv" else case.draw.choice(",;|\t")
    order = case.draw.sample(["url", "caption"], 2)
    drawn = [case.row(number) for number in range(case.size)]
    for row in drawn:
        row["caption"] = row["caption"].translate(dict.fromkeys(map(ord, f'\n"{delimiter}'), "/"))
    data = "".join(delimiter.join(row[name] for name in order) + "\n" for row in drawn)
    return data.encode(), [plain({"url": r["url"], "caption": r["caption"]}) for r in drawn]


def write_json(case: Case) -> tuple[bytes, Rows]:
    """Objects, a line each or in an array, some of which are broken or of other types."""
    draw, pick = case.draw, case.draw.choice
    texts: list[str] = []
    for number in range(case.size):
        row = case.row(number) | {"unused": pick([1, "x", None, 2**70, [1], {"a": 1}])}
        if draw.random() < 0.2:
            row["caption"] = pick([["a cat", "a kitten"], [], [None, "one"], 7, None, "\ud800"])
        if case.broken and number and draw.random() < 0.2:
            row["url"] = pick([["http://a"], {"a": 1}, None, 5])
        if number and draw.random() < 0.2:
            del row[pick(["caption", "score", "kept"])]
        texts.append(json.dumps({case.names.get(k, k): v for k, v in row.items()}))
        if case.broken and number and draw.random() < 0.2:
            cut = [texts[-1][:-2]] * (case.kind == "jsonl")
            texts[-1] = pick(["[1]", "7", '"x"', "null", *cut])
    rows, between = plain_json(case, texts), pick([",", ",\n ", " , "])
    if case.kind == "json":
        return f"[{between.join(texts)}]\n".encode(), rows
    return "".join(f"{text}{pick(['', chr(10)])}\n" for text in texts).encode(), rows


def plain_json(case: Case, texts: list[str]) -> Rows:
    rows: Rows = []
    for text in texts:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        row = None
        if isinstance(value, dict):
            row = plain({what: value.get(name) for what, name in case.names.items()})
        rows.append(row)
    return rows


def write_parquet(case: Case) -> tuple[bytes, Rows]:
    """Columns of any type that may hold what they are for."""
    pick = case.draw.choice
    drawn = [case.row(number) for number in range(case.size)]
    text = [pa.string(), pa.large_string(), pa.string_view()]
    when = datetime(2020, 1, 1)
    kept = pick([
        pa.array([when + timedelta(days=i) for i in range(case.size)], pa.timestamp("s")),
        pa.array([Decimal(i) / 4 for i in range(case.size)], pa.decimal128(9, 2)),
        pa.array(range(case.size), pick([pa.int8(), pa.uint64(), pa.float32()])),
        pa.array(["cc"] * case.size).dictionary_encode(), pa.nulls(case.size),
        pa.array([b"cc"] * case.size), pa.array([[str(i), None] for i in range(case.size)]),
    ])  # fmt: skip
    scores = [0.25 if isinstance(row["score"], str) else row["score"] for row in drawn]
    score = pa.array(scores, pick([pa.float32(), pa.float64()]))
    url, caption = ([row[name] for row in drawn] for name in ("url", "caption"))
    columns = {
        case.names["url"]: pa.array(url, pick(text)),
        case.names["caption"]: pa.array(caption, pick(text)),
        case.names["score"]: score, case.names["kept"]: kept,
        "boxes": pa.array([[{"a": 1}]] * case.size),
    }  # fmt: skip
    if pick([True, False]):
        columns[case.names["caption"]] = pa.array(caption).dictionary_encode()
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, row_group_size=pick([1, 5, 100]))
    values = zip(url, caption, score.to_pylist(), kept.to_pylist(), strict=True)
    return stream.getvalue(), [
        plain(dict(zip(("url", "caption", "score", "kept"), row, strict=True))) for row in values
    ]


def write_text(case: Case) -> tuple[bytes, Rows]:
    lines = [case.draw.choice(["http://a/1,2", "  http://b/\u00fc ", "", " \r", "no url"])
             for _ in range(case.size)]  # fmt: skip
    urls = [line.strip() for line in lines if line.strip()]
    data = ("\n".join(lines) + case.draw.choice(["", "\n"])).encode()
    return case.draw.choice([b"", b"\xef\xbb\xbf"]) + data, [{"url": url} for url in urls]


WRITERS: dict[str, Callable[[Case], tuple[bytes, Rows]]] = {
    "csv": write_csv, "tsv": write_csv, "jsonl": write_json, "json": write_json,
    "parquet": write_parquet, "txt": write_text,
}  # fmt: skip


def plain(row: dict) -> dict | None:
    """A row as the list must give it; None where it is malformed."""
    captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
    texts = [c if isinstance(c, str) else json.dumps(c) for c in captions if c not in (None, "")]
    texts = [text.replace("\ud800", "\ufffd") for text in texts]
    url, score = row["url"], row.get("score")
    if isinstance(url, list | dict):
        return None
    try:
        score = None if score in (None, "") else float(score)
    except ValueError:
        return None
    url = url if url is None or isinstance(url, str) else json.dumps(url)
    return {"url": url, "captions": texts, "score": score, "kept": row.get("kept")}


def is_same(found: object, value: object) -> bool:
    """Whether a kept value is what the file has: itself, its text, or what a cell means."""
    if isinstance(value, bytes):
        return found == value.decode()
    if isinstance(value, datetime):
        return str(found).startswith(str(value))
    if isinstance(value, list) and value and isinstance(value[0], str):
        return found == [text for text in value if text is not None]
    if found is None or value is None or value == "":
        return (found or None) == (value or None)
    texts = {str(value), json.dumps(value, default=str)}
    return found in (value, *texts) or repr(found) == value or (
        isinstance(found, float) and isinstance(value, str) and repr(int(value)) == value
        and found == int(value))  # fmt: skip


def require_rows(path: Path, expected: Rows, filters: FilterConfig, kept: tuple[str, ...]) -> None:
    listed = open_url_list(path, keep_columns=kept, filters=filters)
    found = [row for table in listed.shards(5) for row in table.to_pylist()]
    assert len(found) == listed.num_rows == len(expected)
    assert listed.num_malformed == expected.count(None)
    for row, truth in zip(found, expected, strict=True):
        assert row.get(MALFORMED, False) == (truth is None)
        if truth is None:
            continue
        assert row["url"] == truth["url"]
        captions = [row["caption"], *row.get("captions_more", [])]
        assert [text for text in captions if text] == truth.get("captions", [])
        for name in listed.row_filter.scores:
            assert row[name] == truth["score"]
        for name in kept:
            assert is_same(row[name], truth["kept"]), (row[name], truth["kept"])


def test_random_lists_are_read_as_plain_python_reads_them(tmp_path: Path):
    """The same rows, or one line of error, where the file has no two rows that fit together."""
    refused: Counter[str] = Counter()
    for seed in range(CASES):
        case = Case(seed)
        headerless = case.kind in ("csv", "tsv") and case.draw.random() < 0.2
        data, expected = (write_headerless if headerless else WRITERS[case.kind])(case)
        path = tmp_path / f"{seed}.{case.kind}"
        if case.kind not in ("parquet",) and case.draw.random() < 0.1:
            path, data = path.with_suffix(path.suffix + ".gz"), gzip.compress(data)
        path.write_bytes(data)
        plain_list = headerless or case.kind == "txt"
        filters = FilterConfig() if plain_list else FilterConfig(max_punsafe=0.5)
        try:
            require_rows(path, expected, filters, () if plain_list else ("id",))
        except ValueError as error:
            assert "\n" not in str(error) and path.name in str(error), seed
            refused[case.kind] += 1
            assert all(row is None for row in expected), (seed, str(error))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {data[:300]!r}") from error
        path.unlink()
    assert sum(refused.values()) < CASES / 20, refused


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "txt"])
def test_damaged_files_are_rows_or_one_line_of_error(kind: str, tmp_path: Path):
    """Bytes cut off, changed and put in at random places."""
    draw = random.Random(kind)
    for seed in range(60):
        case = Case(seed)
        case.kind = kind
        data = bytearray(WRITERS[kind](case)[0])
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(len(data) + 1)
            data[place : place + draw.randrange(20)] = draw.choice(
                [b"", b'"', b"\0", b"\xff\xfe", b"\n", b"[[", bytes(draw.randbytes(8))]
            )
        path = tmp_path / f"l.{kind}"
        path.write_bytes(data)
        try:
            listed = open_url_list(path, filters=FilterConfig(null_scores=True))
            assert sum(table.num_rows for table in listed.shards(7)) == listed.num_rows
        except ValueError as error:
            assert "\n" not in str(error), seed
