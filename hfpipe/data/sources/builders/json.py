"""JSON with bytes that are not UTF-8, halves of characters, and columns that hold texts and other values.

`datasets` reads a file that is a list without asking for its encoding. Of a column that holds texts here and numbers
there it makes JSON, but not of texts that are JSON already; and where the first part of the files has texts alone, it
takes that JSON for text. One line that is no JSON, such as the last of a download that was cut off, ends the reading.
Its functions for this have no place for another rule, so they are replaced.
"""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pyarrow as pa
from datasets import Features, List, Value
from datasets.packaged_modules.json import json as theirs
from datasets.packaged_modules.json.json import Json, JsonConfig
from datasets.utils.json import ujson_dumps, ujson_loads
from pyarrow import json as arrow_json

from hfpipe.data.sources.builders.base import Divisible
from hfpipe.data.sources.decoding import JSON_ENCODING

Steps = Sequence[str | int]  # names of fields; 0 for the values of a list
CONTROL = re.compile(rb"[\0-\x08\x0b\x0c\x0e-\x1f]")  # JSON wants them escaped
BROKEN = 0.1  # share of lines from which a file is no file of JSON lines
LOOKED_AT = 100  # lines of a file that tell whether it is one


@dataclass
class MarkingJsonConfig(JsonConfig):
    """As that of `datasets`."""

    encoding: str = JSON_ENCODING


class MarkingJson(Divisible, Json):
    """Marks what cannot be decoded, and tells texts from other values."""

    BUILDER_CONFIG_CLASS = MarkingJsonConfig

    @property
    def divides(self) -> bool:
        traces = self.info.features == theirs.AGENT_TRACES_FEATURES
        return self.config.field is None and not traces and super().divides

    def has_rows(self, first: bytes) -> bool:
        lines = self._lines_of(first.removeprefix(BOM_UTF8))[:LOOKED_AT]
        return not lines[0].startswith(b"[") and len(_broken(lines)) <= BROKEN * len(lines)

    def mended(self, piece: bytes) -> bytes:
        """Rows without a value for lines that are no JSON: of few lines they tell nothing about the file."""
        lines = self._lines_of(piece) if piece.count(b"\n") < LOOKED_AT else []
        for number in (broken := _broken(lines)):
            lines[number] = b"{}"
        return b"\n".join(lines).decode().encode(self.config.encoding) if broken else piece

    def _lines_of(self, data: bytes) -> list[bytes]:
        text = data.decode(self.config.encoding, self.config.encoding_errors or "strict")
        return _escaped(text.encode()).split(b"\n")

    def _split_generators(self, dl_manager: Any) -> Any:
        """Reads the first list whole for its columns, which `datasets` leaves unknown in a stream."""
        splits = super()._split_generators(dl_manager)
        if self.info.features is None and dl_manager.is_streaming:
            _, table = next(self._generate_tables(**splits[0].gen_kwargs), (None, None))
            self.info.features = Features.from_arrow_schema(table.schema) if table else None
        return splits

    def _cast_table(self, table: pa.Table, json_field_paths: Sequence[Steps] = ()) -> pa.Table:
        """Takes texts for what they are where JSON was made of them, and values that are none for missing."""
        for name, *inner in json_field_paths:
            if self.info.features is not None and _holds_text(self.info.features.get(name), inner):
                texts = [_text_in(value, inner) for value in table[name].to_pylist()]
                column = pa.array(texts, table[name].type)
                table = table.set_column(table.column_names.index(name), name, column)
        return super()._cast_table(table, json_field_paths)


def _loads(data: str | bytes) -> Any:
    """JSON's values; a file that is a list comes as bytes, and so does a line, of which `_Arrow` judges."""
    if not isinstance(data, bytes):
        return ujson_loads(data)
    if data[:1] == b"[":
        return ujson_loads(data.decode(JSON_ENCODING))
    return _row(data)


def _row(line: bytes) -> dict[str, Any] | None:
    """A row; None where the line is none."""
    try:
        row = ujson_loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _escaped(data: bytes) -> bytes:
    """With the control characters as JSON wants them."""
    return CONTROL.sub(lambda found: b"\\u%04x" % ord(found[0]), data)


def _broken(lines: Sequence[bytes]) -> list[int]:
    """Which lines are neither blank nor a row."""
    return [number for number, line in enumerate(lines) if line.strip() and _row(line) is None]


def _holds_text(feature: Any, path: Steps) -> bool:
    for step in path:
        if step == 0 and isinstance(feature, List):
            feature = feature.feature
        elif isinstance(feature, dict):
            feature = feature.get(step)
        else:
            return False
    return bool(feature == Value("string"))


def _text_in(value: Any, path: Steps) -> Any:
    """The reverse of `_with_json`, with None for what is no text."""
    if value is None:
        return None
    if not path:
        text = ujson_loads(value)
        return text if isinstance(text, str) else None
    field, *inner = path
    if field == 0:
        return [_text_in(one, inner) for one in value]
    return {**value, field: _text_in(value.get(field), inner)}


def _with_json(value: Any, path: Steps) -> Any:
    """A value with JSON in the place of one inside of it, so that a text which is JSON itself stays a text."""
    if value is None:
        return None
    if not path:
        return ujson_dumps(value)
    field, *inner = path
    if field == 0:
        return [_with_json(one, inner) for one in value]
    return {**value, field: _with_json(value.get(field), inner)}


def _lines_with_json(lines: bytes, paths: Sequence[Steps]) -> bytes:
    rows: list[Any] = [_row(line) or {} for line in lines.splitlines() if line.strip()]
    for path in paths:
        rows = [_with_json(row, path) for row in rows]
    return "\n".join(map(ujson_dumps, rows)).encode()


class _Arrow:
    """Arrow's reader of lines. One that is no JSON is a row without a value, as long as few are.

    Control characters that are not escaped are let pass.
    """

    ReadOptions = arrow_json.ReadOptions

    @staticmethod
    def read_json(lines: BytesIO, read_options: arrow_json.ReadOptions) -> pa.Table:
        try:
            return arrow_json.read_json(lines, read_options=read_options)
        except pa.ArrowInvalid as error:
            if not str(error).startswith("JSON parse error") or "Column(/" in str(error):  # another type in a column
                raise
            rows = _escaped(lines.getvalue()).split(b"\n")
            broken = _broken(rows)
            if len(broken) > BROKEN * len(rows):
                raise
            for number in broken:
                rows[number] = b"{}"
            return arrow_json.read_json(BytesIO(b"\n".join(rows)), read_options=read_options)


theirs.paj = _Arrow
theirs.ujson_loads = _loads
theirs.json_encode_field = _with_json
theirs.json_encode_fields_in_json_lines = _lines_with_json
