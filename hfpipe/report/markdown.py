"""report.md, and the closing lines of a run: what was gained, what was forgotten, where it lies, what to type next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfpipe.core.command import our_command
from hfpipe.core.files import write_text
from hfpipe.core.run_layout import model_of, strength_of
from hfpipe.recipe import Recipe, load_recipe
from hfpipe.report.facts import fact_sections
from hfpipe.report.price import price_markdown, price_sentences
from hfpipe.report.samples import samples_markdown, samples_of
from hfpipe.scores.scorecard import (
    BASE,
    Change,
    Score,
    forgetting,
    how_counted,
    last_change,
    of_lineage,
    read_scorecard,
    stages_of,
)
from hfpipe.scores.wording import describe, describe_first, number


def write_report(folder: Path) -> Path:
    """Writes report.md of a run folder.

    Raises:
        FileNotFoundError: The folder holds no scorecard.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    scores = read_scorecard(folder / "scorecard.json")
    parts = [
        f"# {recipe.name}",
        _verdict(recipe, scores),
        *price_sentences(folder, recipe, scores),
        _table(scores),
        _changes(recipe, scores),
        *price_markdown(folder, recipe, scores),
        samples_markdown(samples_of(folder, recipe, scores)),
        _stages(folder, recipe),
        *(section.markdown() for section in fact_sections(folder, recipe)),
        _facts(folder),
        f"## Recipe\n\n```yaml\n{(folder / 'recipe.yaml').read_text().rstrip()}\n```",
    ]
    path = folder / "report.md"
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _verdict(recipe: Recipe, scores: list[Score]) -> str:
    """One sentence: the gains of the whole run, and what the last stage forgot."""
    if not scores:
        return "The recipe has no suites, so nothing was measured."
    gained, lost = gains_and_losses(recipe, scores)
    gains = "; ".join(describe(change) for change in gained) or "nothing beyond the noise"
    losses = "; ".join(describe(change) for change in lost) or "nothing beyond the noise"
    last = stages_of(scores)[-1]
    beside = set(stages_of(scores)) - set(recipe.lineage(last))  # stages from one parent: say of which this is told
    by = f" by {last}" if beside else ""
    lines = [f"**Gained{by}:** {gains}.", f"**Forgotten{by}:** {losses}."]
    if first := only_scored(recipe, scores):
        lines.append(f"**Scored for the first time:** {'; '.join(map(describe_first, first))}.")
    return "\n\n".join(lines)


def only_scored(recipe: Recipe, scores: list[Score]) -> list[Score]:
    """The scores of the last stage on what no model before it could answer: a classifier's own suite."""
    last = stages_of(scores)[-1]
    scores = of_lineage(scores, recipe.lineage(last))
    before = {score.key for score in scores if score.stage != last}
    return [score for score in scores if score.stage == last != BASE and score.key not in before]


def gains_and_losses(recipe: Recipe, scores: list[Score]) -> tuple[list[Change], list[Change]]:
    """What the last stage has gained against the base, and lost against the best score before it in its line."""
    if not scores:
        return [], []
    last = stages_of(scores)[-1]
    scores = of_lineage(scores, recipe.lineage(last))
    keys = list(dict.fromkeys(score.key for score in scores))
    base = {score.key: score for score in scores if score.stage == BASE}
    end = {score.key: score for score in scores if score.stage == last}
    gained = [Change(base[key], end[key]) for key in keys if key in base and key in end and last != BASE]
    lost = [change for key in keys if (change := forgetting(scores, last, key))]
    return (
        [change for change in gained if change.gain > 0 and change.beyond_noise],
        [change for change in lost if change.gain < 0 and change.beyond_noise],
    )


def _table(scores: list[Score]) -> str:
    """Suites by stages; ± is one standard error."""
    if not scores:
        return ""
    stages = stages_of(scores)
    by_place = {(score.key, score.stage): score for score in scores}
    lines = [
        "## Scores",
        "",
        "| suite | metric | n | " + " | ".join(stages) + " |",
        "| --- | --- | ---: | " + " | ".join("---:" for _ in stages) + " |",
    ]
    for key in dict.fromkeys(score.key for score in scores):
        row = [by_place.get((key, stage)) for stage in stages]
        first = next(score for score in row if score)
        cells = " | ".join(number(score) if score else "" for score in row)
        lines.append(f"| {key[0]} | {key[1]} {first.arrow} | {first.n} | {cells} |")
    note = "± is one standard error; ↑ more is better, ↓ less is better, → nearest is best."
    return "\n".join(lines) + f"\n\n{note}{how_counted(scores)}"


def _changes(recipe: Recipe, scores: list[Score]) -> str:
    lines = ["## What each stage did"]
    for stage in stages_of(scores)[1:]:
        line = of_lineage(scores, recipe.lineage(stage))
        changes = [last_change(line, stage, key) for key in dict.fromkeys(score.key for score in scores)]
        items = [f"- {describe(change)}" for change in changes if change]
        lines += ["", f"**{stage}**", "", *items] if items else []
    return "\n".join(lines) if len(lines) > 1 else ""


def _stages(folder: Path, recipe: Recipe) -> str:
    lines = [
        "## Training",
        "",
        "| stage | kind | from | steps | last loss | data |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    for stage in recipe.stages:
        done = folder / "stages" / stage.name / "done.json"
        if not done.exists():
            continue
        facts = json.loads(done.read_text())
        loss = "" if facts.get("last_loss") is None else f"{facts['last_loss']:.4f}"
        lines.append(
            f"| {stage.name} | {stage.kind} | {facts['parent']} | {facts['steps']} | {loss} | {_data(facts['data'])} |"
        )
    return "\n".join(lines)


def _data(facts: dict[str, Any]) -> str:
    shown = {key: value for key, value in facts.items() if isinstance(value, int | float)}
    return ", ".join(
        f"{value:,} {key}" if isinstance(value, int) else f"{value:.3g} {key}"
        for key, value in ((key.replace("_", " "), value) for key, value in shown.items())
    )


def _facts(folder: Path) -> str:
    facts = json.loads((folder / "environment.json").read_text())
    hardware = facts["hardware"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cpus']} CPUs"
    versions = ", ".join(f"{name} {found}" for name, found in facts["packages"].items())
    lines = [
        "## Environment",
        "",
        f"{machine} ({hardware['system']}), {facts['launch']['processes']} process(es), Python {facts['python']}, "
        f"hfpipe {facts['hfpipe']}, {versions}.",
        f"Base: {facts['base']['id']}"
        + (f" at {facts['base']['revision']}" if facts["base"]["revision"] else "")
        + ".",
    ]
    if facts["trust_remote_code"]:
        lines.append("The recipe allowed the model's own code to run (trust_remote_code).")
    if remote := facts.get("remote_metrics"):
        lines.append(f"The code of these Spaces of the Hub ran here, to measure: {', '.join(remote)}.")
    return "\n".join(lines)


def closing_lines(folder: Path) -> list[str]:
    """What a person reads last: gains, losses, where things lie, and the next commands."""
    recipe = load_recipe(folder / "recipe.yaml")
    scores = read_scorecard(folder / "scorecard.json") if (folder / "scorecard.json").exists() else []
    lines = [""]
    if scores:
        gained, lost = gains_and_losses(recipe, scores)
        lines += [f"gained     {describe(change)}" for change in gained] or ["gained     nothing beyond the noise"]
        lines += [f"forgotten  {describe(change)}" for change in lost] or ["forgotten  nothing beyond the noise"]
        lines += [f"scored     {describe_first(score)}" for score in only_scored(recipe, scores)]
    last = folder / "stages" / recipe.stages[-1].name
    model = model_of(last)
    is_adapter = (model / "adapter_config.json").exists()
    strength = strength_of(last)
    dialled = "" if strength is None else f"  (dialled to {strength:g}, to stay inside the budget)"
    lines.append(f"{'adapter' if is_adapter else 'model':9}  {model}{dialled}")
    if (last / "merged").exists():
        lines.append(f"merged     {last / 'merged'}")
    lines.append(f"report     {folder / 'report.html'}")
    what = "merged" if (last / "merged").exists() else "adapter" if is_adapter else "model"
    push = f"  {our_command()} push {folder} --repo-id YOU/{recipe.name} --what {what}"
    nexts = [] if recipe.push else [push]  # a recipe with a `push:` does it now
    if recipe.model.id is None:  # a first try; whoever starts from a model of the Hub is beyond it
        nexts.append(f"  {our_command()} recipes --copy smollm2-fineweb")
    return [*lines, "", "next:", *nexts] if nexts else lines
