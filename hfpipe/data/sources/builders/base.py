"""The reader of JSON, CSV and text files: a builder of `datasets` that keeps every value as the file has it.

`datasets` reads these files by pyarrow's and pandas' guesses: a text that looks like a date becomes one, 01000 becomes
1000, a whole number beside a gap 1.0. Here a column is a column of numbers only where each number's text is what stands
in the file; otherwise it is text. The options of a source are those of `datasets`' own builders.

A builder also tells of its files how they can be read a piece at a time; see `line_files.py`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
from datasets import ArrowBasedBuilder, BuilderConfig, DatasetInfo, Features, SplitGenerator
from datasets.builder import Key
from datasets.table import table_cast

NEWLINE = b"\n"
PIECE = 2 << 20  # bytes: a resume reads a piece again in each lane
WHOLE = r"0|-?[1-9][0-9]{0,17}"  # fits into 64 bits
LONGEST_DECIMAL = 16  # characters: a float gives back 15 digits
# Python writes numbers below 0.0001 with an exponent.
DECIMAL = r"-?(?:[1-9][0-9]*\.(?:[0-9]*[1-9]|0)|0\.(?:0|(?:[1-9]|0[1-9]|00[1-9]|000[1-9])(?:[0-9]*[1-9])?))"
_WHOLE, _DECIMAL = re.compile(WHOLE), re.compile(DECIMAL)


@dataclass
class FilesConfig(BuilderConfig):
    """Options that all kinds of files have beside those of `datasets`.

    Args:
        known_as: The name in the cache, under which `datasets` looks for it without a network too.
    """

    known_as: str | None = None

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: Features | None = None) -> str:
        return self.known_as or super().create_config_id(config_kwargs, custom_features)


class FileBuilder(ArrowBasedBuilder):
    """Reads files whose rows are lines, unless it says otherwise.

    A subclass opens the files itself: in a stream `datasets` replaces `open` in the module of the class.
    """

    number_columns: frozenset[str] = frozenset()  # columns of text whose values are numbers in the files
    anywhere = True  # whether a row can be found from any place of a file
    has_types = True  # whether the types of its columns are found by a look at the rows

    @property
    def piece_bytes(self) -> int:
        """Bytes of a file that are read at a time."""
        return min(int(self.config.chunksize), PIECE)

    @property
    def divides(self) -> bool:
        """True if its options let a file be read by the piece: not where a newline takes several bytes."""
        return "\n".encode(self.config.encoding or "utf-8") == NEWLINE

    def has_rows(self, first: bytes) -> bool:
        """Returns True if a file that begins like this has rows, and is not one value."""
        return True

    def mended(self, piece: bytes) -> bytes:
        """A piece that does not begin its file, as it is read."""
        return piece

    def head_of(self, file: BinaryIO) -> tuple[bytes, int]:
        """Returns the bytes that go before pieces that do not begin the file, and their number of rows; read from the
        beginning.
        """
        return b"", 0

    def rows_of(self, file: BinaryIO, size: int) -> bytes:
        """Whole rows from where the file stands: so many bytes, and what is left of the row that they end in."""
        data = file.read(size)
        return data if not data or data.endswith(NEWLINE) else data + file.readline()

    def parts_of(self, file: str) -> Iterator[Any]:
        """The rows of a file, many at a time, in a form of the builder's own."""
        raise NotImplementedError

    def look_at(self, part: Any) -> None:
        """Takes note of the types of some rows."""

    def features_found(self, whole: bool) -> Features:
        """The types of the columns, after a look at rows.

        Args:
            whole: Whether all rows were looked at; otherwise no column that may yet turn out to be text is one of
                numbers.
        """
        raise NotImplementedError

    def table_of(self, part: Any) -> pa.Table:
        """Rows as a table of the types that were found."""
        raise NotImplementedError

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=self.config.features)

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        if not self.config.data_files:
            raise ValueError(f"At least one data file must be specified, but got data_files={self.config.data_files}")
        if not any(self.config.data_files.values()):
            raise FileNotFoundError("no file matches")
        dl_manager.download_config.extract_on_the_fly = True
        base_files = dl_manager.download(self.config.data_files)
        splits = {
            name: [dl_manager.iter_files(file) for file in files]
            for name, files in dl_manager.extract(base_files).items()
        }
        if self.has_types and self.config.features is None:  # those of `info` may be a table's, kept in the cache
            self._look([files for split in splits.values() for files in split], whole=not dl_manager.is_streaming)
        return [
            SplitGenerator(name=name, gen_kwargs={"base_files": base_files[name], "files_iterables": files})
            for name, files in splits.items()
        ]

    def _look(self, files_iterables: list[Any], whole: bool) -> None:
        """Finds the types of the columns: of a table by all rows, of a stream by the first part of its first file."""
        parts = self._parts(files_iterables)
        for _, _, part in parts if whole else islice(parts, 1):
            self.look_at(part)
        if not whole and sum(1 for files in files_iterables for _ in files) == 1:
            whole = next(parts, None) is None
        self.info.features = self.features_found(whole) or None

    def _parts(self, files_iterables: Any) -> Iterator[tuple[int, int, Any]]:
        for shard, files in enumerate(files_iterables):
            for file in files:
                try:
                    for number, part in enumerate(self.parts_of(file)):
                        yield shard, number, part
                except Exception:
                    logging.getLogger("datasets").error("Failed to read file '%s'", file)
                    raise

    def _generate_shards(self, base_files: Any, files_iterables: Any) -> Iterator[Any]:
        yield from base_files

    def _generate_tables(self, base_files: Any, files_iterables: Any) -> Iterator[tuple[Key, pa.Table]]:
        for shard, number, part in self._parts(files_iterables):
            table = self.table_of(part)
            if self.config.features is not None:
                table = table_cast(table, self.config.features.arrow_schema)
            yield Key(shard, number), table


class NumberText(str):
    """The text of a number that no float or 64-bit integer gives back."""

    __slots__ = ()


def whole_number(text: str) -> int | NumberText:
    """A whole number of a file, or its text."""
    return int(text) if _WHOLE.fullmatch(text) else NumberText(text)


def decimal_number(text: str) -> float | NumberText:
    """A number with a point or an exponent, or its text."""
    return float(text) if len(text) <= LONGEST_DECIMAL and _DECIMAL.fullmatch(text) else NumberText(text)
