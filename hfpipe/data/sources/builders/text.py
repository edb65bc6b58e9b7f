"""Text files: a row is a line, a paragraph or a document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any, BinaryIO

import pyarrow as pa
from datasets import Features, Value
from datasets.packaged_modules.text.text import TextConfig

from hfpipe.data.sources.builders.base import FileBuilder, FilesConfig
from hfpipe.data.sources.decoding import HANDLER

LONGEST = 1_000_000  # characters of a row: a longer document is several rows, parted at a blank line


@dataclass
class TextFilesConfig(FilesConfig, TextConfig):
    """The options of `datasets`, with its default of none for bytes that cannot be decoded replaced by a mark."""

    encoding_errors: str | None = HANDLER


class TextFiles(FileBuilder):
    """Reads text, and marks bytes that cannot be decoded."""

    BUILDER_CONFIG_CLASS = TextFilesConfig
    has_types = False

    @property
    def divides(self) -> bool:
        return self.config.sample_by != "document" and super().divides

    def rows_of(self, file: BinaryIO, size: int) -> bytes:
        """Lines; or paragraphs, the last of which ends at the first blank line after one that is not."""
        data = super().rows_of(file, size)
        written = False
        while self.config.sample_by == "paragraph" and data and (line := file.readline()):
            data += line
            if written and not line.strip(b"\r\n"):
                break
            written = bool(line.strip(b"\r\n"))
        return data

    def parts_of(self, file: str) -> Iterator[list[str]]:
        with open(file, "rb") as raw:  # in a stream `datasets` puts its own `open` in this place
            text = TextIOWrapper(raw, self.config.encoding, self.config.encoding_errors)
            for number, rows in enumerate(self._rows_in(text)):
                if number == 0 and rows:
                    rows[0] = rows[0].removeprefix("\ufeff")
                yield rows

    def _rows_in(self, text: TextIOWrapper) -> Iterator[list[str]]:
        """The rows of a file, many at a time."""
        if self.config.sample_by == "document":
            yield from ([part] for part in _parted(text))
            return
        rest = ""
        while lines := text.readlines(self.config.chunksize):
            if self.config.sample_by == "line":
                yield lines if self.config.keep_linebreaks else [line.removesuffix("\n") for line in lines]
            else:
                *paragraphs, rest = (rest + "".join(lines)).split("\n\n")
                yield [*filter(None, paragraphs)]
        if rest:
            yield [rest]

    def table_of(self, part: list[str]) -> pa.Table:
        [name] = list(self.config.features or ["text"])
        return pa.table({name: pa.array(part, pa.string())})

    def _split_generators(self, dl_manager: Any) -> Any:
        splits = super()._split_generators(dl_manager)
        self.info.features = self.config.features or Features({"text": Value("string")})
        return splits


def _parted(text: TextIOWrapper) -> Iterator[str]:
    """A document, in parts where it is longer than a row may be; parted at a blank line, a newline or a blank."""
    rest = text.read(LONGEST)
    while more := text.read(LONGEST):
        for sign in ("\n\n", "\n", " "):
            if (place := rest.rfind(sign, LONGEST // 2)) >= 0:
                break
        else:
            place, sign = len(rest), ""
        yield rest[: place + len(sign)]
        rest = rest[place + len(sign) :] + more
        while len(rest) > 2 * LONGEST:
            yield rest[:LONGEST]
            rest = rest[LONGEST:]
    yield rest
