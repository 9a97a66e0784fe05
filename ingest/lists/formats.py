"""Rows of text files: CSV, TSV, JSON lines, a JSON array of objects, or a URL a line.

Files are read in blocks. A row that cannot be read is None and ends nothing: it has other cells
than the header, its quotes do not pair, it is no JSON object, or it is longer than 16 MiB. Bytes
that are not UTF-8 become U+FFFD, a byte-order mark is dropped, and blank lines are no rows.
"""

import csv
import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, getincrementaldecoder
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO

from cluster.base.files import Json

BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 16 << 20
MAX_QUOTED_CHARS = 1 << 20  # of a row over several lines: a quote that is never closed costs these
TYPED_ROWS = 1000  # of JSON, from which the names of the columns are taken
SNIFFED_ROWS = 50
DELIMITERS = ",;\t|"
TOO_LONG = "\0"  # stands for a line beyond MAX_LINE_BYTES; it is no row of any format
URL = re.compile(r"\s*https?://\S+\s*", re.IGNORECASE)
BINARY = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
BINARY |= {b"PAR1": "Parquet"}

CONVERT = "convert the file, such as with iconv -f"

Row = list[str] | Json | None  # cells by their place, or values by their name; None: malformed


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """How a text file holds its rows. names: of the columns; none in an empty file.

    kind: csv, json (lines), array, text.
    """

    kind: str
    names: tuple[str, ...]
    delimiter: str = ","
    header: bool = False

    def column(self, rows: Sequence[Row], name: str) -> list[object]:
        """Return the values of a column, the first of its name; None where a row is malformed."""
        if self.kind in ("json", "array"):
            return [row.get(name) if isinstance(row, dict) else None for row in rows]
        place = self.names.index(name)
        return [row[place] if isinstance(row, list) else None for row in rows]


def find_layout(
    stream: IO[bytes], suffix: str, known: Collection[str], named: Sequence[str] = ()
) -> TextLayout:
    """Look at the beginning of a file.

    suffix: of its name; known: names, in any case, of which a header line has one; named: the
    columns of a CSV file without a header line. Raises ValueError for what is no such text.
    """
    head = stream.read(BLOCK_BYTES).removeprefix(BOM_UTF8)
    first = head.lstrip().split(b"\n", 1)[0][:MAX_QUOTED_CHARS]
    for magic, content in BINARY.items():
        if head.startswith(magic):
            raise ValueError(f"found {content}, expected text in UTF-8; see the file's ending")
    if head.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise ValueError(f"found UTF-16, expected UTF-8; {CONVERT} utf-16 -t utf-8")
    if b"\0" in first:
        raise ValueError("found null bytes in the first line, expected text in UTF-8")
    stream.seek(0)
    if suffix == ".txt":
        if b"\t" in first:
            raise ValueError("found a tab in the first line, expected a URL a line; name it .tsv")
        return TextLayout(kind="text", names=("url",))
    if suffix in (".csv", ".tsv"):
        try:
            first.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the first line is not UTF-8 ({error.reason} at byte {error.start}), expected "
                f"UTF-8; {CONVERT} latin1 -t utf-8"
            ) from None
        return _csv_layout(stream, suffix, known, named)
    kind = "array" if first.startswith(b"[") else "json"
    some = list(islice(read_rows(stream, TextLayout(kind=kind, names=())), TYPED_ROWS))
    names = dict.fromkeys(name for row in some if isinstance(row, dict) for name in row)
    if some and not names:
        raise ValueError(f"found {first[:40].decode('utf-8', 'replace')!r}, expected JSON objects")
    return TextLayout(kind=kind, names=tuple(names))


def read_rows(stream: IO[bytes], layout: TextLayout) -> Iterator[Row]:
    """Yield the rows of a file in order, without its header."""
    if layout.kind == "array":
        yield from _array_rows(stream)
    elif layout.kind == "csv":
        yield from islice(_csv_rows(_lines(stream), layout.delimiter), layout.header, None)
    else:
        lines = (line.strip() for line in _lines(stream))
        yield from ([line] if layout.kind == "text" else _object(line) for line in lines if line)


def _lines(stream: IO[bytes]) -> Iterator[str]:
    r"""Yield the lines of a file without their "\n"; lines end with "\r" in a file without any."""
    end, rest, skipping = b"", b"", False
    for block in iter(lambda: stream.read(BLOCK_BYTES), b""):
        if not end:
            end = b"\r" if b"\r" in block and b"\n" not in block else b"\n"
            block = block.removeprefix(BOM_UTF8)
        if skipping:  # the rest of a line that is too long
            cut = block.find(end)
            block, skipping = block[cut:] if cut >= 0 else b"", cut < 0
        complete, found, rest = (rest + block).rpartition(end)
        if found:
            yield from complete.decode("utf-8", "replace").split(end.decode())
        if len(rest) > MAX_LINE_BYTES:
            rest, skipping = TOO_LONG.encode(), True
    if rest:
        yield rest.decode("utf-8", "replace")


# -- CSV -------------------------------------------------------------------------------------------


def _csv_rows(lines: Iterator[str], delimiter: str) -> Iterator[list[str] | None]:
    """Yield all rows, the header included, whose number of cells the others must have."""
    csv.field_size_limit(MAX_LINE_BYTES)
    waiting, width = deque[str](), 0
    while chunk := [*waiting, *islice(lines, 1000)]:
        waiting.clear()
        rows = _parsed(chunk, delimiter) if width else None
        if rows is not None and len(rows) == len(chunk) and {*map(len, rows)} == {width}:
            yield from rows
            continue
        waiting.extend(chunk)
        while waiting:  # row by row, since one of these is blank, malformed or of several lines
            line = waiting.popleft()
            if line.strip() == "" and delimiter not in line:
                continue
            row = _next_row(line, waiting, lines, delimiter, width)
            width = width or len(row)
            yield row if len(row) == width else None


def _parsed(lines: Iterable[str], delimiter: str) -> list[list[str]] | None:
    """Return the rows of lines; None where the quotes do not pair as the format demands."""
    try:
        return list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error:
        return None


def _next_row(
    line: str, waiting: deque[str], lines: Iterator[str], delimiter: str, width: int
) -> list[str]:
    """Return the row that begins with a line; the lines that it has not used are left waiting.

    A line whose quotes do not pair is read as if they meant nothing: many lists quote nothing. So
    are several lines of which each alone is a row with a URL, though quotes join them.
    """
    taken = [line]

    def feed() -> Iterator[str]:
        yield f"{line}\n"
        size = len(line)
        while size < MAX_QUOTED_CHARS:
            following = waiting.popleft() if waiting else next(lines, None)
            if following is None:
                return
            taken.append(following)
            size += len(following)
            yield f"{following}\n"

    row = None
    if '"' in line:
        try:
            row = next(csv.reader(feed(), delimiter=delimiter, strict=True))
        except csv.Error:
            row = None
    if row is not None and len(taken) > 1:
        alone = [each.removesuffix("\r").split(delimiter) for each in taken]
        if all(len(cells) == width and any(map(URL.fullmatch, cells)) for cells in alone):
            row = None
    if row is None:
        waiting.extendleft(reversed(taken[1:]))
        row = line.removesuffix("\r").split(delimiter)
    return row


def _csv_layout(
    stream: IO[bytes], suffix: str, known: Collection[str], named: Sequence[str]
) -> TextLayout:
    """Find the delimiter with which most rows have the header's cells, and whether there is one."""
    known = {name.strip().casefold() for name in known}
    head = list(islice(_lines(stream), SNIFFED_ROWS))
    best: tuple[tuple[bool, int, bool], str, list[str], bool] | None = None
    for delimiter in dict.fromkeys(("\t" if suffix == ".tsv" else ",", *DELIMITERS)):
        rows = list(_csv_rows(iter(head), delimiter))
        if not rows or rows[0] is None:
            return TextLayout(kind="csv", names=())
        cells = [cell.strip() for cell in rows[0]]
        header = any(cell.casefold() in known for cell in cells)
        is_one = header or any(map(URL.fullmatch, cells)) or len(cells) == len(named) > 1
        score = (is_one, sum(row is not None for row in rows), len(cells) > 1)
        if best is None or score > best[0]:
            best = score, delimiter, cells, header
    assert best is not None, "there is a delimiter"
    _, delimiter, cells, header = best
    places = [place for place, cell in enumerate(cells) if URL.fullmatch(cell)]
    if named and header:
        raise ValueError(f"--columns: found the header {', '.join(cells)}, expected no header line")
    if named and len(named) != len(cells):
        raise ValueError(f"--columns: found {len(named)} names, expected {len(cells)}, one a cell")
    if named or header or not places:
        names = tuple(named or cells)
        return TextLayout(kind="csv", names=names, delimiter=delimiter, header=not named)
    if len(cells) > 2 or len(places) > 1:
        raise ValueError(
            f"found no header line and {len(cells)} columns, expected their names: --columns"
        )
    names = [("url" if place == places[0] else "caption") for place in range(len(cells))]
    return TextLayout(kind="csv", names=tuple(names), delimiter=delimiter)


# -- JSON ------------------------------------------------------------------------------------------


def _object(text: str) -> Json | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _array_rows(stream: IO[bytes]) -> Iterator[Json | None]:
    """Yield the elements of an array; ValueError where it is broken: what follows has no place."""
    parse = json.JSONDecoder().raw_decode
    decode = getincrementaldecoder("utf-8-sig")("replace").decode
    text, place, before = "", 0, "["  # what is read and not parsed yet; what must come next
    blank = re.compile(r"[ \t\r\n]*")
    for block in iter(lambda: stream.read(BLOCK_BYTES), b""):
        text, place = text[place:] + decode(block), 0
        while True:
            start = _end_of(blank, text, place)
            if not text.startswith(before, start) or before == "]":
                break
            at = _end_of(blank, text, start + len(before))
            if text.startswith("]", at) and before == "[":
                before, place = "]", at
                break
            try:
                value, end = parse(text, at)
            except (ValueError, RecursionError):
                break  # cut by the end of the block, or broken
            after = _end_of(blank, text, end)
            if text[after : after + 1] not in (",", "]"):  # nor cut: 12 may be the half of 1234
                break
            yield value if isinstance(value, dict) else None
            before, place = text[after], after
        if len(text) - place > MAX_LINE_BYTES:
            break
    left = text[place:].strip()
    if left != "]":
        raise ValueError(f"found {left[:40]!r} in the array, expected its objects, and no more")


def _end_of(pattern: re.Pattern[str], text: str, place: int) -> int:
    found = pattern.match(text, place)
    return found.end() if found else place
