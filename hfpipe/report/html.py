"""report.html: one page that opens anywhere, without a network, on a phone, on a desk and on paper."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from hfpipe.core.files import write_text
from hfpipe.recipe import Recipe, load_recipe
from hfpipe.report.facts import fact_sections
from hfpipe.report.layout import PAGE
from hfpipe.report.markdown import gains_and_losses, only_scored
from hfpipe.report.plots import loss_curve, score_by_stage
from hfpipe.report.price import price_html, price_sentences
from hfpipe.report.samples import samples_html, samples_of
from hfpipe.scores.scorecard import (
    Change,
    Score,
    how_counted,
    last_change,
    of_lineage,
    over_budget,
    read_scorecard,
    stages_of,
)
from hfpipe.scores.wording import describe, describe_first, number

MOST_IN_A_VERDICT = 4  # changes that a person still reads in a sentence


def write_html(folder: Path) -> Path:
    """Writes report.html of a run folder, whatever of the run is there.

    Raises:
        FileNotFoundError: The folder holds no scorecard.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    scores = read_scorecard(folder / "scorecard.json")
    done = {stage.name: _read(folder / "stages" / stage.name / "done.json") for stage in recipe.stages}
    parents = {stage.name: recipe.parent_of(stage.name) for stage in recipe.stages}
    parts = [
        f"<h1>{escape(recipe.name)}</h1>",
        _verdict(recipe, scores, price_sentences(folder, recipe, scores)),
        _scores(recipe, scores),
        _plots("Scores by stage", [score_by_stage(line, parents) for line in _by_key(scores) if len(line) > 1]),
        _changes(recipe, scores),
        *price_html(folder, recipe, scores),
        samples_html(samples_of(folder, recipe, scores)),
        _plots("Training loss", _losses(folder, recipe)),
        _training(recipe, done),
        *(section.html() for section in fact_sections(folder, recipe)),
        _environment(_read(folder / "environment.json")),
        f"<h2>Recipe</h2><pre>{escape((folder / 'recipe.yaml').read_text())}</pre>",
    ]
    path = folder / "report.html"
    write_text(path, PAGE.format(title=escape(recipe.name), body="\n".join(part for part in parts if part)))
    return path


def _verdict(recipe: Recipe, scores: list[Score], more: list[str]) -> str:
    """What was gained, what it cost, and whether that is inside the budget, in one sentence."""
    if not scores:
        return '<p class="verdict">The recipe has no suites, so nothing was measured.</p>'
    gained, lost = gains_and_losses(recipe, scores)
    won, cost = _in_short(gained), _in_short(lost)
    limits = {name: suite.budget for name, suite in recipe.evaluate.items() if suite.budget is not None}
    last = stages_of(scores)[-1]
    line = of_lineage(scores, recipe.lineage(last))
    over = [name for name, limit in limits.items() if over_budget(line, last, name, limit)]
    budget = ""
    if over:
        budget = f" That exceeds the budget of {', '.join(f'{limits[name]:.1%} on {name}' for name in over)}."
    elif limits:
        budget = " That is inside the budget."
    first = "; ".join(map(describe_first, only_scored(recipe, scores)))
    first = f" Scored for the first time: {first}." if first else ""
    text = escape(f"After {last} the model gained {won} and forgot {cost}.{budget}{first}")
    text += "".join(f" {escape(sentence)}" for sentence in more)
    return f'<p class="verdict{" over" if over else ""}">{_arrows(text)}</p>'


def _in_short(changes: list[Change]) -> str:
    """The first few changes in words, and how many more there are."""
    told = "; ".join(map(describe, changes[:MOST_IN_A_VERDICT])) or "nothing beyond the noise"
    more = len(changes) - MOST_IN_A_VERDICT
    return f"{told}; and {more} more" if more > 0 else told


def _by_key(scores: list[Score]) -> list[list[Score]]:
    """The scores of each metric of each suite, in the order of the stages."""
    keys = dict.fromkeys(score.key for score in scores)
    return [[score for score in scores if score.key == key] for key in keys]


def _scores(recipe: Recipe, scores: list[Score]) -> str:
    if not scores:
        return ""
    stages = stages_of(scores)
    rows = [["suite, metric", *(f"#{escape(stage)}" for stage in stages)]]
    for line in _by_key(scores):
        by_stage = {score.stage: score for score in line}
        name = f"<b>{escape(line[0].suite)}</b> {escape(line[0].metric)}"
        metric = f'{name}<span class="interval">{line[0].way}<br>n = {line[0].n:,}</span>'
        cells = [_score(recipe, scores, by_stage.get(stage)) for stage in stages]
        rows.append([metric, *(f"#{cell}" for cell in cells)])
    note = (
        "± is one standard error, the line below it the 95 % interval. An arrow says that a score became better (▲) or "
        "worse (▼) than in the model that the stage started from, beyond the noise."
    )
    return f'<h2>Scores</h2>{_table(rows)}<p class="note">{note}{escape(how_counted(scores))}</p>'


def _score(recipe: Recipe, scores: list[Score], score: Score | None) -> str:
    """A cell: the score, its direction, and its 95 % interval."""
    if score is None:
        return ""
    arrow = ""
    change = last_change(of_lineage(scores, recipe.lineage(score.stage)), score.stage, score.key)
    if change is not None and change.beyond_noise:
        better = change.gain > 0
        arrow = f' <span class="{"better" if better else "worse"}">{"▲" if better else "▼"}</span>'
    interval = ""
    if score.low is not None and score.high is not None:
        ends = (score.low, score.high)
        low, high = (number(Score(**{**vars(score), "value": end, "stderr": None})) for end in ends)
        interval = f'<span class="interval">{low} to {high}</span>'
    return f"{number(score)}{arrow}{interval}"


def _changes(recipe: Recipe, scores: list[Score]) -> str:
    """What each stage did, in words."""
    parts = []
    for stage in stages_of(scores)[1:]:
        own = of_lineage(scores, recipe.lineage(stage))
        changes = [last_change(own, stage, line[0].key) for line in _by_key(scores)]
        items = "".join(f"<li>{_arrows(escape(describe(change)))}</li>" for change in changes if change)
        if items:
            parts.append(f"<p><b>{escape(stage)}</b></p><ul>{items}</ul>")
    return "<h2>What each stage did</h2>" + "".join(parts) if parts else ""


def _arrows(text: str) -> str:
    """An arrow in one piece, which no line ends in the middle of."""
    return text.replace("-&gt;", "→")


def _losses(folder: Path, recipe: Recipe) -> list[str]:
    curves = []
    for stage in recipe.stages:
        log = folder / "stages" / stage.name / "log.jsonl"
        if not log.exists():
            continue
        rows = [row for line in log.read_text().splitlines() if "loss" in (row := json.loads(line))]
        if rows:
            unit = "" if stage.kind == "classification" else "nats per token"
            curves.append(loss_curve(stage.name, [row["step"] for row in rows], [row["loss"] for row in rows], unit))
    return curves


def _plots(title: str, plots: list[str]) -> str:
    figures = "".join(f"<div>{plot}</div>" for plot in plots)
    return f'<h2>{title}</h2><div class="plots">{figures}</div>' if plots else ""


def _training(recipe: Recipe, done: dict[str, dict[str, Any]]) -> str:
    rows = [["stage", "kind", "from", "#steps", "#last loss", "#rows", "#tokens"]]
    for stage in recipe.stages:
        facts = done[stage.name]
        if facts:
            loss = "" if facts.get("last_loss") is None else f"{facts['last_loss']:.4f}"
            how = stage.kind + (f" ({stage.method})" if stage.adapter is not None else "")
            counts = [f"#{facts['data'][name]:,}" if name in facts["data"] else "#" for name in ("rows", "tokens")]
            cells = [escape(stage.name), how, escape(facts["parent"]), f"#{facts['steps']:,}", f"#{loss}", *counts]
            rows.append(cells)
    return f"<h2>Training</h2>{_table(rows)}" if len(rows) > 1 else ""


def _environment(facts: dict[str, Any]) -> str:
    if not facts:
        return ""
    hardware, base = facts["hardware"], facts["base"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cpus']} CPUs"
    rows = [
        ["what", "found"],
        ["base model", escape(base["id"] + (f" at {base['revision']}" if base["revision"] else ""))],
        ["machine", escape(f"{machine} ({hardware['system']})")],
        ["processes", str(facts["launch"]["processes"])],
        ["versions", escape(", ".join(f"{name} {version}" for name, version in facts["packages"].items()))],
    ]
    if facts["trust_remote_code"]:
        rows.append(["trust_remote_code", "on: the model's own code was allowed to run"])
    if remote := facts.get("remote_metrics"):
        rows.append(["code from the Hub that measured", escape(", ".join(remote))])
    return f"<h2>Environment</h2>{_table(rows)}"


def _table(rows: list[list[str]]) -> str:
    """Rows of ready HTML, the first the head; a cell that begins with # is a number."""

    def cell(tag: str, text: str) -> str:
        return f'<{tag} class="number">{text[1:]}</{tag}>' if text.startswith("#") else f"<{tag}>{text}</{tag}>"

    head = "".join(cell("th", text) for text in rows[0])
    body = "".join(f"<tr>{''.join(cell('td', text) for text in row)}</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
