"""`--set stages.chat.lora.r=8`: changes to a recipe from the command line, under the same checks as the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hfpipe.core.errors import RecipeError
from hfpipe.recipe.document import Document, read_value
from hfpipe.recipe.faults import Fault, Place, Steps, did_you_mean, found, listed


def apply_overrides(document: Document, overrides: Sequence[str]) -> list[Fault]:
    """Changes the document in place, one override after the other.

    An override is `path=value`: the path has a stage's name or its index, the value is YAML, `null` removes the key.

    Returns:
        The overrides that cannot be applied. What a value may be is checked later, with the rest of the recipe.
    """
    faults = []
    for number, override in enumerate(overrides):
        place = Place(f"--set {override}", (1, number, 0))
        try:
            _apply(document, override, place)
        except _Impossible as error:
            faults.append(Fault(error.steps, str(error), place))
    return faults


class _Impossible(Exception):
    """An override that has no place in the recipe."""

    def __init__(self, text: str, steps: Steps = ()) -> None:
        super().__init__(text)
        self.steps = steps


def _apply(document: Document, override: str, place: Place) -> None:
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise _Impossible("found no `path=value`; write for example --set stages.chat.lora.r=8")
    if not text.strip():
        raise _Impossible("found no value after `=`. Write null to remove the key, or '' for an empty text.")
    try:
        value = read_value(text)
    except RecipeError as error:
        raise _Impossible(f"the value is not YAML; put it in quotes. ({error})") from error

    container: Any = document.data
    steps: Steps = ()
    while True:
        step, parts = _next_step(container, parts, steps)
        steps = (*steps, step)
        if not parts:
            break
        if isinstance(container, dict) and container.get(step) is None:
            container[step] = {}
            document.places[steps] = place
        container = container[step]
    if value is None:
        _remove(document, container, steps)
    else:
        container[steps[-1]] = value
        _forget(document, steps)
        document.places[steps] = place


def _next_step(container: Any, parts: list[str], steps: Steps) -> tuple[Any, list[str]]:
    """The key or index that the path names next, and what is left of the path. A name may have dots in it."""
    if isinstance(container, dict):
        known = {str(key): key for key in container}
    elif isinstance(container, list):
        known = {str(index): index for index in range(len(container))}
        if steps == ("stages",):
            names = [item.get("name") if isinstance(item, dict) else None for item in container]
            known |= {name: index for index, name in enumerate(names) if isinstance(name, str)}
    else:
        raise _Impossible(f"found {found(container)}, which has no keys below it.", steps)
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in known:
            return known[name], parts[length:]
    if isinstance(container, dict):
        return parts[0], parts[1:]
    what = "stage" if steps == ("stages",) else "item"
    words = [name for name in known if what == "item" or not name.isdigit()] or list(known)
    raise _Impossible(f"there is no {what} '{parts[0]}', only {listed(words)}.{did_you_mean(parts[0], words)}", steps)


def _remove(document: Document, container: Any, steps: Steps) -> None:
    index = steps[-1]
    if isinstance(container, dict):
        if index not in container:
            raise _Impossible(f"there is no such key to remove.{did_you_mean(index, map(str, container))}", steps)
        del container[index]
        _forget(document, steps)
        return
    del container[index]
    depth = len(steps) - 1
    moved = {}
    for known, place in document.places.items():
        if known[:depth] != steps[:-1] or len(known) <= depth or known[depth] < index:
            moved[known] = place
        elif known[depth] > index:
            moved[(*known[:depth], known[depth] - 1, *known[depth + 1 :])] = place
    document.places = moved


def _forget(document: Document, steps: Steps) -> None:
    """Drops the places of a key and of all below it."""
    document.places = {known: place for known, place in document.places.items() if known[: len(steps)] != steps}
