"""The import of the heavy libraries: told on a terminal, and without the garbage collector."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hfpipe.core import display


@contextmanager
def importing() -> Iterator[None]:
    """Imports torch, transformers and trl in the block.

    Their modules make a million objects that stay. Python's collector walks over all of them each time their number has
    grown by a quarter, which is a quarter of the time of the import; afterwards `gc.freeze` keeps them out of its way
    while a model trains. Nothing is frozen where torch was there before: what a caller has thrown away, models among
    it, would stay in memory.
    """
    first = gc.isenabled() and "torch" not in sys.modules
    with display.doing("importing torch, transformers and trl"):
        if first:
            gc.disable()
        try:
            yield
        finally:
            if first:
                gc.freeze()
                gc.enable()
