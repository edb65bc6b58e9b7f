"""Streams of JSON lines, CSV and text that resume at a place in a file, and that lanes share by bytes.

A file is read a piece at a time, of whole rows, and the builder of `datasets` is given each as if it were a file of its
own: where the piece at hand begins is all that a resume has to know. Lines and paragraphs can be told from any place of
a file, so lanes share a large one by its bytes. A compressed file, and CSV, of which a row may hold lines, is a lane's
as a whole; a resume decompresses what stands before its place in one, and parses nothing of it.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import closing
from posixpath import basename
from typing import Any, BinaryIO
from uuid import uuid4

import pyarrow as pa
from datasets import IterableDataset
from fsspec.implementations.memory import MemoryFileSystem

from hfpipe.core.upstream import examples_of, file_builder_of, with_examples
from hfpipe.data.sources.builders.base import FileBuilder
from hfpipe.data.sources.sharded_files import SharedFiles, Tables

FIRST = 1 << 16  # bytes that are fetched for a look at the beginning of a file, or of a row
PART_BYTES = 1 << 16  # of a file, that are one lane's: far less than a piece, or lanes would read small files together
PASSED_OVER = 1 << 20  # bytes that are read at a time up to a place
ARCHIVES = ("zip://", "7z://", "rar://")  # of many files


class ByteRanges(SharedFiles):
    """The rows of files that are one lane's.

    Args:
        builder: The builder that reads them.
        arguments: Of its `_generate_tables`, for all files.
    """

    builder: FileBuilder

    def __init__(self, builder: FileBuilder, arguments: dict[str, Any]) -> None:
        super().__init__(builder, arguments, _files_of(arguments))
        self.sizes: dict[str, int] = {}  # bytes of the files that can be shared, 0 of others; known to all lanes

    def _init_state_dict(self) -> dict[str, Any]:
        """The state with the beginning of the piece whose rows are counted; None before a lane's first of a file."""
        self._state_dict = {**super()._init_state_dict(), "begin": None}
        return self._state_dict

    def parts_of(self, file: str) -> int:
        if file not in self.sizes:
            self.sizes[file] = self._size_of(file) if self.builder.anywhere and not _is_compressed(file) else 0
        return max(self.sizes[file] // self._part_bytes, 1)

    @property
    def _part_bytes(self) -> int:
        return min(self.builder.piece_bytes, PART_BYTES)

    def _size_of(self, file: str) -> int:
        """Bytes of a file, 0 where its rows cannot be told from any place: one value, or a server that cannot seek."""
        with closing(self.opened(file, block_size=FIRST)) as source:
            try:
                size = int(source.seek(0, io.SEEK_END))
            except ValueError:
                return 0
            source.seek(0)
            divided = size > self._part_bytes and self.builder.has_rows(self.builder.rows_of(source, FIRST))
        return size if divided else 0

    def tables(self, state: dict[str, Any]) -> Tables:
        """The rows that count are those of the piece at hand."""
        for number in range(state["shard_idx"], len(self.files)):
            parts = self.share(number)
            for begin, data, before in self._pieces(self.files[number], parts, state["begin"]) if parts else ():
                if begin != state["begin"]:
                    state["begin"], state["shard_example_idx"] = begin, 0
                read, passed_over = -before, state["shard_example_idx"]
                for key, table in self.tables_of_piece(number, data):
                    passed = min(max(passed_over - read, 0), len(table))
                    if passed < len(table):
                        yield key, read + passed, table.slice(passed)
                    read += len(table)
            state["shard_idx"], state["begin"], state["shard_example_idx"] = number + 1, None, 0

    def _pieces(self, file: str, parts: range, begin: int | None) -> Iterator[tuple[int, bytes, int]]:
        """The pieces of a run of parts, from a place on.

        A row is of the part in which it begins.

        Yields:
            Where a piece begins, its bytes, and how many of the first rows in them are not its own.
        """
        builder, of, size = self.builder, self.parts_of(file), self.sizes[file]
        end = None if parts.stop == of else self._row_from(file, parts.stop * size // of)
        with closing(self.opened(file)) as raw:
            source = io.BufferedReader(raw) if _is_compressed(file) else raw
            head, before = builder.head_of(source) if begin else (b"", 0)
            begin = self._row_from(file, parts.start * size // of) if begin is None else begin
            _go_to(source, begin, len(head))
            while end is None or begin < end:
                data = builder.rows_of(source, builder.piece_bytes)
                if begin == 0 and not builder.has_rows(data):
                    data += source.read()
                if begin and not data:
                    return
                piece = data[: None if end is None else end - begin]
                yield begin, head + builder.mended(piece) if begin else piece, before
                if begin == 0:
                    head, before = builder.head_of(io.BytesIO(data))
                begin += max(len(data), 1)

    def _row_from(self, file: str, place: int) -> int:
        """The beginning of the first row that begins at a place or after it."""
        if not place:
            return 0
        with closing(self.opened(file, block_size=FIRST)) as source:
            source.seek(place - 1)
            self.builder.rows_of(source, 1)
            return int(source.tell())

    def tables_of_piece(self, number: int, data: bytes) -> Iterator[tuple[Any, pa.Table]]:
        """The tables that the builder makes of a file in memory."""
        path = f"/hfpipe/{uuid4().hex}/{basename(self.files[number].partition('::')[0])}"
        memory = MemoryFileSystem()
        memory.pipe(path, data)
        arguments = {name: files[number : number + 1] for name, files in self.kwargs.items()}
        try:
            yield from self.generate_tables_fn(**arguments | {"files_iterables": [[f"memory:/{path}"]]})
        except Exception:
            logging.getLogger("datasets").error("Failed to read '%s'", self.files[number])
            raise
        finally:
            memory.store.pop(path, None)  # at the end of the process too, when `rm` fails


def _files_of(arguments: dict[str, Any]) -> list[str]:
    """The files that a builder is to read, without asking whether they exist."""
    return [str(files.args[0]) for files in arguments["files_iterables"]]


def _is_compressed(file: str) -> bool:
    return "::" in file


def _go_to(source: BinaryIO, place: int, here: int) -> None:
    """Goes on to a place in a file; of one that cannot seek, such as a compressed one, all before it is read."""
    try:
        source.seek(place)
    except ValueError:
        while here < place and (data := source.read(min(place - here, PASSED_OVER))):
            here += len(data)


def by_byte_range(rows: IterableDataset) -> IterableDataset:
    """A stream of JSON lines, CSV or text as `ByteRanges`; any other as it is."""
    examples = examples_of(rows)
    builder = file_builder_of(examples)
    if not isinstance(builder, FileBuilder) or not builder.divides:
        return rows
    if any(file.startswith(ARCHIVES) for file in _files_of(examples.kwargs)):
        return rows
    return with_examples(rows, ByteRanges(builder, dict(examples.kwargs)))
