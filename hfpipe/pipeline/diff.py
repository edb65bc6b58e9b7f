"""Two runs compared without a model: keys of the recipes, scores, answers, cost, versions.

Scores are paired row by row where both runs kept what their models gave for the rows of the same suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hfpipe.core.errors import RecipeError
from hfpipe.core.files import gibibytes, load_json, read_json, read_jsonl
from hfpipe.core.output import printable
from hfpipe.core.run_layout import predictions_of
from hfpipe.core.secrets import without_secrets
from hfpipe.evaluation.suites import compare_rows
from hfpipe.pipeline.finished import require_one_run
from hfpipe.recipe import Recipe, Suite, load_recipe
from hfpipe.recipe.faults import did_you_mean, listed
from hfpipe.recipe.metric_table import OUR_METRICS
from hfpipe.report.samples import pick_samples
from hfpipe.scores.scorecard import BASE, Score, change_since, read_scorecard, stages_of
from hfpipe.scores.wording import change_words, describe, percent

APART = ("name", "output_dir")  # keys of a recipe in which two runs differ that train the same
LONGEST_VALUE, LONGEST_TEXT = 100, 200  # characters that are shown
UNSET = "(not set)"
Paired = dict[str, dict[str, Any]]  # of a suite: by metric, the differences as `Score.paired` holds them


@dataclass(frozen=True)
class Side:
    """One of the two runs.

    Args:
        name: `A` or `B`, which its scores are filed under.
        folder: The run folder.
        recipe: Its recipe.
        stage: The stage that is compared; `base` where nothing is trained yet.
        scores: Its scores.
    """

    name: str
    folder: Path
    recipe: Recipe
    stage: str
    scores: Sequence[Score]

    def records(self, suite: str) -> list[dict[str, Any]]:
        """The answers of the stage to the rows of a suite; empty where they were not kept."""
        file = predictions_of(self.folder / "stages" / self.stage) / f"{suite}.jsonl"
        return read_jsonl(file) if file.exists() else []


def diff_runs(first: Path, second: Path, stage: str | None = None) -> str:
    """Returns the page on two runs.

    Args:
        first: A run folder, called A.
        second: Another one, called B.
        stage: The stage of both that is compared; the last scored one of each when None.

    Raises:
        RecipeError: One of them was repeated, or has no scores, or no such stage.
    """
    a, b = sides = _side("A", first, stage), _side("B", second, stage)
    paired = {suite: _paired(suite, a, b) for suite in dict.fromkeys(score.suite for score in b.scores)}
    blocks = [
        "\n".join(f"{side.name}  {side.folder}, {_stage_words(side)}" for side in sides),
        _block("recipe", recipe_lines(*(side.recipe for side in sides)), "no key differs"),
        _block("scores, from A to B", _score_lines(a, b, paired), "no suite in common"),
        _block("answers", _sample_lines(a, b, paired)),
        _block("cost of the stage", _cost_lines(*sides)),
        _block("machine and versions", _environment_lines(*sides)),
    ]
    return without_secrets("\n\n".join(block for block in blocks if block))


def _side(name: str, folder: Path, stage: str | None) -> Side:
    recipe = load_recipe(folder / "recipe.yaml")
    require_one_run(folder, recipe)
    file = folder / "scorecard.json"
    scores = read_scorecard(file) if file.exists() else []
    if not scores:
        raise RecipeError(f"{folder} has no scores yet: `hfpipe run {folder / 'recipe.yaml'}` continues it.")
    scored = stages_of(scores)
    if stage is not None and stage not in scored:
        text = f"--stage {stage}: {folder} has no scores of it; it has those of {listed(scored)}."
        raise RecipeError(text + did_you_mean(stage, scored))
    chosen = stage or scored[-1]
    own = [replace(score, stage=name, paired={}) for score in scores if score.stage == chosen]
    return Side(name, folder, recipe, chosen, own)


def _stage_words(side: Side) -> str:
    return "the base" if side.stage == BASE else f"stage {side.stage}"


def _block(title: str, lines: Sequence[str], nothing: str = "") -> str:
    """A title with its lines below; with `nothing` to say, or empty, where there are none."""
    if not lines:
        return f"{title}: {nothing}" if nothing else ""
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The keys whose values differ, and the values in words, in the order of the keys."""
    keys = dict.fromkeys([*before, *after])
    return [(key, f"{_value(before, key)} → {_value(after, key)}") for key in keys if before.get(key) != after.get(key)]


def _value(values: Mapping[str, Any], key: str) -> str:
    return _cut(str(values[key]), LONGEST_VALUE) if key in values else UNSET


def _cut(text: str, length: int) -> str:
    """A text in one line that a terminal shows as it is."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _columns(pairs: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(key) for key, _ in pairs), default=0)
    return [f"{key:{width}}  {text}" for key, text in pairs]


def recipe_lines(before: Recipe, after: Recipe) -> list[str]:
    """The keys in which two recipes differ, as `--set` names them, with both values."""
    found = [dict(_flat(recipe.model_dump(mode="json", exclude_defaults=True))) for recipe in (before, after)]
    return _columns([pair for pair in _pairs(*found) if pair[0] not in APART])


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested data by their dotted keys; stages by name, other items of lists by place."""
    if isinstance(value, dict) and value:
        parts = list(value.items())
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        names = [item.get("name") if path == "stages" else place for place, item in enumerate(value)]
        parts = list(zip(names, value, strict=True))
    else:
        yield path, value
        return
    for key, item in parts:
        yield from _flat(item, f"{path}.{key}" if path else str(key))


def _score_lines(a: Side, b: Side, paired: Mapping[str, Paired | None]) -> list[str]:
    """The scores side by side, and those that cannot be held against each other."""
    lines, alone = [], []
    by_key = {score.key: score for score in a.scores}
    common = [score for score in b.scores if score.key in by_key and paired[score.suite] is not None]
    after = [replace(score, paired=(paired[score.suite] or {}).get(score.metric, {})) for score in common]
    both = [by_key[score.key] for score in common] + after
    for score in after:
        change = change_since(both, a.name, b.name, score.key)
        assert change is not None
        unpaired = "" if score.paired else "; the rows were not kept, so both are taken as independent"
        lines.append(f"{change_words(change)}{unpaired}")
    for side in (a, b):
        for score in side.scores:
            if score.key not in {one.key for one in common}:
                why = ", as the suites differ" if paired.get(score.suite, {}) is None else ""
                alone.append(f"{side.name} alone{why}: {score.suite} {describe(score)}")
    return lines + alone


def _paired(suite: str, a: Side, b: Side) -> Paired | None:
    """The paired differences; empty where the rows were not kept, None where the two suites differ."""
    blocks = [_asking(side.recipe.evaluate.get(suite)) for side in (a, b)]
    if blocks[0] != blocks[1] or blocks[0] is None:
        return None
    records = [side.records(suite) for side in (a, b)]
    if not all(records) or not _same_rows(*records):
        return {}
    block = b.recipe.evaluate[suite]
    ours = [metric for metric in block.metrics if metric in OUR_METRICS]  # another's code is not run for a comparison
    found = compare_rows(block.model_copy(update={"metrics": ours}), *records)
    return {metric: {a.name: difference} for metric, difference in found.items()}


def _asking(suite: Suite | None) -> dict[str, Any] | None:
    """The part of a suite that decides what is asked and how it is counted."""
    return (
        None
        if suite is None
        else suite.model_dump(exclude={"budget", "budget_action", "too_few_rows", "metrics", "batch_size", "every"})
    )


def _same_rows(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> bool:
    """Returns True if the rows that both answered are the same ones: a file may have changed under its name."""
    rows = {record["row"]: record for record in before}
    both = [(rows[record["row"]], record) for record in after if record["row"] in rows]
    return bool(both) and all(one.get(key) == two.get(key) for one, two in both for key in ("id", "asked"))


def _sample_lines(a: Side, b: Side, paired: Mapping[str, Paired | None]) -> list[str]:
    """A few rows of every suite with answers: where B is better, where it is worse."""
    better = {score.key: score.higher_is_better for score in b.scores}
    lines = []
    for suite in (suite for suite, differences in paired.items() if differences):
        for sample in pick_samples(suite, (a.name, b.name), a.records(suite), b.records(suite), better):
            if sample.sort == "the same":
                continue
            values = " → ".join(f"{value:.3g}" for value in sample.values)
            lines.append(f"{suite} row {_cut(sample.row, 40)}: {sample.sort} ({sample.metric} {values})")
            lines += [f"  {title:6} {_cut(text, LONGEST_TEXT)}" for title, text in sample.texts]
    return lines


def _cost_lines(a: Side, b: Side) -> list[str]:
    totals = [read_json(side.folder / "stages" / side.stage / "cost.json").get("total", {}) for side in (a, b)]
    known = [{key: form(total[key]) for key, form in COST.items() if total.get(key)} for total in totals]
    return _columns(_pairs(*({key.replace("_", " "): text for key, text in one.items()} for one in known)))


COST: dict[str, Callable[[Any], str]] = {
    "device": str,
    "devices": str,
    "steps": "{:,}".format,
    "tokens": "{:,}".format,
    "tokens_per_second": "{:,.0f}".format,
    "mfu": percent,
    "data_wait": percent,
    "seconds": "{:,.0f}".format,
    "peak_memory": lambda size: f"{gibibytes(size)} GiB",
    "predicted_memory": lambda size: f"{gibibytes(size)} GiB",
    "kwh": "{:.3g}".format,
}


def _environment_lines(a: Side, b: Side) -> list[str]:
    """Versions and hardware that differ: two runs of one recipe may differ by them alone."""
    files = [side.folder / "environment.json" for side in (a, b)]
    found = [dict(_flat(load_json(file))) if file.exists() else {} for file in files]
    return _columns([pair for pair in _pairs(*found) if not pair[0].startswith("base.")])
