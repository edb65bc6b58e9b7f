"""CSV with bytes that are not UTF-8."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import BinaryIO

from datasets.packaged_modules.csv.csv import Csv, CsvConfig

from hfpipe.data.sources.builders.base import PIECE, Divisible
from hfpipe.data.sources.decoding import HANDLER

# Options under which a file of several pieces is read as one is; others, such as `skiprows`, count from its beginning.
OF_ANY_PIECE = {
    *("name", "version", "data_dir", "data_files", "description", "features", "chunksize"),
    *("sep", "delimiter", "quotechar", "names", "column_names", "usecols", "encoding", "encoding_errors"),
    *("na_values", "keep_default_na", "na_filter", "true_values", "false_values", "thousands", "decimal"),
    *("float_precision", "date_format", "on_bad_lines"),
}
csv.field_size_limit(2**31 - 1)  # of the process: a document may be longer than 131,072 characters


@dataclass
class MarkingCsvConfig(CsvConfig):
    """As that of `datasets`."""

    encoding_errors: str | None = HANDLER


class MarkingCsv(Divisible, Csv):
    """Marks bytes that are not UTF-8."""

    BUILDER_CONFIG_CLASS = MarkingCsvConfig
    anywhere = False  # a row may hold lines
    piece_bytes = PIECE  # `chunksize` counts rows

    @property
    def divides(self) -> bool:
        usual = MarkingCsvConfig()
        changed = {
            field.name for field in fields(usual) if getattr(self.config, field.name) != getattr(usual, field.name)
        }
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
