"""The files in which a run keeps what it knows: one table of their shapes, asked before a command reads a run folder.

A file that was cut short, edited or mixed up is told with its name and the place in it, and never guessed at: what is
trained is not trained again over a word in a file. Imports nothing heavy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfpipe.core.errors import DataError

# A shape is a type, a tuple of shapes of which one fits, [shape] for a list, {str: shape} for a mapping of any keys, or
# a mapping of names to shapes; a name with ? may be absent. Other names may be there.
NUMBER, MAYBE = (int, float), type(None)
SCORE: dict[Any, Any] = {
    "stage": str,
    "suite": str,
    "metric": str,
    "value": NUMBER,
    "stderr": (*NUMBER, MAYBE),
    "n": int,
    "higher_is_better": bool,
    "?low": (*NUMBER, MAYBE),
    "?high": (*NUMBER, MAYBE),
    "?paired": {str: (*NUMBER, {str: (*NUMBER, str, bool, MAYBE)}, MAYBE)},
    "?signature": str,
    "?ideal": (*NUMBER, MAYBE),
    "?baselines": {str: NUMBER},
}
SOURCE_FACTS = {"rows": int, "?token_share": NUMBER, "?documents": int, "?epochs": NUMBER, "?format": str} | {
    f"?{kind}{part}": shape
    for kind in ("dirty", "mended", "removed")
    for part, shape in (("", {str: int}), ("_ids", [str]))
}
EARLY_STOPPING = {"suite": str, "metric": str, "step": int, "value": NUMBER, "stopped_early": bool, "evaluations": list}
FILES = {str: [(int, str)]}  # size and hash by name
DONE = {
    "hash": str,
    "parent": str,
    "steps": int,
    "?last_loss": (*NUMBER, MAYBE),
    "?dialled": {"strength": NUMBER},
    "?early_stopping": (EARLY_STOPPING, MAYBE),
    "?files": FILES,
    "data": {"?sources": {str: SOURCE_FACTS}, "?cut_share": NUMBER, "?padding_share": NUMBER},
}
OVERLAP = {"stage": str, "source": str, "suite": str, "which": [str], "?near": int} | dict.fromkeys(
    ("rows", "looked_at", "exact", "partly", "touched"), int
)
INTERVAL = {"value": NUMBER, "low": NUMBER, "high": NUMBER}
SHIFT = {
    "stage": str,
    "suite": str,
    "about": str,
    "reading": str,
    "jsd": NUMBER,
    "jsd_noise": NUMBER,
    "rows": [int],
    "auc": (INTERVAL, MAYBE),
    "bits_per_byte": ([INTERVAL], MAYBE),
}
_TOTALS = ("device_hours", "tokens", "flops", "kwh", "kg_co2", "tokens_per_second", "mfu", "data_wait")
COST = {
    "seconds": NUMBER,
    "attempts": int,
    "measured": int,
    "?device": str,
    "?devices": int,
    "energy_by": (str, MAYBE),
    "country": (str, MAYBE),
} | {f"?{name}": (*NUMBER, MAYBE) for name in (*_TOTALS, "peak_memory", "predicted_memory")}
POINT = {"strength": NUMBER, "scores": [SCORE], "?over": [str], "?inside": (bool, MAYBE)} | {
    f"?{key}{part}": ([NUMBER], MAYBE) if part == "_interval" else (*NUMBER, MAYBE)
    for key in ("gain", "forgetting")
    for part in ("", "_stderr", "_interval")
}
ENVIRONMENT = {
    "hfpipe": str,
    "python": str,
    "packages": {str: str},
    "hardware": {"?system": str, "?cpus": (int, MAYBE), "?gpus": [str]},
    "?launch": {"processes": int},
    "base": {"id": str, "revision": (str, MAYBE)},
}
RECORD = {"?row": int, "?values": {str: (*NUMBER, MAYBE)}, "?asked": str} | dict.fromkeys(
    ("?likelihood", "?choice", "?generation", "?number"), dict
)
KEPT = {"batches": int, "texts": int, "tokens": int, "done": bool, "shown": [str]} | dict.fromkeys(
    ("ended", "duplicates", "repeats"), NUMBER
)
# The shape of each file, and what to do when it is another. `*` stands for any name, as in a shell.
AGAIN = "Remove the file and run the recipe again: what it holds is worked out anew."
_MADE_AGAIN = "Remove the folder `keep`, and run the recipe again: its texts are made anew, the same ones."
SHAPES: dict[str, tuple[Any, str]] = {
    "stages/base/done.json": ({"hash": str, "revision": str, "commit": (str, MAYBE)}, AGAIN),
    "stages/*/done.json": (
        DONE,
        "It says that the stage is trained. Put a copy of the file back; or move the folder of the stage away, and "
        "`hfpipe run` trains it again.",
    ),
    "stages/*/stage.json": (
        {"hash": str},
        "It says what the stage was trained by. Put a copy of the file back, or move the folder of the stage away, and "
        "`hfpipe run` trains it again.",
    ),
    "stages/*/scores.json": ({str: {"hash": str, "scores": [SCORE]}}, AGAIN),
    "stages/*/predictions/*.jsonl": (RECORD, "Remove the file and scores.json beside its folder, and run again."),
    "stages/*/strengths/*/*.jsonl": (RECORD, "Remove the folder `strengths` and dial.json beside it, and run again."),
    "stages/*/dial.json": ({"hash": str, "points": [POINT], "?best": (*NUMBER, MAYBE), "?verdict": str}, AGAIN),
    "stages/*/dial/strength.json": ({"strength": NUMBER, "?files": FILES}, AGAIN),
    "stages/*/merge.json": (
        {
            "base": str,
            "costs": {str: NUMBER},
            "loss": NUMBER,
            "?difference": NUMBER,
            "?files": FILES,
            "?suites": [{"suite": str, "metric": str, "adapter": NUMBER, "merged": NUMBER}],
        },
        AGAIN,
    ),
    "stages/*/cost.json": ({"?stage": str, "attempts": [dict], "total": COST}, AGAIN),
    "stages/*/keep/*.json": (KEPT, _MADE_AGAIN),
    "stages/*/keep/*.jsonl": ({"ended": bool, "tokens": int, "?text": str, "?messages": list}, _MADE_AGAIN),
    "stages/*/length.json": ({"hash": str, "?lanes": int, "rows": NUMBER}, AGAIN),
    "stages/*/log.jsonl": (
        {"step": int, "?max_steps": int, "?loss": NUMBER},
        "Remove the file: it is a log, and nothing depends on it.",
    ),
    "scorecard.json": ([SCORE], AGAIN),
    "overlap.json": ({"pairs": [OVERLAP]}, AGAIN),
    "shift.json": ({"hash": str, "pairs": [SHIFT]}, AGAIN),
    "hub.json": ({str: {"revision": (str, MAYBE)}}, AGAIN),
    "environment.json": (ENVIRONMENT, AGAIN),
    "repeats.json": ({"repeats": [str], "scores": [{"stage": str, "suite": str, "metric": str}]}, AGAIN),
}
_SPELLED = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
    MAYBE: "null",
}


def require_whole_state(folder: Path) -> None:
    """Refuses a run folder with a damaged file.

    Args:
        folder: The run folder; one that is not there is whole.

    Raises:
        DataError: A file is not what hfpipe writes; the message names it, the place in it, and the remedy.
    """
    told: set[Path] = set()
    for pattern, (shape, remedy) in SHAPES.items():
        for path in sorted(folder.glob(pattern)):
            if path in told:
                continue  # the base's, by an entry of its own
            told.add(path)
            if why := fault_of_file(path, shape):
                raise DataError(f"{path} is damaged: {why}. {remedy}")


def fault_of_file(path: Path, shape: Any) -> str | None:
    """Returns why a JSON file, or one with a JSON value a line, is not of a shape; None where it is."""
    try:
        text = path.read_bytes().decode("utf-8")
        if path.suffix == ".json":
            return fault_of_value(json.loads(text), shape)
        lines = text.split("\n")
        if lines[-1] and path.name == "log.jsonl":
            lines.pop()  # a line that a kill cut short
        for number, line in enumerate(lines, 1):
            if line.strip() and (why := fault_of_value(json.loads(line), shape)):
                return f"line {number}, {why}"
    except IsADirectoryError:
        return "it is a folder"
    except UnicodeDecodeError:
        return "it holds bytes that are not text"
    except RecursionError:
        return "it is nested too deep"
    except ValueError as error:
        return f"it is not whole JSON ({error})"
    return None


def fault_of_value(value: Any, shape: Any, place: str = "") -> str | None:
    """Returns what in a value does not fit a shape, with its place; None where all fits."""
    shapes = shape if isinstance(shape, tuple) else (shape,)
    faults = [_misfit(value, one, place) for one in shapes]
    if None in faults:
        return None
    inner = next((why for why in faults if why and not why.startswith(f"{place or 'it'} is ")), None)
    return (
        inner or f"{place or 'it'} is {_found(value)}, where {' or '.join(dict.fromkeys(map(_spell, shapes)))} belongs"
    )


def _misfit(value: Any, shape: Any, place: str) -> str | None:
    if isinstance(shape, type):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = {int: number and isinstance(value, int), float: number and math.isfinite(value)}
        right = fits[shape] if shape in fits else isinstance(value, shape)
        return None if right and not (shape is str and _torn(value)) else f"{place or 'it'} is {_found(value)}"
    if not isinstance(value, list if isinstance(shape, list) else dict):
        return f"{place or 'it'} is {_found(value)}"
    return next(
        (why for item, part, where in _parts(value, shape, place) if (why := fault_of_value(item, part, where))), None
    )


def _parts(value: Any, shape: Any, place: str) -> Iterator[tuple[Any, Any, str]]:
    """Yields the parts of a list or mapping, with the shape and the place of each."""
    before = f"{place}." if place else ""
    if isinstance(shape, list):
        yield from ((item, shape[0], f"{before}{number}") for number, item in enumerate(value))
    elif str in shape:
        yield from ((item, shape[str], f"{before}{key}") for key, item in value.items())
    else:
        for name, part in shape.items():
            key = name.removeprefix("?")
            if key in value:
                yield value[key], part, f"{before}{key}"
            elif key == name:
                yield _ABSENT, part, f"{before}{key}"


_ABSENT = object()


def _torn(text: str) -> bool:
    """Returns True if a text holds half of a character, which cannot be written."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _spell(shape: Any) -> str:
    return _SPELLED[shape if isinstance(shape, type) else type(shape)]


def _found(value: Any) -> str:
    if value is _ABSENT:
        return "missing"
    if isinstance(value, bool | int | float | str):
        return f"{json.dumps(value)[:60]}"
    return _SPELLED.get(type(value), "null")
