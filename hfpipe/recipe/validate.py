"""Makes a recipe of a file and overrides, or tells every fault in them at once in plain language."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hfpipe.core.errors import RecipeError
from hfpipe.recipe.config import (
    CrossValidation,
    Cures,
    Energy,
    Merge,
    Model,
    Push,
    Recipe,
    Shift,
    Suite,
    Suites,
    Tokenizer,
    TokenizerTraining,
)
from hfpipe.recipe.document import Document, faults_text, read_document
from hfpipe.recipe.faults import Fault, Place, Steps, did_you_mean, found, found_and_allowed, listed, nearest
from hfpipe.recipe.foreign_words import our_word
from hfpipe.recipe.overrides import apply_overrides
from hfpipe.recipe.passthrough import check_passed_through
from hfpipe.recipe.raw import kind_of, sequence
from hfpipe.recipe.rules.adapters import is_repeated, take_over
from hfpipe.recipe.rules.recipe import check_rules, check_suites_file
from hfpipe.recipe.signatures import lora_fields, masking_fields, training_fields
from hfpipe.recipe.source_config import BLOCK, LIST, TURNS, WORD, Augment, Deduplicate, Fold, Turn
from hfpipe.recipe.stage_config import (
    KINDS,
    Counterfactual,
    EarlyStopping,
    Keep,
    KeepKl,
    KeepL2,
    Qat,
    Quantization,
    Replay,
    Samples,
    SelfReplay,
)

_BLOCKS: dict[str, type[BaseModel]] = {
    "model": Model,
    "tokenizer": Tokenizer,
    "train": TokenizerTraining,
    "quantization": Quantization,
    "qat": Qat,
    "replay": Replay,
    "samples": Samples,
    "deduplicate": Deduplicate,
    "augment": Augment,
    "counterfactual": Counterfactual,
    "push": Push,
    "energy": Energy,
    "merge": Merge,
    "shift": Shift,
    "cures": Cures,
    "fold": Fold,
    "early_stopping": EarlyStopping,
    "keep": Keep,
    "kl": KeepKl,
    "l2": KeepL2,
    "cross_validation": CrossValidation,
}
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping (lines of `key: value` below it)",
    "model_type": "a mapping (lines of `key: value` below it)",
    "model_attributes_type": "a mapping (lines of `key: value` below it)",
}
MOST_FAULTS = 200  # that are looked for; each costs a look for the nearest word
_BOUNDS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
_BOUND_WORDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}


def check_structure(data: dict[str, Any]) -> tuple[Recipe | None, list[Fault]]:
    """Reads plain data as a recipe.

    Returns:
        The recipe, or None and what is wrong with it.
    """
    faults = [fault for index, stage in enumerate(sequence(data.get("stages"))) for fault in _check_kind(index, stage)]
    readable = data | {"stages": [_with_kind(stage) for stage in sequence(data.get("stages"))]} if faults else data
    try:
        recipe = Recipe.model_validate(readable)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        translated = (_translate(found, readable, Recipe) for found in errors[:MOST_FAULTS])
        return None, faults + [fault for fault in translated if fault]
    return (None if faults else recipe), faults


def _check_kind(index: int, stage: Any) -> Iterable[Fault]:
    if not isinstance(stage, dict) or (isinstance(stage.get("kind"), str) and stage["kind"] in KINDS):
        return
    kinds, steps = f"the kinds are {listed(KINDS)}", ("stages", index, "kind")
    if "kind" not in stage:
        yield Fault(steps, f"missing; {kinds}.")
    elif stage["kind"] in ("lora", "qlora"):
        yield Fault(
            steps, f"found the text '{stage['kind']}'; {kinds}. Write `kind: sft` and a `lora:` block below it."
        )
    else:
        yield Fault(steps, f"found {found(stage['kind'])}; {kinds}.{did_you_mean(stage['kind'], KINDS)}")


def _with_kind(stage: Any) -> Any:
    """The stage with the kind that was meant, so that the rest of it is checked too."""
    kind = kind_of(stage)
    return stage | {"kind": kind} if isinstance(stage, dict) and kind else stage


def _translate(error: ErrorDetails, data: dict[str, Any], top: type[BaseModel]) -> Fault | None:
    steps = _plain_steps(error["loc"])
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind.startswith("union_tag"):
        return None  # the kind of a stage, which _check_kind has reported
    if kind == "missing":
        about = _description(steps, data, top)
        return Fault(steps, f"missing; {about}." if about else "missing.")
    if kind == "extra_forbidden":
        return Fault(steps, _unknown_key(steps, data, top))
    if kind == "invalid_key":
        return Fault(
            steps, f"found {found(steps[-1])} as a key; allowed is a word. Did you mean '{steps[-1]}' in quotes?"
        )
    if kind == "string_pattern_mismatch":
        about = "letters, digits, '.', '_' and '-', as in `name` or `me/name`" if steps[-1] == "repo_id" else ""
        about = about or "letters, digits, '.', '_' and '-', beginning with a letter or a digit"
        return Fault(steps, f"found {found(value)}; allowed are {about}.")
    if kind == "too_short":
        what = "a list with at least one item" if isinstance(value, list) else "a mapping with at least one entry"
        return Fault(
            steps, f"found {'an empty list' if isinstance(value, list) else 'nothing in it'}; allowed is {what}."
        )
    if kind == "literal_error":
        return Fault(steps, _wrong_word(value, context["expected"]))
    if kind in _BOUNDS:
        bound = _BOUNDS[kind]
        return Fault(steps, f"found {found(value)}; allowed is a number {_BOUND_WORDS[bound]} {context[bound]:g}.")
    if kind == "value_error":
        return Fault(steps, str(context["error"]))
    if kind == "list_type" and steps[-1] == "columns":
        return Fault(steps, found_and_allowed(value, "a mapping (role: column), or a list of columns to read"))
    if kind in _TYPES:
        return Fault(steps, found_and_allowed(value, _TYPES[kind]))
    return Fault(steps, f"found {found(value)}. {error['msg']}.")


def _plain_steps(location: tuple[int | str, ...]) -> Steps:
    """A path without what pydantic adds to it: the kind behind a stage's index, and the tags of shapes."""
    steps = [step for step in location if step not in (WORD, LIST, BLOCK, TURNS, "[key]")]
    if len(steps) > 2 and steps[0] == "stages" and steps[2] in KINDS:
        del steps[2]
    return tuple(steps)


def _wrong_word(value: Any, expected: str) -> str:
    words = [word.strip("' ") for word in expected.replace(" or ", ",").split(",")]
    near = nearest(value, words) if isinstance(value, str) else None
    return found_and_allowed(value, f"one of {listed(words)}" if len(words) > 1 else words[0], near=near)


def _block_at(steps: Steps, data: dict[str, Any], top: type[BaseModel]) -> type[BaseModel]:
    """The keys of the block at a path."""
    if not steps:
        return top
    if len(steps) == 2 and steps[0] == "stages":
        return KINDS[kind_of(sequence(data["stages"])[steps[1]]) or "sft"]
    if len(steps) == 2 and steps[0] == "evaluate":
        return Suite
    if "template" in steps[:-1]:
        return Turn
    if steps[-2:] == ("keep", "replay"):
        return SelfReplay
    return _BLOCKS.get(steps[-1], top)


def _description(steps: Steps, data: dict[str, Any], top: type[BaseModel]) -> str:
    if steps[-1] == "path":  # of a source, whose block is not closed
        return "a Hub data set, a builder (json, parquet, text, csv...), a folder, or `builtin`"
    field = _block_at(steps[:-1], data, top).model_fields.get(str(steps[-1]))
    return (field.description or "") if field else ""


def _unknown_key(steps: Steps, data: dict[str, Any], top: type[BaseModel]) -> str:
    key, block = str(steps[-1]), _block_at(steps[:-1], data, top)
    if len(steps) == 3 and steps[0] == "stages":
        kind = kind_of(sequence(data["stages"])[steps[1]]) or "sft"
        below: dict[str, Callable[[], Any]] = {"training": lambda: training_fields(kind), "lora": lora_fields}
        if kind == "pretrain":
            below["masking"] = masking_fields
        owner = next((name for name, fields in below.items() if key in (fields() or {})), None)
        if owner and key not in block.model_fields:
            return f"unknown key of a {kind} stage. It belongs below `{owner}:`."
        if key == "replay":
            text = f"mixes texts of an earlier stage into one that trains on texts, which a {kind} stage does not."
            return f"{text} Remove it, or start from that stage by `parent`."
        elsewhere = [kind for kind, words in KINDS.items() if key in words.model_fields]
        if elsewhere:
            return f"is a key of a {elsewhere[0]} stage, not of a {kind} stage."
        return f"unknown key of a {kind} stage. {_near_or_all(key, block)}"
    titles: dict[type[BaseModel], str] = {
        Recipe: "a recipe",
        Suites: "a file of suites",
        Suite: "a suite",
        Turn: "a turn",
    }
    title = titles.get(block) or f"`{steps[-2]}`"
    if block is Recipe and (home := _home_in_a_stage(key)):
        return f"unknown key of {title}. It belongs to a stage, {home}."
    return f"unknown key of {title}. {_near_or_all(key, block)}"


def _home_in_a_stage(key: str) -> str | None:
    """The right place in a stage of a key from the recipe's top: beside `kind:`, or below one of its blocks."""
    if any(key in words.model_fields for words in KINDS.values()):
        return "beside its `kind:`"
    blocks = {"training": training_fields("sft"), "lora": lora_fields()}
    return next((f"below `{name}:`" for name, fields in blocks.items() if key in (fields or {})), None)


def _near_or_all(key: str, block: type[BaseModel]) -> str:
    if ours := our_word(key):
        return f"Here it is {ours}."
    keys = [field.alias or name for name, field in block.model_fields.items()]
    return did_you_mean(key, keys).strip() or f"The keys are {listed(keys)}."


def load_recipe(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe, whole, before anything is loaded; imports no heavy library.

    Args:
        path: A YAML file, or what such a file holds.
        overrides: Changes such as `stages.chat.lora.r=8`, under the same checks.

    Raises:
        RecipeError: The file cannot be read as YAML, or the recipe has faults: all of them, in the order of the file.
    """
    with _without_collection():
        document = _document(path)
        faults = [*document.faults, *apply_overrides(document, overrides)]
        taken_over = take_over(document.data)
        recipe, structural = check_structure(document.data)
        checks = chain(check_values(document.data), check_passed_through(document.data), check_rules(document.data))
        further = list(islice(checks, MOST_FAULTS))
    reported = {fault.steps for fault in structural}
    faults += structural + [fault for fault in further if fault.steps not in reported]
    faults = [fault for fault in faults if not is_repeated(fault, faults, taken_over)]
    if faults or recipe is None:
        raise RecipeError(faults_text(document, faults))
    return recipe


def load_suites(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Suites:
    """Reads the suites of a recipe, or a file that has an `evaluate:` block and no stages.

    Args:
        path: A YAML file, or what such a file holds.
        overrides: Changes such as `evaluate.general.batch_size=8`, under the same checks.

    Raises:
        RecipeError: The file cannot be read as YAML, has faults, or has no suite.
    """
    document = _document(path)
    if "stages" in document.data:
        recipe = load_recipe(path, overrides)
        if not recipe.evaluate:
            raise RecipeError(f"{document.name} has no suites: add an `evaluate:` block.")
        return Suites(seed=recipe.seed, model=recipe.model, evaluate=recipe.evaluate)
    faults = [*document.faults, *apply_overrides(document, overrides)]
    suites, structural = None, []
    try:
        suites = Suites.model_validate(document.data)
    except ValidationError as error:
        told = (_translate(found, document.data, Suites) for found in error.errors(include_url=False)[:MOST_FAULTS])
        structural = [fault for fault in told if fault]
    checks = chain(check_values(document.data), check_passed_through(document.data), check_suites_file(document.data))
    reported = {fault.steps for fault in structural}
    faults += structural + [fault for fault in islice(checks, MOST_FAULTS) if fault.steps not in reported]
    if faults or suites is None:
        raise RecipeError(faults_text(document, faults))
    return suites


def _document(path: str | Path | Mapping[str, Any]) -> Document:
    if not isinstance(path, Mapping):
        return read_document(Path(path))
    return Document("the recipe", copy.deepcopy(dict(path)), {(): Place("the recipe", (0, 1, 0))})


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
