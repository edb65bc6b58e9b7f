"""Output to a terminal, or to a reader that may go away: `hfpipe run RECIPE | head` trains on and says nothing more."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

STDERR = 2  # where there is no place left to tell of it


class _Forgiving(io.FileIO):
    """Writes to a file descriptor; to nowhere once its reader or terminal is gone, or its disk full: an error once."""

    is_terminal = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            is_gone = isinstance(error, BrokenPipeError) or (self.is_terminal and error.errno == errno.EIO)
            if not is_gone and self.fileno() != STDERR:
                raise
            return len(data)


def forgive_closed_pipes() -> None:
    """Lets standard output and error outlive their readers; leaves streams that something has put in their place."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        raw = _Forgiving(stream.fileno(), "wb", closefd=False)
        raw.is_terminal = stream.isatty()
        text = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors="backslashreplace" if stream.errors == "strict" else stream.errors,  # what it has no letter for
            line_buffering=stream.line_buffering,
        )
        setattr(sys, name, text)


JOINERS = "\u200c\u200d"  # of Persian, of Indian scripts, of emoji: they print nothing and change nothing else


def printable(text: str) -> str:
    """A line of text from data or a model, with what would steer the terminal written out."""
    return "".join(c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode() for c in text)


COLOURS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "dim": 2}


def has_colours(stream: TextIO) -> bool:
    """Returns True if a stream is a terminal whose user has not turned colours off (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, colour: str) -> str:
    """A text in one of `COLOURS`, for a terminal."""
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"
