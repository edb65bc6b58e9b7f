"""`hfpipe cure`: one stage trained with several cures for forgetting, side by side, and the best inside the budgets.

Each cure is a stage of one run, from the same parent, so that budgets, intervals, costs and the report are those of any
run. What the recipe's own run has trained of it already is taken from there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hfpipe.core import ranks
from hfpipe.core.errors import BudgetExceeded, RecipeError
from hfpipe.core.files import read_json, write_text
from hfpipe.pipeline.run import run_recipe
from hfpipe.recipe import Keep, Recipe, Stage, dump_recipe
from hfpipe.recipe.faults import did_you_mean, listed
from hfpipe.recipe.signatures import training_fields
from hfpipe.scores.scorecard import Score, of_lineage, read_scorecard
from hfpipe.scores.tradeoff import Point, kept_keys, kept_suites, point, scales_of
from hfpipe.scores.wording import loss_words, share_words, with_interval

LOWER = 4  # times the learning rate
SLOWER = "lower rate"


def cure_recipe(recipe: Recipe, name: str | None, steps: int | None) -> Path:
    """Trains a stage of a recipe with each cure, or what is left of it, and compares them.

    Args:
        recipe: The recipe.
        name: The stage; the last one that can be cured when absent.
        steps: Steps of the stage, of each cure; those of the recipe when absent.

    Returns:
        The run folder of the comparison, `cure` in that of the recipe.

    Raises:
        RecipeError: There is no such stage, or it is of a kind that is not cured.
        UserError: As `run_recipe`.
    """
    if steps is not None and steps < 1:
        raise RecipeError(f"--steps is {steps}; allowed is a whole number from 1.")
    stage = _stage(recipe, name)
    cures = cures_of(recipe, stage, steps)
    folder = recipe.run_folder / "cure"
    before = recipe.stages[: [one.name for one in recipe.stages].index(stage.name)]
    changes: dict[str, Any] = {"stages": [*before, *cures.values()], "output_dir": str(folder)}
    compared = recipe.model_copy(update={**changes, "push": None, "merge": False})
    if ranks.is_main():
        _take_over(recipe, folder, [*(one.name for one in before), stage.name])
    ranks.wait()
    with suppress(BudgetExceeded):  # which is what the comparison is about
        run_recipe(compared)
    ranks.wait()
    if ranks.is_main():
        scores = read_scorecard(folder / "scorecard.json")
        for line in _lines(recipe, compared, stage, cures, scores, folder):
            print(line, flush=True)
    return folder


def cures_of(recipe: Recipe, stage: Stage, steps: int | None = None) -> dict[str, Stage]:
    """Returns the stage with each cure, by its name: none, the parent's own texts, these with KL, a lower rate."""
    training = {**stage.training, **({} if steps is None else {"max_steps": steps})}
    parent = recipe.parent_of(stage.name)
    none = stage.model_copy(update={"training": training, "keep": None})
    plain = none.model_copy(update={"parent": parent})
    fields = training_fields(stage.kind) or {}
    rate = float(training.get("learning_rate", fields["learning_rate"].default if fields else 5e-5)) / LOWER
    keeps: dict[str, dict[str, Any]] = {"self": {"replay": {}}}
    if stage.parent_adapter != "continue":
        keeps["self-kl"] = {"replay": {}, "kl": {}}
    found = {"none": none}
    for how, words in keeps.items():
        changes: dict[str, Any] = {"name": f"{stage.name}-{how}", "keep": Keep.model_validate(words)}
        found[how] = plain.model_copy(update=changes)
    if stage.kept != Keep.model_validate({}):
        own = {"name": f"{stage.name}-own", "keep": stage.kept}
        found["as the recipe has it"] = plain.model_copy(update=own)
    slower = {"name": f"{stage.name}-slower", "training": {**training, "learning_rate": rate}}
    found[SLOWER] = plain.model_copy(update=slower)
    return found


def _stage(recipe: Recipe, name: str | None) -> Any:
    names = [one.name for one in recipe.stages if one.kind in ("pretrain", "sft") and one.task == "causal"]
    if name is None and names:
        name = names[-1]
    if name not in names:
        found = f"'{name}' is not a stage that can be cured" if name else "no stage can be cured"
        raise RecipeError(
            f"{found}: that takes one of next tokens (pretrain or sft). In this recipe: {listed(names) or 'none'}."
            f"{did_you_mean(name, names) if name else ''}"
        )
    if recipe.model.architecture is not None and recipe.parent_of(name) == "base":
        raise RecipeError(f"stages.{name} starts from a model made from nothing, so there is nothing to keep.")
    return next(one for one in recipe.stages if one.name == name)


def _take_over(recipe: Recipe, folder: Path, names: Sequence[str]) -> None:
    """Gives the comparison the base and the stages that the recipe's own run has; a run looks at their versions."""
    for name in ("base", *names):
        source, target = recipe.run_folder / "stages" / name, folder / "stages" / name
        if source.is_dir() and not target.exists():
            shutil.copytree(source, target, copy_function=os.link)


def _lines(
    recipe: Recipe, compared: Recipe, stage: Any, cures: dict[str, Stage], scores: list[Score], folder: Path
) -> list[str]:
    """Tells what was found, a line a cure, and the best inside the budgets, whose recipe is written."""
    parent = recipe.parent_of(stage.name)
    start = [score for score in scores if score.stage == parent]
    ends = {how: [score for score in scores if score.stage == one.name] for how, one in cures.items()}
    every = [*start, *(score for end in ends.values() for score in end)]
    scales, kept = scales_of(every), kept_keys(recipe.evaluate, start, list(ends.values()))
    line = of_lineage(scores, compared.lineage(parent))
    points = {how: point(recipe.evaluate, line, start, end, scales, kept) for how, end in ends.items() if end}
    told = [f"cures of {stage.name}, against {parent}:"]
    for how, where in points.items():
        told.append(f"  {how}: {_where(where)}; {_cost(folder / 'stages' / cures[how].name)}")
    if not kept_suites(recipe.evaluate):
        return [*told, "No suite has a budget, so nothing says which is best: give those that are to be kept one."]
    inside = {how: where for how, where in points.items() if not where.over}
    if not inside:
        return [*told, "None is inside the budgets: see the report for what each exceeds, and docs/cure.md."]
    best = max(inside, key=lambda how: inside[how].gain.value if inside[how].gain else 0.0)  # type: ignore[union-attr]
    training = dict(stage.training)
    if best == SLOWER:
        training["learning_rate"] = cures[best].training["learning_rate"]
    chosen = {"name": stage.name, "parent": stage.parent, "training": training}
    cured = cures[best].model_copy(update=chosen)
    stages = [cured if one.name == stage.name else one for one in recipe.stages]
    path = folder / "cured.yaml"
    write_text(path, dump_recipe(recipe.model_copy(update={"stages": stages})))
    return [*told, f"The most is learned inside the budgets by: {best}. Its recipe: {path}"]


def _where(where: Point) -> str:
    gain, lost = with_interval(*share_words(where.gain)), with_interval(*loss_words(where.forgetting))
    over = ", ".join(f"{change.after.suite} {change.after.metric}" for change in where.over)
    return f"gain {gain or 'unknown'}, forgetting {lost or 'unknown'}{f', over the budget of {over}' if over else ''}"


def _cost(folder: Path) -> str:
    """Tells what a stage took, as far as it was measured."""
    total = read_json(folder / "cost.json").get("total", {})
    parts = [f"{total['seconds']:,.0f} s"] if "seconds" in total else []
    parts += [f"{total['tokens']:,.0f} tokens"] if total.get("tokens") else []
    parts += [f"{total['peak_memory'] / 2**30:.2f} GiB"] if total.get("peak_memory") else []
    return ", ".join(parts) or "cost unknown"
