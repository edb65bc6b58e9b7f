"""Sample outputs before and after, side by side: a few rows that became better, worse, or stayed as they were."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from hfpipe.core.run_layout import predictions_of
from hfpipe.recipe import Recipe
from hfpipe.scores.scorecard import BASE, Score

EACH = 2  # rows of each sort and suite
SHOWN = 500  # characters of a text
SORTS = ("better", "worse", "the same")


@dataclass(frozen=True)
class Sample:
    """One row of a suite, as two models answered it.

    Args:
        suite: The suite.
        row: Its place in it, or its id.
        sort: One of `SORTS`.
        metric: The metric that says so.
        values: The row's own score before and after.
        stages: What was scored before and after.
        asked: What the row asks, where that was kept.
        right: The right answer.
        answers: The answers before and after.
    """

    suite: str
    row: str
    sort: str
    metric: str
    values: tuple[float, float]
    stages: tuple[str, str]
    asked: str
    right: str
    answers: tuple[str, str]


def samples_of(folder: Path, recipe: Recipe, scores: Sequence[Score]) -> list[Sample]:
    """The samples of every suite with answers, from the first model in the line of the last stage that was asked to it.

    The same run gives the same rows: those that changed most, and the first that stayed.
    """
    if not scores:
        return []
    better = {score.key: score.higher_is_better for score in scores}
    line = recipe.lineage(scores[-1].stage)
    found = []
    for suite in recipe.evaluate:
        files = {stage: predictions_of(folder / "stages" / stage) / f"{suite}.jsonl" for stage in line}
        there = [stage for stage, file in files.items() if file.exists()]
        if len(there) > 1:
            before, after = (_records(files[stage]) for stage in (there[0], there[-1]))
            found += _pick(suite, (there[0], there[-1]), before, after, better)
    return found


def _records(file: Path) -> dict[int, dict[str, Any]]:
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {record["row"]: record for record in records if _answer(record) is not None}


def _answer(record: dict[str, Any]) -> dict[str, Any] | None:
    """What the model said and what is right: in words where it was asked for words, else its choice."""
    for need in ("generation", "choice", "number"):
        if "prediction" in record.get(need, {}):
            return record[need]
    return None


def _pick(
    suite: str,
    stages: tuple[str, str],
    before: dict[int, dict[str, Any]],
    after: dict[int, dict[str, Any]],
    better: dict[tuple[str, str], bool],
) -> list[Sample]:
    both = [row for row in after if row in before]
    need = next((need for need in ("generation", "choice", "number") if both and need in after[both[0]]), "")
    metrics = [name for name in (after[both[0]]["values"] if both else ()) if _judges(name, need, after[both[0]])]
    if not metrics:
        return []
    metric = metrics[0]

    def gain(row: int) -> float:
        change = after[row]["values"][metric] - before[row]["values"][metric]
        return change if better.get((suite, metric), True) else -change

    known = [row for row in both if metric in after[row]["values"] and metric in before[row]["values"]]
    order = sorted(known, key=lambda row: (-abs(gain(row)), row))
    sorts = dict(zip(SORTS, (lambda x: x > 0, lambda x: x < 0, lambda x: x == 0), strict=True))
    chosen = [(sort, row) for sort, test in sorts.items() for row in [r for r in order if test(gain(r))][:EACH]]
    return [_sample(suite, stages, sort, metric, before[row], after[row]) for sort, row in chosen]


def _judges(metric: str, need: str, record: dict[str, Any]) -> bool:
    """Whether a metric's value of a row is about the answer that is shown, and not about its likelihood."""
    likelihood = ("bits_per_byte", "perplexity", "bits_per_token")
    choice = need == "generation" and "choice" in record and metric == "accuracy"
    return metric not in likelihood and not choice


def _sample(
    suite: str, stages: tuple[str, str], sort: str, metric: str, before: dict[str, Any], after: dict[str, Any]
) -> Sample:
    old, new = _answer(before) or {}, _answer(after) or {}
    return Sample(
        suite=suite,
        row=str(after.get("id", after["row"])),
        sort=sort,
        metric=metric,
        values=(before["values"][metric], after["values"][metric]),
        stages=stages,
        asked=str(after.get("asked", "")),
        right=_words(new["reference"]),
        answers=(_words(old["prediction"]), _words(new["prediction"])),
    )


def _words(answer: Any) -> str:
    return ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)


def _name(stage: str) -> str:
    return stage if stage == BASE else f"after {stage}"


def shortened(text: str) -> str:
    """A text as it is shown: its beginning, and how much there is of it."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} … ({len(text):,} characters)"


def samples_html(samples: Sequence[Sample]) -> str:
    """A card for each sample; the texts stand as they are, whatever they hold and in whichever direction they run."""
    if not samples:
        return ""
    cards = []
    for sample in samples:
        title = f"{escape(sample.suite)}, row {escape(sample.row)}: {sample.sort}"
        value = f"{escape(sample.metric)} {sample.values[0]:.4g} → {sample.values[1]:.4g}"
        sides = [(_name(stage), answer) for stage, answer in zip(sample.stages, sample.answers, strict=True)]
        sides = [("right", sample.right), *sides]
        asked = f'<div class="asked">{_text(sample.asked)}</div>' if sample.asked else ""
        answers = "".join(f"<div><b>{escape(name)}</b>{_text(text)}</div>" for name, text in sides)
        kind = {"better": "better", "worse": "worse"}.get(sample.sort, "")
        cards.append(
            f'<div class="sample"><p><span class="{kind}">{title}</span> <span class="note">{value}</span></p>'
            f'{asked}<div class="sides">{answers}</div></div>'
        )
    return f"<h2>Samples</h2>{''.join(cards)}"


def _text(text: str) -> str:
    return f'<div class="text" dir="auto">{escape(shortened(text)) or "&nbsp;"}</div>'


def samples_markdown(samples: Sequence[Sample]) -> str:
    """The same as fenced blocks, whose fence is longer than any in the texts."""
    if not samples:
        return ""
    parts = ["## Samples"]
    for sample in samples:
        values = f"{sample.metric} {sample.values[0]:.4g} -> {sample.values[1]:.4g}"
        texts = [("asked", sample.asked), ("right", sample.right)]
        texts += [(_name(stage), answer) for stage, answer in zip(sample.stages, sample.answers, strict=True)]
        body = "\n".join(f"{name}: {shortened(text)}" for name, text in texts if text or name != "asked")
        fence = "```"
        while fence in body:
            fence += "`"
        parts.append(f"{sample.suite}, row {sample.row}, {sample.sort} ({values}):\n\n{fence}text\n{body}\n{fence}")
    return "\n\n".join(parts)
