"""Configs for preferences: what DPO is called in each tool, its loss, and rows of a chosen and a rejected answer."""

from __future__ import annotations

from typing import Any

from hfpipe.convert.draft import Draft, OutOfScope
from hfpipe.convert.words import Block
from hfpipe.recipe.rules.training import preference_losses


def begin(draft: Draft) -> None:
    """Makes the stage one of preferences."""
    draft.stage.update(kind="preference", name="preference")


def loss(draft: Draft, key: str, value: Any) -> None:
    """Says the loss.

    Args:
        draft: The draft.
        key: The key of the config that says so.
        value: A loss, or several.

    Raises:
        OutOfScope: DPOTrainer has none of that name.
    """
    names = [str(one) for one in (value if isinstance(value, list) else [value])]
    if strange := [name for name in names if preference_losses() and name not in preference_losses()]:
        raise OutOfScope(
            f"this {draft.tool} config is for the loss '{strange[0]}' (`{key}`), which TRL's DPOTrainer does not have."
        )
    draft.put("stage.loss", names if len(names) > 1 else names[0])


def with_sft(draft: Draft, key: str, weight: Any) -> None:
    """Adds the loss of the chosen answers, which some configs weigh beside that of the pairs."""
    if weight:
        first = draft.stage.get("loss", "sigmoid")
        draft.put("stage.loss", [*(first if isinstance(first, list) else [first]), "sft"])
        draft.train(key, "training.loss_weights", [1.0] * (len(draft.stage["loss"]) - 1) + [float(weight)])


def in_turns(asked: str, chosen: str, rejected: str, system: str | None = None) -> Block:
    """Returns a template of pairs: a question, with a system message where there is one, and two answers."""
    given = [{"role": "system", "content": system}] if system else []
    answers = {"chosen": chosen, "rejected": rejected}
    said = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
    return {"prompt": [*given, {"role": "user", "content": asked}], **said}


def renamed(source: Block, format: str, **columns: str | None) -> Block:
    """Returns a source of a format, with the columns that have other names there."""
    named = {ours: theirs for ours, theirs in columns.items() if theirs and theirs != ours}
    return {**source, "format": format, **({"columns": named} if named else {})}


def finish(draft: Draft) -> None:
    """Leaves out what has no effect on preferences, and scores held-out pairs as such."""
    if draft.stage["kind"] != "preference":
        return
    if (draft.stage.get("lora") or {}).pop("lora_dropout", None):
        draft.note("unneeded", "lora_dropout", "TRL's DPOTrainer turns every dropout off, as its tools do")
    for suite in draft.suites.values():
        suite["metrics"] = ["preference_accuracy", "preference_margin"]
