"""How the rows of a stage that has a table, and not a stream, come to steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hfpipe.core import ranks
from hfpipe.data.dataloader import ShuffledRows
from hfpipe.recipe import Stage
from hfpipe.stages.common import divide_batch
from hfpipe.stages.run import StageRun


@dataclass(frozen=True)
class Plan:
    """The division of a stage's rows.

    Args:
        per_device: Rows of a micro-batch on one rank.
        accumulation: Micro-batches of a step.
        total: Rows to serve in all, over all epochs.
    """

    per_device: int
    accumulation: int
    total: int

    @property
    def global_batch(self) -> int:
        """Rows of a step over all ranks."""
        return self.per_device * self.accumulation * ranks.ranks()

    @property
    def max_steps(self) -> int:
        return math.ceil(self.total / self.global_batch)

    def tokens_per_step(self, lengths: Sequence[int]) -> float:
        """Tokens of a step over all ranks, on average."""
        return self.global_batch * fmean(lengths)

    def serve(self, run: StageRun, rows: Any, lengths: Sequence[int]) -> ShuffledRows:
        """This rank's rows; see `ShuffledRows`."""
        return ShuffledRows(
            rows,
            lengths,
            total=self.total,
            per_device=self.per_device,
            accumulation=self.accumulation,
            seed=run.recipe.seed,
            rank=ranks.rank(),
            ranks=ranks.ranks(),
        )


def plan_of(stage: Stage, rows: int) -> Plan:
    """Divides `rows` rows by the recipe's `max_steps`, or else its `num_train_epochs`.

    Raises:
        RecipeError: As `divide_batch`.
    """
    per_device, accumulation = divide_batch(stage)
    plan = Plan(per_device, accumulation, total=round(rows * stage.training.get("num_train_epochs", 1)))
    steps = stage.training.get("max_steps", -1)
    return Plan(per_device, accumulation, total=steps * plan.global_batch) if steps > 0 else plan
