"""Rules of a stage's adapter: `lora:` for short, or `peft: {type: ...}` for every kind of adapter that PEFT has.

A stage may train the adapter of an earlier stage further, by `parent_adapter: continue`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from hfpipe.recipe.faults import Fault, Steps, did_you_mean, found, listed
from hfpipe.recipe.raw import Block, RawStage, as_text, mapping, stages, suites
from hfpipe.recipe.signatures import is_prompt_learning, peft_types
from hfpipe.recipe.stage_config import CHANGES_THE_BASE

# What these types need besides a config, or why a training loop of next tokens does not train them.
_NOT_TRAINED = {
    "adalora": "its ranks change while it trains, which a checkpoint of PEFT does not keep",
    "adaption_prompt": "it replaces the attention of a few architectures",
    "cartridge": "it is distilled from a model that sees a document",
    "cpt": "it needs the tokens of its examples",
    "multitask_prompt_tuning": "it needs the number of a task in every row",
    "p_tuning": "the encoder that makes its tokens is not kept in a checkpoint of PEFT",
    "poly": "it needs the number of a task in every row",
    "shadow": "it runs beside the model",
    "xlora": "it needs adapters that are trained already",
}
# Whose change of the weights can be scaled by its own tensors; see hfpipe/model/interpolate.py.
DIALLED = ("lora", "vera", "loha", "lokr", "ia3")
_NOT_MERGED = ("lily",)  # PEFT has no merge for it
# They are worked out from data or from the weights in full precision by a call of their own, which a config is not.
_INITS_BY_CALL = ("corda", "eva", "loftq", "lora_ga")
_INITS_OF_WEIGHTS = (*CHANGES_THE_BASE, "mica")


def adapter_of(stage: RawStage) -> Block | None:
    """The block of a stage's adapter, with its `type`; None where all weights are trained."""
    if "lora" in stage.data:
        block = stage.at("lora")
        return Block(block.steps, {"type": "lora", **block.data})
    return stage.at("peft") if "peft" in stage.data else None


def is_mergeable(stage: RawStage) -> bool:
    """Returns True if the stage's adapter can become part of the weights; a prompt cannot."""
    adapter = adapter_of(stage)
    kind = as_text(adapter.data.get("type")) if adapter else None
    return kind is None or is_mergeable_type(kind)


def is_mergeable_type(kind: str) -> bool:
    """Returns True if PEFT can make an adapter of this type part of the weights."""
    return not (is_prompt_learning(kind) or kind in _NOT_MERGED)


def check_adapter(stage: RawStage) -> Iterator[Fault]:
    """Yields what is wrong with the adapter of a stage beside the fields of its class."""
    for key, instead in (("lora", "lora: {}"), ("peft", "peft: {type: ia3}")):
        if key in stage.data and stage.data[key] is None:
            text = f"found nothing below it. Write `{instead}` for PEFT's defaults, or remove it to train all weights."
            yield Fault((*stage.steps, key), text)
    if "lora" in stage.data and "peft" in stage.data:
        text = "the stage has `lora:` already, which is short for `peft: {type: lora}`. Keep one of the two."
        yield Fault((*stage.steps, "peft"), text)
    elif isinstance(stage.data.get("peft"), dict):
        yield from _check_type(stage, stage.at("peft"))
    yield from _check_quantization(stage)
    yield from _check_qat(stage)
    adapter = adapter_of(stage)
    if adapter is not None and adapter.data.get("type") == "lora":
        yield from _check_init(stage, adapter)
        yield from _check_layers(adapter)


def _check_type(stage: RawStage, block: Block) -> Iterator[Fault]:
    types = [name for name in peft_types() if name not in _NOT_TRAINED]
    steps, kind = (*block.steps, "type"), block.data.get("type")
    if not types:
        return
    if kind is None:
        yield Fault(steps, f"missing; the kind of adapter, one of {listed(types)}.")
    elif kind in _NOT_TRAINED:
        yield Fault(steps, f"'{kind}' is not trained by a stage: {_NOT_TRAINED[kind]}. The types are {listed(types)}.")
    elif kind not in types:
        yield Fault(steps, f"found {found(kind)}; the types are {listed(types)}.{did_you_mean(kind, types)}")
    elif kind == "prefix_tuning" and block.data.get("prefix_projection"):
        text = "the projection is not kept in a checkpoint of PEFT, so a run could not be continued. Remove it."
        yield Fault((*block.steps, "prefix_projection"), text)
    elif kind == "trainable_tokens" and not block.data.get("token_indices"):
        text = "missing; the ids of the tokens to train. Those of `model.tokenizer.add_tokens` are trained by `lora:`."
        yield Fault((*block.steps, "token_indices"), text)
    elif stage.kind != "sft" and is_prompt_learning(kind):
        text = f"'{kind}' learns tokens before a prompt, which no {stage.kind} stage does."
        yield Fault(steps, f"{text} Take `kind: sft`, or an adapter of the weights, such as `lora`.")


def _check_quantization(stage: RawStage) -> Iterator[Fault]:
    form = _form(stage)
    if form is not None and adapter_of(stage) is None:
        bits = "4-bit" if form == "nf4" else "8-bit"
        text = f"a full fine-tune of a {bits} model is not possible: its weights cannot be trained."
        yield Fault((*stage.steps, "quantization"), f"{text} Add `lora: {{r: 16}}`, or remove `quantization`.")


_ROUNDED_TO = {"int4": ("int8", None), "int8": ("int8", None)}  # weights, and what activations go with them


def _check_qat(stage: RawStage) -> Iterator[Fault]:
    """Yields what a stage says wrongly of the quantization that it trains for."""
    block = stage.at("qat")
    weights, activations = (block.data.get(key) for key in ("weights", "activations"))
    if not block.data or not isinstance(weights, str):
        return
    if _form(stage) is not None:
        text = "rounds the weights of the base in each pass, and `quantization` stores them rounded. Keep one of the"
        yield Fault((*stage.steps, "qat"), f"{text} two.")
    if activations not in _ROUNDED_TO.get(weights, (weights,)):
        text = "leave it out, or write int8" if weights in _ROUNDED_TO else f"write {weights}"
        yield Fault((*block.steps, "activations"), f"with `weights: {weights}`, {text}.")
    for key in ("group_size", "after_steps") if weights not in _ROUNDED_TO else ():
        if key in block.data:
            yield Fault((*block.steps, key), f"is of integers, and `weights` is {weights}. Leave it out.")


def _form(stage: RawStage) -> str | None:
    quantization: Any = stage.data.get("quantization")
    form = quantization.get("type") if isinstance(quantization, dict) else quantization
    return form if form in ("nf4", "int8") else None


def _check_layers(adapter: Block) -> Iterator[Fault]:
    for key in ("layers_to_transform", "layers_pattern"):
        if adapter.data.get(key) is not None and not isinstance(adapter.data.get("target_modules"), list):
            text = "needs the modules of those layers by name: `target_modules: [q_proj, v_proj]`, which is all-linear"
            yield Fault((*adapter.steps, key), f"{text} when it is absent. Add it.")
            return


def _check_init(stage: RawStage, adapter: Block) -> Iterator[Fault]:
    init, steps = str(adapter.data.get("init_lora_weights", "")), (*adapter.steps, "init_lora_weights")
    if init in _INITS_BY_CALL:
        text = f"'{init}' is made from data or by quantizing the base before the training, which hfpipe does not do."
        yield Fault(steps, f"{text} Take pissa, olora, orthogonal or gaussian, or leave it out.")
    elif init.startswith(_INITS_OF_WEIGHTS) and _form(stage) is not None:
        text = f"'{init}' starts from the weights of the base in full precision, and this base is quantized."
        yield Fault(steps, f"{text} Remove `quantization`, or take orthogonal or gaussian.")
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if adapter.data.get(key)]
    if init.startswith(CHANGES_THE_BASE) and patterns:
        text = f"'{init}' is converted to an adapter of the untouched base, which needs one rank for all modules."
        yield Fault(steps, f"{text} Remove `{patterns[0]}`.")


def check_added_tokens(stages: list[RawStage], data: dict[str, Any]) -> Iterator[Fault]:
    """Yields every adapter that cannot train the embeddings of added tokens: PEFT does so beside LoRA only."""
    tokenizer = mapping(mapping(data.get("model")).get("tokenizer"))
    added = next((key for key in ("add_tokens", "add_special_tokens") if tokenizer.get(key)), None)
    for stage in stages if added else ():
        adapter = adapter_of(stage)
        kind = as_text(adapter.data.get("type")) if adapter is not None else None
        if adapter is not None and kind not in (None, "lora") and not adapter.data.get("modules_to_save"):
            text = f"'{kind}' does not train the embeddings of tokens that `model.tokenizer.{added}` adds."
            yield Fault((*adapter.steps, "type"), f"{text} Take `lora`, or name the embeddings in `modules_to_save`.")


def check_merges(every: list[RawStage], data: dict[str, Any]) -> Iterator[Fault]:
    """Yields every merge that cannot be: of `merge:`, of `push:`, and of an adapter that a later stage starts from."""
    by_name = {stage.name: stage for stage in every if stage.name}
    for number, stage in enumerate(every):
        parent = parent_of(stage, every[:number])
        if parent is not None and not is_continued(stage) and not is_mergeable(parent):
            text = f"the stage starts from '{parent.name}', whose adapter cannot be merged into the weights."
            yield Fault((*stage.steps, "parent"), f"{text} Write `parent: base`, or give '{parent.name}' a `lora:`.")
    adapters = [stage for stage in every if adapter_of(stage) is not None]
    if data.get("merge") and adapters and not is_mergeable(adapters[-1]):
        yield Fault(("merge",), f"the adapter of '{adapters[-1].name}' cannot be merged into the weights. Remove it.")
    push = mapping(data.get("push"))
    pushed = by_name.get(as_text(push.get("stage")) or "") or (adapters[-1] if adapters else None)
    if push.get("what") in ("merged", "both") and pushed is not None and not is_mergeable(pushed):
        text = f"the adapter of '{pushed.name}' cannot be merged into the weights. Write `what: adapter`."
        yield Fault(("push", "what"), text)


def check_dial(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields what is wrong with `budget_action: dial`: no budget to keep, or an adapter that has no strengths."""
    dialling = [suite for suite in suites(data) if suite.data.get("budget_action") == "dial"]
    for suite in suites(data):
        if "budget_action" in suite.data and suite.data.get("budget") is None:
            text = "there is no `budget` to exceed. Add one, such as `budget: 3%`, or remove it."
            yield Fault((*suite.steps, "budget_action"), text)
    for stage in stages(data) if dialling else ():
        adapter = adapter_of(stage)
        kind = as_text(adapter.data.get("type")) if adapter else None
        if kind is not None and kind not in DIALLED:
            text = f"the stage '{stage.name}' trains an adapter of type {kind}, which has no strengths between 0 and 1;"
            text += f" {listed(DIALLED)} and all weights have. Write `budget_action: fail`, or take another adapter."
            yield Fault((*dialling[0].steps, "budget_action"), text)


_OF_AN_ADAPTER = ("lora", "peft", "quantization")
_OTHER_MODELS = {"classification", "translation"}  # the other kinds train the same model, of the next token


def parent_of(stage: RawStage, earlier: Sequence[RawStage]) -> RawStage | None:
    """The stage that a stage starts from; None for the base, or where there is none of that name."""
    name = as_text(stage.data.get("parent"))
    if name is None:
        return earlier[-1] if earlier else None
    return next((other for other in earlier if other.name == name), None)


def is_continued(stage: RawStage) -> bool:
    """Returns True if a stage trains its parent's adapter further."""
    return stage.data.get("parent_adapter") == "continue"


def take_over(data: dict[str, Any]) -> dict[Steps, Steps]:
    """Gives every stage that continues an adapter the keys of that adapter, where it does not say them again.

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
    """Returns True if a fault lies in keys that were taken over, and is reported where they stand too."""
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
    if len(kinds) > 1 and kinds & _OTHER_MODELS:
        yield Fault(steps, f"the adapter of a {parent.kind} stage is not trained further by a {stage.kind} stage.")
    kind = as_text(mapping(parent.data.get("peft")).get("type"))
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
