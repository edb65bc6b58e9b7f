"""Budgets: what exceeds one, and what a stage is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from hfpipe.recipe import load_recipe
from hfpipe.scores.scorecard import Score, of_lineage, over_budget


def score(stage: str, value: float, stderr: float = 0.01, **changes: object) -> Score:
    facts = {"suite": "general", "metric": "bits_per_byte", "n": 200, "higher_is_better": False, **changes}
    return Score(stage, value=value, stderr=stderr, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("after", "over"),
    [
        (score("chat", 1.035), False),  # 3.5 % lost, 0.5 % above the budget, within 1.96 errors of sqrt(2) %
        (score("chat", 1.035, paired={"base": 0.001}), True),  # the same rows, so the noise is smaller
        (score("chat", 1.07), True),
        (score("chat", 1.02, stderr=0.0), False),  # inside the budget
        (score("chat", 0.5), False),  # better
        (score("chat", 1.5, n=5), False),  # five rows tell nothing
    ],
)
def test_a_budget_is_exceeded_beyond_the_noise_only(after: Score, over: bool) -> None:
    assert bool(over_budget([score("base", 1.0), after], "chat", "general", 0.03)) is over


def test_a_stage_has_nothing_to_forget_of_one_beside_it(tmp_path: Path) -> None:
    content = tiny.recipe(tmp_path, merge=False)
    beside = {**content["stages"][1], "name": "beside", "parent": "prose"}
    del beside["lora"]
    content["stages"].append(beside)
    recipe = load_recipe(tiny.write(tmp_path, content))
    assert [recipe.lineage(name) for name in ("prose", "sounds", "beside")] == [
        ["base", "prose"],
        ["base", "prose", "sounds"],
        ["base", "prose", "beside"],
    ]
    scores = [score("base", 2.0), score("prose", 1.0), score("sounds", 0.5), score("beside", 1.0)]
    assert over_budget(scores, "beside", "general", 0.03), "against the best of all stages"
    assert not over_budget(of_lineage(scores, recipe.lineage("beside")), "beside", "general", 0.03)
