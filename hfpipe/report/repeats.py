"""report.md and report.html of a recipe that was run several times: mean and spread over the repeats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfpipe.core.files import read_json
from hfpipe.recipe import Recipe, load_recipe
from hfpipe.report.layout import Cell, Number, Page, Section, Table, Told, write_page
from hfpipe.scores.wording import between, number

REPEATS = "repeats.json"


def write_repeat_reports(folder: Path) -> list[Path]:
    """Writes report.md and report.html from repeats.json and returns their paths."""
    recipe = load_recipe(folder / "recipe.yaml")
    found = read_json(folder / REPEATS)
    links = [f"{name}/report.html" for name in found["repeats"]]
    sections = [_score_section(recipe, found), Section("The repeats", links=links)]
    return write_page(Page(recipe.name, "", [Told(*_verdict(found))], sections), folder)


def repeat_lines(folder: Path) -> list[str]:
    """The last lines in the terminal: mean and spread of the scores of the last stage, and the path of the report."""
    return ["", *_verdict(read_json(folder / REPEATS))[1], f"report     {folder / 'report.html'}"]


def _verdict(found: Mapping[str, Any]) -> tuple[str, list[str]]:
    """A title, and a line for each score of the last stage."""
    last = found["scores"][-1]["stage"] if found["scores"] else None
    lines = []
    for row in found["scores"]:
        if row["stage"] != last:
            continue
        line = f"{row['suite']} {row['metric']} {_value(row, 'mean')} over {len(row['values'])} repeats"
        if row["std"] is not None:
            line += f" ({_interval(row)}; std {_value(row, 'std')})"
        if gain := row.get("gain"):
            gain = {**row, **gain}
            line += f"; gain over the base {_value(gain, 'mean')}"
            if gain["std"] is not None:
                beyond = gain["low"] > 0 or gain["high"] < 0
                line += f" ({_interval(gain)}{'' if beyond else ', within the spread'})"
        lines.append(f"{line}.")
    return (f"After {last}", lines) if lines else ("", ["The recipe has no suites, so nothing was measured."])


def _score_section(recipe: Recipe, found: Mapping[str, Any]) -> Section:
    rows = []
    for row in found["scores"]:
        mean = Cell(_value(row, "mean"), "" if row["std"] is None else _interval(row))
        each = [_value({**row, **row["values"]}, name) if name in row["values"] else "" for name in found["repeats"]]
        name = Cell(f"{row['suite']} {row['metric']} {row['arrow']}", f"{row['n']:,} rows")
        rows.append([name, row["stage"], mean, _value(row, "std"), *each])
    head = ["suite, metric", "stage", *map(Number, ("mean", "std", *found["repeats"]))]
    return Section("Scores over the repeats", Table(head, rows), [_note(recipe)])


def _note(recipe: Recipe) -> str:
    note = (
        "std is the standard deviation between the repeats, which a single run hides; the interval is the 95 % one of "
        "their mean, by Student's t."
    )
    if recipe.cross_validation is not None:
        block = recipe.cross_validation
        note += (
            f" Each repeat leaves another of {block.folds} folds of the data of {block.stage} out and is scored on it. "
            "The folds are trained on much the same rows, so the interval is widened after Nadeau and Bengio (2003)."
        )
    elif len(recipe.seeds or ()) < 5:
        note += " Few seeds: the interval is wide because so little is known, not because training varies that much."
    return note


def _value(row: Mapping[str, Any], key: str) -> str:
    return "unknown" if row[key] is None else number(row[key], row["metric"])


def _interval(row: Mapping[str, Any]) -> str:
    return between(_value(row, "low"), _value(row, "high"))
