"""The mixture that a stage draws from: its own sources by their weights, and the sources of a stage that it replays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfpipe.data.chat import chat_text
from hfpipe.data.sources.formats import Rows, roles_of
from hfpipe.data.sources.load import load_rows
from hfpipe.recipe import Recipe, Source, Stage
from hfpipe.recipe.row_formats import TEXT_KINDS


@dataclass(frozen=True)
class Part:
    """A source of a stage.

    Args:
        source: The source.
        share: Of the whole stage; the shares of a stage sum to 1.
        replayed: Whether it is a source of an earlier stage.
    """

    source: Source
    share: float
    replayed: bool


def mixture(recipe: Recipe, stage: Stage) -> list[Part]:
    """The parts of a stage: its own sources, then those that it replays, which stand to each other as in their stage.

    What the replayed stage itself replays does not come along.
    """
    replay = getattr(stage, "replay", None)
    share = replay.share if replay is not None else 0.0
    parts = _parts(stage, 1 - share, replayed=False)
    if replay is not None:
        earlier = next(other for other in recipe.stages if other.name == replay.stage)
        parts += _parts(earlier, share, replayed=True)
    return parts


def _parts(stage: Stage, share: float, *, replayed: bool) -> list[Part]:
    weights = [source.weight or 1.0 for source in stage.data]
    return [
        Part(source, share * weight / sum(weights), replayed)
        for source, weight in zip(stage.data, weights, strict=True)
    ]


def documents_of(part: Part, tokenizer: Any) -> Rows:
    """Rows with a column `text`; a replayed prompt and completion, or a conversation, as the text that a model sees."""
    rows = load_rows(part.source, kinds=TEXT_KINDS if part.replayed else ("text",))
    kind = roles_of(rows) if part.replayed else "text"
    if kind == "text":
        return rows

    def texts(batch: dict[str, list[Any]]) -> dict[str, list[str | None]]:
        if kind == "messages":
            return {"text": [chat_text(tokenizer, turns) if turns else None for turns in batch["messages"]]}
        pairs = zip(batch["prompt"], batch["completion"], strict=True)
        return {"text": [None if None in pair else "".join(pair) for pair in pairs]}

    columns = ["messages"] if kind == "messages" else ["prompt", "completion"]
    return rows.map(texts, batched=True, remove_columns=columns)
