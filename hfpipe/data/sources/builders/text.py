"""Text with bytes that are not UTF-8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any, BinaryIO

import pyarrow as pa
from datasets.builder import Key
from datasets.packaged_modules.text.text import Text, TextConfig

from hfpipe.data.sources.builders.base import Divisible
from hfpipe.data.sources.decoding import HANDLER


@dataclass
class MarkingTextConfig(TextConfig):
    """As that of `datasets`."""

    encoding_errors: str | None = HANDLER


class MarkingText(Divisible, Text):
    """Marks bytes that are not UTF-8, in files elsewhere too: `datasets` opens those without regard to the encoding."""

    BUILDER_CONFIG_CLASS = MarkingTextConfig

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

    def _generate_tables(self, base_files: Any, files_iterables: Any) -> Iterator[tuple[Key, pa.Table]]:
        [name] = list(self.config.features or ["text"])
        for shard, files in enumerate(files_iterables):
            for file in files:
                with open(file, "rb") as raw:  # in a stream `datasets` puts its own `open` in this place
                    text = TextIOWrapper(raw, self.config.encoding, self.config.encoding_errors)
                    for part, rows in enumerate(self._rows_of(text)):
                        yield Key(shard, part), self._cast_table(pa.table({name: pa.array(rows, pa.string())}))

    def _rows_of(self, text: TextIOWrapper) -> Iterator[list[str]]:
        """The rows of a file, many at a time."""
        if self.config.sample_by == "document":
            yield [text.read()]
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
