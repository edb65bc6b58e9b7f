"""Confusion matrices: which class was said where which was right, from the predictions that the last stage left."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from hfpipe.core.run_layout import predictions_of
from hfpipe.recipe import Recipe
from hfpipe.report.section import Section

MOST_CLASSES = 30  # of a table that a person still reads
LONGEST_NAME = 40


def confusion_sections(folder: Path, recipe: Recipe) -> list[Section]:
    """One table for each suite of classes, after the last stage that was scored on it."""
    sections = []
    for suite in recipe.evaluate:
        files = {one.name: predictions_of(folder / "stages" / one.name) / f"{suite}.jsonl" for one in recipe.stages}
        there = [stage for stage, file in files.items() if file.exists()]
        pairs = _pairs(files[there[-1]]) if there else []
        names = sorted({name for pair in pairs for name in pair})
        if 2 <= len(names) <= MOST_CLASSES:
            sections.append(_table(suite, there[-1], pairs, names))
    return sections


def _pairs(file: Path) -> list[tuple[str, str]]:
    """The right and the said class of each row that has one of each."""
    records = [json.loads(line).get("choice", {}) for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [(record["reference"], record["prediction"]) for record in records if record]
    return [pair for pair in pairs if all(isinstance(side, str) for side in pair)]


def _table(suite: str, stage: str, pairs: list[tuple[str, str]], names: list[str]) -> Section:
    counts = Counter(pairs)
    rows = [["right \\ said", *(f"#{_cut(name)}" for name in names), "#rows", "#found"]]
    for right in names:
        row = [counts[right, said] for said in names]
        found = f"{counts[right, right] / sum(row):.1%}" if sum(row) else ""
        rows.append([_cut(right), *(f"#{count:,}" for count in row), f"#{sum(row):,}", f"#{found}"])
    return Section(f"Confusion: {suite} after {stage}", rows)


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
