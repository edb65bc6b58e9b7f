"""TRL's conversational `prompt` and `completion`, two lists of turns, read as one conversation."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value

from hfpipe.data.dirt import BESIDE_MESSAGES, COMPLETION_TURNS


def turn_of(feature: Any) -> Any:
    """What a list holds: of a conversation the type of a turn, a mapping; None of what is no list."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def is_conversation(feature: Any) -> bool:
    """Whether a column holds turns with `role` and `content`."""
    turn = turn_of(feature)
    return isinstance(turn, dict) and {"role", "content"} <= set(turn)


def as_conversation(rows: Any, features: Features, prompt: str, completion: str) -> Dataset | IterableDataset:
    """Rows with `messages`, and with the number of turns of it that are the completion.

    Args:
        rows: A `Dataset` or an `IterableDataset`.
        features: Its columns and their types.
        prompt: The column with the turns that are given.
        completion: The column with the turns that are said.
    """
    turn = {**turn_of(features[prompt]), **turn_of(features[completion])}
    kept = {name: features[name] for name in ("id", *BESIDE_MESSAGES) if name in features}

    def joined(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pairs = list(zip(batch[prompt], batch[completion], strict=True))
        whole = [None if None in pair else [*pair[0], *pair[1]] for pair in pairs]
        turns = [row and [{key: said.get(key) for key in turn} for said in row] for row in whole]
        counts = [len(said or ()) for _, said in pairs]
        return {"messages": turns, COMPLETION_TURNS: counts, **{name: batch[name] for name in kept}}

    made = Features({"messages": List(turn), COMPLETION_TURNS: Value("int32"), **kept})
    return rows.map(joined, batched=True, remove_columns=list(features), features=made)
