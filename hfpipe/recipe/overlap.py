"""Nothing is trained on what a suite holds: the part of that promise that the recipe alone can tell.

Two sources are known to share rows when they are the same table (or name a file in common) and their splits and rows
meet. What only the data can tell is looked for when it is loaded.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from typing import Any

from hfpipe.recipe.faults import Fault, dotted
from hfpipe.recipe.raw import mapping, stages, suites

TRAIN, TEST = "train", "test"  # the split of a source that names none: of a stage, and of a suite


def check_overlap(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields the suites that share rows with what a stage is trained on."""
    sources = [source for stage in stages(data) for source in stage.sources]
    trained = [source for source in sources if source.data.get("decontaminate") is not True]  # looked at row by row
    for suite in suites(data):
        shared = next((source for source in trained if _share_rows(source.data, suite.source.data)), None)
        if shared is not None:
            where = dotted(shared.steps, data)
            text = f"has rows of {where}, and nothing is trained on what a suite holds. Take another split, or `skip:`."
            yield Fault(suite.source.steps, text)


def _share_rows(trained: dict[Any, Any], held_out: dict[Any, Any]) -> bool:
    if not trained.get("path") or _table(trained) != _table(held_out):
        return False
    if trained.get("where") != held_out.get("where"):
        return False  # two conditions may well exclude each other
    first, second = _split(trained, TRAIN), _split(held_out, TEST)
    if first[0] != second[0] or not _files_meet(trained, first[0], held_out, second[0]):
        return False
    if first[1] != second[1] and first[1] and second[1]:
        return _slices_meet(first[1], second[1])
    if first[1] != second[1]:
        return True  # one is a slice of the other
    (start, end), (other_start, other_end) = _rows(trained), _rows(held_out)
    if (start, end) == (other_start, other_end) and not _folds_meet(trained.get("fold"), held_out.get("fold")):
        return False  # of the same rows, so counted from the same place
    return max(start, other_start) < min(end, other_end)


def _folds_meet(first: Any, second: Any) -> bool:
    """Whether two folds of the same rows have rows in common."""
    one, other = mapping(first), mapping(second)
    if not one or not other or one.get("of") != other.get("of"):
        return True
    if None not in (one.get("keep"), other.get("keep")):
        return one["keep"] == other["keep"]
    return not any(None is not a.get("keep") == b.get("leave") for a, b in ((one, other), (other, one)))


def _table(source: dict[Any, Any]) -> tuple[str, ...]:
    path = str(source.get("path"))
    name = source.get("name") or ("text" if path == "builtin" else "")
    return os.path.normpath(path), str(name), os.path.normpath(str(source.get("data_dir") or ""))


def _split(source: dict[Any, Any], default: str) -> tuple[str, str]:
    """Name of the split and its slice: "train[:5%]" -> ("train", ":5%"). Files without a split's name are `train`."""
    files = source.get("data_files")
    if files is not None and not isinstance(files, dict) and "split" not in source:
        return TRAIN, ""
    split = re.fullmatch(r"\s*([^\[]*?)\s*(?:\[(.*)\])?\s*", str(source.get("split") or default))
    return (split[1], split[2] or "") if split else (str(source.get("split")), "")


def _files_meet(trained: dict[Any, Any], split: str, held_out: dict[Any, Any], other_split: str) -> bool:
    files, other_files = _files(trained, split), _files(held_out, other_split)
    return files == other_files or bool(files & other_files)


def _files(source: dict[Any, Any], split: str) -> set[str]:
    files = source.get("data_files")
    files = mapping(files).get(split) if isinstance(files, dict) else files
    return {os.path.normpath(str(file)) for file in (files if isinstance(files, list) else [files]) if file is not None}


def _rows(source: dict[Any, Any]) -> tuple[float, float]:
    """The rows [start, end) that `skip` and `take` leave."""
    skip, take = source.get("skip"), source.get("take")
    start = skip if isinstance(skip, int) else 0
    return start, start + take if isinstance(take, int) else math.inf


def _slices_meet(first: str, second: str) -> bool:
    """Whether two slices such as ":90%" and "90%:" meet; False where they cannot be compared."""
    units = {"%" in part for part in (first, second)}
    ranges = [re.fullmatch(r"(\d*)%?:(\d*)%?", part) for part in (first, second)]
    if len(units) > 1 or not all(ranges):
        return False
    (start, end), (other_start, other_end) = ((int(m[1] or 0), float(m[2] or "inf")) for m in ranges if m)
    return max(start, other_start) < min(end, other_end)
