"""Gain against forgetting, and the dial: from the scorecard and each stage's dial.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from hfpipe.core.files import read_json
from hfpipe.core.run_layout import strength_of
from hfpipe.recipe import Recipe
from hfpipe.report.cures import cured_sentence
from hfpipe.report.layout import Cell, Number, Section, Table
from hfpipe.report.plots import Placed, dial_plots, tradeoff_plots
from hfpipe.scores.scorecard import Score, of_lineage, stages_of
from hfpipe.scores.tradeoff import Comparison, Key, compare, estimate_of, kept_keys, kept_suites, point, scales_of
from hfpipe.scores.wording import loss_words, number, percent, share_words, with_interval

MOST_PAIRS = 3  # of stages from one parent, of which each two are compared in a sentence


def price_sections(folder: Path, recipe: Recipe, scores: Sequence[Score]) -> list[Section]:
    """Every stage's gain and forgetting, and the finished dials."""
    tradeoff = _tradeoff_section(folder, recipe, scores)
    return [*([tradeoff] if tradeoff else []), *(dial_section(dial) for dial in dials_of(folder, recipe))]


def price_sentences(folder: Path, recipe: Recipe, scores: Sequence[Score]) -> list[str]:
    """Sentences for the verdict: stages dialled down, losses of cured ones, comparisons of stages from one parent."""
    strengths = {stage.name: strength_of(folder / "stages" / stage.name) for stage in recipe.stages}
    told = [
        f"Stage {stage} was over its budget and was dialled down to {strength:g} of its strength, the best inside it."
        for stage, strength in strengths.items()
        if strength is not None
    ]
    scored = stages_of(scores)
    kept = (cured_sentence(folder, recipe, scores, stage.name) for stage in recipe.stages if stage.name in scored)
    return [*told, *(line for line in kept if line), *_comparisons(recipe, scores, strengths)]


def _family(
    recipe: Recipe, scores: Sequence[Score], parent: str
) -> tuple[list[Score], dict[str, list[Score]], dict[Key, float], set[Key]]:
    """The scores of a parent, those of each stage that starts from it, their scales, and what is to be kept."""
    start = [score for score in scores if score.stage == parent]
    children = [stage for stage in stages_of(scores)[1:] if recipe.parent_of(stage) == parent]
    ends = {stage: [score for score in scores if score.stage == stage] for stage in children}
    every = [*start, *(score for end in ends.values() for score in end)]
    return start, ends, scales_of(every), kept_keys(recipe.evaluate, start, list(ends.values()))


def _tradeoff_section(folder: Path, recipe: Recipe, scores: Sequence[Score]) -> Section | None:
    """Every stage against the model it started from; stages from one parent share what is to be kept and the scales."""
    rows, placed, kept = [], [], kept_suites(recipe.evaluate)
    for stage in stages_of(scores)[1:]:
        parent = recipe.parent_of(stage)
        start, ends, scales, keys = _family(recipe, scores, parent)
        where = point(recipe.evaluate, of_lineage(scores, recipe.lineage(parent)), start, ends[stage], scales, keys)
        method = next(one.method for one in recipe.stages if one.name == stage)
        placed.append(Placed(stage, parent, method, where))
        over = ", ".join(f"{change.after.suite} {change.after.metric}" for change in where.over)
        state = Cell("over", over, "worse") if over else "inside" if kept else "none"
        how = _how(method, strength_of(folder / "stages" / stage))
        gain, forgot = Cell(*share_words(where.gain)), Cell(*loss_words(where.forgetting))
        if where.forgetting is None and not kept:  # nothing became worse beyond the noise
            forgot = Cell("none seen")
        rows.append([stage, state, gain, forgot, how, parent])
    if not rows:
        return None
    what = f"the suites with a budget ({', '.join(kept)})" if kept else "what became worse, as no suite has a budget"
    note = (
        f"Forgetting is the mean loss on {what}, against the best score before; gain the mean improvement on all other "
        "suites, as a share of a flawless score, or where there is none of the largest among the compared stages. With "
        "each its 95 % interval."
    )
    head = ["stage", "budget", Number("gain"), Number("forgetting"), "trained", "from"]
    return Section("Gain against forgetting", Table(head, rows), [note], tradeoff_plots(placed))


def _comparisons(recipe: Recipe, scores: Sequence[Score], strengths: Mapping[str, float | None]) -> list[str]:
    """A sentence for each two stages from one parent: which learned more, and which forgot more."""
    told = []
    methods = {stage.name: stage.method for stage in recipe.stages}
    for parent in stages_of(scores):
        start, ends, scales, kept = _family(recipe, scores, parent)
        pairs = [*combinations(ends, 2)]
        if len(pairs) > MOST_PAIRS:  # each with the first alone: a person reads no more
            pairs = [pair for pair in pairs if pair[0] == next(iter(ends))]
        for first, second in pairs:
            if methods[second] == "full":  # said of the adapter, against all weights
                first, second = second, first
            found = compare(start, ends[first], ends[second], scales, kept)
            one, other = (f"{name} ({_how(methods[name], strengths.get(name))})" for name in (second, first))
            told.append(f"From the same start as {other}, {one} {_in_words(found)}.")
            as_trained = strengths.get(first) is None and strengths.get(second) is None
            if as_trained and methods[first] == "full" and methods[second] == "LoRA" and _less(found):
                told[-1] += " That LoRA learns less and forgets less is known from elsewhere (Biderman et al. 2024)."
    return told


def _in_words(found: Comparison) -> str:
    parts = []
    for verb, estimate in (("learned", found.learned), ("forgot", found.forgot)):
        if estimate is None:
            parts.append(f"nothing says what it {verb}")
        elif estimate.beyond_noise and percent(abs(estimate.value)) != percent(0):
            size = with_interval(*share_words(estimate if estimate.value > 0 else -estimate))
            parts.append(f"{verb} {size} {'more' if estimate.value > 0 else 'less'}")
        else:
            noise = "" if estimate.beyond_noise else ", within the noise"
            parts.append(f"{verb} as much{noise}: {with_interval(*share_words(estimate))}")
    return " and ".join(parts)


def _less(found: Comparison) -> bool:
    """Returns True if the second model learned less and forgot less, both beyond the noise."""
    both = (found.learned, found.forgot)
    return all(estimate is not None and estimate.beyond_noise and estimate.value < 0 for estimate in both)


def _how(method: str, strength: float | None) -> str:
    """Describes how a stage was trained, and at which strength it is handed on."""
    return ("all weights" if method == "full" else method) + ("" if strength is None else f", dialled to {strength:g}")


def dials_of(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """The finished dials of a run."""
    found = [read_json(folder / "stages" / stage.name / "dial.json") for stage in recipe.stages]
    return [dial for dial in found if "verdict" in dial]


def dial_section(dial: dict[str, Any]) -> Section:
    """One dial: a strength a line."""
    names = list(dict.fromkeys((score["suite"], score["metric"]) for one in dial["points"] for score in one["scores"]))
    shown = [Number(f"{suite} {metric}") for suite, metric in names]
    rows: list[list[str | Cell]] = []
    for one in dial["points"]:
        state: str | Cell = "none" if one["inside"] is None else "inside"
        state = Cell("over", ", ".join(one["over"]), "worse") if one["over"] else state
        best = " (best)" if one["strength"] == dial["best"] else ""
        values = {(score["suite"], score["metric"]): score["value"] for score in one["scores"]}
        gain, forgot = share_words(estimate_of(one, "gain")), loss_words(estimate_of(one, "forgetting"))
        rows.append([f"{one['strength']:g}{best}", state, Cell(*gain), Cell(*forgot)])
        rows[-1] += [number(values[name], name[1]) if name in values else "" for name in names]
    how = "the adapter's own tensors are scaled" if dial["method"] == "adapter" else "all weights are interpolated"
    note = f"Strength 0 is {dial['parent']}, 1 is {dial['stage']} as trained; between them {how}. {dial['verdict']}"
    head = ["strength", "budget", Number("gain"), Number("forgetting"), *shown]
    return Section(f"The dial: {dial['stage']}", Table(head, rows), [note], dial_plots(dial))
