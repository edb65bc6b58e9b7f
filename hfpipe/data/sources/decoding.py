"""Data with bytes that are not UTF-8, and JSON with half a character: read to the end, the places marked.

`datasets` gives up on a whole file for one such place. Python lets a program say how bytes are decoded, by an error
handler, which `builders` name for their files. Each place becomes one of Unicode's noncharacters, which are meant for
use inside a program and stand in no text; `text_rules.py` decides on the row.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset, Value

from hfpipe.core.upstream import examples_of

UNDECODABLE = "\ufdd0"  # bytes that are not UTF-8
LONE = "\ufdd1"  # an escaped surrogate of JSON without its other half
HANDLER = "hfpipe_mark"

# Escaped surrogates: a pair, or one alone. It begins with fixed bytes, by which `re` skips all others at once.
_SURROGATES = re.compile(rb"\\u[dD](?:([89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|[89a-fA-F][0-9a-fA-F]{2})")


def table_blocks(rows: Dataset, size: int, begin: int = 0) -> Iterator[dict[str, list[Any]]]:
    """The columns of a table, `size` rows at a time, from row `begin` on."""
    for start in range(begin, len(rows), size):
        place = slice(start, min(start + size, len(rows)))
        try:
            yield rows[place]
        except UnicodeDecodeError:
            yield python_of(rows.with_format("arrow")[place])


def can_be_arrow(rows: IterableDataset) -> bool:
    """Returns True if a stream has Arrow's own values: not those that Python has made already, nor JSON, nor what is
    nested.

    Nor views of strings, of which Arrow cannot take some.
    """
    features = (rows.features or {}).values()
    plain = all(isinstance(feature, Value) and feature.dtype != "string_view" for feature in features)
    return examples_of(rows).iter_arrow is not None and rows.features is not None and plain


def unmarked(row: dict[str, Any]) -> dict[str, Any]:
    """A row that is scored: what is marked in its texts becomes U+FFFD, as anyone else would read it."""
    marks = {ord(UNDECODABLE): "\ufffd", ord(LONE): "\ufffd"}
    return {key: value.translate(marks) if _may_be_marked(value) else value for key, value in row.items()}


def _may_be_marked(value: Any) -> bool:
    return isinstance(value, str) and not value.isascii() and (UNDECODABLE in value or LONE in value)


def python_of(table: pa.Table) -> dict[str, list[Any]]:
    """The values of a table; bytes that are not UTF-8, which Parquet lets pass, are marked."""
    try:
        return table.to_pydict()
    except UnicodeDecodeError:
        return {name: _decoded(table[name]) for name in table.column_names}


def _decoded(column: pa.ChunkedArray) -> list[Any]:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column.to_pylist()
    values = column.cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", HANDLER) for value in values]


def _mark(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return UNDECODABLE, error.end


def marked_json(data: bytes) -> bytes:
    """JSON with a mark in the place of each escaped surrogate that has no other half."""
    parts, end = [], 0
    found = _SURROGATES.search(data)
    while found:
        begin, resume = found.span()
        if _is_escaped(data, begin):
            resume = begin + 2  # the text has a backslash here, and a u after it
        elif not found[1]:
            parts += [data[end:begin], LONE.encode()]
            end = resume
        found = _SURROGATES.search(data, resume)
    return b"".join([*parts, data[end:]]) if parts else data


def _is_escaped(data: bytes, place: int) -> bool:
    """Returns True if an odd number of backslashes stands before the one at `place`."""
    begin = place
    while data[begin - 1 : begin] == b"\\":
        begin -= 1
    return (place - begin) % 2 == 1


codecs.register_error(HANDLER, _mark)
