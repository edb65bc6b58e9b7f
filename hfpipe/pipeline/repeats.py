"""A recipe run several times, with other seeds or on other folds of its data: what one run says by luck, many tell.

Each repeat is a whole run with a folder of its own below the recipe's. `repeats.json` and the pages beside it hold mean
and spread over them.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy import stats

from hfpipe.core import ranks
from hfpipe.core.errors import BudgetExceeded
from hfpipe.core.files import write_json, write_text
from hfpipe.pipeline.context import open_ranks
from hfpipe.pipeline.run import run_recipe
from hfpipe.recipe import Fold, Recipe, Suite, dump_recipe
from hfpipe.recipe.rules.outcome import HELD_OUT
from hfpipe.report.repeats import repeat_lines, write_repeat_reports
from hfpipe.scores.scorecard import BASE, Score, read_scorecard


def run_repeats(recipe: Recipe) -> Path:
    """Runs a recipe with `seeds` or `cross_validation`, or what is left of it.

    Returns:
        The folder of the whole, with a run folder for each repeat.

    Raises:
        BudgetExceeded: In a repeat; the others are run all the same.
        UserError: As `run_recipe`.
    """
    open_ranks(recipe)
    folder = recipe.run_folder
    over: list[BudgetExceeded] = []
    found: dict[str, list[Score]] = {}
    if ranks.is_main():
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
    for name, repeat in repeats_of(recipe):
        ranks.say(f"{recipe.name}: {name}")
        place = repeat.run_folder
        if found and ranks.is_main():
            _lend_base(folder / next(iter(found)), place)
        ranks.wait()
        try:
            run_recipe(repeat)
        except BudgetExceeded as error:
            over.append(error)
        ranks.wait()  # the main process writes the scores after the others are done
        found[name] = read_scorecard(place / "scorecard.json")
        if ranks.is_main():
            write_json(folder / "repeats.json", summary(found, _shared_share(recipe)))
            write_repeat_reports(folder)
    for line in repeat_lines(folder):
        ranks.say(line)
    if over:
        raise over[0]
    return folder


def repeats_of(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """The name and the recipe of each repeat."""
    alone = {"seeds": None, "cross_validation": None}
    folder = recipe.run_folder
    for seed in recipe.seeds or ():
        name = f"seed-{seed}"
        yield name, recipe.model_copy(update={**alone, "seed": seed, "output_dir": str(folder / name)})
    block = recipe.cross_validation
    for number in range(1, block.folds + 1) if block else ():
        assert block is not None
        name = f"fold-{number}"
        stages = list(recipe.stages)
        place = next(place for place, stage in enumerate(stages) if stage.name == block.stage)
        source = stages[place].data[0]
        kept, left = (source.model_copy(update={"fold": fold}) for fold in _folds(number, block.folds))
        stages[place] = stages[place].model_copy(update={"data": [left]})
        kept = kept.model_copy(update={"weight": None})
        suites = {
            **recipe.evaluate,
            HELD_OUT: Suite.model_validate({"data": _with_split(kept), "metrics": block.metrics}),
        }
        changes = {"stages": stages, "evaluate": suites, "output_dir": str(folder / name)}
        yield name, recipe.model_copy(update={**alone, **changes})


def _folds(number: int, count: int) -> tuple[Fold, Fold]:
    return Fold.model_validate({"of": count, "keep": number}), Fold.model_validate({"of": count, "leave": number})


def _with_split(source: Any) -> Any:
    """The source with the split that a stage reads by default, which is another than a suite's."""
    if "split" in source.passed_through:
        return source
    return type(source).model_validate({**source.model_dump(exclude_defaults=True), "split": "train"})


def _lend_base(first: Path, folder: Path) -> None:
    """Gives a repeat the scores of a base that is the same: they are taken only where their hashes fit."""
    source, target = first / "stages" / BASE, folder / "stages" / BASE
    if not target.exists() and (source / "scores.json").exists():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("model", "done.json"))


def _shared_share(recipe: Recipe) -> float:
    """Returns the share of variance that one more repeat cannot average away: folds are trained on much the same rows.

    Nadeau and Bengio (2003, doi:10.1023/A:1024068626366) add the held-out rows per trained row to the variance of the
    mean, in units of the variance of one fold.
    """
    return 1 / (recipe.cross_validation.folds - 1) if recipe.cross_validation else 0.0


def summary(found: dict[str, list[Score]], shared: float) -> dict[str, Any]:
    """Mean and spread of every score over the repeats that have it.

    Args:
        found: Scores by repeat.
        shared: See `_shared_share`.

    Returns:
        `repeats`, their names; and `scores`, one a stage, suite and metric: `mean`, `std` (of the sample), `low` and
        `high` (95 % interval of the mean, Student's t), `values` by repeat, `n` rows of all repeats; and, for a stage
        that can be compared with the base, `gain` over it, taken repeat by repeat, with the same three.
    """
    by_place = {name: {(score.stage, *score.key): score for score in scores} for name, scores in found.items()}
    places = dict.fromkeys(place for scores in by_place.values() for place in scores)
    rows = []
    for stage, suite, metric in places:
        place = stage, suite, metric
        here = {name: scores[place] for name, scores in by_place.items() if place in scores}
        some = next(iter(here.values()))
        before = {name: by_place[name].get((BASE, suite, metric)) for name in here}
        gains = [score.merit - old.merit for name, score in here.items() if (old := before[name]) and stage != BASE]
        row: dict[str, Any] = {"stage": stage, "suite": suite, "metric": metric, "arrow": some.arrow}
        row |= {"n": sum(score.n for score in here.values()), **_spread([s.value for s in here.values()], shared)}
        row["values"] = {name: score.value for name, score in here.items()}
        if gains:
            row["gain"] = _spread(gains, shared)
        rows.append(row)
    return {"repeats": list(found), "scores": rows}


def _spread(values: list[float], shared: float) -> dict[str, float | None]:
    """Mean, standard deviation and 95 % interval of the mean; only the mean of one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "std": None, "low": None, "high": None}
    std = statistics.stdev(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * std * math.sqrt(1 / len(values) + shared)
    return {"mean": mean, "std": std, "low": mean - half, "high": mean + half}
