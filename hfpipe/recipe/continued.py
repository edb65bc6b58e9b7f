"""Stages that train the adapter of an earlier stage further, by `parent_adapter: continue`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from hfpipe.recipe.faults import Fault, Steps, found
from hfpipe.recipe.raw import RawStage, mapping, stages, text_of
from hfpipe.recipe.signatures import is_prompt_learning

_OF_AN_ADAPTER = ("lora", "peft", "quantization")
_LANGUAGE = {"pretrain", "sft"}  # kinds that train the same model, of the next token


def parent_of(stage: RawStage, earlier: Sequence[RawStage]) -> RawStage | None:
    """The stage that a stage starts from; None for the base, or where there is none of that name."""
    name = text_of(stage.data.get("parent"))
    if name is None:
        return earlier[-1] if earlier else None
    return next((other for other in earlier if other.name == name), None)


def is_continued(stage: RawStage) -> bool:
    """Whether a stage trains its parent's adapter further."""
    return stage.data.get("parent_adapter") == "continue"


def take_over(data: dict[str, Any]) -> dict[Steps, Steps]:
    """Gives every stage that continues an adapter the words of that adapter, where it does not say them again.

    Args:
        data: The recipe, which is changed.

    Returns:
        Where words were put, and where they were found.
    """
    taken: dict[Steps, Steps] = {}
    every = stages(data)
    for number, stage in enumerate(every):
        parent = parent_of(stage, every[:number])
        if parent is None or not is_continued(stage):
            continue
        has_adapter = "lora" in stage.data or "peft" in stage.data
        for key in _OF_AN_ADAPTER:
            if key in parent.data and key not in stage.data and not (has_adapter and key != "quantization"):
                stage.data[key] = copy.deepcopy(parent.data[key])
                taken[*stage.steps, key] = (*parent.steps, key)
    return taken


def is_repeated(fault: Fault, faults: Sequence[Fault], taken: dict[Steps, Steps]) -> bool:
    """Whether a fault lies in words that were taken over, and is reported where they stand too."""
    origin = taken.get(fault.steps[:3])
    return origin is not None and Fault((*origin, *fault.steps[3:]), fault.text) in faults


def check_continued(stage: RawStage, earlier: Sequence[RawStage]) -> Iterator[Fault]:
    """Yields why a stage cannot train its parent's adapter further."""
    if not is_continued(stage):
        return
    steps, parent = (*stage.steps, "parent_adapter"), parent_of(stage, earlier)
    if parent is None or not ("lora" in parent.data or "peft" in parent.data):
        name = f"'{parent.name}' trains all weights" if parent else "it starts from the base"
        yield Fault(steps, f"there is no adapter to continue: {name}. Remove it, or name another `parent`.")
        return
    merge = "or write `parent_adapter: merge` to train another one on top of it"
    kinds = {str(stage.kind), str(parent.kind)}
    if len(kinds) > 1 and kinds != _LANGUAGE:
        yield Fault(steps, f"the adapter of a {parent.kind} stage is not trained further by a {stage.kind} stage.")
    kind = text_of(mapping(parent.data.get("peft")).get("type"))
    if kind is not None and is_prompt_learning(kind):
        yield Fault(steps, f"peft does not train the prompt of a saved '{kind}' further. Write `parent: base`.")
    for key in _OF_AN_ADAPTER:
        default = "none" if key == "quantization" else None
        now, then = stage.data.get(key, default), parent.data.get(key, default)
        if key in stage.data and now != then:
            text = f"differs from that of '{parent.name}', whose adapter is trained further: "
            text += f"{_first_difference(now, then)} Leave `{key}` out to take it over, {merge}."
            yield Fault((*stage.steps, key), text)


def _first_difference(now: Any, then: Any) -> str:
    if not (isinstance(now, dict) and isinstance(then, dict)):
        return f"found {found(now)}, and there {found(then)}."
    key = next(key for key in (*now, *then) if now.get(key) != then.get(key) or (key in now) != (key in then))
    here, there = (found(block[key]) if key in block else "not given" for block in (now, then))
    return f"`{key}` is {here}, and there {there}."
