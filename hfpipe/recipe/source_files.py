"""Names of data files: which kind each is by its ending, and whether a source's path means this machine or the Hub."""

from __future__ import annotations

import os
import re

# The endings that are read, by the builder of `datasets` whose options they take.
FILE_KINDS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".txt", ".md", ".text"), "text"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def file_kind(name: str) -> str | None:
    """The kind of a file by its ending, with or without one of compression; None for any other."""
    stem, ending = os.path.splitext(name.lower())
    if ending in COMPRESSED:
        ending = os.path.splitext(stem)[1]
    return FILE_KINDS.get(ending)


def is_local_name(path: str) -> bool:
    """Returns True if a path can mean nothing but files of this machine: by how it begins, by its ending, or as a
    pattern.
    """
    return path.startswith(("./", "../", "/", "~", "$")) or file_kind(path) is not None or is_pattern(path)


def is_pattern(path: str) -> bool:
    """Returns True if a path is a pattern such as `data/*.jsonl`."""
    return "://" not in path and any(sign in path for sign in "*?[")


def expanded(path: str) -> str:
    """A path with `~` and the variables of the environment in it replaced.

    Raises:
        KeyError: A variable is not set.
    """

    def value(found: re.Match[str]) -> str:
        return os.environ[found[1] or found[2]]

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}|\$(\w+)", value, path))
