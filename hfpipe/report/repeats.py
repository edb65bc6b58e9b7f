"""report.md and report.html of a recipe that was run several times: mean and spread over the repeats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from hfpipe.core.files import write_text
from hfpipe.recipe import Recipe, load_recipe
from hfpipe.recipe.metric_table import SHARE_METRICS
from hfpipe.report.html import PAGE
from hfpipe.report.layout import Section

REPEATS = "repeats.json"


def write_repeat_reports(folder: Path) -> list[Path]:
    """Writes report.md and report.html from repeats.json and returns their paths."""
    recipe = load_recipe(folder / "recipe.yaml")
    found = json.loads((folder / REPEATS).read_text())
    verdict = [line.strip() for line in _verdict(found)]
    sections = _sections(recipe, found)
    links = [f"{name}/report.html" for name in found["repeats"]]
    page = [f"<h1>{escape(recipe.name)}</h1>"]
    page += [f'<p class="verdict">{escape(line)}</p>' for line in verdict]
    page += [section.html() for section in sections]
    page += ["<h2>The repeats</h2>", "<ul>", *(f'<li><a href="{link}">{link}</a></li>' for link in links), "</ul>"]
    text = [f"# {recipe.name}", *verdict, *(section.markdown() for section in sections)]
    text += ["## The repeats", "\n".join(f"- [{link}]({link})" for link in links)]
    written = [folder / "report.md", folder / "report.html"]
    write_text(written[0], "\n\n".join(text) + "\n")
    write_text(written[1], PAGE.format(title=escape(recipe.name), body="\n".join(page)))
    return written


def repeat_lines(folder: Path) -> list[str]:
    """What a person reads last: the mean and spread of the last stage, and where the repeats lie."""
    found = json.loads((folder / REPEATS).read_text())
    return ["", *_verdict(found), f"report     {folder / 'report.html'}"]


def _verdict(found: Mapping[str, Any]) -> list[str]:
    """A line for each score of the last stage."""
    last = found["scores"][-1]["stage"] if found["scores"] else None
    lines = []
    for row in found["scores"]:
        if row["stage"] != last:
            continue
        line = f"{row['suite']} {row['metric']} {_value(row, 'mean')} ± {_value(row, 'std')} over {_count(row)}"
        if gain := row.get("gain"):
            shown = {key: _value({**row, **gain}, key) for key in ("mean", "low", "high")}
            line += f"; gain over the base {shown['mean']}"
            if gain["std"] is not None:
                beyond = gain["low"] > 0 or gain["high"] < 0
                line += f" (95 % interval {shown['low']} to {shown['high']}{'' if beyond else ', within the spread'})"
        lines.append(f"{line}.")
    return lines or ["The recipe has no suites, so nothing was measured."]


def _count(row: Mapping[str, Any]) -> str:
    return f"{len(row['values'])} repeats"


def _sections(recipe: Recipe, found: Mapping[str, Any]) -> list[Section]:
    head = ["stage", "suite", "metric", "#mean", "#std", "#95 % interval", "#rows"]
    rows = [[*head, *(f"#{name}" for name in found["repeats"])]]
    for row in found["scores"]:
        interval = "" if row["std"] is None else f"{_value(row, 'low')} to {_value(row, 'high')}"
        cells = [_value(row, "mean"), _value(row, "std"), interval, f"{row['n']:,}"]
        cells += [_value({**row, **row["values"]}, name) if name in row["values"] else "" for name in found["repeats"]]
        rows.append([row["stage"], row["suite"], f"{row['metric']} {row['arrow']}", *(f"#{cell}" for cell in cells)])
    return [Section("Scores over the repeats", rows, [_note(recipe)])]


def _note(recipe: Recipe) -> str:
    note = (
        "std is the standard deviation between the repeats, which a single run hides; the interval is that of their "
        "mean, by Student's t."
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
    """A value as it is printed everywhere: shares in percent, the rest with four digits."""
    if row[key] is None:
        return "unknown"
    percent = row["metric"] in SHARE_METRICS
    return f"{row[key] * 100:.1f} %" if percent else f"{row[key]:.4f}"
