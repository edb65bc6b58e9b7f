"""Numbers whose text is the one that stands in the file: the others are kept as text.

`str` of a number must give back what a person sees in the file, for that is what a template trains on and what an
answer is compared with: 7 and 0.5 are numbers, 007, 0.50, 1e3 and 12345678901234567890 stay texts.
"""

from __future__ import annotations

import re

WHOLE = r"0|-?[1-9][0-9]{0,17}"  # fits into 64 bits
LONGEST_DECIMAL = 16  # characters: a float gives back 15 digits
# Python writes numbers below 0.0001 with an exponent.
DECIMAL = r"-?(?:[1-9][0-9]*\.(?:[0-9]*[1-9]|0)|0\.(?:0|(?:[1-9]|0[1-9]|00[1-9]|000[1-9])(?:[0-9]*[1-9])?))"
_WHOLE, _DECIMAL = re.compile(WHOLE), re.compile(DECIMAL)


class NumberText(str):
    """The text of a number that no float or 64-bit integer gives back."""

    __slots__ = ()


def whole_number(text: str) -> int | NumberText:
    """A whole number of a file, or its text."""
    return int(text) if _WHOLE.fullmatch(text) else NumberText(text)


def decimal_number(text: str) -> float | NumberText:
    """A number with a point or an exponent, or its text."""
    return float(text) if len(text) <= LONGEST_DECIMAL and _DECIMAL.fullmatch(text) else NumberText(text)
