"""Rules of any value, wherever it stands: what no file name, no text and no number of a run can be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from hfpipe.recipe.faults import Fault, Steps


def check_values(value: Any, steps: Steps = ()) -> Iterator[Fault]:
    """Yields texts and keys with a zero byte or half a character, and numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield Fault(steps, f"found {value}, which nothing can be set to. Write a finite number, or leave it out.")
    if isinstance(value, str):
        if "\0" in value:
            yield Fault(steps, "holds a zero byte, which no text and no file name has. Remove it.")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            yield Fault(steps, "holds half a character (a surrogate), which cannot be written. Remove it.")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(key, str) and ("\0" in key or any("\ud800" <= letter <= "\udfff" for letter in key)):
            yield Fault(steps, "has a key with a zero byte or half a character. Remove it.")
        else:
            yield from check_values(item, (*steps, key))
