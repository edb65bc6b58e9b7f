"""Reads docstrings out of source files with `ast`; nothing is imported or run.

`corpus.py` starts this file as a program, once for each part of the corpus: modules and paths come in as JSON on the
standard input, docstrings go out as JSON. It needs nothing but the standard library, so that it starts at once, and it
is no process of a pool, so that it works in a notebook and beneath a script without `if __name__ == "__main__"`.
"""

from __future__ import annotations

import ast
import gc
import inspect
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIN_CHARACTERS = 200
MIN_DENSITY = (
    0.25  # of a file's bytes, in long triple-quoted strings: a third of the code holds two thirds of the prose
)


def docstrings_of(files: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Docstrings of at least 200 characters, from those files that hold many.

    Args:
        files: Pairs of a module's name and its path. A file that cannot be read or parsed gives nothing.

    Returns:
        `module`, `name` (dotted, empty for the module's own), `signature` (empty unless a function) and `text` of each.
    """
    found: list[dict[str, str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        for module, path in files:
            try:
                source = Path(path).read_bytes()
                if _density(source) >= MIN_DENSITY:
                    found += list(_in_body(ast.parse(source), module, ""))
            except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
                continue
    return found


def _density(source: bytes) -> float:
    quoted = map(len, source.split(b'"""')[1::2])
    return sum(length for length in quoted if length >= MIN_CHARACTERS) / max(len(source), 1)


def _in_body(node: ast.Module | ast.ClassDef, module: str, prefix: str) -> Iterator[dict[str, str]]:
    """The docstrings of a module or class and of what is defined in it."""
    if isinstance(node, ast.Module):
        yield from _own(node, module=module, name="", signature="")
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{child.name}"
            signature = "" if isinstance(child, ast.ClassDef) else f"{child.name}({ast.unparse(child.args)})"
            yield from _own(child, module=module, name=name, signature=signature)
            if isinstance(child, ast.ClassDef):
                yield from _in_body(child, module, f"{name}.")


def _own(node: Any, **place: str) -> Iterator[dict[str, str]]:
    raw = ast.get_docstring(node, clean=False)
    if raw and len(raw) >= MIN_CHARACTERS:
        text = inspect.cleandoc(raw).strip()
        if len(text) >= MIN_CHARACTERS:
            yield {**place, "text": text}


if __name__ == "__main__":
    gc.disable()  # trees come and go whole
    json.dump(docstrings_of(json.load(sys.stdin)), sys.stdout)
