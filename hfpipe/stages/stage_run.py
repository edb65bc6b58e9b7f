"""The context that a stage is given to run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hfpipe.data.cleaning.cleaned import find_cleaned
from hfpipe.data.dedup import Cleaner
from hfpipe.data.mixture import mixture
from hfpipe.model.adapter import ProbeText
from hfpipe.model.load import ModelRef
from hfpipe.recipe import Recipe, Stage
from hfpipe.stages.cost import CostMeter


@dataclass(frozen=True)
class StageRun:
    """One stage about to be trained.

    Args:
        recipe: The whole recipe.
        stage: The stage of it.
        parent: The model it starts from, a whole model and not an adapter.
        parent_hash: Hash of the stage that made it, and of all before; that of the base.
        continued: The adapter of `parent` that is trained further; None for a new one, or none at all.
        tokenizer: The run's tokenizer.
        added_tokens: Ids of the tokens that the base knows nothing of; an adapter trains their embeddings.
        folder: `stages/<stage>` in the run folder.
        hash: Hash of the stage and of all before it.
        trajectory: The same of all versions of the stage that can continue each other's checkpoints.
        probe_texts: A few held-out texts on which the saved model is compared with the trained one.
        rows: The rows of every suite.
        cost: Measures the stage.
        callbacks: More callbacks of the trainer; they come after the one that makes a checkpoint whole.
    """

    recipe: Recipe
    stage: Stage
    parent: ModelRef
    parent_hash: str
    continued: ModelRef | None
    tokenizer: Any
    added_tokens: tuple[int, ...]
    folder: Path
    hash: str
    trajectory: str
    probe_texts: list[ProbeText]
    rows: dict[str, list[dict[str, Any]]]
    cost: CostMeter
    callbacks: tuple[TrainerCallback, ...] = ()

    @cached_property
    def cleaner(self) -> Cleaner:
        """Cleans the sources of the stage, and those that it replays as they are cleaned in their own."""
        parts = mixture(self.recipe, self.stage)
        groups = [[part.source for part in parts if part.replayed == replayed] for replayed in (False, True)]
        cleaned = find_cleaned(self.folder.parents[1], self.recipe, self.stage)
        return Cleaner(self.folder / "cleaning", self.hash, self.rows, groups, cleaned)
