"""Everything that a report tells of a run, computed once from the JSON files of the run folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfpipe.core.command import our_command
from hfpipe.core.files import read_json
from hfpipe.core.run_layout import ADAPTER_CONFIG, model_of, strength_of
from hfpipe.recipe import Recipe, load_recipe
from hfpipe.report.cures import COMPARED, how_kept, next_cure
from hfpipe.report.details import detail_sections
from hfpipe.report.layout import Cell, Number, Page, Section, Table, Told
from hfpipe.report.plots import loss_curve, losses_of, score_by_stage
from hfpipe.report.price import price_sections, price_sentences
from hfpipe.report.samples import sample_section, training_samples
from hfpipe.report.usage import lines_to_use
from hfpipe.scores.scorecard import BASE, Score, judge_budget, last_change, of_lineage, read_scorecard, stages_of
from hfpipe.scores.tradeoff import Change, from_baseline, gains_and_losses, is_first
from hfpipe.scores.wording import change_words, describe, interval, number, percent

MOST_IN_A_VERDICT = 6  # changes that a person still reads in a list


def run_page(folder: Path) -> Page:
    """The page of a run folder, whatever of the run is there.

    Raises:
        FileNotFoundError: The folder holds no scorecard.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    scores = read_scorecard(folder / "scorecard.json")
    sections = [
        *price_sections(folder, recipe, scores),
        score_section(recipe, scores, plots=True),
        _change_section(recipe, scores),
        sample_section(folder, recipe, scores),
        *training_samples(folder, recipe),
        _training_section(folder, recipe),
        *detail_sections(folder, recipe),
        environment_section(read_json(folder / "environment.json"), recipe),
        Section("Recipe", code=((folder / "recipe.yaml").read_text(), "yaml")),
    ]
    verdict = [
        *_verdict(folder, recipe, scores),
        *(Told("", [line]) for line in price_sentences(folder, recipe, scores)),
    ]
    return Page(recipe.name, about(recipe), verdict, [section for section in sections if section])


def about(recipe: Recipe) -> str:
    """The base and the stages, in a line."""
    architecture = recipe.model.architecture or {}
    fresh = architecture.get("model_type") or architecture.get("from", "model")
    base = recipe.model.id or f"a {fresh} with fresh weights"
    words = {one.name: f"{one.name} ({one.kind}, {how_trained(one)})" for one in recipe.stages}
    told, before = base, BASE
    for name, text in words.items():
        parent = recipe.parent_of(name)
        told += f" → {text}" if parent == before else f"; {parent} → {text}"
        before = name
    return told


def how_trained(stage: Any) -> str:
    """Returns `all weights`, or the kind of adapter and the quantization of its base."""
    if stage.adapter is None:
        return f"all weights{_kept(stage)}"
    return stage.method + (f" on {stage.quantized.type}" if stage.quantized else "") + _kept(stage)


def _kept(stage: Any) -> str:
    """Returns how a stage was kept near its parent, and its rows near their swapped forms, in words."""
    block = getattr(stage, "counterfactual", None)
    both = [f"KL between both forms of swapped rows by {block.weight:g}"] if block is not None else []
    return "".join(f", {how}" for how in (*how_kept(stage), *both))


def _verdict(folder: Path, recipe: Recipe, scores: list[Score]) -> list[Told]:
    """The gains of the whole run, the losses of its last stage, and every budget that a stage exceeds."""
    if not scores:
        return [Told("", ["The recipe has no suites, so nothing was measured."])]
    last = stages_of(scores)[-1]
    if last == BASE:
        return [Told("", ["Only the base has been scored so far."])]
    told = [Told("Cures compared", [found])] if (found := read_json(folder / COMPARED).get("told")) else []
    told = told or _of_last(recipe, scores, last)
    limits = {name: suite.budget for name, suite in recipe.evaluate.items() if suite.budget is not None}
    over, unsure = [], []
    for stage in stages_of(scores)[1:]:
        own = of_lineage(scores, recipe.lineage(stage))
        judged = {name: judge_budget(own, stage, name, recipe.evaluate[name]) for name in limits}
        if exceeded := [f"{percent(limits[name])} on {name}" for name, budget in judged.items() if budget.over]:
            advice = next_cure(folder, recipe, scores, next(one for one in recipe.stages if one.name == stage))
            over.append(f"{stage} exceeds the budget of {', '.join(exceeded)}. {advice}")
        undecided = [change for budget in judged.values() for change in budget.undecided]
        unsure += [f"{stage}: {change_words(change)}, which is above the budget" for change in undecided]
    if limits:
        kept = ", ".join(f"{percent(limit)} on {name}" for name, limit in limits.items())
        those = "every stage is" if len(stages_of(scores)) > 2 else f"{last} is"
        inside = f"{those} {'not told to exceed' if unsure else 'inside'} the budget of {kept}."
        told.append(Told("Budget", over or [inside], "worse" if over else ""))
    if unsure:
        told.append(Told("Too few rows to judge", _some(unsure)))
    return told


def _of_last(recipe: Recipe, scores: list[Score], last: str) -> list[Told]:
    """The gains up to the last stage, its losses, and what it is the first to be scored on."""
    line = of_lineage(scores, recipe.lineage(last))
    gained, lost = gains_and_losses(line)
    by = f" by {last}" if set(stages_of(scores)) - set(recipe.lineage(last)) else ""  # there are stages beside it
    told = [
        Told(f"{title}{by}", _some(_changes(changes, line)), how if changes else "")
        for title, changes, how in (("Gained", gained, "better"), ("Forgotten", lost, "worse"))
    ]
    if first := first_scores(line):
        told.append(Told("Scored for the first time", _some([f"{score.suite} {describe(score)}" for score in first])))
    return told


def _some(items: list[str]) -> list[str]:
    """The first few, and how many more there are."""
    more = len(items) - MOST_IN_A_VERDICT
    return items[:MOST_IN_A_VERDICT] + ([f"and {more} more, see the scores"] if more > 0 else [])


def _changes(changes: Sequence[Change], scores: Sequence[Score]) -> list[str]:
    """The changes in words; where there is none, the suites on which one could have been seen."""
    last = [score for score in scores if score.stage == scores[-1].stage and not is_first(scores, score)]
    suites = list(dict.fromkeys(score.suite for score in last))
    named = ", ".join(suites) if len(suites) <= MOST_IN_A_VERDICT else f"{len(suites)} suites"
    none = f"nothing beyond the noise on {named}" if suites else "no suite says, as none was scored before"
    return [str(change_words(change)) for change in changes] or [none]


def first_scores(scores: Sequence[Score]) -> list[Score]:
    """The scores of the last stage that nothing is there to compare with, and that are no gain over guessing."""
    end = [score for score in scores if score.stage == scores[-1].stage and is_first(scores, score)]
    gained = {change.after.key for change in gains_and_losses(scores)[0]}
    return [score for score in end if score.key not in gained]


def by_key(scores: Iterable[Score]) -> list[list[Score]]:
    """The scores of each metric of each suite, in the order of the stages."""
    found: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        found.setdefault(score.key, []).append(score)
    return list(found.values())


def score_section(recipe: Recipe, scores: Sequence[Score], *, plots: bool = False) -> Section | None:
    """Suites by stages, with intervals, and with an arrow where a stage changed a score beyond the noise."""
    if not scores:
        return None
    stages = stages_of(scores)
    rows: list[list[str | Cell]] = []
    for line in by_key(scores):
        by_stage = {score.stage: score for score in line}
        first = line[0]
        answers = "".join(f"; {name} {number(value, first.metric)}" for name, value in line[-1].baselines.items())
        name = Cell(f"{first.suite} {first.metric}\N{NO-BREAK SPACE}{first.arrow}", f"n = {first.n:,}{answers}")
        rows.append([name, *(_score_cell(recipe, scores, by_stage.get(stage)) for stage in stages)])
    counted = dict.fromkeys(f"{score.metric} of {score.suite} {score.signature}" for score in scores if score.signature)
    notes = [
        "With each score its 95 % interval. ▲ better, ▼ worse than the model that the stage started from, beyond the "
        "noise. ↑ more is better, ↓ less is better, → nearest is best."
    ]
    if counted:
        notes.append(f"How they are counted, by sacrebleu's signature: {'; '.join(counted)}.")
    parents = {stage.name: recipe.parent_of(stage.name) for stage in recipe.stages}
    drawn = [score_by_stage(line, parents) for line in by_key(scores) if plots and len(line) > 1]
    return Section("Scores", Table(["suite, metric", *map(Number, stages)], rows), notes, drawn)


def _score_cell(recipe: Recipe, scores: Sequence[Score], score: Score | None) -> str | Cell:
    if score is None:
        return ""
    change = last_change(of_lineage(scores, recipe.lineage(score.stage)), score.stage, score.key)
    mark = change_words(change).mark if change else ""
    return Cell(number(score.value, score.metric), interval(score), mark)


def _change_section(recipe: Recipe, scores: Sequence[Score]) -> Section | None:
    """The change of every score by every stage, from the model that the stage started from."""
    rows: list[list[str | Cell]] = []
    for stage in stages_of(scores)[1:]:
        line = of_lineage(scores, recipe.lineage(stage))
        for key in dict.fromkeys(score.key for score in line):
            change = last_change(line, stage, key)
            new = next((score for score in line if score.key == key and score.stage == stage), None)
            if change is None and new is not None and is_first(line, new):
                change = from_baseline(new)
            if change is not None:
                words = change_words(change)
                detail = ", ".join(part for part in (words.interval, words.note) if part)
                rows.append([words.subject, stage, words.way, Cell(words.size, detail, words.mark)])
    head = ["suite, metric", "stage", Number("before → after"), "change"]
    notes = ["Each stage against the model it started from; with each change its 95 % interval."]
    return Section("What each stage did", Table(head, rows), notes) if rows else None


def _training_section(folder: Path, recipe: Recipe) -> Section | None:
    rows: list[list[str | Cell]] = []
    plots = []
    for stage in recipe.stages:
        place = folder / "stages" / stage.name
        if facts := read_json(place / "done.json"):
            lost = facts.get("last_loss")
            how = f"{stage.kind}, {how_trained(stage)}"
            loss = "" if lost is None else number(lost)
            rows.append([stage.name, how, facts["parent"], f"{facts['steps']:,}", loss])
        steps, losses = losses_of(place)
        if steps:
            unit = "" if stage.kind == "classification" else "nats per token"
            plots.append(loss_curve(stage.name, steps, losses, unit))
    head = ["stage", "kind", "from", Number("steps"), Number("last loss")]
    return Section("Training", Table(head, rows), plots=plots) if rows else None


def environment_section(facts: Mapping[str, Any], recipe: Recipe | None = None) -> Section | None:
    """Hardware and versions, as far as they were recorded; with the recipe also the base model."""
    hardware, launch = (facts.get(key) or {} for key in ("hardware", "launch"))
    machine = ", ".join(hardware.get("gpus") or ()) or (f"{hardware['cpus']} CPUs" if hardware.get("cpus") else "")
    system = f" ({hardware['system']})" if hardware.get("system") else ""
    versions = {"Python": facts.get("python"), "hfpipe": facts.get("hfpipe"), **(facts.get("packages") or {})}
    rows = [
        ["base model", f"{recipe.model.id} at {recipe.model.revision}" if recipe and recipe.model.id else ""],
        ["machine", f"{machine}{system}".strip()],
        ["processes", str(launch.get("processes") or "")],
        ["versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)],
        ["model's own code", "ran here (trust_remote_code)" if facts.get("trust_remote_code") else ""],
        ["metrics from the Hub", ", ".join(facts.get("remote_metrics") or ())],
    ]
    rows = [row for row in rows if row[1]]
    return Section("Environment", Table(["", "found"], rows)) if rows else None


def closing_lines(folder: Path) -> list[str]:
    """The last lines of a run in the terminal: gains, losses, where things lie, how they are used, what comes next."""
    recipe = load_recipe(folder / "recipe.yaml")
    scores = read_scorecard(folder / "scorecard.json") if (folder / "scorecard.json").exists() else []
    lines = [""]
    if scores:
        own = of_lineage(scores, recipe.lineage(stages_of(scores)[-1]))
        for title, changes in zip(("gained", "forgotten"), gains_and_losses(own), strict=True):
            lines += [f"{title:9}  {text}" for text in _changes(changes, own)]
        lines += [f"scored     {score.suite} {describe(score)}" for score in first_scores(own)]
    last = folder / "stages" / recipe.stages[-1].name
    model, merged = model_of(last), last / "merged"
    is_adapter = (model / ADAPTER_CONFIG).exists()
    strength = strength_of(last)
    dialled = "" if strength is None else f"  (dialled to {strength:g}, to stay inside the budget)"
    lines.append(f"{'adapter' if is_adapter else 'model':9}  {model}{dialled}")
    if merged.exists():
        lines.append(f"merged     {merged}")
    lines.append(f"report     {folder / 'report.html'}")
    to_merge = is_adapter and not merged.exists()
    lines += ["", "use it:", *(f"  {line}" for line in _commands_to_use(folder, recipe.stages[-1].task, to_merge))]
    lines += [f"  {line}" for line in lines_to_use(folder, recipe, recipe.stages[-1].name)]
    what = "merged" if merged.exists() else "adapter" if is_adapter else "model"
    push = f"  {our_command()} push {folder} --repo-id YOU/{recipe.name} --what {what}"
    nexts = [] if recipe.push else [push]  # a recipe with a `push:` does it now
    if recipe.model.id is None:  # a first try; whoever starts from a model of the Hub is beyond it
        nexts.append(f"  {our_command()} recipes --copy smollm2-fineweb")
    return [*lines, "", "next:", *nexts] if nexts else lines


def _commands_to_use(folder: Path, task: str, to_merge: bool) -> list[str]:
    """The commands of hfpipe that let a trained model speak; none for a model that writes no text.

    Args:
        folder: The run folder.
        task: What the model is for.
        to_merge: Whether it is an adapter that is not merged yet.
    """
    if task != "causal":
        return []
    commands = {
        f"chat {folder} --base": "talk to it, with its base beside it",
        f"generate {folder} PROMPTS.txt": "answer a file of prompts",
        **({f"merge {folder}": "one model of adapter and base, for what comes next"} if to_merge else {}),
        f"export {folder} --to gguf": "for llama.cpp and Ollama",
    }
    longest = max(map(len, commands))
    return [*(f"{our_command()} {command:{longest}}  # {what}" for command, what in commands.items()), "or in Python:"]
