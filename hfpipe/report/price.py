"""Gain against forgetting, and the dial: sections of both reports, from the scorecard and each stage's dial.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from hfpipe.core.run_layout import strength_of
from hfpipe.recipe import Recipe
from hfpipe.report.layout import Section
from hfpipe.report.plots import Placed
from hfpipe.scores.scorecard import Score, of_lineage, stages_of
from hfpipe.scores.tradeoff import Comparison, Estimate, compare, kept_keys, kept_suites, point, scales_of


def placed(recipe: Recipe, scores: Sequence[Score]) -> list[Placed]:
    """Every stage that was scored, in order; stages from one parent share what is to be kept and the scales."""
    found = []
    for stage in stages_of(scores)[1:]:
        start, ends, scales, kept = _family(recipe, scores, recipe.parent_of(stage))
        line = of_lineage(scores, recipe.lineage(recipe.parent_of(stage)))
        where = point(recipe.evaluate, line, start, ends[stage], scales, kept)
        method = next(one.method for one in recipe.stages if one.name == stage)
        found.append(Placed(stage, recipe.parent_of(stage), method, where))
    return found


def _family(
    recipe: Recipe, scores: Sequence[Score], parent: str
) -> tuple[list[Score], dict[str, list[Score]], Any, Any]:
    """The scores of a parent, those of each stage that starts from it, their scales, and what is to be kept."""
    start = [score for score in scores if score.stage == parent]
    children = [stage for stage in stages_of(scores)[1:] if recipe.parent_of(stage) == parent]
    ends = {stage: [score for score in scores if score.stage == stage] for stage in children}
    every = [*start, *(score for end in ends.values() for score in end)]
    return start, ends, scales_of(every), kept_keys(recipe.evaluate, start, list(ends.values()))


def comparisons(recipe: Recipe, scores: Sequence[Score], strengths: Mapping[str, float | None]) -> list[str]:
    """A sentence for each two stages from one parent: which learned more, and which forgot more.

    Args:
        recipe: The recipe.
        scores: The scorecard.
        strengths: Of the stages that were dialled down; these are no longer what they were trained to be.
    """
    told = []
    methods = {stage.name: stage.method for stage in recipe.stages}
    for parent in stages_of(scores):
        start, ends, scales, kept = _family(recipe, scores, parent)
        for first, second in combinations(ends, 2):
            if methods[second] == "full":  # said of the adapter, against all weights
                first, second = second, first
            found = compare(start, ends[first], ends[second], scales, kept)
            told.append(_in_words(first, second, methods, strengths, found))
    return told


def _in_words(
    first: str, second: str, methods: dict[str, str], strengths: Mapping[str, float | None], found: Comparison
) -> str:
    parts = []
    for verb, estimate in (("learned", found.learned), ("forgot", found.forgot)):
        if estimate is None:
            parts.append(f"nothing says what it {verb}")
        elif estimate.beyond_noise:
            parts.append(f"{verb} {'more' if estimate.value > 0 else 'less'} ({_signed(estimate)})")
        else:
            parts.append(f"{verb} as much, within the noise ({_signed(estimate)})")
    one, other = (f"{name} ({_how(methods[name], strengths.get(name))})" for name in (second, first))
    text = f"From the same start as {other}, {one} {' and '.join(parts)}."
    as_trained = strengths.get(first) is None and strengths.get(second) is None
    if as_trained and methods[second] != "full" and methods[first] == "full" and found.learned and found.forgot:
        less = all(estimate.beyond_noise and estimate.value < 0 for estimate in (found.learned, found.forgot))
        how = "This is" if less else "This does not show"
        text += f" {how} the known result that LoRA learns less and forgets less (Biderman et al. 2024)."
    return text


def _how(method: str, strength: float | None) -> str:
    """How a stage was trained, and at which strength it is handed on."""
    return ("all weights" if method == "full" else method) + ("" if strength is None else f", dialled to {strength:g}")


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.1%} ± {estimate.stderr:.1%}"


def percent(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.1%} ± {estimate.stderr:.1%}"


def tradeoff_section(folder: Path, recipe: Recipe, scores: Sequence[Score]) -> Section | None:
    """Every stage's gain and forgetting, against the model it started from."""
    rows = [["stage", "trained", "from", "#gain", "#forgetting", "budget"]]
    for one in placed(recipe, scores):
        over = ", ".join(f"{change.after.suite} {change.after.metric}" for change in one.where.over)
        state = f"over: {over}" if over else "inside" if kept_suites(recipe.evaluate) else "none"
        method = _how(one.method, strength_of(folder / "stages" / one.stage))
        rows.append([one.stage, method, one.parent, f"#{percent(one.where.gain)}", f"#{percent(one.where.forgetting)}"])
        rows[-1].append(state)
    if len(rows) == 1:
        return None
    kept = kept_suites(recipe.evaluate)
    what = f"the suites with a budget ({', '.join(kept)})" if kept else "what became worse, as no suite has a budget"
    note = (
        f"Forgetting is the mean loss on {what}, against the best score before; gain the mean improvement on all other "
        "suites, as a share of a flawless score, or where there is none of the largest among the compared stages. ± is "
        "one standard error."
    )
    return Section("Gain against forgetting", rows, [note])


def dials_of(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """The finished dials of a run."""
    files = [folder / "stages" / stage.name / "dial.json" for stage in recipe.stages]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    return [dial for dial in found if "verdict" in dial]


def dial_section(dial: dict[str, Any]) -> Section:
    """One dial: a strength a line."""
    names = list(dict.fromkeys((score["suite"], score["metric"]) for one in dial["points"] for score in one["scores"]))
    rows = [["#strength", "#gain", "#forgetting", "budget", *(f"#{suite} {metric}" for suite, metric in names)]]
    for one in dial["points"]:
        state = "none" if one["inside"] is None else f"over: {', '.join(one['over'])}" if one["over"] else "inside"
        state = f"{state}, best" if one["strength"] == dial["best"] else state
        by_name = {(score["suite"], score["metric"]): score["value"] for score in one["scores"]}
        cells = [f"#{_value(by_name[name])}" if name in by_name else "#" for name in names]
        shares = [f"#{percent(estimate_of(one, key))}" for key in ("gain", "forgetting")]
        rows.append([f"#{one['strength']:g}", *shares, state, *cells])
    how = "the adapter's own tensors are scaled" if dial["method"] == "adapter" else "all weights are interpolated"
    note = f"Strength 0 is {dial['parent']}, 1 is {dial['stage']} as trained; between them {how}. {dial['verdict']}"
    return Section(f"The dial: {dial['stage']}", rows, [note])


def _value(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.4g}"


def estimate_of(one: dict[str, Any], key: str) -> Estimate | None:
    """The gain or the forgetting of a point of dial.json."""
    return None if one[key] is None else Estimate(one[key], one[f"{key}_stderr"])


def price_sentences(folder: Path, recipe: Recipe, scores: Sequence[Score]) -> list[str]:
    """What belongs in the verdict: stages that were dialled down, and stages from one parent beside each other."""
    strengths = {stage.name: strength_of(folder / "stages" / stage.name) for stage in recipe.stages}
    told = [
        f"Stage {stage} was over its budget and was dialled down to {strength:g} of its strength, the best inside it."
        for stage, strength in strengths.items()
        if strength is not None
    ]
    return [*told, *comparisons(recipe, scores, strengths)]


def price_markdown(folder: Path, recipe: Recipe, scores: Sequence[Score]) -> list[str]:
    """Both sections in Markdown."""
    section = tradeoff_section(folder, recipe, scores)
    dials = [dial_section(dial).markdown() for dial in dials_of(folder, recipe)]
    return [*([section.markdown()] if section else []), *dials]


def price_html(folder: Path, recipe: Recipe, scores: Sequence[Score]) -> list[str]:
    """Both sections in HTML, with their plots."""
    from hfpipe.report.plots import dial_plots, tradeoff_plots

    parts = []
    section = tradeoff_section(folder, recipe, scores)
    if section is not None:
        parts.append(section.html() + _side_by_side(tradeoff_plots(placed(recipe, scores))))
    for dial in dials_of(folder, recipe):
        parts.append(dial_section(dial).html() + _side_by_side(dial_plots(dial)))
    return parts


def _side_by_side(plots: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(f"<div>{plot}</div>" for plot in plots)}</div>' if plots else ""
