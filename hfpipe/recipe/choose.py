"""Words of a command line, looked at before anything heavy is imported: suites, a stage to cure, generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from hfpipe.core.errors import RecipeError
from hfpipe.recipe.config import Recipe, Suite, Suites
from hfpipe.recipe.document import read_value
from hfpipe.recipe.faults import Fault, did_you_mean, listed
from hfpipe.recipe.passthrough import check_block
from hfpipe.recipe.raw import Block, RawSuite
from hfpipe.recipe.rules.without_effect import check_generation_effect
from hfpipe.recipe.signatures import generation_fields
from hfpipe.recipe.stage_config import KEEPING, Stage

OWN = ("runs", "models", "checkpoints", "outputs")  # which nobody takes for an owner on the Hub


def chosen_suites(suites: Suites, names: Sequence[str] | None, limit: int | None) -> Suites:
    """The suites that are asked for, or the first rows of them.

    Args:
        suites: All suites of the file.
        names: Those to keep; all when None or empty.
        limit: Rows of each suite; all when None.

    Raises:
        RecipeError: There is no such suite.
    """
    for name in names or ():
        if name not in suites.evaluate:
            known = list(suites.evaluate)
            raise RecipeError(
                f"--suite {name}: there is no such suite; the file has {listed(known)}.{did_you_mean(name, known)}"
            )
    kept = {name: suite for name, suite in suites.evaluate.items() if not names or name in names}
    if limit is not None:
        if limit < 1:
            raise RecipeError(f"--limit {limit}: allowed is a number of rows, 1 or more.")
        kept = {name: _first_rows(suite, limit) for name, suite in kept.items()}
    return suites.model_copy(update={"evaluate": kept})


def _first_rows(suite: Suite, limit: int) -> Suite:
    if suite.lm_eval is not None or suite.data.fold is not None:  # a fold is of all rows: fewer would be dealt anew
        return suite.model_copy(update={"limit": min(limit, suite.limit or limit)})
    take = min(limit, suite.data.take or limit)
    return suite.model_copy(update={"data": suite.data.model_copy(update={"take": take})})


def generation_words(words: Sequence[str]) -> dict[str, Any]:
    """Reads `max_new_tokens=200` and other fields of transformers.GenerationConfig.

    Raises:
        RecipeError: There is no such field, or it takes another value, or would do nothing.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.strip():
            raise RecipeError(f"--set {word}: found no NAME=VALUE; write for example --set max_new_tokens=200.")
        found[name.strip()] = read_value(value)
    block = Block(("--set",), found)
    suite = RawSuite(("--set",), {"generation": found}, "--set")
    faults: Iterator[Fault] = chain(
        check_block(block, generation_fields(), "GenerationConfig"), check_generation_effect(suite)
    )
    if told := [f"{' '.join(map(str, fault.steps))}: {fault.text}" for fault in faults]:
        raise RecipeError("\n".join(told))
    return found


def require_model(model: str) -> None:
    """Refuses a model that is written as a folder, or as one in a folder that is here, and is none.

    Args:
        model: A folder, or an id on the Hub. `Qwen/NAME` is one even where a folder `Qwen` holds other models;
            `runs/NAME` and `models/NAME` are none where there is such a folder.

    Raises:
        RecipeError: There is no such folder.
    """
    folder = Path(model).expanduser()
    inside = folder.parent != Path() and folder.parent.is_dir()
    inside = inside and (len(folder.parts) > 2 or folder.parent.name in OWN or any(folder.parent.glob("*/recipe.yaml")))
    if (inside or model.startswith(("/", "./", "../", "~"))) and not folder.is_dir():
        near = did_you_mean(folder.name, [one.name for one in folder.parent.iterdir()]) if inside else ""
        raise RecipeError(f"there is no folder {model}. Name a folder with a model, or its id on the Hub.{near}")


def require_strength(strength: float | None) -> None:
    """Refuses a strength that is not between 0 and 1.

    Raises:
        RecipeError: It is not.
    """
    if strength is not None and not 0 <= strength <= 1:
        raise RecipeError(f"--strength {strength:g}: allowed is a number from 0 (the parent) to 1 (as it was trained).")


def curable_stage(recipe: Recipe, name: str | None) -> Stage:
    """A stage of a recipe whose cures can be compared; the last of them when none is named.

    Raises:
        RecipeError: There is none, or it is of a kind that is not cured.
    """
    names = [one.name for one in recipe.stages if one.kind in KEEPING and one.task == "causal"]
    if name is None and names:
        name = names[-1]
    if name not in names:
        found = f"'{name}' is not a stage that can be cured" if name else "no stage can be cured"
        raise RecipeError(
            f"{found}: cures are for stages that predict next tokens ({listed(KEEPING)}). In this recipe: "
            f"{listed(names) or 'none'}.{did_you_mean(name, names) if name else ''}"
        )
    if recipe.model.architecture is not None and recipe.parent_of(name) == "base":
        raise RecipeError(f"stages.{name} starts from a model made from nothing, so there is nothing to keep.")
    return next(one for one in recipe.stages if one.name == name)
