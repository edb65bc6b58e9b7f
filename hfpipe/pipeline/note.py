"""The note of `hfpipe check`, as of a doctor: a mark before each finding, its reason, what to do about it.

On a terminal the marks are coloured and long lines are wrapped; anywhere else a finding is one line, for `grep`.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

from hfpipe.core.output import has_colours, painted

FINE, LOOK, WRONG = ("✓", "green"), ("!", "yellow"), ("✗", "red")
LABEL = 10  # characters of the column of labels
INDENT = " " * (2 + LABEL + 1)


class Note:
    """Prints findings as they are made, and counts those to look at."""

    def __init__(self) -> None:
        self.to_look_at = 0
        self._coloured = has_colours(sys.stdout)

    def fine(self, label: str, text: str, *more: str) -> None:
        """Tells what is in order, or a plain fact.

        Args:
            label: Its subject: `model`, `data`, `memory`.
            text: The finding.
            more: Lines below it.
        """
        self._print(FINE, label, text, more)

    def look(self, label: str, text: str, *more: str) -> None:
        """Tells what a run is not stopped by, though it may not be what is wanted; with what to do about it."""
        self.to_look_at += 1
        self._print(LOOK, label, text, more)

    def wrong(self, label: str, text: str, *more: str) -> None:
        """Tells what stops a run; an error with the remedy follows."""
        self._print(WRONG, label, text, more)

    def stop(self) -> None:
        """Ends the note of a recipe that would not run; the error itself is printed after it."""
        print(f"\n{self._marked(WRONG)} a run would stop here:", flush=True)

    def close(self, launch: str) -> None:
        """Ends the note of a recipe that can be run, with the line that does it."""
        many = f"{self.to_look_at} thing{'s' if self.to_look_at > 1 else ''}"
        told = f"no fault found, {many} to look at (!)" if self.to_look_at else "no fault found"
        mark = LOOK if self.to_look_at else FINE
        print(f"\n{self._marked(mark)} {told}; start it with:\n  {launch}")

    def _print(self, mark: tuple[str, str], label: str, text: str, more: Sequence[str]) -> None:
        head = f"{self._marked(mark)} {label:{LABEL}} "
        for place, line in enumerate((text, *more)):
            first = head if place == 0 else INDENT
            print(first + self._wrapped(line))

    def _marked(self, mark: tuple[str, str]) -> str:
        return painted(*mark) if self._coloured else mark[0]

    def _wrapped(self, line: str) -> str:
        if not sys.stdout.isatty():
            return line
        width = max(40, shutil.get_terminal_size().columns - len(INDENT))
        return f"\n{INDENT}".join(textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""])
