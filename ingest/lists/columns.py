"""What the columns of a list are read as: text, numbers, captions, or as they are kept.

Only columns that are used are looked at. Types are by need: a score is a number whatever its column
holds elsewhere, a URL is text. A kept column has the narrowest type of those that hold all its
values: bool, int64, double, lists of texts, else text. CSV has no types: its cells are numbers
where all are written as Python would write them, so that 007 and 1.10 remain text.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pyarrow as pa

FURTHER_CAPTIONS = "captions_more"  # column: the captions of a sample after its first one
Need = Literal["text", "number", "captions", "kept"]
INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
NUMBERS = {*INTEGERS, "float", "double"}
PLAIN_TYPES = {"string", "large_string", "bool", *NUMBERS}
NO_NUMBER = {"", "na", "n/a", "#n/a", "null", "none", "\\n"}  # as text, any case
EXACT = 2**53  # up to which doubles hold every integer
_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column as it is read. name: in the list that comes out; source: in the file."""

    name: str
    source: str
    need: Need
    type: "pa.DataType"


def find_name(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the first of the wanted columns that there is, as `names` spell it: exactly so, or in
    another case and with blanks around it."""
    by_name = {name.strip().casefold(): name for name in reversed(names)}
    exact = next((name for name in wanted if name in names), None)
    near = (by_name.get(name.strip().casefold()) for name in wanted)
    return exact if exact is not None else next((n for n in near if n is not None), None)


# -- types -----------------------------------------------------------------------------------------


def is_list(kind: "pa.DataType") -> bool:
    """Return whether a column of this type holds lists."""
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def holds_captions(kind: "pa.DataType") -> bool:
    """Return whether a column of this type holds texts or lists of texts."""
    import pyarrow as pa

    kind = kind.value_type if is_list(kind) else kind
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return str(kind) in ("string", "large_string", "string_view")


def plain_type(kind: "pa.DataType") -> "pa.DataType | None":
    """Return the type that a column is kept as: bool, a number, string, or a list of strings.

    Other scalars, such as timestamps and decimals, are kept as text, in which nothing of them is
    lost. None: nothing of this kind is kept. A column of nulls says nothing: pa.null().
    """
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if is_list(kind) and (holds_captions(kind) or types.is_null(kind.value_type)):
        return pa.list_(pa.string())
    if str(kind) in NUMBERS or types.is_boolean(kind) or types.is_null(kind):
        return kind
    if types.is_float16(kind):
        return pa.float32()
    texts = (types.is_temporal, types.is_decimal, types.is_large_binary, types.is_binary)
    is_text = holds_captions(kind) or any(test(kind) for test in texts)
    return pa.string() if is_text or str(kind) == "binary_view" else None


def common_type(kinds: "Iterable[pa.DataType]") -> "pa.DataType":
    """Return the plain type that holds the values of all these; text, if there are only nulls."""
    import pyarrow as pa

    by_name = {str(kind): kind for kind in kinds if not pa.types.is_null(kind)}
    if len(by_name) == 1:
        return next(iter(by_name.values()))
    names = set(by_name)
    if names and names <= NUMBERS - {"uint64"}:
        return pa.int64() if names <= INTEGERS else pa.float64()
    if any(is_list(kind) for kind in by_name.values()):
        return pa.list_(pa.string())
    return pa.string()


class Survey:
    """The type of a column of a text file, by all its values."""

    def __init__(self, *, is_csv: bool) -> None:
        self._kind_of = _cell_kind if is_csv else _value_kind
        self._kinds: set[str] = set()

    def add(self, values: Sequence[object]) -> None:
        """Look at further values."""
        if self._kind_of is _value_kind and all_texts(values):
            self._kinds.add("text")
        elif "text" not in self._kinds or self._kind_of is _value_kind:
            self._kinds.update(map(self._kind_of, values))

    @property
    def type(self) -> "pa.DataType":
        """The type; pa.null() where there are no values."""
        import pyarrow as pa

        kinds = self._kinds - {"null"}
        if not kinds:
            return pa.null()
        if "list" in kinds:
            return pa.list_(pa.string())
        if kinds == {"bool"}:
            return pa.bool_()
        if kinds <= {"int", "long"}:
            return pa.int64()
        return pa.float64() if kinds <= {"int", "float"} else pa.string()


def all_texts(values: Sequence[object]) -> bool:
    """Return whether all values are texts, and none is absent."""
    return {*map(type, values)} == {str}


def _value_kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) <= EXACT else "long" if -(2**63) <= value < 2**63 else "text"
    if isinstance(value, float):
        return "float"
    if isinstance(value, list) and all(v is None or isinstance(v, str) for v in value):
        return "list"
    return "text"


def _cell_kind(cell: object) -> str:
    if cell is None or cell == "":
        return "null"
    try:
        value = float(str(cell))
        if repr(value) == cell:
            return "float"
        return _value_kind(int(value)) if str(int(value)) == cell else _long_kind(str(cell))
    except (ValueError, OverflowError):
        return "text"


def _long_kind(cell: str) -> str:
    """Return the kind of what may be an integer that no double holds; ValueError for no integer."""
    return _value_kind(int(cell)) if str(int(cell)) == cell else "text"


# -- values ----------------------------------------------------------------------------------------
# Of text files: each returns a value as the type wants it, and raises TypeError or ValueError where
# it is none; the row is malformed then.


def _text(value: object) -> str | None:
    if isinstance(value, str):
        return _HALF_PAIR.sub("\ufffd", value)
    if isinstance(value, list | dict):
        raise TypeError("no text")
    return None if value is None else json.dumps(value)


def _any_text(value: object) -> str | None:
    return _text(json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value)


def _number(value: object) -> float | None:
    if isinstance(value, str) and value.strip().lower() in NO_NUMBER:
        return None
    if value is None:
        return None
    if not isinstance(value, int | float | str) or "_" in str(value):  # 1_000 is Python's alone
        raise TypeError("no number")
    return float(value)


def _integer(value: object) -> int | None:
    return None if value in (None, "") else int(str(value))


def _texts(value: object, text_of: Callable[[object], str | None]) -> list[str] | None:
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    return [text for item in items if (text := text_of(item)) is not None]


def _converter(column: Column) -> Callable[[object], object]:
    text_of = _any_text if column.need == "kept" else _text
    if is_list(column.type):
        return partial(_texts, text_of=text_of)
    if str(column.type) == "string":
        return text_of
    return _integer if str(column.type) in INTEGERS else _number


def to_array(values: Sequence[object], column: Column) -> "tuple[pa.Array, list[int]]":
    """Return values of a text file as an array, and the places of those that do not fit."""
    import pyarrow as pa

    if not is_list(column.type):  # Arrow would take a text for a list of its letters
        with suppress(TypeError, ValueError, OverflowError):
            return pa.array(values, column.type), []
        if str(column.type) == "double" and all_texts(values):
            with suppress(pa.ArrowInvalid):
                return pa.array(values, pa.string()).cast(column.type), []
    convert, converted, bad = _converter(column), [], []
    for place, value in enumerate(values):
        try:
            converted.append(convert(value))
        except (TypeError, ValueError, OverflowError):
            converted.append(None)
            bad.append(place)
    return pa.array(converted, column.type), bad


# -- columns of Parquet ----------------------------------------------------------------------------


def require_fit(kind: "pa.DataType", column: Column) -> None:
    """Raise ValueError for a column of Parquet that cannot be read as what it is needed for."""
    import pyarrow as pa

    plain = plain_type(kind)
    fits, expected = plain is not None, "text, a list of texts, number or another scalar"
    if column.need == "number":
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        fits = pa.types.is_decimal(value) or str(plain) in {*NUMBERS, "null"}
        expected = "numbers"
    elif column.need == "text" and (plain is None or is_list(plain)):
        fits, expected = False, "text"
    if not fits:
        raise ValueError(f"column {column.source} is {kind}, expected {expected}")


def from_parquet(values: "pa.ChunkedArray", column: Column) -> "pa.ChunkedArray":
    """Return a column of Parquet as the type wants it; bytes that are not UTF-8 become U+FFFD."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if is_list(column.type):
        found = [value for chunk in values.chunks for value in plain_values(chunk)]
        texts = [_texts(value, _text) for value in found]
        return pa.chunked_array([pa.array(texts, column.type)])
    if not types.is_string(column.type):
        return values.cast(column.type, safe=False)
    if holds_captions(values.type):
        values = values.cast(pa.large_binary())  # Parquet does not check what it calls a string
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        if types.is_timestamp(values.type):  # of a zone that is not known here
            return values.cast(pa.timestamp(values.type.unit)).cast(pa.string())
        texts = [_repaired(value) for value in values.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])


def plain_values(column: "pa.Array") -> list:
    """Return the values of a column that may be kept; text that is not UTF-8 is repaired."""
    import pyarrow as pa

    column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if not (holds_captions(column.type) or str(column.type).endswith("binary")):
        return column.to_pylist()
    values = undecoded(column)
    if is_list(column.type):
        return [None if texts is None else [_repaired(text) for text in texts] for texts in values]
    return [_repaired(text) for text in values]


def undecoded(column: "pa.Array") -> list:
    """Return the bytes of texts, or of lists of them: Parquet does not check its strings."""
    import pyarrow as pa

    column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    kind = pa.list_(pa.large_binary()) if is_list(column.type) else pa.large_binary()
    return column.cast(kind).to_pylist()


def _repaired(text: bytes | None) -> str | None:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text

