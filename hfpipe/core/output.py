"""Output to a terminal, or to a reader that may go away: `hfpipe run RECIPE | head` trains on and says nothing more."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Forgiving(io.FileIO):
    """Writes to a file descriptor; once its reader is gone, to nowhere."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def forgive_closed_pipes() -> None:
    """Lets standard output and error outlive their readers; leaves streams that something has put in their place."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        raw = _Forgiving(stream.fileno(), "wb", closefd=False)
        text = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
        )
        setattr(sys, name, text)


JOINERS = "\u200c\u200d"  # of Persian, of Indian scripts, of emoji: they print nothing and change nothing else


def printable(text: str) -> str:
    """A line of text from data or a model, with what would steer the terminal written out."""
    return "".join(c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode() for c in text)
