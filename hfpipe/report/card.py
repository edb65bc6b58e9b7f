"""The model card: what a trained model is, how it is used, what it gained and what it cost.

The metadata block goes through huggingface_hub's own `ModelCardData`, so that the Hub shows the base model, the data
sets and the scores (`model-index`). The text holds nothing that changes from one push of a run to the next: the same
run gives the same card, and a repeated push changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hfpipe.core.files import read_json, write_text
from hfpipe.core.run_layout import DIAL, MODEL
from hfpipe.recipe import Recipe, Source, Stage, load_recipe
from hfpipe.recipe.config import BUILDERS, hub_id, is_on_hub
from hfpipe.report.content import environment_section, how_trained, score_section
from hfpipe.report.cures import cured_sentence
from hfpipe.report.details import cost_section, limits_section, stage_costs
from hfpipe.report.layout import Told, render
from hfpipe.report.usage import TASKS, Usage, code, lineage, needs_access, usage_in_run, vllm_command
from hfpipe.scores.scorecard import Score, forgetting, of_lineage, read_scorecard, stages_of
from hfpipe.scores.tradeoff import from_baseline, is_first, kept_keys, kept_suites, point, scales_of
from hfpipe.scores.wording import change_words, loss_words, with_interval

TRANSLATED = {"bleu", "chrf", "ter"}  # metrics of a translation, where rouge is of a summary
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")  # what the Hub takes


def model_card(usage: Usage, recipe: Recipe, run: Path, images: Sequence[str] = (), *, is_scored: bool = True) -> str:
    """The README.md beside a trained model.

    Args:
        usage: The model.
        recipe: The recipe of the run, as others may see it.
        run: The run folder.
        images: Files beside the card with the plots of its dial.
        is_scored: Whether the scorecard is about this model; a dialled stage is scored at the strength it is handed on
            at.

    Returns:
        A metadata block and Markdown.
    """
    scorecard = run / "scorecard.json"
    scores = read_scorecard(scorecard) if is_scored and scorecard.is_file() else []
    environment, costs = read_json(run / "environment.json"), stage_costs(run, recipe)
    cured = cured_sentence(run, recipe, scores, usage.stage) if scores else None
    scores = of_lineage(scores, recipe.lineage(usage.stage))  # what other stages did is not about this model
    stages = lineage(recipe, usage.stage)
    spent = {stage.name: costs[stage.name] for stage in stages if stage.name in costs}
    text = render(
        "card.md",
        title=_title(usage, recipe),
        usage=usage,
        recipe=recipe,
        last=stages[-1],
        made_by=_makers(usage, stages),
        access=needs_access(usage, recipe),
        code=code(usage, recipe),
        vllm=vllm_command(usage, recipe),
        scores=score_section(recipe, scores),
        scored=usage.stage in stages_of(scores),
        changes=_changes(scores, usage.stage),
        forgotten=_forgotten(recipe, scores, usage.stage),
        cured=cured,
        images=images,
        trained=[_trained(stage) for stage in stages],
        files=_local_names(recipe),
        cost=cost_section(spent),
        environment=environment_section(environment),
        limits=list(_limits(usage, recipe, environment, bool(scores))),
    )
    return f"---\n{_metadata(usage, recipe, scores, spent).to_yaml()}\n---\n\n{text}"


def write_cards(run: Path) -> list[Path]:
    """Writes the README.md beside each model and adapter that a run has, over the libraries' own with its blanks.

    Returns:
        The paths.
    """
    recipe = load_recipe(run / "recipe.yaml")
    written = []
    for stage in recipe.stages:
        place = run / "stages" / stage.name
        for folder in (place / MODEL, place / DIAL, place / "merged"):
            if (place / "done.json").exists() and folder.is_dir():
                usage = usage_in_run(run, recipe, stage.name, folder)
                is_scored = folder.name != MODEL or not (place / DIAL).is_dir()
                write_text(folder / "README.md", model_card(usage, recipe, run, is_scored=is_scored))
                written.append(folder / "README.md")
    return written


def _metadata(
    usage: Usage, recipe: Recipe, scores: Sequence[Score], spent: Mapping[str, dict[str, Any]]
) -> ModelCardData:
    adapter = usage.what == "adapter"
    stages = lineage(recipe, usage.stage)
    task = _hub_task(recipe, stages[-1])
    used = dict.fromkeys(found for stage in stages for source in stage.data if (found := hub_id(source)))
    here = [score for score in scores if score.stage == usage.stage]
    tags = ["hfpipe", *dict.fromkeys(stage.kind for stage in stages), *([stages[-1].method.lower()] if adapter else [])]
    relation = "adapter" if adapter else "quantized" if usage.quantized else "finetune"
    license = usage.license or stated(usage.base_facts)
    terms: dict[str, Any] = {key: usage.base_facts.get(key) for key in ("license_name", "license_link")}
    return ModelCardData(
        base_model=usage.base if usage.base_on_hub else None,
        base_model_relation=relation if usage.base_on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        license=license,
        language=_languages(usage) or None,
        datasets=list(used) or None,
        tags=tags,
        model_name=_title(usage, recipe),
        eval_results=[_eval_result(score, recipe, task) for score in here] or None,
        **(terms if license == "other" and not usage.license else {}),
        **_emissions(spent),
    )


def _languages(usage: Usage) -> list[str]:
    """The languages that the data sets were said to be in, then those of the base."""
    found = []
    for facts in (*usage.data_facts.values(), usage.base_facts):
        told = facts.get("language") or []
        found += [told] if isinstance(told, str) else list(told)
    return [name for name in dict.fromkeys(map(str, found)) if LANGUAGE.fullmatch(name)]


def _hub_task(recipe: Recipe, stage: Stage) -> str:
    """The Hub's name of what the model is for; an encoder-decoder that is measured by ROUGE alone summarizes."""
    metrics = {name for suite in recipe.evaluate.values() for name in suite.metrics}
    if stage.task == "seq2seq" and not metrics & TRANSLATED and any(name.startswith("rouge") for name in metrics):
        return "summarization"
    return TASKS[stage.task][0]


def _emissions(spent: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """`co2_eq_emissions` of the Hub, in grams; nothing when an attempt at a stage was not measured."""
    totals = list(spent.values())
    if not totals or any(total.get("kg_co2") is None or total["measured"] < total["attempts"] for total in totals):
        return {}
    grams = 1000 * sum(total["kg_co2"] for total in totals)
    last = totals[-1]
    facts = {"emissions": float(f"{grams:.3g}"), "source": last["energy_by"], "hardware_used": last.get("device")}
    return {"co2_eq_emissions": {**facts, "geographical_location": last["country"]}}


def _eval_result(score: Score, recipe: Recipe, task: str) -> EvalResult:
    suite = recipe.evaluate.get(score.suite)
    source = suite.data if suite else None
    arguments = source.passed_through if source else {}
    return EvalResult(
        task_type=task,
        dataset_type=(hub_id(source) if source else None) or score.suite,
        dataset_name=score.suite,
        dataset_config=arguments.get("name"),
        dataset_split=arguments.get("split"),
        dataset_revision=arguments.get("revision"),
        metric_type=score.metric,
        metric_name=f"{score.metric} on {score.suite} (n = {score.n})",
        metric_value=round(score.value, 6),
    )


def _title(usage: Usage, recipe: Recipe) -> str:
    return usage.place.split("/")[-1] if usage.on_hub else f"{recipe.name}-{usage.stage}"


def _makers(usage: Usage, stages: Sequence[Stage]) -> list[tuple[str, str]]:
    """The stages that made a model, each with its kind and how it was trained; those of the adapter alone, for one."""
    first = 0
    if usage.what == "adapter":
        first = len(stages) - 1
        while first and stages[first].parent_adapter == "continue":
            first -= 1
    made = [(stage.name, f"{stage.kind}, {how_trained(stage)}", stage) for stage in stages[first:]]
    merged = usage.what != "adapter"
    return [(name, f"{how}, merged into the weights" if merged and stage.adapter else how) for name, how, stage in made]


def _changes(scores: Sequence[Score], stage: str) -> list[Told]:
    """One line per suite and metric: against the best before, or the best answer without a model."""
    told = []
    for score in (score for score in scores if score.stage == stage):
        change = from_baseline(score) if is_first(scores, score) else forgetting(scores, stage, score.key)
        if change is not None:
            words = change_words(change)
            kind = {"better": "gained", "worse": "forgotten"}.get(words.mark, "no difference beyond the noise")
            told.append(Told(kind, [str(words)]))
    return told


def _forgotten(recipe: Recipe, scores: Sequence[Score], stage: str) -> str | None:
    """Returns how much a stage forgot of the suites with a budget, on average; None where nothing says it."""
    kept = [name for name in kept_suites(recipe.evaluate) if any(score.suite == name for score in scores)]
    end = [score for score in scores if score.stage == stage]
    line = [score for score in scores if score.stage != stage]
    if not kept or not end or not line:
        return None
    where = point(recipe.evaluate, line, line, end, scales_of(scores), kept_keys(recipe.evaluate, line, [end]))
    lost = with_interval(*loss_words(where.forgetting))
    return f"Forgetting, the mean loss on {', '.join(kept)} against the best score before: {lost}." if lost else None


@dataclass(frozen=True)
class _Trained:
    """A stage as the card lists it."""

    name: str
    kind: str
    how: str
    sources: list[tuple[str, str, str]]  # name, address on the Hub, and the rest
    options: str


def _trained(stage: Stage) -> _Trained:
    how = how_trained(stage)
    if stage.method == "LoRA" and stage.adapter is not None:
        how = how.replace("LoRA", f"LoRA of rank {stage.adapter.get('r', 8)}")
    options = ", ".join(f"{key} {value}" for key, value in stage.training.items())
    return _Trained(stage.name, stage.kind, how, [_source(source) for source in stage.data], options)


def _source(source: Source) -> tuple[str, str, str]:
    found, files = hub_id(source), _local_files(source)
    name = found or (", ".join(files) if files else source.path)
    config = source.passed_through.get("name")
    rest = f" ({config})" if config else ""
    rest += f", weight {source.weight:g}" if source.weight is not None else ""
    return name, f"https://huggingface.co/datasets/{found}" if found else "", rest


def _local_names(recipe: Recipe) -> list[str]:
    """The files and folders of the machine of the run that the recipe names."""
    sources = [source for stage in recipe.stages for source in stage.data] + [s.data for s in recipe.evaluate.values()]
    models = [recipe.model.id, recipe.model.tokenizer.id if recipe.model.tokenizer else None]
    local = [name for name in models if name and not is_on_hub(name)]
    return list(dict.fromkeys([*local, *(file for source in sources for file in _local_files(source))]))


def _local_files(source: Source) -> list[str]:
    """The files and folders that a source reads, as the recipe names them."""
    given = source.passed_through
    files = given.get("data_files") or []
    groups = files.values() if isinstance(files, dict) else [files]
    named = [name for group in groups for name in ([group] if isinstance(group, str) else group)]
    if hub_id(source):
        return []
    folder = [source.path] if source.path not in BUILDERS else []
    return [name for name in (*folder, given.get("data_dir"), *named) if name and "://" not in name]


def _limits(usage: Usage, recipe: Recipe, environment: Mapping[str, Any], scored: bool) -> Iterator[Told]:
    known = "Nothing is known about it but the scores above." if scored else "Nothing about it was measured."
    yield Told("", [known])
    if scored and (bias := limits_section(recipe)) and bias.table:
        for text in dict.fromkeys(str(row[-1]) for row in bias.table.rows):
            yield Told("", [text])
    yield Told("", ["It learned from the data above and may repeat what is wrong or offensive in it."])
    if usage.base and not usage.base_stage:
        yield Told("", [f"It inherits the limits and the terms of use of {usage.base}."])
    if environment.get("trust_remote_code"):
        yield Told("", ["The code in the base's repository ran (`trust_remote_code`); loading it may need the same."])
    if remote := environment.get("remote_metrics"):
        yield Told("", [f"Some of the scores are by code of the Hub: {', '.join(remote)}."])
    yield from _licences(usage, recipe)


# What a licence asks that another may not, by its name on the Hub: https://huggingface.co/docs/hub/repositories-licenses
TERMS = {
    "forbids commercial use": re.compile(r"-nc\b|noncommercial|-research"),
    "forbids to pass on what is made of it": re.compile(r"-nd\b"),
    "asks that what is made of it carries the same licence": re.compile(r"-sa\b|^(a|l)?gpl|^odbl|^cdla-sharing|^eupl"),
    "has terms of its own": re.compile(r"^(other|unknown|llama|gemma|openrail|bigscience|creativeml|deepfloyd)"),
}


def stated(facts: Mapping[str, Any]) -> str | None:
    """The one licence that a card of the Hub names."""
    license = facts.get("license")
    return license if isinstance(license, str) and license else None


def terms_of(license: str) -> set[str]:
    return {term for term, pattern in TERMS.items() if pattern.search(license.lower())}


def _licences(usage: Usage, recipe: Recipe) -> Iterator[Told]:
    """Lines on the licence: a missing or unknown one, and every conflict with those of base and data."""
    of_base = stated(usage.base_facts)
    license = usage.license or of_base
    if license is None:
        others = " and ".join((["that of the base"] if recipe.model.id else []) + ["those of the data"])
        yield Told("", [f"No licence is stated here; {others} must be looked up."])
    if license and of_base and license != of_base:
        yield Told("Licence conflict", [f"stated here is {license}, and the base {usage.base} is under {of_base}."])
    for id, facts in usage.data_facts.items():
        theirs = stated(facts)
        if theirs is None:
            yield Told("", [f"The licence of the data set {id} is not known."])
        elif more := sorted(terms_of(theirs) - terms_of(license or "")):
            here = f"{license} does not" if license else "no licence is stated here"
            yield Told(
                "Licence conflict",
                [
                    f"the data set {id} is under {theirs}, which {' and '.join(more)}; {here}. Whether that reaches a "
                    "model trained on it has to be settled before the model is used so."
                ],
            )
