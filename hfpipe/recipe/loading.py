"""From a file and overrides to a recipe, or to every fault in them at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hfpipe.core.errors import RecipeError
from hfpipe.recipe.continued import is_repeated, take_over
from hfpipe.recipe.faults import report
from hfpipe.recipe.overrides import apply_overrides
from hfpipe.recipe.passthrough import check_passed_through
from hfpipe.recipe.rules import check_rules
from hfpipe.recipe.structure import check_structure
from hfpipe.recipe.words import Recipe
from hfpipe.recipe.yaml_lines import read_document


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe, whole, before anything is loaded; imports no heavy library.

    Args:
        path: A YAML file.
        overrides: Changes such as `stages.chat.lora.r=8`, under the same checks.

    Raises:
        RecipeError: The file cannot be read as YAML, or the recipe has faults: all of them, in the order of the file.
    """
    with _without_collection():
        document = read_document(Path(path))
        faults = [*document.faults, *apply_overrides(document, overrides)]
        taken_over = take_over(document.data)
        recipe, structural = check_structure(document.data)
        further = [*check_passed_through(document.data), *check_rules(document.data)]
    reported = {fault.steps for fault in structural}
    faults += structural + [fault for fault in further if fault.steps not in reported]
    faults = [fault for fault in faults if not is_repeated(fault, faults, taken_over)]
    if faults or recipe is None:
        raise RecipeError(report(document, faults))
    return recipe


@contextmanager
def _without_collection() -> Iterator[None]:
    """Holds the garbage collector back, which would visit the nodes of parsed source again and again for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
