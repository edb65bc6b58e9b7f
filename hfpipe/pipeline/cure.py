"""`hfpipe cure`: one stage trained with several cures for forgetting, side by side, and the best inside the budgets.

Each cure is a stage of one run, from the same parent, so that budgets, intervals, costs and the report are those of any
run; the dial scores each of them between the parent and itself. What the recipe's own run has trained of it already is
taken from there. `cures:` in a recipe makes the same at the end of a run.
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
from hfpipe.core.files import gibibytes, read_json, write_json, write_text
from hfpipe.pipeline.dial import dial_run
from hfpipe.pipeline.run import run_recipe
from hfpipe.recipe import Keep, Recipe, Stage, dump_recipe
from hfpipe.recipe.choose import curable_stage
from hfpipe.recipe.rules.adapters import DIALLED
from hfpipe.recipe.signatures import training_fields
from hfpipe.report import write_reports
from hfpipe.report.cures import COMPARED, CURE
from hfpipe.scores.scorecard import Score, of_lineage, read_scorecard, score_of
from hfpipe.scores.tradeoff import Point, kept_keys, kept_suites, point, scales_of
from hfpipe.scores.wording import loss_words, share_words, with_interval

LOWER = 4  # times the learning rate
SLOWER, NARROWER = "lower rate", "lower rank"
STRENGTHS = (0.25, 0.5, 0.75)  # at which the dial scores each cure, beside 1
Place = tuple[str, float]  # a cure and its strength


def run_with_cures(recipe: Recipe) -> Path:
    """Runs a recipe, and compares the cures of a stage where it says `cures:`, also where one is over its budget.

    Raises:
        UserError: As `run_recipe`.
    """
    said = recipe.compared
    if said is None:
        return run_recipe(recipe)
    over: BudgetExceeded | None = None
    try:
        run_recipe(recipe)
    except BudgetExceeded as error:
        over = error
    cure_recipe(recipe, said.stage, said.steps, dial=said.dial)
    if ranks.is_main():
        write_reports(recipe.run_folder)  # whose advice is what was measured
    ranks.wait()
    if over is not None:
        raise over
    return recipe.run_folder


def cure_recipe(recipe: Recipe, name: str | None, steps: int | None, *, dial: bool = True) -> Path:
    """Trains a stage of a recipe with each cure, or what is left of it, and compares them.

    Args:
        recipe: The recipe.
        name: The stage; the last one that can be cured when absent.
        steps: Steps of the stage, of each cure; those of the recipe when absent.
        dial: Whether each is scored at some strengths too.

    Returns:
        The run folder of the comparison, `cure` in that of the recipe.

    Raises:
        RecipeError: There is no such stage, or it is of a kind that is not cured.
        UserError: As `run_recipe`.
    """
    if steps is not None and steps < 1:
        raise RecipeError(f"--steps is {steps}; allowed is a whole number from 1.")
    stage = curable_stage(recipe, name)
    cures = cures_of(recipe, stage, steps)
    folder = recipe.run_folder / CURE
    before = recipe.stages[: [one.name for one in recipe.stages].index(stage.name)]
    own_first = sorted(cures.values(), key=lambda one: one.name != stage.name)  # its parent may be the one before it
    changes: dict[str, Any] = {"stages": [*before, *own_first], "output_dir": str(folder)}
    # The shift of the data is that of the recipe's own run, the same for each cure.
    compared = recipe.model_copy(update={**changes, "push": None, "merge": False, "cures": False, "shift": False})
    if ranks.is_main():
        _take_over(recipe, folder, [*(one.name for one in before), stage.name])
    ranks.wait()
    with suppress(BudgetExceeded):  # which is what the comparison is about
        run_recipe(compared, closing=False)
    ranks.wait()
    for one in cures.values() if dial and recipe.evaluate else ():
        if (one.adapter or {"type": "lora"})["type"] in DIALLED and (
            folder / "stages" / one.name / "done.json"
        ).exists():
            ranks.say(f"\n{one.name} at lower strengths:")
            dial_run(folder, one.name, STRENGTHS)
    if ranks.is_main():
        scores = read_scorecard(folder / "scorecard.json")
        lines = _lines(recipe, compared, stage, cures, scores, folder)
        for line in lines:
            ranks.say(line, "result")
        write_json(folder / COMPARED, {"told": lines[-1]})
        write_reports(folder)
    return folder


def cures_of(recipe: Recipe, stage: Stage, steps: int | None = None) -> dict[str, Stage]:
    """Returns the stage with each cure, by its name: none, the parent's own texts, with KL, a lower rate or rank.

    What the recipe has stays as it is, with the stage's name, and so what the recipe's run has trained of it counts.
    """
    training = {**stage.training, **({} if steps is None else {"max_steps": steps})}
    own = stage.model_copy(update={"training": training})
    plain = own.model_copy(update={"keep": None, "parent": recipe.parent_of(stage.name)})
    fields = training_fields(stage.kind) or {}
    rate = float(training.get("learning_rate", fields["learning_rate"].default if fields else 5e-5)) / LOWER
    keeps = {"none": Keep.model_validate({}), "self": Keep.model_validate({"replay": {}})}
    if stage.parent_adapter != "continue":
        keeps["self-kl"] = Keep.model_validate({"replay": {}, "kl": {}})
    if stage.kept not in keeps.values():
        keeps["as the recipe has it"] = stage.kept
    found = {}
    for how, keep in keeps.items():
        changes = {"name": f"{stage.name}-{how}", "keep": None if how == "none" else keep}
        found[how] = own if keep == stage.kept else plain.model_copy(update=changes)
    slower = {"name": f"{stage.name}-slower", "training": {**training, "learning_rate": rate}}
    found[SLOWER] = plain.model_copy(update=slower)
    if (adapter := _narrower(stage)) is not None:
        found[NARROWER] = plain.model_copy(update={"name": f"{stage.name}-narrower", "lora": adapter})
    return found


def _narrower(stage: Stage) -> dict[str, Any] | None:
    """Returns a stage's LoRA with a quarter of its rank at the same scale; None where that is nothing else."""
    if stage.lora is None or stage.parent_adapter == "continue":
        return None
    rank, alpha = stage.lora.get("r", 8), stage.lora.get("lora_alpha", 8)
    if not isinstance(rank, int) or rank < LOWER or stage.lora.get("use_rslora"):
        return None
    return {**stage.lora, "r": rank // LOWER, "lora_alpha": max(1, alpha * (rank // LOWER) // rank)}


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
    at: dict[Place, list[Score]] = {(how, 1.0): end for how, end in ends.items() if end}
    at |= {(how, strength): end for how, one in cures.items() for strength, end in _dialled(folder, one.name)}
    points = {place: point(recipe.evaluate, line, start, end, scales, kept) for place, end in at.items()}
    told = [f"cures of {stage.name}, against {parent}:"]
    for how, one in cures.items():
        for strength in sorted((s for name, s in points if name == how), reverse=True):
            named = how if strength == 1 else f"  at strength {strength:g}"
            cost = f"; {_cost(folder / 'stages' / one.name)}" if strength == 1 else ""
            told.append(f"  {named if named != 'none' else 'no cure'}: {_where(points[how, strength])}{cost}")
    if not kept_suites(recipe.evaluate):
        return [*told, "No suite has a budget, so nothing says which is best: give those that are to be kept one."]
    inside = {place: where for place, where in points.items() if not where.over}
    if not inside:
        return [*told, "None is inside the budgets: see the report for what each exceeds, and docs/cure.md."]
    best = max(inside, key=lambda place: (inside[place].gain.value if inside[place].gain else 0.0, place[1]))  # type: ignore[union-attr]
    path = folder / "cured.yaml"
    write_text(path, dump_recipe(_cured(recipe, stage, cures[best[0]], best)))
    named = "no cure" if best[0] == "none" else best[0]
    named = named if best[1] == 1 else f"{named} at strength {best[1]:g}"
    gain = inside[best].gain
    noise = " Its gain is within the noise: score more rows." if gain is not None and not gain.beyond_noise else ""
    return [*told, "", f"The most is learned inside the budgets by: {named}.{noise} Its recipe: {path}"]


def _dialled(folder: Path, name: str) -> list[tuple[float, list[Score]]]:
    """Returns the scores of a cure at the strengths between its parent and itself that the dial has scored."""
    points = read_json(folder / "stages" / name / "dial.json").get("points", [])
    found = [(one["strength"], [score_of(row) for row in one["scores"]]) for one in points]
    return [(strength, scores) for strength, scores in found if 0 < strength < 1]


def _cured(recipe: Recipe, stage: Stage, cure: Stage, best: Place) -> Recipe:
    """Returns the recipe with the best cure of a stage; one that is best below its full strength is dialled down."""
    training = dict(stage.training)
    if best[0] == SLOWER:
        training["learning_rate"] = cure.training["learning_rate"]
    cured = cure.model_copy(update={"name": stage.name, "parent": stage.parent, "training": training})
    changes: dict[str, Any] = {"stages": [cured if one.name == stage.name else one for one in recipe.stages]}
    if best[1] < 1:
        kept = kept_suites(recipe.evaluate)
        dialled = {name: recipe.evaluate[name].model_copy(update={"budget_action": "dial"}) for name in kept}
        changes["evaluate"] = {**recipe.evaluate, **dialled}
    return recipe.model_copy(update={**changes, "cures": False})


def _where(where: Point) -> str:
    gain, lost = with_interval(*share_words(where.gain)), with_interval(*loss_words(where.forgetting))
    over = ", ".join(f"{change.after.suite} {change.after.metric}" for change in where.over)
    return f"gain {gain or 'unknown'}, forgetting {lost or 'unknown'}{f', over the budget of {over}' if over else ''}"


def _cost(folder: Path) -> str:
    """Tells what a stage took, as far as it was measured."""
    total = read_json(folder / "cost.json").get("total", {})
    parts = [f"{total['seconds']:,.0f} s"] if "seconds" in total else []
    parts += [f"{total['tokens']:,.0f} tokens"] if total.get("tokens") else []
    parts += [f"peak memory {gibibytes(total['peak_memory'])} GiB"] if total.get("peak_memory") else []
    return ", ".join(parts) or "cost unknown"
