"""Runs beside each other: their last scores, their losses as they trained, what each gained and forgot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfpipe.core.errors import UserError
from hfpipe.recipe import Recipe, load_recipe
from hfpipe.report.content import by_key
from hfpipe.report.layout import Cell, Number, Section, Table
from hfpipe.report.plots import Placed, front, loss_curves, losses_of
from hfpipe.scores.scorecard import BASE, Key, Score, of_lineage, read_scorecard, stages_of
from hfpipe.scores.tradeoff import kept_keys, point, scales_of
from hfpipe.scores.wording import interval, number

MOST_RUNS = 12  # in one plot: more lines are no longer told apart
# Of a run that is damaged, or half written.
UNREADABLE = (UserError, ValueError, KeyError, TypeError, OSError, IndexError)


@dataclass(frozen=True)
class Compared:
    """A run as it is compared.

    Args:
        name: Its name.
        recipe: Its recipe.
        line: The scores from the base to its last scored stage.
        logs: By stage its steps and losses, as `losses_of` gives them.
    """

    name: str
    recipe: Recipe
    line: Sequence[Score]
    logs: Mapping[str, tuple[Sequence[int], Sequence[float]]]

    @property
    def last(self) -> dict[Key, Score]:
        """The last score of each metric of each suite."""
        return {scores[-1].key: scores[-1] for scores in by_key(self.line)}


def compare_runs(runs: Mapping[str, Path]) -> list[Section]:
    """Sections that lay two runs or more beside each other, of what they have in common; runs in disorder are left out.

    Args:
        runs: The run folders by name.
    """
    found = []
    for name, folder in runs.items():
        try:
            recipe = load_recipe(folder / "recipe.yaml")
            scores = read_scorecard(folder / "scorecard.json") if (folder / "scorecard.json").exists() else []
            line = of_lineage(scores, recipe.lineage(stages_of(scores)[-1])) if scores else []
            logs = {stage.name: losses_of(folder / "stages" / stage.name) for stage in recipe.stages}
            found.append(Compared(name, recipe, line, {stage: log for stage, log in logs.items() if log[0]}))
        except UNREADABLE:
            continue
    return [section for section in (_scores(found), _front(found), _curves(found)) if section]


def _scores(runs: Sequence[Compared]) -> Section | None:
    """The last score of each suite in each run, for the suites that two runs or more have."""
    last = {run.name: run.last for run in runs if run.line}
    keys = list(dict.fromkeys(key for one in last.values() for key in one))
    shared = [key for key in keys if sum(key in one for one in last.values()) > 1]
    if not shared:
        return None
    rows = []
    for name, one in last.items():
        cells: list[str | Cell] = [name]
        for key in shared:
            score = one.get(key)
            cells.append("" if score is None else Cell(number(score.value, score.metric), interval(score)))
        rows.append(cells)
    arrows = {key: next(one[key] for one in last.values() if key in one).arrow for key in shared}
    head = ["run", *(Number(f"{suite} {metric}\N{NO-BREAK SPACE}{arrows[suite, metric]}") for suite, metric in shared)]
    note = (
        "Of the last scored stage of each run, with 95 % intervals, for suites that two runs or more have by the same "
        "name. Rows may differ: `hfpipe diff` compares two runs row by row."
    )
    return Section("Last scores", Table(head, rows), [note])


def _front(runs: Sequence[Compared]) -> Section | None:
    """Returns the gain and the forgetting of runs that have the same scores, each against its own base."""
    scored = [run for run in runs if run.line and run.line[-1].stage != BASE]
    alike = {frozenset(run.last): [one for one in scored if one.last.keys() == run.last.keys()] for run in scored}
    placed = [_placed(family[:MOST_RUNS]) for family in alike.values()]
    note = (
        "Each run against its own base, runs with the same suites and metrics in one plot; the line joins those of "
        "which no other one gained more and forgot less."
    )
    plots = [front(family) for family in placed if len(family) > 1]
    return Section("Gain against forgetting", None, [note], plots) if plots else None


def _placed(runs: Sequence[Compared]) -> list[Placed]:
    """The places of runs on the plane, as far as there is something to gain and something to keep."""
    starts = [[score for score in run.line if score.stage == BASE] for run in runs]
    ends = [list(run.last.values()) for run in runs]
    kept: set[Key] = set()
    for run, start, end in zip(runs, starts, ends, strict=True):
        kept |= kept_keys(run.recipe.evaluate, start, [end])
    scales = scales_of(score for run in runs for score in run.line)
    placed = []
    for run, start, end in zip(runs, starts, ends, strict=True):
        before = [score for score in run.line if score not in end]
        where = point(run.recipe.evaluate, before, start, end, scales, kept)
        if where.gain is not None and where.forgetting is not None:
            placed.append(Placed(run.name, BASE, "", where))
    return placed


def _curves(runs: Sequence[Compared]) -> Section | None:
    """The losses of stages that two runs or more have by the same name and kind."""
    kinds = {(stage.name, stage.kind): None for run in runs for stage in run.recipe.stages}
    plots = []
    for stage, kind in kinds:
        mine = [run for run in runs if any((one.name, one.kind) == (stage, kind) for one in run.recipe.stages)]
        logs = {run.name: run.logs[stage] for run in mine if stage in run.logs}
        if len(logs) > 1:
            shown = dict(list(logs.items())[:MOST_RUNS])
            plots.append(loss_curves(stage, shown))
    note = "Losses compare where the data and the tokenizer are the same."
    return Section("Losses", None, [note], plots) if plots else None
