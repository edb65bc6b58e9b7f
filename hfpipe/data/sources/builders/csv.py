"""CSV files, whose cells stay as they stand in the file: 01000 and 0.50 are texts, and a gap makes no 1 a 1.0."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, fields
from io import BufferedReader
from typing import Any, BinaryIO

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, Value
from datasets.packaged_modules.csv.csv import CsvConfig

from hfpipe.data.sources.builders.base import DECIMAL, LONGEST_DECIMAL, PIECE, WHOLE, FileBuilder, FilesConfig
from hfpipe.data.sources.decoding import HANDLER

# Options under which a file of several pieces is read as one is; others, such as `skiprows`, count from its beginning.
OF_ANY_PIECE = {
    *("name", "version", "data_dir", "data_files", "description", "features", "chunksize", "known_as"),
    *("sep", "delimiter", "quotechar", "names", "column_names", "usecols", "encoding", "encoding_errors"),
    *("na_values", "keep_default_na", "na_filter", "true_values", "false_values", "thousands", "decimal"),
    *("float_precision", "date_format", "on_bad_lines"),
}
# Options that say how cells are to be understood: with one of them pandas finds the types.
OF_TYPES = ("features", "converters", "true_values", "false_values", "thousands", "decimal", "float_precision")
csv.field_size_limit(2**31 - 1)  # of the process: a document may be longer than 131,072 characters


@dataclass
class CsvFilesConfig(FilesConfig, CsvConfig):
    """The options of `datasets`; an empty cell alone is missing, and not one that holds NA or None."""

    encoding_errors: str | None = HANDLER
    keep_default_na: bool = False
    na_values: Any = ""


class CsvFiles(FileBuilder):
    """Reads CSV, keeps its cells as they are, and marks bytes that cannot be decoded."""

    BUILDER_CONFIG_CLASS = CsvFilesConfig
    _found: dict[str, set[str]] | None = None
    anywhere = False  # a row may hold lines
    piece_bytes = PIECE  # `chunksize` counts rows

    @property
    def has_types(self) -> bool:  # type: ignore[override]
        return not any(self._is_set(name) for name in OF_TYPES)

    def _is_set(self, name: str) -> bool:
        return getattr(self.config, name) != getattr(CsvFilesConfig(), name)

    @property
    def divides(self) -> bool:
        changed = {field.name for field in fields(self.config) if self._is_set(field.name)}
        plain = all(isinstance(sign, str) and len(sign) == 1 for sign in (self.config.sep, self.config.quotechar))
        return changed <= OF_ANY_PIECE and plain and super().divides

    def head_of(self, file: BinaryIO) -> tuple[bytes, int]:
        """The names of the columns and the first row, by which pandas tells how many columns there are."""
        names = b"" if self.config.names else self._record(file)
        return names + self._record(file), 1

    def _record(self, file: BinaryIO) -> bytes:
        """The next record, and blank lines before it."""
        lines: list[bytes] = []
        next(filter(None, self._records(file, lines)), None)
        return b"".join(lines)

    def rows_of(self, file: BinaryIO, size: int) -> bytes:
        lines: list[bytes] = []
        read = seen = 0
        for _ in self._records(file, lines):
            read += sum(map(len, lines[seen:]))
            seen = len(lines)
            if read >= size:
                break
        return b"".join(lines)

    def _records(self, file: BinaryIO, lines: list[bytes]) -> Iterator[list[str]]:
        """Records as Python reads them, whose lines are kept; it asks for a line at a time, and pandas parts alike."""

        def kept() -> Iterator[str]:
            while line := file.readline():
                lines.append(line)
                yield line.decode("latin-1").replace("\r", " ")  # which Python refuses outside of quotes

        return csv.reader(kept(), delimiter=self.config.sep, quotechar=self.config.quotechar)

    def parts_of(self, file: str) -> Iterator[pa.Table]:
        options = self.config.pd_read_csv_kwargs | {"keep_default_na": self.config.keep_default_na}
        if self.config.keep_default_na and self.config.na_values == "":
            options.pop("na_values", None)
        dtype: Any = str if self.has_types else None
        if self.config.features is not None:
            dtype = {name: str for name, of in self.config.features.items() if of == Value("string")}
        with BufferedReader(open(file, "rb")) as raw:  # in a stream `datasets` puts its own `open` in this place
            for frame in pd.read_csv(raw, iterator=True, dtype=dtype, **options):
                yield pa.Table.from_pandas(frame, preserve_index=False)

    def look_at(self, part: pa.Table) -> None:
        found = self._found = self._found or {}
        for name in part.column_names:
            kinds = found.setdefault(name, set())
            if "text" not in kinds:
                kinds.add(_kind_of(part[name]))

    def features_found(self, whole: bool) -> Features:
        types = {frozenset({"int64"}): "int64", frozenset({"float64"}): "float64"} if whole else {}
        found = self._found or {}
        return Features(
            {name: Value(types.get(frozenset(kinds - {"null"}), "string")) for name, kinds in found.items()}
        )

    def table_of(self, part: pa.Table) -> pa.Table:
        if not self.has_types or self.info.features is None:
            return part
        columns = [part[name] if name in part.column_names else pa.nulls(len(part)) for name in self.info.features]
        schema = self.info.features.arrow_schema
        if unknown := sorted({*part.column_names} - {*schema.names}):
            raise pa.ArrowInvalid(f"the columns {', '.join(unknown)} are not in the first of the files")
        return pa.table([pc.cast(one, field.type) for one, field in zip(columns, schema, strict=True)], schema=schema)


def _kind_of(column: pa.ChunkedArray) -> str:
    """The type that a column of cells can have without one of them changing its text."""
    if column.null_count == len(column):
        return "null"
    if pc.all(pc.match_substring_regex(column, f"^(?:{WHOLE})$")).as_py():
        return "int64"
    is_short = pc.less_equal(pc.utf8_length(column), LONGEST_DECIMAL)
    if pc.all(pc.and_(is_short, pc.match_substring_regex(column, f"^(?:{DECIMAL})$"))).as_py():
        return "float64"
    return "text"
