"""JSON files: a row a line, a list of rows, or one object; every value as it stands in the file.

Texts stay texts (pyarrow makes a timestamp of those that look like one), and a column of numbers is one only where each
gives back its text; see `base.py`. A column of several kinds of values is JSON. A line that is no JSON is a row
without a value, as long as few are. Bytes that cannot be decoded and halves of characters are marked; see
`decoding.py`.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any

import pyarrow as pa
from datasets import Features, List, Value
from datasets import Json as JsonFeature
from datasets.packaged_modules.json.json import JsonConfig
from datasets.table import table_cast

from hfpipe.data.sources.builders.base import PIECE, FileBuilder, FilesConfig, NumberText, decimal_number, whole_number
from hfpipe.data.sources.decoding import HANDLER, marked_json

BROKEN = 0.1  # share of lines from which a file is no file of JSON lines
LOOKED_AT = 100  # lines of a file that tell whether it is one


@dataclass
class JsonFilesConfig(FilesConfig, JsonConfig):
    """The options of `datasets`; bytes that cannot be decoded are marked."""

    encoding_errors: str | None = HANDLER


@dataclass
class Shape:
    """The kinds of values that were seen in a place of the rows, and the shapes of what is inside of them."""

    kinds: set[str] = field(default_factory=set)
    item: Shape | None = None
    fields: dict[str, Shape] = field(default_factory=dict)

    def see(self, values: Sequence[Any]) -> None:
        """Takes note of values that stand in this place."""
        types = {*map(type, values)} - {type(None)}
        self.kinds |= {_KINDS[one] for one in types}
        if list in types:
            self.item = self.item or Shape()
            self.item.see([inner for value in values if type(value) is list for inner in value])
        if dict in types:
            inside: dict[str, list[Any]] = {}
            for value in values:
                if type(value) is dict:
                    for key, inner in value.items():
                        inside.setdefault(key, []).append(inner)
            for key, inner in inside.items():
                self.fields.setdefault(key, Shape()).see(inner)

    def feature(self, *, whole: bool, inner: bool = False) -> Any:
        """The type of this place.

        Args:
            whole: Whether all rows were seen; otherwise a type must hold what may still come.
            inner: Whether it is inside of a column, where templates of chats write numbers as numbers.
        """
        kinds = self.kinds
        if not kinds:
            return Value("null") if whole else JsonFeature()
        if kinds == {"list"} and self.item is not None:
            turns = not whole and self.item.kinds == {"dict"}  # in a stream, later ones may have other keys
            return List(JsonFeature() if turns else self.item.feature(whole=whole, inner=True))
        if kinds == {"dict"} and self.fields:
            return {key: shape.feature(whole=whole, inner=True) for key, shape in self.fields.items()}
        if kinds in ({"string"}, {"bool"}) or (whole and kinds in ({"int64"}, {"float64"})):
            return Value(*kinds)
        if kinds <= NUMBERS and not inner:
            return Value("string")
        return JsonFeature()


_KINDS = {str: "string", bool: "bool", int: "int64", float: "float64", NumberText: "number", list: "list", dict: "dict"}
NUMBERS = {"int64", "float64", "number"}


class JsonFiles(FileBuilder):
    """Reads JSON, and keeps its values as they are."""

    BUILDER_CONFIG_CLASS = JsonFilesConfig
    _shape: Shape | None = None

    @property
    def divides(self) -> bool:
        return self.config.field is None and super().divides

    def has_rows(self, first: bytes) -> bool:
        lines = self._lines_of(first)[:LOOKED_AT]
        return _begins_with_row(lines) and sum(map(_is_broken, lines)) <= BROKEN * len(lines)

    def mended(self, piece: bytes) -> bytes:
        """Rows without a value for lines that are no JSON: of few lines they tell nothing about the file."""
        lines = self._lines_of(piece) if piece.count(b"\n") < LOOKED_AT else []
        if not any(map(_is_broken, lines)):
            return piece
        mended = "\n".join("{}" if _is_broken(line) else line for line in lines)
        return mended.encode(self.config.encoding, "surrogatepass")

    def _lines_of(self, data: bytes) -> list[str]:
        return self._decoded(data).removeprefix("\ufeff").split("\n")

    def _decoded(self, data: bytes) -> str:
        return marked_json(data).decode(self.config.encoding, self.config.encoding_errors or "strict")

    def parts_of(self, file: str) -> Iterator[list[dict[str, Any] | None]]:
        size = max(int(self.config.chunksize), 1)
        with BufferedReader(open(file, "rb")) as raw:  # in a stream `datasets` puts its own `open` in this place
            data = self.rows_of(raw, min(size, PIECE)).removeprefix(BOM_UTF8)
            if self.config.field is not None or not self._is_lines(data):
                yield self._rows_of_value(self._decoded(data + raw.read()))
                return
            while data:
                yield self._rows_of_lines(data)
                data = self.rows_of(raw, size)

    def _is_lines(self, data: bytes) -> bool:
        if "\n".encode(self.config.encoding) != b"\n":
            return False  # not to be cut at a byte
        return _begins_with_row(self._lines_of(data))

    def _rows_of_lines(self, data: bytes) -> list[dict[str, Any] | None]:
        lines = [line for line in self._decoded(data).split("\n") if line and not line.isspace()]
        rows = [_row(line) for line in lines]
        broken = [number for number, row in enumerate(rows) if row is None]
        if len(broken) > BROKEN * len(rows):
            raise pa.ArrowInvalid(f"JSON parse error: {_why(lines[broken[0]])} in row {broken[0]}")
        return rows

    def _rows_of_value(self, text: str) -> list[dict[str, Any] | None]:
        """The rows of a file that is one value: a list, an object with a list in it, or an object of columns."""
        if not text.strip():
            return []
        try:
            value = _loads(text)
        except (ValueError, RecursionError) as error:
            if "\n" in text.strip() and self.config.field is None:  # lines in an encoding that cannot be cut
                return self._rows_of_lines(text.encode(self.config.encoding, "surrogatepass"))
            raise pa.ArrowInvalid(f"JSON parse error: {error}") from error
        if self.config.field is not None:
            if not isinstance(value, dict) or self.config.field not in value:
                keys = ", ".join(value) if isinstance(value, dict) else "none"
                raise pa.ArrowInvalid(f"the file has no field {self.config.field!r}; its fields are: {keys}")
            value = value[self.config.field]
        return _as_rows(value)

    def look_at(self, part: list[dict[str, Any] | None]) -> None:
        self._shape = self._shape or Shape()
        self._shape.see([row for row in part if row is not None])

    def features_found(self, whole: bool) -> Features:
        shape = self._shape or Shape()
        numbers = {name for name, one in shape.fields.items() if one.kinds and one.kinds <= NUMBERS}
        self.number_columns = frozenset(numbers)
        return Features({name: one.feature(whole=whole) for name, one in shape.fields.items()})

    def table_of(self, part: list[dict[str, Any] | None]) -> pa.Table:
        features = self.info.features or self.config.features
        if features is None:  # read without a look, as in a test of one piece
            self.look_at(part)
            features = self.features_found(whole=False)
        declared = self.config.features is not None
        columns = {}
        for name, feature in features.items():
            texts = declared or name in self.number_columns
            values = [None if row is None else _fitted(row.get(name), feature, texts) for row in part]
            columns[name] = pa.array(values, _storage_of(feature))
        return table_cast(pa.table(columns), features.arrow_schema)


def _begins_with_row(lines: Sequence[str]) -> bool:
    """Returns True if the first lines are rows of their own; a file may begin with a broken one."""
    first = [line for line in lines[:LOOKED_AT] if line and not line.isspace()]
    return not first or (not first[0].lstrip().startswith("[") and any(_row(line) is not None for line in first))


def _is_broken(line: str) -> bool:
    return bool(line.strip()) and _row(line) is None


# Control characters that are not escaped are let pass, and NaN is a value that is missing. One decoder serves all
# lines, as `json.loads` would make a new one for each.
_loads = json.JSONDecoder(
    strict=False, parse_float=decimal_number, parse_int=whole_number, parse_constant=lambda _: None
).decode


def _row(line: str) -> dict[str, Any] | None:
    """A row; None where the line is none."""
    try:
        row = _loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _why(line: str) -> str:
    try:
        return f"found {str(_loads(line))[:40]}, which is no row,"
    except (ValueError, RecursionError) as error:
        return str(error)


def _as_rows(value: Any) -> list[dict[str, Any] | None]:
    """The rows that a JSON value holds.

    Raises:
        pa.ArrowInvalid: It holds none.
    """
    if isinstance(value, list):
        if all(isinstance(one, dict) or one is None for one in value):
            return value
        if all(isinstance(one, str) for one in value):
            return [{"text": one} for one in value]
    if isinstance(value, dict):
        lists = {key: inner for key, inner in value.items() if isinstance(inner, list)}
        tables = [rows for rows in lists.values() if rows and all(isinstance(one, dict) for one in rows)]
        if len(tables) == 1 and len(lists) == 1:
            return tables[0]
        if value and len(lists) == len(value) and len({*map(len, lists.values())}) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
        by_row = {key: inner for key, inner in value.items() if isinstance(inner, dict)}
        if (
            value
            and len(by_row) == len(value)
            and all([*one] == [str(n) for n in range(len(one))] for one in by_row.values())
        ):
            return [
                dict(zip(value, row, strict=True))
                for row in zip(*(one.values() for one in by_row.values()), strict=True)
            ]
        if value:
            return [value]
    shown = "null" if value is None else repr(str(value)[:40])
    raise pa.ArrowInvalid(f"the file holds {shown}, which is no list of rows and no row")


def _fitted(value: Any, feature: Any, texts: bool = False) -> Any:
    """A value for its type; None where it is of another kind, and JSON where the type is.

    Args:
        value: The value.
        feature: Its type.
        texts: Whether a number in a column of texts is its text.
    """
    if value is None:
        return None
    if isinstance(feature, Value):
        return _scalar(value, feature, texts)
    if isinstance(feature, JsonFeature):
        return json.dumps(_plain(value))
    if isinstance(feature, dict):
        if not isinstance(value, dict):
            return None
        return {key: _fitted(value.get(key), inner, texts) for key, inner in feature.items()}
    inner = feature.feature if hasattr(feature, "feature") else None
    if inner is None:
        return value  # a type of `datasets` with an encoding of its own
    return [_fitted(one, inner, texts) for one in value] if isinstance(value, list) else None


def _plain(value: Any) -> Any:
    """A value with numbers in the place of their texts, but for those that `datasets` cannot read back from JSON."""
    if isinstance(value, NumberText):
        return str(value) if value.lstrip("-").isdigit() else float(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _scalar(value: Any, feature: Value, texts: bool) -> Any:
    if feature.dtype in ("string", "large_string", "string_view"):
        if isinstance(value, str) and (texts or not isinstance(value, NumberText)):
            return str(value)
        return None if not texts or isinstance(value, bool | list | dict) else str(value)
    if feature.dtype == "bool":
        return value if isinstance(value, bool) else None
    if isinstance(value, NumberText):
        number = float(value)
        return int(number) if feature.dtype.startswith(("int", "uint")) and number.is_integer() else number
    return value


def _storage_of(feature: Any) -> pa.DataType:
    """The Arrow type that values are written in before they are cast: JSON as text."""
    if isinstance(feature, JsonFeature):
        return pa.string()
    if isinstance(feature, dict):
        return pa.struct({key: _storage_of(inner) for key, inner in feature.items()})
    if isinstance(feature, List):
        return pa.list_(_storage_of(feature.feature))
    return Features({"column": feature}).arrow_schema.field("column").type
