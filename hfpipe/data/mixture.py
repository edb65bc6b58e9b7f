"""The mixture that a stage draws from: its own sources, and what it replays of a stage or of its parent's own texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfpipe.data.chat import chat_text
from hfpipe.data.sources.formats import Rows, roles_of
from hfpipe.data.sources.load import load_rows
from hfpipe.recipe import Recipe, Source, Stage
from hfpipe.recipe.row_formats import TEXT_KINDS


class OwnTexts(Source):
    """A file of texts that a stage's parent made of itself; see `stages.own_texts`."""

    @property
    def title(self) -> str:
        """Returns the name under which a person reads of it."""
        return f"its parent's own {Path(str(self.passed_through['data_files'])).stem}"


@dataclass(frozen=True)
class Part:
    """A source of a stage.

    Args:
        source: The source.
        share: Of the whole stage; the shares of a stage sum to 1.
        replayed: Whether it is a source of an earlier stage, or the parent's own texts.
    """

    source: Source
    share: float
    replayed: bool


def mixture(recipe: Recipe, stage: Stage, own_texts: Sequence[OwnTexts] = ()) -> list[Part]:
    """The parts of a stage: its own sources, then those that it replays, which stand to each other as in their stage.

    What the replayed stage itself replays does not come along.

    Args:
        recipe: The recipe.
        stage: The stage.
        own_texts: What the stage's parent made of itself, where it is made already; the share of it is left free else.
    """
    replay, own = getattr(stage, "replay", None), stage.kept.replay
    share = replay.share if replay is not None else 0.0
    own_share = own.share if own is not None else 0.0
    parts = _parts(stage, 1 - share - own_share, replayed=False)
    if replay is not None:
        earlier = next(other for other in recipe.stages if other.name == replay.stage)
        parts += _parts(earlier, share, replayed=True)
    return parts + [Part(source, own_share / len(own_texts), True) for source in own_texts]


def _parts(stage: Stage, share: float, *, replayed: bool) -> list[Part]:
    weights = [source.weight or 1.0 for source in stage.data]
    return [
        Part(source, share * weight / sum(weights), replayed)
        for source, weight in zip(stage.data, weights, strict=True)
    ]


def documents_of(part: Part, tokenizer: Any) -> Rows:
    """Rows with a column `text`; a replayed prompt and completion, or a conversation, as the text that a model sees.

    Every rank has to call this.
    """
    rows = load_rows(part.source, kinds=TEXT_KINDS if part.replayed else ("text",), together=True)
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
