"""Rules of `keep:`, by which a stage keeps what its parent can do, and of `samples:`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hfpipe.recipe.faults import Fault
from hfpipe.recipe.raw import Block, RawStage
from hfpipe.recipe.rules.adapters import adapter_of
from hfpipe.recipe.source_config import BASE
from hfpipe.recipe.stage_config import CHANGES_THE_BASE, KEEPING, SelfReplay


def check_keep(stage: RawStage, first: bool, model: Block) -> Iterator[Fault]:
    """Yields what of a stage's `keep:` cannot be.

    Args:
        stage: The stage.
        first: Whether it is the first stage.
        model: The recipe's model.
    """
    given = stage.data.get("keep")
    if given is None or stage.kind not in KEEPING:
        return
    keep = stage.at("keep")
    if isinstance(given, dict) and all(value is None for value in given.values()):
        yield Fault(keep.steps, "says nothing. Write `keep: self`, or how: `keep: {replay: {share: 10%}}`.")
    if stage.data.get("objective") == "masked":
        text = "needs a model that says texts by itself, and one of masked tokens does not. Remove it, or mix in"
        yield Fault(keep.steps, f"{text} general text as a source.")
    kl = keep.at("kl")
    if kl.data.get("parent") is not None and adapter_of(stage) is not None:
        text = "rounds a copy of the parent, and beside an adapter the parent is the model itself. Leave it out"
        yield Fault((*kl.steps, "parent"), f"{text} (`quantization: nf4` of the stage rounds the model).")
    if keep.data.get("kl") is not None:
        if keep.data.get("replay") is None:
            text = "is measured on the parent's own texts, and the stage has none. Add `replay: {share: 10%}`"
            yield Fault((*keep.steps, "kl"), f"{text} beside it.")
        if stage.data.get("parent_adapter") == "continue":
            text = "compares with the model without its adapter, and the parent has that adapter. Write"
            yield Fault((*keep.steps, "kl"), f"{text} `parent_adapter: merge`, or leave it out.")
        init = stage.at("lora").data.get("init_lora_weights")
        if isinstance(init, str) and init.startswith(CHANGES_THE_BASE):
            text = f"compares with the model without its adapter, and `init_lora_weights: {init}` moves a part of the"
            yield Fault((*keep.steps, "kl"), f"{text} parent into it. Leave one of the two out.")
    if keep.data.get("l2") is not None and adapter_of(stage) is not None:
        text = "has no effect on an adapter, which is its parent where it is 0. Write `training: {weight_decay: 0.1}`."
        yield Fault((*keep.steps, "l2"), text)
    parent = stage.data.get("parent")
    if (parent == BASE or (first and parent is None)) and model.data.get("architecture") is not None:
        text = "the stage starts from a model made from nothing, so there is nothing to keep. Remove it."
        yield Fault(keep.steps, text)
    shares = [_share(stage.at("replay").data.get("share"), 0.0), _self_share(given)]
    if sum(shares) >= 1:
        text = f"`replay` and `keep` together take {sum(shares):.0%} of the stage, and nothing is left of its own data."
        yield Fault(keep.steps, f"{text} Lower their shares.")


def check_counterfactual(stage: RawStage) -> Iterator[Fault]:
    """Yields what of a stage's `counterfactual:` cannot be."""
    block = stage.at("counterfactual")
    if stage.data.get("counterfactual") is None:
        return
    if stage.data.get("objective") == "masked":
        text = "compares predictions of next tokens or of classes, and this stage trains on masked ones. Remove it, or"
        yield Fault(block.steps, f"{text} write `augment: {{swap: gender}}` at the source.")
    swap = block.data.get("swap")
    if isinstance(swap, list) and any(isinstance(words, list) and len(set(words)) < 2 for words in swap):
        text = "each list needs two words or more, which take each other's place: [[Christian, Muslim]]."
        yield Fault((*block.steps, "swap"), text)


def check_samples(stage: RawStage) -> Iterator[Fault]:
    """Yields what of a stage's `samples:` cannot be."""
    if stage.data.get("samples") is not None and stage.data.get("objective") == "masked":
        text = "asks for texts, and a model of masked tokens writes none. Remove it."
        yield Fault(stage.at("samples").steps, text)


def _self_share(keep: Any) -> float:
    """The share of a stage that its parent's own texts take."""
    default = float(SelfReplay.model_fields["share"].default)
    if not isinstance(keep, dict):
        return default if keep == "self" else 0.0
    replay = keep.get("replay")
    return _share(replay.get("share"), default) if isinstance(replay, dict) else 0.0


def _share(value: Any, default: float) -> float:
    """A share as a number, where it is one."""
    if isinstance(value, str) and value.strip().endswith("%"):
        value = value.strip().rstrip("% ")
        try:
            return float(value) / 100
        except ValueError:
            return 0.0
    return float(value) if isinstance(value, (int, float)) else default if value is None else 0.0
