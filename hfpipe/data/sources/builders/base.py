"""What a builder tells of its files, so that they can be read a piece at a time; see `line_files.py`."""

from __future__ import annotations

from typing import Any, BinaryIO

NEWLINE = b"\n"
PIECE = 2 << 20  # bytes: a resume reads a piece again in each lane


class Divisible:
    """A builder whose rows are lines of a file, unless it says otherwise."""

    config: Any
    anywhere = True  # whether a row can be found from any place of a file

    @property
    def piece_bytes(self) -> int:
        """How much of a file is read at a time."""
        return min(int(self.config.chunksize), PIECE)

    @property
    def divides(self) -> bool:
        """Whether its options let a file be read by the piece: not where a newline takes several bytes."""
        return "\n".encode(self.config.encoding or "utf-8") == NEWLINE

    def has_rows(self, first: bytes) -> bool:
        """Whether a file that begins like this has rows, and is not one value."""
        return True

    def mended(self, piece: bytes) -> bytes:
        """A piece that does not begin its file, as it is read."""
        return piece

    def head_of(self, file: BinaryIO) -> tuple[bytes, int]:
        """What goes before pieces that do not begin the file, and how many rows it makes; read from the beginning."""
        return b"", 0

    def rows_of(self, file: BinaryIO, size: int) -> bytes:
        """Whole rows from where the file stands: so many bytes, and what is left of the row that they end in."""
        data = file.read(size)
        return data if not data or data.endswith(NEWLINE) else data + file.readline()
