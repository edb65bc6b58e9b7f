"""Faults of a recipe: each with its path, its line, what was found, what is allowed, and the nearest word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

Steps = tuple[Any, ...]  # keys and list indices from the top of the recipe: ("stages", 0, "training", "max_steps")


@dataclass(frozen=True)
class Place:
    """The place of a key: `file:line` or the override it came from, and its rank in reading order."""

    text: str
    order: tuple[int, int, int]


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a recipe.

    Args:
        steps: Path to the key; for a missing key, the path it would have.
        text: What was found, what is allowed, what to do.
        place: Where, if that is not where `steps` stands.
    """

    steps: Steps
    text: str
    place: Place | None = None


def dotted(steps: Steps, data: Any) -> str:
    """The path as `--set` takes it: `stages.law.training.max_steps`, with the stage's name for its index."""
    parts = [str(step) for step in steps]
    if len(steps) > 1 and steps[0] == "stages" and isinstance(steps[1], int):
        parts[1] = _stage_names(data).get(steps[1], parts[1])
    return ".".join(parts)


def _stage_names(data: Any) -> dict[int, str]:
    """Index to name, of the stages whose name is theirs alone."""
    stages = data.get("stages") if isinstance(data, dict) else None
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in (stages or [])]
    return {index: name for index, name in enumerate(names) if isinstance(name, str) and names.count(name) == 1}


def did_you_mean(word: Any, words: Iterable[str]) -> str:
    """ " Did you mean x?", or nothing where no word is near."""
    near = nearest(word, words)
    return f" Did you mean {near}?" if near else ""


LONGEST_WORD = 60  # letters of what could be a misspelt word


def nearest(word: Any, words: Iterable[str]) -> str | None:
    """The word that is meant, whatever its capitals and dashes; None where no word is near."""
    if len(str(word)) > LONGEST_WORD:
        return None
    plain = {_plain(known): known for known in words}
    close = difflib.get_close_matches(_plain(str(word)), plain, n=1, cutoff=0.6)
    return plain[close[0]] if close else None


def near_to(word: str, words: Iterable[str]) -> list[str]:
    """The few words nearest to one, itself first."""
    return difflib.get_close_matches(word, list(words), n=5, cutoff=0.0)


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")


def found(value: Any) -> str:
    """A value in words: "the text 'a'", "the number 2.5", "a list"."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text '{value}'" if len(value) <= 60 else f"the text '{value[:57]}...'"
    return "a list" if isinstance(value, list) else "a mapping"


def found_and_allowed(value: Any, allowed: str, *, near: str | None = None) -> str:
    """The sentence for a value of a wrong type, with the likely cause when it is a quoted or an old-style value."""
    text = f"found {found(value)}; allowed is {allowed}."
    if isinstance(value, str) and "true or false" in allowed and value.lower() in ("yes", "on", "no", "off", "y", "n"):
        return f"{text} Did you mean {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}?"
    if isinstance(value, str) and "number" in allowed and _is_number(value):
        return f"{text} Did you mean {value} without quotes?"
    if isinstance(value, (int, float)) and not isinstance(value, bool) and "text" in allowed:
        return f"{text} Did you mean '{value}' in quotes?"
    return f"{text} Did you mean {near}?" if near else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def listed(words: Iterable[str]) -> str:
    """a, b, c."""
    return ", ".join(words)
